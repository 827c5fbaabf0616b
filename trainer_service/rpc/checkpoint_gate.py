"""What operations that save or load pass through on their way in and out: records owners, asks stores.

It stands at the border, so the answers it changes are those that clients get. The run itself, its order and its journal
know only the local folder.
"""

import asyncio
import contextlib

from gradwire.errors import GradwireError
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.checkpoints.transfers import Transfers
from trainer_service.paths import FROZEN_WEIGHTS, SAMPLER_WEIGHTS, STATE, CheckpointPath
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run
from trainer_service.runs.sequence import error_response

_SAVES = {"save_state": STATE, "save_weights_for_sampler": SAMPLER_WEIGHTS}
"""Operation to the kind of checkpoint it creates."""


class CheckpointGate:
    """The gate for saves and loads.

    Args:
        transfers: Moves checkpoints to and from the store.
    """

    def __init__(self, transfers: Transfers) -> None:
        self._transfers = transfers
        self._catalog = transfers.catalog
        self._asked: dict[tuple[str, int], asyncio.Task[bytes]] = {}
        """Saves being stored that a client has asked about, by run and seq_id."""

    async def before(self, run: Run, operation: Operation) -> None:
        """To be awaited before an operation takes its place; the caller must let no later operation overtake it.

        A failure here is not raised: the operation finds it itself and reports it in its answer.
        """
        with contextlib.suppress(GradwireError, OSError):
            if operation.kind in _SAVES:
                self._catalog.claim(run.run_id, run.owner)
                if not _freezes(operation):
                    name = getattr(operation.request, operation.kind).name
                    path = CheckpointPath(run.run_id, _SAVES[operation.kind], name)
                    await asyncio.to_thread(self._catalog.make_way, str(path))
            elif operation.kind == "load_state":
                await self._transfers.fetch(operation.request.load_state.path)

    def stores(self, operation: Operation) -> bool:
        """Whether the answer to an operation must pass through `after`."""
        return self._catalog.storage is not None and operation.kind in _SAVES and not _freezes(operation)

    async def after(self, answer: bytes) -> bytes:
        """The answer to a save: unchanged once the checkpoint is in the store, or why it is not there."""
        response = TrainResponse.FromString(answer)
        path = _saved_path(response)
        if not path:
            return answer
        try:
            await self._transfers.store(path)
        except GradwireError as exc:
            exc.message += " The checkpoint is on the trainer's disk and is stored as soon as possible."
            return error_response(response.seq_id, exc).SerializeToString()
        return answer

    async def after_within(self, run: Run, answer: bytes, timeout_s: float) -> bytes | None:
        """Like `after`, for any operation; None if the store takes longer. However often this is called, the checkpoint
        is stored once."""
        response = TrainResponse.FromString(answer)
        if self._catalog.storage is None or not _saved_path(response):
            return answer
        key = run.run_id, response.seq_id
        task = self._asked.get(key)
        if task is None:
            task = self._asked[key] = asyncio.create_task(self.after(answer))
            task.add_done_callback(lambda _: self._asked.pop(key))
        done, _ = await asyncio.wait([task], timeout=timeout_s)
        return task.result() if done else None


def _saved_path(response: TrainResponse) -> str:
    """Where an operation saved a checkpoint; "" if it did not."""
    kind = response.WhichOneof("result")
    path = getattr(response, kind).path if kind in _SAVES else ""
    return "" if f"/{FROZEN_WEIGHTS}/" in path else path


def _freezes(operation: Operation) -> bool:
    """Whether it saves nothing but freezes parameters in the worker's memory."""
    return operation.kind == "save_weights_for_sampler" and operation.request.save_weights_for_sampler.ephemeral
