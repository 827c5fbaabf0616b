"""Translates a run's answers into what the client of its model expects."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gradwire._wire.codec import Batch
from gradwire.errors import GradwireError, error, from_status
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.gateway import paths
from trainer_service.gateway.custom_passes import surrogate_loss
from trainer_service.gateway.outcomes import PROTOBUF, Outcome, Refusal
from trainer_service.gateway.tensors import output_message, read_logprobs

CUSTOM_PASSES = ("kept_forward", "backward", "second_pass")
"""Plans of passes of a custom loss, whose loss is summed up here."""


class AnswerTranslation:
    """Translates the answers of one model.

    Args:
        answer_of: Gets an operation's answer from the run's journal, by its number in the run.
        open_sampler: Gets (number, path) of frozen weights that become a sampler; returns the sampler's id.
    """

    def __init__(
        self, answer_of: Callable[[int], Awaitable[TrainResponse]], open_sampler: Callable[[int, str], str]
    ) -> None:
        self._answer_of = answer_of
        self._open_sampler = open_sampler
        self._forwards: dict[int, asyncio.Future[TrainResponse]] = {}
        """Answers of forwards with kept graphs, by number in the run: the second pass tells their logprobs again."""

    def expect_forward(self, run_seq_id: int) -> None:
        """Notes that a forward was sent which keeps its graph."""
        self._forwards[run_seq_id] = asyncio.get_running_loop().create_future()

    def forget_forwards(self, run_seq_ids: list[int]) -> None:
        """Forgets forwards whose second pass will not come, or is answered."""
        for run_seq_id in run_seq_ids:
            self._forwards.pop(run_seq_id, None)

    def arrived(self, run_seq_id: int, response: TrainResponse) -> None:
        """Takes an answer that came by the stream."""
        forward = self._forwards.get(run_seq_id)
        if forward is not None and not forward.done():
            forward.set_result(response)

    def waits(self, plan: dict[str, Any]) -> bool:
        """Whether `outcome` of that plan may have to wait for something else than the answer it is given."""
        if plan["as"] != "backward":
            return False
        forward = self._forwards.get(plan["forward"])
        return forward is None or not forward.done()

    async def outcome(self, plan: dict[str, Any], response: TrainResponse, batch: Batch | None) -> Outcome:
        """Translates an answer.

        Args:
            plan: How, as the operation was planned. Gets what a later translation needs and `batch` has.
            response: The answer.
            batch: Data of one of the two passes of a custom loss; None where the plan knows the loss already.
        """
        try:
            return await getattr(self, f"_{plan['as']}")(plan, result_of(response), batch)
        except (GradwireError, Refusal) as exc:
            return Outcome.failure(exc)

    async def _pass(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        return _output(result, result.metrics)

    async def _kept_forward(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        return _output(result, {**result.metrics, "loss:sum": _loss(plan, result, batch)})

    async def _backward(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        number = plan["forward"]
        known = self._forwards.get(number)
        forward = result_of(await (asyncio.shield(known) if known is not None else self._answer_of(number)))
        self.forget_forwards([number])
        # The forward's own numbers, but what this pass itself did: it went through the model backward alone.
        metrics = {**forward.metrics, **result.metrics, "loss:sum": _loss(plan, forward, batch)}
        return _output(forward, metrics)

    async def _second_pass(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        # As of one that was recognised: whether it was, is told by forward_passes alone.
        return _output(result, {**result.metrics, "loss:sum": _loss(plan, result, batch)})

    async def _optim_step(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        return Outcome.result(type="optim_step", metrics=dict(result.metrics))

    async def _state(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        return Outcome.result(type="save_weights", path=paths.to_tinker(result.path))

    async def _weights(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        return Outcome.result(type="save_weights_for_sampler", path=paths.to_tinker(result.path))

    async def _external(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        path = paths.to_tinker(result.path)
        return Outcome.result(type="save_weights_external", path=path, size_bytes=result.size_bytes)

    async def _sampler(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        sampler_id = self._open_sampler(plan["number"], result.path)
        return Outcome.result(type="save_weights_for_sampler", sampling_session_id=sampler_id)

    async def _load(self, plan: dict[str, Any], result: Any, batch: Batch | None) -> Outcome:
        return Outcome.result(type="load_weights", path=plan["path"])


def _loss(plan: dict[str, Any], forward: Any, batch: Batch | None) -> float:
    if "loss" not in plan:
        assert batch is not None, "the data of a custom loss was let go before its loss was known"
        plan["loss"] = surrogate_loss(batch, read_logprobs(forward))
    return plan["loss"]


def result_of(response: TrainResponse) -> Any:
    """The result in an answer.

    Raises:
        GradwireError: The answer is a failure.
    """
    kind = response.WhichOneof("result")
    if kind == "error":
        raise from_status(response.error)
    if kind is None:
        raise error("INTERNAL", "The trainer's answer is of a kind this gateway does not know.")
    return getattr(response, kind)


def _output(result: Any, metrics: Mapping[str, float]) -> Outcome:
    """A pass's answer as the client gets it."""
    return Outcome(PROTOBUF, output_message(result, dict(metrics)).SerializeToString())
