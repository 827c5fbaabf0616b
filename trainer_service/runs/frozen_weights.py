"""Frozen weights of a run: which of them the worker has, and how those come back that went with an earlier one.

A worker keeps them in its memory alone. What they were is still known: the state of their run after the operation that
made them, which a snapshot and the journal give again. Those behind the snapshot that their run is restored from are
made on the way, at no cost; any other once somebody asks for it, of a copy of the run that is replayed beside it.
"""

from collections import OrderedDict
from collections.abc import Iterable

from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDeleteRun

from trainer_service.fleet.calls import call
from trainer_service.fleet.worker import Worker
from trainer_service.paths import SamplerPath
from trainer_service.runs.journal import Row
from trainer_service.runs.recovery import Source, freeze_command, restore


class FrozenWeights:
    """Which of a run's frozen weights are where, by the seq_ids of the operations that made them.

    Args:
        max_wanted: As many as the worker keeps.
    """

    def __init__(self, *, max_wanted: int) -> None:
        self._max_wanted = max_wanted
        self._held: set[int] = set()
        self._wanted: OrderedDict[int, None] = OrderedDict()
        self._asked: set[int] = set()

    @property
    def wanted(self) -> list[int]:
        """Those used last that the worker does not have, closed ones left out; oldest use first."""
        return [seq_id for seq_id in self._wanted if seq_id not in self._held]

    @property
    def oldest_asked(self) -> int | None:
        """The first of those that somebody has asked for since the worker that had them died."""
        return min(self._asked & set(self.wanted), default=None)

    def held(self, seq_id: int) -> bool:
        """Whether this worker was given them; it may have dropped them since, and then says why."""
        return seq_id in self._held

    def made(self, seq_ids: Iterable[int]) -> None:
        """The worker has them."""
        for seq_id in seq_ids:
            self._held.add(seq_id)
            self._asked.discard(seq_id)
            self._want(seq_id)

    def used(self, seq_id: int) -> None:
        """Somebody asks for some that there are, or were."""
        if seq_id not in self._held:
            self._asked.add(seq_id)
        self._want(seq_id)

    def closed(self, seq_id: int) -> None:
        """Nobody needs them any more."""
        self._wanted.pop(seq_id, None)

    def worker_died(self) -> None:
        """The worker has none of them any more."""
        self._held.clear()
        self._asked.clear()

    def _want(self, seq_id: int) -> None:
        self._wanted[seq_id] = None
        self._wanted.move_to_end(seq_id)
        while len(self._wanted) > self._max_wanted:
            self._asked.discard(self._wanted.popitem(last=False)[0])


def froze(row: Row | None) -> bool:
    """Whether an operation of the journal made frozen weights."""
    if row is None or row.reason != "" or row.kind != "save_weights_for_sampler":
        return False
    return TrainRequest.FromString(row.request).save_weights_for_sampler.ephemeral


async def freeze_again(
    worker: Worker, *, run_id: str, source: Source, request: CreateRunRequest, seq_id: int, as_run: str
) -> None:
    """Makes a run's frozen weights again, of a copy of it.

    Args:
        worker: Gets them. The run itself is not touched.
        run_id: The run.
        source: What its state is recovered from.
        request: Created it.
        seq_id: The operation that made them.
        as_run: The copy's run_id.

    Raises:
        Died: The worker died.
        NotFoundError: SAMPLER_NOT_FOUND: nothing is left that they could be made of.
        GradwireError: The worker has no room for the copy, or for them.
    """
    try:
        await restore(worker, run_id, request, source, up_to=seq_id, as_run=as_run)
        await call(worker, freeze_command(run_id, seq_id, of=as_run))
    except GradwireError as exc:
        if exc.reason != "RUN_LOST":
            raise
        path = str(SamplerPath.frozen_weights(run_id, seq_id))
        text = f"The frozen weights {path} went with the worker that had them, and cannot be made again: {exc.message}"
        raise error("SAMPLER_NOT_FOUND", text, model_path=path) from exc
    finally:
        worker.submit(WorkerCommand(run_id=as_run, delete_run=WorkerDeleteRun()), lambda _: None)
