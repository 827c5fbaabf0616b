"""All runs of a trainer."""

import asyncio
import contextlib
import os
import secrets
from pathlib import Path

from gradwire.errors import GradwireError, UnavailableError, error, from_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerCreateRun, WorkerDeleteRun

from trainer_service.access import current_caller
from trainer_service.config import Limits
from trainer_service.fleet.worker import Reply, Worker
from trainer_service.runs.disk import disk_full
from trainer_service.runs.run import Observe, Run


class Runs:
    """Makes, finds and forgets runs. Those of other keys are as if they were not there, unless an admin asks.

    Args:
        worker: Executes them.
        base_model: The one model they start from, as the trainer was given it.
        limits: The most there may be.
        data_dir: What limits.max_disk_bytes counts; None counts nothing.
        detach_grace_s: See Run.
        observe: See Run.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        base_model: str,
        limits: Limits,
        detach_grace_s: float,
        observe: Observe,
        data_dir: Path | None = None,
    ) -> None:
        self._data_dir = data_dir
        self._worker = worker
        self._base_model = base_model
        self._limits = limits
        self._detach_grace_s = detach_grace_s
        self._observe = observe
        self._runs: dict[str, Run] = {}
        self._by_request_id: dict[tuple[str, str], asyncio.Task[Run]] = {}
        worker.on_death(self._worker_died)

    def __len__(self) -> int:
        return len(self._runs)

    def get(self, run_id: str) -> Run:
        """The run, for the current caller.

        Raises:
            GradwireError: RUN_NOT_FOUND, whether there is none or it is somebody else's.
        """
        run = self._runs.get(run_id)
        if run is None or not current_caller.get().may_see(run.owner):
            raise error("RUN_NOT_FOUND", f"There is no run {run_id!r}; ListRuns lists those there are.", run_id=run_id)
        return run

    def list(self) -> list[Run]:
        """All runs the current caller may see, newest first."""
        caller = current_caller.get()
        return [run for run in reversed(self._runs.values()) if caller.may_see(run.owner)]

    @property
    def unanswered(self) -> int:
        """Operations of all runs received and not yet answered."""
        return sum(run.unanswered for run in self._runs.values())

    async def quiet(self) -> None:
        """Returns once every operation received has been answered."""
        for run in list(self._runs.values()):
            await run.quiet()

    async def create(self, request: CreateRunRequest) -> Run:
        """A new run, or the one that the same request_id made.

        Raises:
            GradwireError: BASE_MODEL_MISMATCH, NOT_IMPLEMENTED, LIMIT_EXCEEDED, WORKER_NOT_READY, or the worker's own.
        """
        self._check(request)
        if not request.request_id:
            return await self._create(request)
        key = (current_caller.get().owner, request.request_id)
        task = self._by_request_id.get(key)
        if task is None:
            task = self._by_request_id[key] = asyncio.create_task(self._create(request))
            task.add_done_callback(lambda done: self._forget_failure(key, done))
        # Shielded: a caller that goes away must not undo what its repeat will ask for.
        return await asyncio.shield(task)

    async def delete(self, run_id: str) -> None:
        """Frees the run.

        Raises:
            GradwireError: RUN_NOT_FOUND.
        """
        run = self.get(run_id)
        known_to_worker = not run.lost
        run.close()
        del self._runs[run_id]
        for key, task in list(self._by_request_id.items()):
            if task.done() and not task.cancelled() and task.exception() is None and task.result() is run:
                del self._by_request_id[key]
        if known_to_worker:
            # When the worker dies instead, the run's memory is free all the same.
            with contextlib.suppress(UnavailableError):
                await self._command(WorkerCommand(run_id=run_id, delete_run=WorkerDeleteRun()))

    def _check(self, request: CreateRunRequest) -> None:
        if request.base_model and not _same_model(request.base_model, self._base_model):
            raise error(
                "BASE_MODEL_MISMATCH",
                f"base_model is {request.base_model!r}, but this trainer serves {self._base_model!r}; ask for "
                "that one, or start a trainer for yours.",
                requested=request.base_model,
                served=self._base_model,
            )
        if request.lora_rank:
            raise error(
                "NOT_IMPLEMENTED",
                f"lora_rank is {request.lora_rank}, but LoRA is not built yet; use 0 to train all parameters.",
            )

    async def _create(self, request: CreateRunRequest) -> Run:
        active = sum(not run.lost for run in self._runs.values())
        if active >= self._limits.max_runs:
            raise error(
                "LIMIT_EXCEEDED",
                f"This trainer holds {active} runs and takes at most {self._limits.max_runs}; "
                "delete one with DeleteRun.",
                limit=self._limits.max_runs,
                got=active + 1,
            )
        caller = current_caller.get()
        own = sum(not run.lost and run.owner == caller.owner for run in self._runs.values())
        if self._limits.max_runs_per_key and own >= self._limits.max_runs_per_key:
            raise error(
                "LIMIT_EXCEEDED",
                f"This API key has {own} runs and may have at most {self._limits.max_runs_per_key}; "
                "delete one with DeleteRun.",
                limit=self._limits.max_runs_per_key,
                got=own + 1,
            )
        run = Run(
            f"run-{secrets.token_hex(6)}",
            base_model=self._base_model,
            display_name=request.display_name,
            worker=self._worker,
            observe=self._observe,
            detach_grace_s=self._detach_grace_s,
            max_in_flight=self._limits.max_in_flight_operations,
            owner=caller.owner,
            refuse=self._refuse,
        )
        # In the table first, so that runs made at the same time count against each other.
        self._runs[run.run_id] = run
        try:
            await self._command(WorkerCommand(run_id=run.run_id, create_run=WorkerCreateRun(request=request)))
        except GradwireError:
            self._runs.pop(run.run_id, None)
            raise
        except asyncio.CancelledError:
            # Nobody will ever hear of it.
            self._runs.pop(run.run_id, None)
            self._worker.submit(WorkerCommand(run_id=run.run_id, delete_run=WorkerDeleteRun()), lambda _: None)
            raise
        return run

    def _forget_failure(self, key: tuple[str, str], done: asyncio.Task[Run]) -> None:
        """A call that failed may be tried again under its request_id."""
        if done.cancelled() or done.exception() is not None:
            self._by_request_id.pop(key, None)

    async def _command(self, command: WorkerCommand) -> None:
        future: asyncio.Future[Reply | GradwireError] = asyncio.get_running_loop().create_future()
        self._worker.submit(command, lambda outcome: None if future.done() else future.set_result(outcome))
        outcome = await future
        if isinstance(outcome, GradwireError):
            raise outcome
        if outcome.event.done.HasField("error"):
            raise from_status(outcome.event.done.error)

    def _refuse(self, kind: str) -> GradwireError | None:
        """Why an operation of this kind may not run now, if it may not."""
        if self._data_dir is None or not self._limits.max_disk_bytes or not kind.startswith("save_"):
            return None
        return disk_full(self._data_dir, max_disk_bytes=self._limits.max_disk_bytes)

    def _worker_died(self, reason: GradwireError) -> None:
        for run in self._runs.values():
            run.lose(reason)


def _same_model(asked: str, served: str) -> bool:
    """Whether two names mean one model: equal, or folders that are the same folder."""
    if asked == served:
        return True
    # os.path, since pathlib raises on names that cannot be paths, such as very long ones.
    return os.path.isdir(asked) and os.path.isdir(served) and os.path.samefile(asked, served)
