"""The life of a run in the worker: made, restored, written to a snapshot, deleted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError, invalid_field, to_status
from gradwire.v1.trainer_service_pb2 import CreateRunRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDone, WorkerEvent

from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.storage.snapshots import SnapshotWriter, repeat_failure
from trainer_service.engine.worker.prepared import Work
from trainer_service.executing import Executing


class RunLife:
    """Prepares commands about whole runs for an engine.

    Args:
        engine: Holds the runs.
        sampling: Keeps their samplers; None if nothing is sampled.
        send: Sends the outcome of a snapshot, from another thread.
        executing: Notes what is executed of them; None on a rank that does not lead.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling | None,
        send: Callable[[WorkerEvent], object],
        executing: Executing | None,
    ) -> None:
        self._engine = engine
        self._sampling = sampling
        self._executing = executing
        self._send = send
        self._snapshots = SnapshotWriter(engine.ranks)
        self._kinds: dict[str, Callable[[WorkerCommand], Work]] = {
            "create_run": self._create,
            "fail_operation": self._fail_operation,
            "snapshot_run": self._snapshot,
            "freeze_weights": self._freeze,
            "delete_run": self._delete,
            "drop_graphs": self._drop_graphs,
        }

    @property
    def kinds(self) -> frozenset[str]:
        """The commands it prepares."""
        return frozenset(self._kinds)

    def prepare(self, kind: str, command: WorkerCommand) -> Work:
        """Decodes and checks a command of one of these kinds.

        Raises:
            InvalidArgumentError: INVALID_FIELD.
        """
        return self._kinds[kind](command)

    def _create(self, command: WorkerCommand) -> Work:
        created, run_id = command.create_run, command.run_id
        lora = lora_settings(created.request)

        def work() -> None:
            self._engine.create_run(run_id, lora=lora, adapter=created.request.adapter_path)
            if created.snapshot_folder:
                self._engine.restore_run(run_id, Path(created.snapshot_folder))
            if self._executing is not None and created.run_folder:
                self._executing.hold_run(run_id, Path(created.run_folder))

        return work

    def _fail_operation(self, command: WorkerCommand) -> Work:
        failed = command.fail_operation

        def work() -> None:
            repeat_failure(
                self._engine.run_state(command.run_id),
                seq_id=failed.seq_id,
                kind=failed.kind,
                reason=failed.reason,
                forward_seq_id=failed.forward_seq_id,
            )

        return work

    def _snapshot(self, command: WorkerCommand) -> Work:
        def written(failure: GradwireError | None) -> None:
            done = WorkerDone(error=to_status(failure) if failure else None)
            self._send(WorkerEvent(command_id=command.command_id, done=done))

        folder = Path(command.snapshot_run.folder)
        return lambda: self._snapshots.take(self._engine.run_state(command.run_id), folder, written)

    def _freeze(self, command: WorkerCommand) -> Work:
        frozen = command.freeze_weights

        def work() -> None:
            assert self._sampling is not None, "a worker without sampling"
            self._sampling.samplers.freeze(frozen.run_id, frozen.seq_id, of=command.run_id)

        return work

    def _delete(self, command: WorkerCommand) -> Work:
        run_id, unload = command.run_id, command.delete_run.unload

        def work() -> None:
            if self._sampling is not None and not unload:
                self._sampling.samplers.delete_run(run_id)
            if self._executing is not None:
                self._executing.drop_run(run_id)
            self._engine.delete_run(run_id)

        return work

    def _drop_graphs(self, command: WorkerCommand) -> Work:
        return lambda: self._engine.drop_graphs(command.run_id)


def lora_settings(request: CreateRunRequest) -> LoraSettings | None:
    """The LoRA settings of a request; None if all parameters train, or an adapter decides.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a setting would have no effect.
    """
    names = ("lora_alpha", "seed", "train_mlp", "train_attn", "train_unembed")
    given: dict[str, Any] = {name: getattr(request, name) for name in names if request.HasField(name)}
    if given and request.adapter_path:
        raise invalid_field(
            next(iter(given)), "is set together with adapter_path, but the adapter decides it. Leave it out."
        )
    if given and not request.lora_rank:
        raise invalid_field(
            next(iter(given)), "is set, but lora_rank is 0, which trains all parameters; set lora_rank."
        )
    if request.adapter_path or not request.lora_rank:
        return None
    if "lora_alpha" in given:
        given["alpha"] = given.pop("lora_alpha")
    return LoraSettings(rank=request.lora_rank, **given)
