"""A prompt goes in; tokens come out as they are sampled, one JSON object per line."""

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from gradwire.errors import GradwireError, error, from_status, invalid_field
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import sampling_service_pb2 as sampling_messages
from gradwire.v1.trainer_service_pb2 import TrainRequest

from trainer_service.config import Limits
from trainer_service.field_limits import check_limits
from trainer_service.page.page_json import encode
from trainer_service.runs.operation import Operation
from trainer_service.runs.registry import Runs
from trainer_service.runs.sampling import SampleRequests

_MAX_TOKENS = 4096
_STOP_REASONS = {
    sampling_messages.STOP_REASON_LENGTH: "length",
    sampling_messages.STOP_REASON_STOP: "stop",
}


class SamplingBox:
    """Samples for the page.

    Args:
        runs: Runs to sample from in their current state.
        sampling: Carries out requests.
        limits: The most a request may ask for.
    """

    def __init__(self, runs: Runs, sampling: SampleRequests, limits: Limits) -> None:
        self._runs = runs
        self._sampling = sampling
        self._limits = limits

    async def sample(self, asked: dict[str, Any]) -> AsyncGenerator[bytes]:
        """Lines of {"text", "logprobs"}, at the end {"stop_reason"}, or {"error"} if it fails on the way.

        Args:
            asked: prompt, a text; source, "base", a run's id, or a checkpoint's path; max_tokens; temperature; seed.

        Raises:
            GradwireError: The request is not possible.
        """
        request = sampling_messages.SampleRequest(
            prompt_text=_text(asked, "prompt"),
            sampling_params=sampling_messages.SamplingParams(
                max_tokens=int(_number(asked, "max_tokens", 1, _MAX_TOKENS, 256)),
                temperature=_number(asked, "temperature", 0, 100, 1),
                seed=None if asked.get("seed") is None else int(_number(asked, "seed", -(2**62), 2**62, 0)),
            ),
        )
        source = _text(asked, "source")
        if source.startswith("gradwire://"):
            request.sampler.model_path = source
        elif source != "base":
            request.sampler.model_path = await self._freeze(source)
        check_limits(request, self._limits)
        responses = self._sampling.sample(request)
        # A refusal comes before the first token, and so becomes the whole answer rather than a line of it.
        first = await anext(responses, None)
        return self._lines(first, responses)

    async def _lines(
        self,
        first: sampling_messages.SampleResponse | None,
        responses: AsyncGenerator[sampling_messages.SampleResponse],
    ) -> AsyncGenerator[bytes]:
        # Closed as soon as the page goes away: that frees the request's place.
        async with contextlib.aclosing(responses):
            try:
                response = first
                while response is not None:
                    for found in response.samples:
                        yield _line(text=found.text, logprobs=[_finite(value) for value in found.logprobs])
                        if found.stop_reason:
                            yield _line(stop_reason=_STOP_REASONS.get(found.stop_reason, "other"))
                    response = await anext(responses, None)
            except GradwireError as exc:
                yield _line(error={"reason": exc.reason, "message": exc.message})

    async def _freeze(self, run_id: str) -> str:
        """Freezes a run's weights as they are now; returns their path."""
        run = self._runs.get(run_id)
        if run.attachment is not None:
            raise error(
                "RUN_ATTACHED",
                f"A client is attached to {run_id}, and freezing its weights from elsewhere would break its order. "
                "Sample one of its checkpoints, or wait until the client leaves.",
                run_id=run_id,
            )
        save = ops.SaveWeightsForSamplerRequest(ephemeral=True)
        made = Operation.made(TrainRequest(seq_id=run.next_seq_id, save_weights_for_sampler=save))
        response = await run.execute(made)
        if response.HasField("error"):
            raise from_status(response.error)
        return response.save_weights_for_sampler.path


def _line(**found: Any) -> bytes:
    return encode(found) + b"\n"


def _finite(value: float) -> float | None:
    return round(value, 4) if value > -1e9 else None


def _text(asked: dict[str, Any], name: str) -> str:
    value = asked.get(name)
    try:
        if isinstance(value, str) and value.encode():
            return value
    except UnicodeEncodeError:
        raise invalid_field(name, "is not UTF-8 text.") from None
    raise invalid_field(name, "is empty; it must be a text." if value == "" else "must be a text.")


def _number(asked: dict[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = asked.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise invalid_field(name, f"is {value!r:.40}; it must be a number from {least} to {most}.")
    return value
