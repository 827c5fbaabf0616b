"""Sample requests on their way to the wire, and what comes back, gathered."""

import uuid
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradwire._client.sampling_params import MAX_UINT32, checked_integer, sampling_params_message, shown
from gradwire._wire.codec import tensor_message
from gradwire.errors import invalid_field
from gradwire.types import SampledSequence, SampleResponse, SamplingParams, TensorData
from gradwire.types.data import model_input_tokens, to_array
from gradwire.types.sampling_results import StopReason
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1 import tensor_pb2
from gradwire.v1.datum_pb2 import ModelInput

STOP_REASONS: dict[int, StopReason] = {pb.STOP_REASON_LENGTH: "length", pb.STOP_REASON_STOP: "stop"}


def sample_request(
    prompt: Any,
    num_samples: int = 1,
    sampling_params: Any = None,
    *,
    include_prompt_logprobs: bool = False,
    topk_prompt_logprobs: int = 0,
    topk_sample_logprobs: int = 0,
    target_prompt_logprobs: Any = None,
    prompt_logprobs_last_n: int | None = None,
) -> pb.SampleRequest:
    """The arguments of SamplingClient.sample, for the wire; the sampler is still to be set.

    Raises:
        InvalidArgumentError: INVALID_FIELD, with the argument's name.
    """
    if not isinstance(include_prompt_logprobs, bool):
        raise invalid_field(
            "include_prompt_logprobs", f"is {shown(include_prompt_logprobs)}; it must be True or False."
        )
    request = pb.SampleRequest(
        num_samples=checked_integer("num_samples", num_samples, 1, MAX_UINT32),
        sampling_params=sampling_params_message(SamplingParams() if sampling_params is None else sampling_params),
        include_prompt_logprobs=include_prompt_logprobs,
        topk_prompt_logprobs=checked_integer("topk_prompt_logprobs", topk_prompt_logprobs, 0, MAX_UINT32),
        topk_sample_logprobs=checked_integer("topk_sample_logprobs", topk_sample_logprobs, 0, MAX_UINT32),
    )
    try:
        request.prompt.CopyFrom(ModelInput(tokens=model_input_tokens(prompt, "prompt")))
    except ValueError as exc:
        raise invalid_field("prompt", f"cannot be read: {exc}") from exc
    if target_prompt_logprobs is not None:
        request.target_prompt_logprobs.CopyFrom(_targets(target_prompt_logprobs))
    if prompt_logprobs_last_n is not None:
        last_n = checked_integer("prompt_logprobs_last_n", prompt_logprobs_last_n, 1, MAX_UINT32)
        request.prompt_logprobs_last_n = last_n
    return request


def _targets(given: Any) -> tensor_pb2.Tensor:
    where = "target_prompt_logprobs"
    try:
        # What a sparse one of tinker's leaves out asks for nothing.
        sparse = getattr(given, "sparse_crow_indices", None) is not None
        targets = np.asarray(given.to_numpy(pad_value=-1)) if sparse else to_array(given)
    except (TypeError, ValueError) as exc:
        raise invalid_field(where, f"cannot be read: {exc}") from exc
    if targets.dtype.kind not in "iu" or targets.ndim != 2:
        raise invalid_field(
            where,
            f"is {targets.dtype} {list(targets.shape)}; it must be token ids, integers of shape [len(prompt) - 1, K], "
            "with -1 for what is not asked for.",
        )
    return tensor_message(targets.astype(np.int64))


@dataclass
class _Sample:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    topk: list[list[tuple[int, float]]] = field(default_factory=list)
    stop_reason: StopReason = "length"


class Gathered:
    """What a request's messages say together.

    Args:
        request: It.
    """

    def __init__(self, request: pb.SampleRequest) -> None:
        self._request = request
        self.clear()

    def clear(self) -> None:
        """Forgets what came, since all of it comes again."""
        # By sample, as they come: how many is for the trainer to check before anything of that length is made here.
        self._samples: defaultdict[int, _Sample] = defaultdict(_Sample)
        self._prompt: pb.PromptLogprobs | None = None

    def add(self, response: pb.SampleResponse) -> None:
        """The next message."""
        if response.HasField("prompt"):
            self._prompt = response.prompt
        for piece in response.samples:
            sample = self._samples[piece.sample]
            sample.tokens.extend(piece.tokens)
            sample.logprobs.extend(piece.logprobs)
            sample.topk += _rows(piece.topk_tokens, piece.topk_logprobs, self._request.topk_sample_logprobs)
            sample.stop_reason = STOP_REASONS.get(piece.stop_reason, "length")

    def response(self) -> SampleResponse:
        """All of it."""
        request, prompt = self._request, self._prompt
        sample_id = uuid.uuid4().hex
        found = [(number, self._samples.get(number) or _Sample()) for number in range(request.num_samples)]
        sequences = [
            SampledSequence(
                sample.tokens,
                sample.logprobs,
                sample.stop_reason,
                sequence_id=f"{sample_id}-{number}",
                topk_logprobs=sample.topk if request.topk_sample_logprobs else None,
            )
            for number, sample in found
        ]
        if prompt is None:
            return SampleResponse(sequences)
        num_tokens = len(request.prompt.tokens)
        logprobs = topk = targets = None
        if request.include_prompt_logprobs:
            logprobs = [*[None] * (num_tokens - len(prompt.logprobs)), *prompt.logprobs]
        if prompt.topk:
            rows = _rows(prompt.topk_tokens, prompt.topk_logprobs, prompt.topk)
            topk = [*[None] * (num_tokens - len(rows)), *rows]
        if request.HasField("target_prompt_logprobs"):
            shape = list(request.target_prompt_logprobs.shape)
            targets = TensorData(np.array(prompt.target_logprobs, dtype=np.float32), shape=shape)
        return SampleResponse(sequences, logprobs, topk, target_prompt_logprobs=targets)


def _rows(tokens: Any, logprobs: Any, count: int) -> list[list[tuple[int, float]]]:
    pairs = list(zip(tokens, logprobs, strict=True))
    return [pairs[start : start + count] for start in range(0, len(pairs), count or 1)]
