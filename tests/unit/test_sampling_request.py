"""What a Sample request may hold, and what becomes of it: checked without a model."""

from typing import Any

import pytest
from gradwire.errors import GradwireError, InvalidArgumentError
from gradwire.v1.sampling_service_pb2 import SampleRequest, SamplingParams, Stop

from trainer_service.config import Limits
from trainer_service.engine.sampling.request import Request, read_request
from trainer_service.engine.sampling.text import Text

CONTEXT = 16


def no_text() -> Text:
    raise AssertionError("the tokenizer was used")


def read(num_prompt: int = 3, *, prompt_text: str = "", limits: Limits | None = None, **params: Any) -> Request:
    message = SampleRequest(sampling_params=SamplingParams(**params), prompt_text=prompt_text)
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
