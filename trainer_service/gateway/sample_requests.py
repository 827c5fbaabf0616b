"""Translates sample requests and their answers between tinker's wire and ours."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from gradwire._wire.codec import decode_tensor, tensor_message
from gradwire.v1.datum_pb2 import ModelInput
from gradwire.v1.sampling_service_pb2 import (
    STOP_REASON_STOP,
    PromptLogprobs,
    Sampler,
    SampleRequest,
    SampleResponse,
    SamplingParams,
    Stop,
)

from trainer_service.gateway.bodies import Fields
from trainer_service.gateway.outcomes import PROTOBUF, Outcome, Refusal
from trainer_service.gateway.wire import tinker_wire_pb2 as wire

_MAX_UINT32 = (1 << 32) - 1
_NO_LOGPROB = -99999.0
"""What tinker puts in a cell of top-k that holds nothing."""


def read_tokens(fields: Fields, name: str) -> list[int]:
    """Token ids of a prompt in chunks.

    Raises:
        Refusal: A chunk is no text, or a token no int32.
    """
    prompt = fields.fields(name)
    tokens: list[int] = []
    for place, chunk in enumerate(prompt.items("chunks")):
        where = f"{name}.chunks[{place}]"
        if not isinstance(chunk, dict) or chunk.get("type", "encoded_text") != "encoded_text":
            kind = chunk.get("type") if isinstance(chunk, dict) else None
            raise Refusal(400, f"{where} is {str(kind)[:40]!r}; this trainer's models read tokens alone.")
        tokens += checked_tokens(chunk.get("tokens"), f"{where}.tokens")
    prompt.finish()
    return tokens


def checked_tokens(tokens: Any, where: str) -> list[int]:
    """A JSON list as token ids.

    Raises:
        Refusal: It is something else.
    """
    if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < 1 << 31 for token in tokens):
        raise Refusal(400, f"{where} is no list of token ids, which are integers from 0 on.")
    return tokens


def read_sample(fields: Fields, sampler: Sampler) -> SampleRequest:
    """Reads an asample request.

    Raises:
        Refusal: A field is missing, unknown or not allowed.
    """
    request = SampleRequest(
        sampler=sampler,
        prompt=ModelInput(tokens=read_tokens(fields, "prompt")),
        num_samples=fields.integer("num_samples", 1, low=1, high=_MAX_UINT32),
        include_prompt_logprobs=fields.flag("prompt_logprobs"),
        topk_prompt_logprobs=fields.integer("topk_prompt_logprobs", 0, low=0, high=_MAX_UINT32),
        topk_sample_logprobs=fields.integer("topk_sample_logprobs", 0, low=0, high=_MAX_UINT32),
        prompt_logprobs_last_n=fields.optional_integer("prompt_logprobs_last_n", low=1, high=_MAX_UINT32),
    )
    params = fields.fields("sampling_params")
    request.sampling_params.CopyFrom(_read_params(params))
    params.finish()
    fields.refuse("record_stability_info", "It is for the loss stable_reinforce; train with another loss.")
    fields.refuse("prompt_alt_tokens_k", "Ask for topk_prompt_logprobs, and draw from them.")
    if fields.has("target_prompt_logprobs"):
        request.target_prompt_logprobs.CopyFrom(tensor_message(_read_targets(fields, len(request.prompt.tokens))))
    fields.drop("target_prompt_logprobs")
    fields.finish()
    return request


def _read_targets(fields: Fields, prompt_length: int) -> npt.NDArray[np.int64]:
    """Token ids [N - 1, K] to tell the logprobs of."""
    tensor = fields.fields("target_prompt_logprobs")
    data, shape = tensor.items("data"), tensor.items("shape")
    tensor.ignore("dtype")
    for name in ("sparse_crow_indices", "sparse_col_indices"):
        tensor.refuse(name, "Send a dense tensor, with -1 where nothing is asked.")
    tensor.finish()
    sound = all(type(one) is int and -1 <= one < 1 << 31 for one in data) and all(type(one) is int for one in shape)
    if (
        not sound
        or len(shape) != 2
        or shape[0] != prompt_length - 1
        or shape[0] * shape[1] != len(data)
        or min(shape) < 1
    ):
        raise Refusal(
            400,
            f"target_prompt_logprobs must be token ids, or -1, of shape [{prompt_length - 1}, K] for a prompt of "
            f"{prompt_length} tokens.",
        )
    return np.array(data, dtype=np.int64).reshape(shape)


def _read_params(params: Fields) -> SamplingParams:
    seed = params.optional_integer("seed")
    read = SamplingParams(
        max_tokens=params.optional_integer("max_tokens", low=0, high=_MAX_UINT32),
        temperature=params.optional_number("temperature"),
        top_k=params.optional_integer("top_k", low=-1, high=(1 << 31) - 1),
        top_p=params.optional_number("top_p"),
        seed=seed,
    )
    stop = params.value("stop")
    if stop is not None:
        read.stop.CopyFrom(read_stop(stop))
    return read


def read_stop(stop: Any) -> Stop:
    """A text, texts or token ids that end a sample.

    Raises:
        Refusal: It is something else.
    """
    if isinstance(stop, str):
        return Stop(strings=[stop])
    if isinstance(stop, list) and all(isinstance(one, str) for one in stop):
        return Stop(strings=stop)
    if isinstance(stop, list):
        return Stop(token_ids=checked_tokens(stop, "sampling_params.stop"))
    raise Refusal(400, "stop is none of a string, a list of strings and a list of token ids.")


@dataclass
class CollectedSample:
    """One sample as it comes in."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: int = 0
    topk_tokens: list[int] = field(default_factory=list)
    topk_logprobs: list[float] = field(default_factory=list)


def add_samples(samples: Sequence[CollectedSample], response: SampleResponse) -> None:
    """The next tokens."""
    for part in response.samples:
        sample = samples[part.sample]
        sample.tokens += part.tokens
        sample.logprobs += part.logprobs
        sample.topk_tokens += part.topk_tokens
        sample.topk_logprobs += part.topk_logprobs
        sample.stop_reason = part.stop_reason or sample.stop_reason


def sample_outcome(
    samples: Sequence[CollectedSample], prompt: PromptLogprobs | None, request: SampleRequest
) -> Outcome:
    """The answer to an asample."""
    message = wire.SampleResponse()
    for sample in samples:
        stopped = sample.stop_reason == STOP_REASON_STOP
        sequence = message.sequences.add(
            stop_reason=wire.STOP_REASON_STOP if stopped else wire.STOP_REASON_LENGTH,
            tokens=np.array(sample.tokens, dtype="<i4").tobytes(),
            logprobs=np.array(sample.logprobs, dtype="<f4").tobytes(),
        )
        if (k := request.topk_sample_logprobs) and sample.tokens:
            likeliest = _topk(sample.topk_tokens, sample.topk_logprobs, k, before=0)
            sequence.topk_sampled_logprobs.CopyFrom(likeliest)
    if prompt is not None:
        # Nothing is known of the first token, and nothing was asked about those before the last few.
        length = len(request.prompt.tokens)
        if request.include_prompt_logprobs:
            before = length - len(prompt.logprobs)
            message.prompt_logprobs = np.array([*[np.nan] * before, *prompt.logprobs], dtype="<f4").tobytes()
        if prompt.topk:
            before = length - len(prompt.topk_logprobs) // prompt.topk
            likeliest = _topk(prompt.topk_tokens, prompt.topk_logprobs, prompt.topk, before=before)
            message.topk_prompt_logprobs.CopyFrom(likeliest)
        if request.HasField("target_prompt_logprobs"):
            message.target_prompt_logprobs.CopyFrom(_target_logprobs(prompt, request))
    return Outcome(PROTOBUF, message.SerializeToString())


def _topk(tokens: Sequence[int], logprobs: Sequence[float], k: int, *, before: int) -> wire.TopkLogprobs:
    """Rows of k likeliest tokens, behind `before` rows of which nothing is known."""
    token_ids = np.array([*[0] * (k * before), *tokens], dtype="<i4")
    values = np.array([*[_NO_LOGPROB] * (k * before), *logprobs], dtype="<f4")
    return wire.TopkLogprobs(token_ids=token_ids.tobytes(), logprobs=values.tobytes(), k=k, length=len(values) // k)


def _target_logprobs(prompt: PromptLogprobs, request: SampleRequest) -> wire.Tensor:
    asked = decode_tensor(request.target_prompt_logprobs, "target_prompt_logprobs")
    found = np.array(prompt.target_logprobs, dtype="<f4").reshape(asked.shape)
    found = np.where(asked < 0, np.float32(np.nan), found).astype("<f4")
    return wire.Tensor(dense=found.tobytes(), dtype=wire.DTYPE_FLOAT32, shape=asked.shape)
