"""A worker without a model, and a whole trainer front end around it, on this process's event loop."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError, error, to_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.sampling_service_pb2 import PromptLogprobs, SampledTokens, SampleResponse
from gradwire.v1.trainer_service_pb2 import (
    LossInfo,
    ModelInfo,
    TrainRequest,
    TrainResponse,
)
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDone, WorkerEvent, WorkerReady

from trainer_service.atomic_folders import read_manifest, whole_folder
from trainer_service.field_limits import check_ttl_seconds
from trainer_service.fleet.worker import Deliver, Died, Reply
from trainer_service.paths import SAMPLER_WEIGHTS, STATE, CheckpointPath, SamplerPath, check_checkpoint_name
from trainer_service.user_metadata import check_user_metadata

READY = WorkerReady(
    model_folder="/no/such/model",
    model=ModelInfo(base_model="fake", architecture="Fake", vocab_size=100, max_context_length=64, dtype="float32"),
    losses=[LossInfo(name="cross_entropy", loss_fn_inputs=["weights"])],
)


@dataclass
class FakeWorker:
    """Executes commands in order and records them. Implements trainer_service.fleet.worker.Worker."""

    latency_s: float = 0.0
    """How long one command takes."""
    ready: WorkerReady | None = field(default_factory=lambda: READY)
    responding: bool = True
    status_message: str = "ready"
    counters: Mapping[str, float] = field(default_factory=dict)
    executed: list[tuple[str, int, str]] = field(default_factory=list)
    """(run id, seq_id, kind) of every command, in order; seq_id 0 for those that are about no operation."""
    failures: dict[tuple[str, int], GradwireError] = field(default_factory=dict)
    """Operations, by run id and seq_id, that answer with an error."""
    command_failures: dict[str, list[GradwireError]] = field(default_factory=dict)
    """What the next commands about no operation, by kind, answer with."""
    poison: set[tuple[str, int]] = field(default_factory=set)
    """Operations, by run id and seq_id, that it dies of."""
    because: GradwireError | None = None
    """What it then leaves to say."""
    checkpoint_dir: Path | None = None
    """Where saves go; front_end sets it."""
    stopped: bool = False
    sampling: dict[str, Deliver] = field(default_factory=dict)
    """Sample requests begun and not ended, by sample_id."""
    sample_owners: list[str] = field(default_factory=list)
    """Of all Sample requests, in order."""
    leases: list[tuple[str, int]] = field(default_factory=list)
    """(model_path, lease_ms) of the samplers opened, in order."""

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        """Clear it to hold the device; commands wait."""
        self.gate.set()
        self.steps: dict[str, int] = {}
        """Optimizer steps of the runs held, which is all there is of them."""
        self.frozen: dict[SamplerPath, int] = {}
        """Those of frozen weights."""
        self._commands: deque[tuple[WorkerCommand, Deliver]] = deque()
        self._arrived = asyncio.Event()
        self._ready_callbacks: list[Callable[[], object]] = []
        self._death_callbacks: list[Callable[[GradwireError], object]] = []
        self._responding_callbacks: list[Callable[[], object]] = []
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def waiting(self) -> int:
        """Commands received and not answered."""
        return len(self._commands)

    async def has_waiting(self, count: int) -> None:
        """Returns once that many commands were received and not answered."""
        while self.waiting < count:
            self._arrived.clear()
            await self._arrived.wait()

    def submit(self, command: WorkerCommand, deliver: Deliver, *, request: bytes = b"") -> None:
        if self.ready is None:
            text = f"The worker is not ready: {self.status_message}."
            deliver(Died(error("WORKER_NOT_READY", text, retry_after_s=0.5)))
            return
        if request:
            command.request.MergeFromString(request)
        self._commands.append((command, deliver))
        self._arrived.set()

    def on_ready(self, callback: Callable[[], object]) -> None:
        self._ready_callbacks.append(callback)

    def on_death(self, callback: Callable[[GradwireError], object]) -> None:
        self._death_callbacks.append(callback)

    def on_responding(self, callback: Callable[[], object]) -> None:
        self._responding_callbacks.append(callback)

    def respond(self, responding: bool) -> None:
        """It is stopped, or goes on."""
        self.responding = responding
        for callback in self._responding_callbacks:
            callback()

    def become_ready(self) -> None:
        """A worker has loaded the model."""
        self.ready, self.status_message = READY, "ready"
        for callback in self._ready_callbacks:
            callback()

    def die(
        self, reason: str = "The worker process ended (signal SIGKILL).", *, because: GradwireError | None = None
    ) -> None:
        """The process is gone, with everything it was asked; `because` is what it left to say of what it executed."""
        died = error("WORKER_DIED", reason)
        self.ready, self.status_message = None, reason
        self.steps.clear()
        self.frozen.clear()
        for callback in self._death_callbacks:
            callback(died)
        executing = bool(self._commands)
        for number, deliver in enumerate(self._forget_pending()):
            first = executing and not number
            deliver(Died(died, executing=first, because=because if first else None))

    async def stop(self) -> None:
        self.stopped, self.ready = True, None
        stopped = error("DRAINING", "The trainer stopped before this was done.", retry_after_s=5.0)
        for deliver in self._forget_pending():
            deliver(Died(stopped))
        self._task.cancel()

    def _forget_pending(self) -> list[Deliver]:
        pending = [*(deliver for _, deliver in self._commands), *self.sampling.values()]
        self._commands.clear()
        self.sampling.clear()
        return pending

    async def _run(self) -> None:
        while True:
            while not self._commands:
                self._arrived.clear()
                await self._arrived.wait()
            await self.gate.wait()
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            if not self._commands:
                continue  # Died meanwhile.
            command, deliver = self._commands[0]
            if (command.run_id, command.request.seq_id) in self.poison:
                self.die(because=self.because)
                continue
            self._commands.popleft()
            kind = command.WhichOneof("command") or ""
            if kind in ("sample", "cancel_sample"):
                self.executed.append((command.run_id, 0, kind))
                self._sample(command, deliver)
                continue
            if kind != "request":
                self.executed.append((command.run_id, command.fail_operation.seq_id, kind))
                done = WorkerDone()
                try:
                    self._other(kind, command)
                except GradwireError as exc:
                    done.error.CopyFrom(to_status(exc))
                deliver(Reply(WorkerEvent(command_id=command.command_id, done=done), memoryview(b"")))
                continue
            kind = command.request.WhichOneof("operation") or ""
            self.executed.append((command.run_id, command.request.seq_id, kind))
            try:
                response = self._execute(command.run_id, command.request)
            except GradwireError as exc:
                response = TrainResponse(error=to_status(exc))
            response.execute_ms = self.latency_s * 1000
            encoded = memoryview(response.SerializeToString())
            deliver(Reply(WorkerEvent(command_id=command.command_id, response=response), encoded))

    def _other(self, kind: str, command: WorkerCommand) -> None:
        run_id = command.run_id
        if kind == "open_sampler":
            self.leases.append((command.open_sampler.sampler.model_path, command.open_sampler.lease_ms))
        if self.command_failures.get(kind):
            raise self.command_failures[kind].pop(0)
        if kind == "create_run":
            assert run_id not in self.steps, f"{run_id} was made twice"
            folder = command.create_run.snapshot_folder
            self.steps[run_id] = _read_snapshot(Path(folder)) if folder else 0
        elif kind == "delete_run":
            self.steps.pop(run_id, None)
            if not command.delete_run.unload:
                self.frozen = {path: steps for path, steps in self.frozen.items() if path.run_id != run_id}
        elif kind == "freeze_weights":
            frozen = command.freeze_weights
            self.frozen[SamplerPath.frozen_weights(frozen.run_id, frozen.seq_id)] = self.steps[run_id]
        elif kind == "snapshot_run":
            folder = Path(command.snapshot_run.folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").write_text(str(self.steps[run_id]))

    def _sample(self, command: WorkerCommand, deliver: Deliver) -> None:
        """Token 7 max_tokens times; without max_tokens, once, and on until cancelled."""

        def send(**event: Any) -> None:
            deliver(Reply(WorkerEvent(command_id=command.command_id, **event), memoryview(b"")))

        if command.HasField("cancel_sample"):
            sampled = self.sampling.pop(command.cancel_sample.sample_id, None)
            if sampled is not None:
                cancelled = WorkerDone(error=to_status(error("CANCELLED", "Given up.")))
                sampled(Reply(WorkerEvent(done=cancelled), memoryview(b"")))
            send(done=WorkerDone())
            return
        self.sample_owners.append(command.sample.owner)
        request = command.sample.request
        params = request.sampling_params
        for _ in range(params.max_tokens if params.HasField("max_tokens") else 1):
            send(sampled=SampleResponse(samples=[SampledTokens(tokens=[7], logprobs=[-1.0])]))
        if params.HasField("max_tokens"):
            if request.include_prompt_logprobs:
                prompt = PromptLogprobs(logprobs=[-2.0] * (len(request.prompt.tokens) - 1))
                send(sampled=SampleResponse(prompt=prompt))
            send(done=WorkerDone())
        else:
            self.sampling[command.sample.sample_id] = deliver

    def save(self, path: CheckpointPath, size_bytes: int = 3_000_000, **about: Any) -> str:
        """Writes a checkpoint of zeros, and replaces one. Returns its path."""
        assert self.checkpoint_dir is not None
        about = {"created_at": datetime.now(UTC).isoformat(), "step": 3, "architecture": "Fake", **about}
        check_checkpoint_name(path.name)
        with whole_folder(path.folder(self.checkpoint_dir), about=about, overwrite=True) as writer:
            (writer.path / "zeros").write_bytes(bytes(size_bytes))
            (writer.path / "name").write_text(path.name)
        return str(path)

    def _execute(self, run_id: str, request: TrainRequest) -> TrainResponse:
        failure = self.failures.get((run_id, request.seq_id))
        if failure is not None:
            return TrainResponse(error=to_status(failure))
        match request.WhichOneof("operation"):
            case "forward":
                # The targets' own bytes as logprobs: an answer as large as the question.
                batch = request.forward.batch
                outputs = {"logprobs": batch.loss_fn_inputs["target_tokens"]}
                answer = ops.ForwardResponse(loss_fn_outputs=outputs, cu_seqlens=batch.cu_seqlens)
                return TrainResponse(forward=answer)
            case "forward_backward":
                batch = request.forward_backward.batch
                response = ops.ForwardBackwardResponse(metrics={"loss:sum": float(request.seq_id)})
                if "target_tokens" in batch.loss_fn_inputs:
                    # As in forward.
                    response.cu_seqlens.CopyFrom(batch.cu_seqlens)
                    response.loss_fn_outputs["logprobs"].CopyFrom(batch.loss_fn_inputs["target_tokens"])
                return TrainResponse(forward_backward=response)
            case "backward":
                return TrainResponse(backward=ops.BackwardResponse())
            case "optim_step":
                self.steps[run_id] += 1
                return TrainResponse(optim_step=ops.OptimStepResponse(step=self.steps[run_id]))
            case "zero_grad":
                return TrainResponse(zero_grad=ops.ZeroGradResponse())
            case "cancel":
                return TrainResponse(cancel=ops.CancelResponse())
            case "save_state" if self.checkpoint_dir is not None:
                save = request.save_state
                path = self.save(CheckpointPath(run_id, STATE, save.name), **_label(save))
                return TrainResponse(save_state=ops.SaveStateResponse(path=path))
            case "save_weights_for_sampler" if request.save_weights_for_sampler.ephemeral:
                path = SamplerPath.frozen_weights(run_id, request.seq_id)
                self.frozen[path] = self.steps[run_id]
                path = str(path)
                return TrainResponse(save_weights_for_sampler=ops.SaveWeightsForSamplerResponse(path=path))
            case "save_weights_for_sampler" if self.checkpoint_dir is not None:
                save = request.save_weights_for_sampler
                path = self.save(CheckpointPath(run_id, SAMPLER_WEIGHTS, save.name), **_label(save))
                return TrainResponse(save_weights_for_sampler=ops.SaveWeightsForSamplerResponse(path=path))
            case "load_state" if self.checkpoint_dir is not None:
                folder = CheckpointPath.parse(request.load_state.path).folder(self.checkpoint_dir)
                self.steps[run_id] = read_manifest(folder).about["step"]
                return TrainResponse(load_state=ops.LoadStateResponse(step=self.steps[run_id]))
            case other:
                return TrainResponse(error=to_status(error("NOT_IMPLEMENTED", f"{other} is not built yet.")))


def _label(save: Any) -> dict[str, Any]:
    """What a manifest tells of what the caller said about a checkpoint, refused as the worker refuses it."""
    label: dict[str, Any] = {"user_metadata": check_user_metadata(save.user_metadata)}
    if save.HasField("ttl_seconds"):
        check_ttl_seconds(save.ttl_seconds)
        label["expires_at"] = (datetime.now(UTC) + timedelta(seconds=save.ttl_seconds)).isoformat()
    return label


def _read_snapshot(folder: Path) -> int:
    text = (folder / "manifest.json").read_text()
    if not text.isdigit():
        raise error("CHECKPOINT_DAMAGED", f"The snapshot {folder} has different content than was written.")
    return int(text)
