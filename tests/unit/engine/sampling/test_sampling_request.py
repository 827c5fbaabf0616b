"""What a Sample request may hold, and what becomes of it: checked without a model."""

from typing import Any

import pytest
from gradwire.errors import GradwireError, InvalidArgumentError
from gradwire.v1.sampling_service_pb2 import SampleRequest, SamplingParams, Stop
from gradwire.v1.tensor_pb2 import FloatValues, IntValues, Tensor

from trainer_service.config import Limits
from trainer_service.engine.sampling.request import Request, read_request
from trainer_service.engine.sampling.text import Text

CONTEXT = 16


def no_text() -> Text:
    raise AssertionError("the tokenizer was used")


def read(
    num_prompt: int = 3,
    *,
    prompt_text: str = "",
    limits: Limits | None = None,
    ask: dict[str, Any] | None = None,
    **params: Any,
) -> Request:
    message = SampleRequest(sampling_params=SamplingParams(**params), prompt_text=prompt_text, **ask or {})
    message.prompt.tokens.extend([1] * num_prompt)
    return read_request(
        message,
        vocab_size=100,
        max_context_length=CONTEXT,
        limits=limits or Limits(),
        eos_tokens=frozenset([2]),
        text=no_text,
    )


@pytest.mark.parametrize(
    ("num_prompt", "asked", "wanted"),
    [(3, None, 13), (3, 5, 5), (3, 13, 13), (3, 14, 13), (15, 2**32 - 1, 1), (16, 0, 0)],
)
def test_as_many_tokens_as_were_asked_for_or_as_the_context_has_room_for(
    num_prompt: int, asked: int | None, wanted: int
):
    assert read(num_prompt, max_tokens=asked).max_tokens == wanted


def test_messages_come_as_often_as_was_asked_for():
    assert read().message_interval_s == 0.05
    assert read(ask={"message_interval_ms": 2000}).message_interval_s == 2
    with pytest.raises(InvalidArgumentError, match="message_interval_ms is 10001; it must be 0 to 10000"):
        read(ask={"message_interval_ms": 10_001})


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(16, 1), (16, None), (17, 0)])
def test_a_prompt_that_fills_the_context_is_refused(num_prompt: int, max_tokens: int | None):
    with pytest.raises(InvalidArgumentError) as refused:
        read(num_prompt, max_tokens=max_tokens)
    assert (refused.value.reason, refused.value.field_violations[0][0]) == ("SEQUENCE_TOO_LONG", "prompt")


@pytest.mark.parametrize("temperature", [-1.0, 1e-300, 1e-45, 1e39, 1e300, float("inf"), float("nan")])
def test_a_temperature_that_no_float32_holds_is_refused(temperature: float):
    with pytest.raises(InvalidArgumentError, match="it must be 0") as refused:
        read(temperature=temperature)
    assert refused.value.field_violations[0][0] == "sampling_params.temperature"


def test_a_temperature_that_float32_holds_is_taken():
    assert [read(temperature=value).choice.temperature for value in (0.0, 1.2e-38, 1e38)] == [0.0, 1.2e-38, 1e38]


@pytest.mark.parametrize(
    ("limit", "arguments"),
    [
        ("max_prompt_text_bytes", {"num_prompt": 0, "prompt_text": "é" * 200_000}),
        ("max_stop_strings", {"stop": Stop(strings=["s"] * 129)}),
        ("max_stop_string_bytes", {"stop": Stop(strings=["s" * 1025])}),
        ("max_stop_bytes", {"stop": Stop(strings=["é" * 500] * 5)}),
        ("max_stop_token_ids", {"stop": Stop(token_ids=[1] * 1025)}),
    ],
)
def test_the_worker_too_refuses_what_is_too_long_before_it_does_anything(limit: str, arguments: dict[str, Any]):
    with pytest.raises(GradwireError) as refused:
        read(**arguments)
    assert (refused.value.reason, refused.value.metadata["limit_name"]) == ("LIMIT_EXCEEDED", limit)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidArgumentError, match=r"sampling_params.stop.strings\[1\] is empty"):
        read(stop=Stop(strings=["a", ""]))


def targets(*rows: list[int]) -> dict[str, Any]:
    ids = [token for row in rows for token in row]
    return {"target_prompt_logprobs": Tensor(ints=IntValues(values=ids), shape=[len(rows), len(rows[0])])}


@pytest.mark.parametrize(
    ("where", "asked"),
    [
        ("topk_sample_logprobs", {"topk_sample_logprobs": 101}),
        ("prompt_logprobs_last_n", {"prompt_logprobs_last_n": 2}),
        ("prompt_logprobs_last_n", {"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True}),
        ("prompt_logprobs_last_n", {"prompt_logprobs_last_n": 3, "topk_prompt_logprobs": 1}),
        ("target_prompt_logprobs", targets([1], [2], [3])),
        ("target_prompt_logprobs", {"target_prompt_logprobs": Tensor(floats=FloatValues(values=[1.0]), shape=[2, 1])}),
        ("target_prompt_logprobs", {"target_prompt_logprobs": Tensor(ints=IntValues(values=[1, 2]))}),
        ("target_prompt_logprobs.shape[1]", {"target_prompt_logprobs": Tensor(ints=IntValues(), shape=[2, 0])}),
        ("target_prompt_logprobs[1][0]", targets([-1, 99], [100, -1])),
        ("target_prompt_logprobs[0][1]", targets([-1, -2], [0, -1])),
    ],
)
def test_what_cannot_be_asked_about_a_prompt_is_refused_by_its_name(where: str, asked: dict[str, Any]):
    with pytest.raises(InvalidArgumentError) as refused:
        read(ask=asked)
    assert refused.value.field_violations[0][0] == where


def test_what_is_asked_about_the_end_of_a_prompt_begins_there():
    request = read(6, ask={"include_prompt_logprobs": True, "prompt_logprobs_last_n": 2})
    assert (request.first_row, request.rows_from()) == (3, 3)
    rows = targets([-1], [-1], [7], [-1], [8])
    assert read(6, ask=rows).rows_from() == 2
    assert read(6, ask=rows | {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 1}).rows_from() == 2
    assert read(6, ask=targets(*[[-1]] * 5)).rows_from() == 5
