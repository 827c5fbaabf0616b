"""All runs of a trainer, including those left by the trainer before it."""

import asyncio
import logging
import secrets
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, ForkRunRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerCreateRun, WorkerDeleteRun

from trainer_service.access import current_caller
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import Durability, Limits
from trainer_service.fleet.calls import call
from trainer_service.fleet.worker import Worker
from trainer_service.runs import fork_replay
from trainer_service.runs.capacity import Capacity
from trainer_service.runs.disk import disk_full
from trainer_service.runs.fork_replay import Replayed
from trainer_service.runs.frozen_weights import freeze_again, froze
from trainer_service.runs.journal import Record
from trainer_service.runs.journal_writer import JournalWriter
from trainer_service.runs.observer import Observer
from trainer_service.runs.operation import Operation
from trainer_service.runs.recovery import Source, find_source
from trainer_service.runs.request_ids import RequestIds
from trainer_service.runs.run import Run, RunSettings
from trainer_service.runs.starting_adapter import find_starting_adapter
from trainer_service.runs.store import RunStore, StoredRun
from trainer_service.served_model import ServedModel
from trainer_service.user_metadata import check_user_metadata

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 2.0
"""How long background work, such as deleting a run, may still take when the trainer stops."""


class Runs:
    """Makes, finds and forgets runs. Runs of other keys are invisible, except to an admin.

    Args:
        worker: Executes their operations.
        base_model: The one model they all start from.
        limits: How many there may be.
        transfers: The checkpoints that runs load and start from.
        runs_dir: A folder for each run: its journal and snapshots. Several trainers may share it.
        adapter_dir: Adapters that runs may start from, beside those saved here.
        data_dir: What limits.max_disk_bytes counts; None counts nothing.
        detach_grace_s: See RunSettings.
        observer: See RunSettings.
        durability: How runs are kept.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        base_model: ServedModel,
        limits: Limits,
        transfers: Transfers,
        runs_dir: Path,
        adapter_dir: Path,
        detach_grace_s: float,
        observer: Observer,
        data_dir: Path | None = None,
        durability: Durability | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._transfers = transfers
        self._adapter_dir = adapter_dir
        self._worker = worker
        self._base_model = base_model
        self._limits = limits
        self._durability = durability or Durability()
        self.journal_writer = JournalWriter()
        """Writes all their journals."""
        self.store = RunStore(runs_dir, self.journal_writer, self._durability)
        """Their folders."""
        self._runs: dict[str, Run] = {}
        self._capacity = Capacity(
            worker,
            self._runs,
            max_runs=limits.max_runs,
            max_runs_per_key=limits.max_runs_per_key,
            idle_lease_s=self._durability.idle_lease_s,
        )
        self._settings = RunSettings(
            worker=worker,
            observer=observer,
            base_model=base_model,
            detach_grace_s=detach_grace_s,
            max_in_flight=limits.max_in_flight_operations,
            full=self._capacity.full,
            background=self._background,
            refuse=self._refuse,
            snapshots=self._durability.snapshots,
            max_frozen_weights=limits.max_frozen_weights,
        )
        self._freezing: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._request_ids = RequestIds(lambda run: self._background(self._delete(run)))
        self._tasks: set[asyncio.Task[object]] = set()
        self._capacity_keeper: asyncio.Task[None] | None = None
        worker.on_ready(self._capacity.bring_back)
        worker.on_death(self._worker_died)

    def __len__(self) -> int:
        return len(self._runs)

    def start(self) -> None:
        """Takes over the runs an earlier trainer left, and unloads idle ones from now on."""
        start_s = time.monotonic()
        self.store.clear()
        for found in self.store.open_all(lambda record: self._base_model.is_source(record.base_model)):
            self._take_up(found)
        if self._runs:
            fields = {"runs": len(self._runs), "took_s": round(time.monotonic() - start_s, 3)}
            logger.info("Runs taken over.", extra={"fields": fields | {"operations": self.unanswered}})
        if self._worker.ready is not None:
            self._capacity.bring_back()
        self._capacity_keeper = asyncio.get_running_loop().create_task(self._capacity.keep())

    def suspend(self) -> None:
        """Executes nothing more: callers that wait are sent away and retry at the next trainer."""
        for run in self._runs.values():
            run.suspend()

    async def stop(self) -> None:
        """Writes what is left to write and releases every run, for another trainer to take over."""
        if self._capacity_keeper is not None:
            self._capacity_keeper.cancel()
        for freezing in self._freezing.values():
            freezing.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_STOP_GRACE_S)
        await asyncio.gather(*(run.placement.let_go() for run in self._runs.values()))
        await self.store.close()

    def get(self, run_id: str) -> Run:
        """The run, for the current caller.

        Raises:
            GradwireError: RUN_NOT_FOUND, whether it does not exist or belongs to somebody else.
        """
        run = self._runs.get(run_id)
        if run is None or not current_caller.get().may_see(run.owner):
            raise error("RUN_NOT_FOUND", f"There is no run {run_id!r}; ListRuns lists yours.", run_id=run_id)
        return run

    def list(self) -> list[Run]:
        """All runs the current caller may see, newest first."""
        caller = current_caller.get()
        return [run for run in reversed(self._runs.values()) if caller.may_see(run.owner)]

    def everybodys(self) -> "list[Run]":
        """All runs of all owners, newest first."""
        return [*reversed(self._runs.values())]

    @property
    def unanswered(self) -> int:
        """Operations of all runs received and not yet answered."""
        return sum(run.unanswered for run in self._runs.values())

    async def quiet(self) -> None:
        """Returns once every received operation has been answered."""
        for run in list(self._runs.values()):
            await run.quiet()

    async def create(self, request: CreateRunRequest) -> Run:
        """A new run, or the one made earlier under the same request_id.

        Raises:
            GradwireError: BASE_MODEL_MISMATCH, INVALID_FIELD, CHECKPOINT_NOT_FOUND, LIMIT_EXCEEDED, STORAGE_FAILED,
                WORKER_NOT_READY, or an error of the worker's.
        """
        self._check(request)
        return await self._request_ids.once(current_caller.get().owner, request.request_id, self._create(request))

    async def fork(self, request: ForkRunRequest) -> Run:
        """A new run that starts from another run's state after one of its steps, or the one made earlier under the same
        request_id.

        Raises:
            GradwireError: RUN_NOT_FOUND, LIMIT_EXCEEDED, STORAGE_FAILED, WORKER_NOT_READY, WORKER_DIED. INVALID_FIELD:
                the journal does not have that step. RUN_LOST: it no longer reaches back far enough.
        """
        making = self._fork(self.get(request.run_id), request)
        return await self._request_ids.once(current_caller.get().owner, request.request_id, making)

    async def replay(self, run_id: str) -> Replayed:
        """Executes a run's journal again, on a copy, and compares the answers.

        Raises:
            GradwireError: RUN_NOT_FOUND, LIMIT_EXCEEDED, WORKER_NOT_READY, WORKER_DIED, RUN_LOST.
        """
        run = self.get(run_id)
        async with run.settled() as up_to, self._capacity.one_more(owner=None):
            return await fork_replay.replay(
                self._worker,
                run_id=run_id,
                source=await self._source(run),
                request=run.create_request,
                up_to=up_to,
                as_run=f"{run_id}-replay-{secrets.token_hex(3)}",
            )

    async def bring_back_frozen(self, run: Run, seq_id: int) -> None:
        """Returns once the worker has a run's frozen weights again, if it went with an earlier one that had them. Of
        others, and while there is no worker, nothing is done: the worker then says what is the matter.

        Raises:
            GradwireError: As frozen_weights.freeze_again; WORKER_DIED; LIMIT_EXCEEDED: there is no room for a copy of
                the run.
        """
        frozen = run.placement.frozen
        if not frozen.held(seq_id) and not froze(await run.row(seq_id)):
            return
        frozen.used(seq_id)
        await run.placement.settled()
        if frozen.held(seq_id) or self._worker.ready is None:
            return
        key = run.run_id, seq_id
        if (freezing := self._freezing.get(key)) is None:
            freezing = asyncio.get_running_loop().create_task(self._freeze_again(run, seq_id))
            self._freezing[key] = freezing
            freezing.add_done_callback(lambda _: self._freezing.pop(key, None))
        # Others wait for it too.
        await asyncio.shield(freezing)

    async def _freeze_again(self, run: Run, seq_id: int) -> None:
        epoch = run.placement.epoch
        async with run.settled(), self._capacity.one_more(owner=None):
            await freeze_again(
                self._worker,
                run_id=run.run_id,
                source=await self._source(run),
                request=run.create_request,
                seq_id=seq_id,
                as_run=f"{run.run_id}-frozen-{secrets.token_hex(3)}",
            )
        if self._runs.get(run.run_id) is not run:
            # It was deleted meanwhile, and these with it.
            self._worker.submit(WorkerCommand(run_id=run.run_id, delete_run=WorkerDeleteRun()), lambda _: None)
        elif run.placement.epoch == epoch:
            run.placement.frozen.made([seq_id])

    async def delete(self, run_id: str) -> None:
        """Frees the run and removes it from the disk.

        Raises:
            GradwireError: RUN_NOT_FOUND.
        """
        await self._delete(self.get(run_id))

    async def _delete(self, run: Run) -> None:
        del self._runs[run.run_id]
        self._request_ids.forget(run)
        await run.delete()
        self._capacity.let_in()
        await self.store.remove(run.run_id)

    # ── making ────────────────────────────────────────────────────────────────────────────────────────────────────

    def check_base_model(self, base_model: str) -> None:
        """See ServedModel.check."""
        self._base_model.check(base_model)

    def _check(self, request: CreateRunRequest) -> None:
        self.check_base_model(request.base_model)
        check_user_metadata(request.user_metadata)

    async def _create(self, request: CreateRunRequest) -> Run:
        owner = current_caller.get().owner
        run_id = f"run-{secrets.token_hex(6)}"
        adapter: Path | None = None
        if request.adapter_path:
            adapter, request = await self._with_adapter(run_id, request)
        record = Record(
            run_id=run_id,
            owner=owner,
            base_model=self._base_model.source,
            created_s=time.time(),
            create_request=request.SerializeToString(),
        )
        live = True
        async with self._capacity.one_more(owner=owner):
            await self.store.write_down(record, adapter)
            try:
                await self.store.publish(record.run_id)
                created = WorkerCreateRun(request=request, run_folder=str(self.store.folder(run_id)))
                await call(self._worker, WorkerCommand(run_id=run_id, create_run=created))
            except GradwireError as exc:
                if exc.reason != "WORKER_DIED":
                    await self.store.remove(record.run_id)
                    raise
                # The run is on disk, so the next worker can make it.
                live = False
        return self._add(record, live=live)

    async def _fork(self, parent: Run, request: ForkRunRequest) -> Run:
        owner = current_caller.get().owner
        # Read before waiting for the journal: a step made meanwhile might not be in it yet.
        step = request.step if request.HasField("step") else parent.step
        forked_at_step = parent.record.parent_step if parent.record.parent_run_id else None
        made = CreateRunRequest()
        made.CopyFrom(parent.create_request)
        made.request_id, made.display_name = request.request_id, request.display_name
        run_id = f"run-{secrets.token_hex(6)}"
        adapter: Path | None = None
        if made.adapter_path:
            # A copy of its own: its parent may be deleted.
            adapter, made.adapter_path = Path(made.adapter_path), str(self.store.adapter_folder(run_id))
        async with parent.settled(), self._capacity.one_more(owner=owner):
            find = fork_replay.seq_id_of_step
            seq_id = await asyncio.to_thread(find, parent.folder, step, forked_at_step=forked_at_step)
            record = Record(
                run_id=run_id,
                owner=owner,
                base_model=self._base_model.source,
                created_s=time.time(),
                create_request=made.SerializeToString(),
                parent_run_id=parent.run_id,
                parent_seq_id=seq_id,
                parent_step=step,
                step=step,
            )
            folder = await self.store.write_down(record, adapter)
            try:
                await fork_replay.fork(
                    self._worker,
                    source_run_id=parent.run_id,
                    source=await self._source(parent),
                    request=parent.create_request,
                    seq_id=seq_id,
                    run_id=run_id,
                    folder=folder,
                )
                # Published only now: without its first snapshot the run could never be restored.
                await self.store.publish(run_id)
            except BaseException:
                self._worker.submit(WorkerCommand(run_id=run_id, delete_run=WorkerDeleteRun()), lambda _: None)
                await self.store.remove(run_id)
                raise
            return self._add(record, live=True)

    def _add(self, record: Record, *, live: bool) -> Run:
        # The worker may have died between its answer and now.
        live = live and self._worker.ready is not None
        run = self._runs[record.run_id] = Run(record, self.store.journal(record.run_id), self._settings, live=live)
        return run

    async def _source(self, run: Run) -> Source:
        return await asyncio.to_thread(find_source, run.folder, forked=bool(run.record.parent_run_id))

    async def _with_adapter(self, run_id: str, request: CreateRunRequest) -> tuple[Path, CreateRunRequest]:
        """(folder of the adapter the run starts from, the request with where the run will have its own copy)."""
        folder, rank = await find_starting_adapter(request, transfers=self._transfers, adapter_dir=self._adapter_dir)
        changed = CreateRunRequest()
        changed.CopyFrom(request)
        changed.lora_rank, changed.adapter_path = rank, str(self.store.adapter_folder(run_id))
        return folder, changed

    # ── taking up ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _take_up(self, found: StoredRun) -> None:
        record = found.record
        journal = self.store.journal(record.run_id)
        run = Run(record, journal, self._settings, next_seq_id=found.next_seq_id)
        run.take_up(found.undone, executing=found.executing)
        self._runs[record.run_id] = run
        self._request_ids.remember(record.owner, run)

    # ── the worker ────────────────────────────────────────────────────────────────────────────────────────────────

    def _worker_died(self, reason: GradwireError) -> None:
        for run in self._runs.values():
            run.placement.worker_died()

    def _refuse(self, operation: Operation) -> GradwireError | None:
        """Why the current caller's operation may not run now; None if it may."""
        if operation.kind == "load_state":
            return self._refuse_load(operation.request.load_state.path)
        if self._data_dir is None or not self._limits.max_disk_bytes or not operation.kind.startswith("save_"):
            return None
        return disk_full(self._data_dir, max_disk_bytes=self._limits.max_disk_bytes)

    def _refuse_load(self, path: str) -> GradwireError | None:
        try:
            # A thread asked the store before the operation was accepted.
            self._transfers.catalog.find(path, recent=True)
        except GradwireError as exc:
            return exc
        return None

    def _background(self, coroutine: Coroutine[Any, Any, object]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: "asyncio.Task[object]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("A background task failed.", exc_info=exc)
