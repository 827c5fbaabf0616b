"""From the trainer's commands to the engine's verbs and back: protos on one side, arrays on the other.

`prepare` decodes and checks a command and may run ahead on the thread that reads; `execute` runs on the device thread,
strictly in order. A command that was refused while being prepared still takes its turn: its failure is delivered, and
leaves its mark on the run, where it would have executed.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from gradwire._wire.codec import Batch, decode_batch, decode_tensor, tensor_message
from gradwire.errors import GradwireError, error, invalid_field, to_status
from gradwire.types import AdamParams
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_TYPE_DELTA, CheckpointType
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDone, WorkerEvent

from trainer_service.checkpoint_path import CheckpointPath, check_checkpoint_name, check_ttl_seconds
from trainer_service.engine import validation
from trainer_service.engine.device import broken
from trainer_service.engine.engine import Engine, ForwardResult, Normalization
from trainer_service.engine.losses import find_loss
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.storage.checkpoints import Label
from trainer_service.engine.storage.snapshots import SnapshotWriter, repeat_failure
from trainer_service.user_metadata import check_user_metadata

logger = logging.getLogger(__name__)

Work = Callable[[], Message | None]
"""Executes a command; returns an operation's answer, None for a command that is not one."""

_ANSWERED_LATER = ("snapshot_run", "sample")
_SAMPLING = ("sample", "cancel_sample", "open_sampler", "close_sampler")

_NORMALIZATIONS: dict[int, Normalization] = {
    ops.GRAD_ACCUMULATION_NORMALIZATION_UNSPECIFIED: "none",
    ops.GRAD_ACCUMULATION_NORMALIZATION_NONE: "none",
    ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS: "num_loss_tokens",
    ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES: "num_sequences",
}
_GRADIENT_PASSES = ("forward_backward", "backward")


@dataclass(frozen=True)
class Prepared:
    """A command ready to execute.

    Attributes:
        command_id: To answer with.
        seq_id: Of the operation; None for a command that is not one.
        what: Its name: the field of TrainResponse that answers an operation.
        work: Executes it, or raises what is wrong with it.
        answered_later: Whether it goes on by itself, once begun, and is answered when it is done.
        received_s: When it came, by time.monotonic.
    """

    command_id: int
    seq_id: int | None
    what: str
    work: Work
    received_s: float
    answered_later: bool = False


def overtakes(command: WorkerCommand) -> bool:
    """Whether a command belongs to sampling, which does not wait for the operations before it."""
    return command.WhichOneof("command") in _SAMPLING


class Commands:
    """Executes the trainer's commands on an engine.

    Args:
        engine: It.
        send: Sends an answer that comes later, on another thread.
        sampling: Sampling beside its runs; None refuses to sample.
    """

    def __init__(self, engine: Engine, send: Callable[[WorkerEvent], object], sampling: Sampling | None = None) -> None:
        self._engine = engine
        self._send = send
        self._sampling = sampling
        self._snapshots = SnapshotWriter()
        self._operations: dict[str, Callable[[str, int, Any], Work]] = {
            "forward": self._forward,
            "forward_backward": self._forward_backward,
            "backward": self._backward,
            "optim_step": self._optim_step,
            "zero_grad": self._zero_grad,
            "cancel": self._cancel,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "save_state": self._save_state,
            "load_state": self._load_state,
        }

    def prepare(self, command: WorkerCommand) -> Prepared:
        """Decodes and checks a command. Never raises: what is wrong with it is raised in its turn."""
        received_s = time.monotonic()
        kind = command.WhichOneof("command")
        seq_id = command.request.seq_id if kind == "request" else None
        what = (command.request.WhichOneof("operation") if kind == "request" else kind) or "nothing"
        try:
            if seq_id is None:
                work = self._prepare_other(what, command)
            elif what in self._operations:
                work = self._operations[what](command.run_id, seq_id, getattr(command.request, what))
            else:
                raise error("PROTOCOL_VIOLATION", f'The worker was sent "{what}", which is no operation of a run.')
        except Exception as exc:
            work = self._refused(command.run_id, seq_id, what, exc)
        return Prepared(command.command_id, seq_id, what, work, received_s, answered_later=what in _ANSWERED_LATER)

    def execute(self, prepared: Prepared) -> WorkerEvent | None:
        """Executes a command on the device. Returns the answer; None where that comes later, by itself.

        Raises:
            Exception: The device is beyond use; the process must end.
        """
        counters = self._engine.counters
        started_s = time.monotonic()
        answer: Message | None = None
        failure: GradwireError | None = None
        try:
            answer = prepared.work()
        except GradwireError as exc:
            failure = exc
            logger.info(f"Refused {prepared.what}.", extra={"fields": {"reason": exc.reason, "why": exc.message}})
        except Exception as exc:
            logger.exception(f"Failed in {prepared.what}.", extra={"fields": {"seq_id": prepared.seq_id}})
            if broken(exc):
                raise
            text = f"{prepared.what} failed in the worker by a fault of Gradwire's own; its log has the details."
            failure = error("INTERNAL", text)
        execute_s = time.monotonic() - started_s
        counters.busy_seconds_total += execute_s
        event = WorkerEvent(command_id=prepared.command_id)
        if prepared.seq_id is None:
            event.done.CopyFrom(WorkerDone(error=to_status(failure) if failure else None))
        else:
            counters.operations_total += 1
            counters.failed_operations_total += failure is not None
            event.response.CopyFrom(
                TrainResponse(
                    seq_id=prepared.seq_id,
                    queue_ms=(started_s - prepared.received_s) * 1000,
                    execute_ms=execute_s * 1000,
                )
            )
            if failure is not None:
                event.response.error.CopyFrom(to_status(failure))
            else:
                getattr(event.response, prepared.what).CopyFrom(answer)
        event.counters.update(counters.as_metrics())
        return None if prepared.answered_later and failure is None else event

    def _prepare_other(self, what: str, command: WorkerCommand) -> Work:
        engine, run_id = self._engine, command.run_id
        created, failed = command.create_run, command.fail_operation

        lora = _lora_settings(created.request)

        def create() -> None:
            engine.create_run(run_id, lora=lora, adapter=created.request.adapter_path)
            if created.snapshot_folder:
                engine.restore_run(run_id, Path(created.snapshot_folder))

        def fail() -> None:
            names = ("seq_id", "kind", "reason", "forward_seq_id")
            repeat_failure(engine.run_state(run_id), **{name: getattr(failed, name) for name in names})

        others: dict[str, Work] = {
            "create_run": create,
            "fail_operation": fail,
            "snapshot_run": lambda: self._snapshot(command),
            "delete_run": lambda: self._delete_run(run_id, unload=command.delete_run.unload),
            "drop_graphs": lambda: engine.drop_graphs(run_id),
        }
        if what in _SAMPLING and self._sampling is not None:
            return self._prepare_sampling(what, command, self._sampling)
        if what not in others:
            raise error("PROTOCOL_VIOLATION", "The worker was sent a command that says nothing to do.")
        return others[what]

    def _snapshot(self, command: WorkerCommand) -> None:
        def written(failure: GradwireError | None) -> None:
            done = WorkerDone(error=to_status(failure) if failure else None)
            self._send(WorkerEvent(command_id=command.command_id, done=done))

        self._snapshots.take(self._engine.run_state(command.run_id), Path(command.snapshot_run.folder), written)

    def _prepare_sampling(self, what: str, command: WorkerCommand, sampling: Sampling) -> Work:
        match what:
            case "sample":
                request = sampling.read(command.sample.request)
                return lambda: sampling.start(command.command_id, command.sample, request)
            case "cancel_sample":
                return lambda: sampling.scheduler.cancel(command.cancel_sample.sample_id)
            case "open_sampler":
                model_path = command.open_sampler.sampler.model_path
                return lambda: sampling.open(model_path)
            case _:
                return lambda: sampling.samplers.close(command.close_sampler.sampler.model_path)

    def _delete_run(self, run_id: str, *, unload: bool) -> None:
        if self._sampling is not None and not unload:
            self._sampling.samplers.delete_run(run_id)
        self._engine.delete_run(run_id)

    def _refused(self, run_id: str, seq_id: int | None, what: str, exc: Exception) -> Work:
        def work() -> None:
            if seq_id is not None and what in _GRADIENT_PASSES:
                self._engine.fail_pass(run_id, seq_id)
            raise exc

        return work

    def _checked_batch(self, request: ops.ForwardRequest | ops.ForwardBackwardRequest, loss: Loss | None) -> Batch:
        batch = decode_batch(request.data, request.batch if request.HasField("batch") else None)
        validation.check_batch(
            batch,
            vocab_size=self._engine.model.vocab_size,
            max_context_length=self._engine.model.max_context_length,
            limits=self._engine.limits,
            loss=loss,
        )
        if loss is not None:
            validation.check_loss_config(loss, request.loss_fn_config)
        return batch

    def _forward(self, run_id: str, seq_id: int, request: ops.ForwardRequest) -> Work:
        if request.keep_graph and request.loss_fn:
            raise invalid_field(
                "loss_fn", f'is "{request.loss_fn}" together with keep_graph; a kept graph gets its loss from backward.'
            )
        if request.loss_fn_config and not request.loss_fn:
            raise invalid_field("loss_fn_config", "is set without loss_fn; name the loss it configures.")
        loss = find_loss(request.loss_fn) if request.loss_fn else None
        batch = self._checked_batch(request, loss)
        config, keep_graph = dict(request.loss_fn_config), request.keep_graph
        staged = self._engine.stage(batch, loss)

        def work() -> Message:
            found = self._engine.forward(run_id, seq_id, staged, keep_graph=keep_graph, loss=loss, config=config)
            return ops.ForwardResponse(**_encoded(found, batch))

        return work

    def _forward_backward(self, run_id: str, seq_id: int, request: ops.ForwardBackwardRequest) -> Work:
        loss = find_loss(request.loss_fn)
        batch = self._checked_batch(request, loss)
        config = dict(request.loss_fn_config)
        staged = self._engine.stage(batch, loss)

        def work() -> Message:
            found = self._engine.forward_backward(run_id, seq_id, staged, loss, config)
            return ops.ForwardBackwardResponse(**_encoded(found, batch))

        return work

    def _backward(self, run_id: str, seq_id: int, request: ops.BackwardRequest) -> Work:
        gradients_TK = validation.check_gradients(decode_tensor(request.gradients, "gradients"))
        forward_seq_id = request.forward_seq_id

        def work() -> Message:
            metrics = self._engine.backward(run_id, seq_id, forward_seq_id=forward_seq_id, gradients_TK=gradients_TK)
            return ops.BackwardResponse(metrics=metrics)

        return work

    def _optim_step(self, run_id: str, seq_id: int, request: ops.OptimStepRequest) -> Work:
        names = AdamParams.__dataclass_fields__
        params = AdamParams(**{name: getattr(request, name) for name in names if request.HasField(name)})
        normalization = _NORMALIZATIONS.get(request.grad_accumulation_normalization)
        if normalization is None:
            raise invalid_field(
                "grad_accumulation_normalization",
                f"is {request.grad_accumulation_normalization}, which this trainer does not know; known: "
                f"{', '.join(dict.fromkeys(_NORMALIZATIONS.values()))}.",
            )

        def work() -> Message:
            found = self._engine.optim_step(run_id, seq_id, params, normalization)
            return ops.OptimStepResponse(step=found.step, metrics=found.metrics)

        return work

    def _zero_grad(self, run_id: str, seq_id: int, request: ops.ZeroGradRequest) -> Work:
        def work() -> Message:
            self._engine.zero_grad(run_id)
            return ops.ZeroGradResponse()

        return work

    def _cancel(self, run_id: str, seq_id: int, request: ops.CancelRequest) -> Work:
        forward_seq_ids, taint = list(request.forward_seq_ids), request.taint

        def work() -> Message:
            return ops.CancelResponse(dropped=self._engine.cancel(run_id, forward_seq_ids, taint=taint))

        return work

    def _save_weights_for_sampler(self, run_id: str, seq_id: int, request: ops.SaveWeightsForSamplerRequest) -> Work:
        if request.ephemeral:
            return self._freeze(run_id, seq_id, request)
        check_checkpoint_name(request.name)
        name, overwrite, merged, dtype = request.name, request.overwrite, request.merged, request.dtype
        if request.checkpoint_type not in CheckpointType.values():
            raise invalid_field("checkpoint_type", f"is {request.checkpoint_type}; it must be BASE or DELTA.")
        delta = request.checkpoint_type == CHECKPOINT_TYPE_DELTA
        label = _label(request)

        def work() -> Message:
            self._engine.run_state(run_id).saving_seq_id = seq_id
            saved = self._engine.save_weights_for_sampler(
                run_id, name, label, merged=merged, delta=delta, overwrite=overwrite, dtype=dtype
            )
            return ops.SaveWeightsForSamplerResponse(path=saved.path, uri=saved.uri, size_bytes=saved.size_bytes)

        return work

    def _freeze(self, run_id: str, seq_id: int, request: ops.SaveWeightsForSamplerRequest) -> Work:
        if request.name or request.overwrite:
            raise invalid_field("name", "and overwrite belong to checkpoints; an ephemeral snapshot has neither.")
        if request.dtype:
            raise invalid_field("dtype", "is of what is written; an ephemeral snapshot has the dtype that trains.")
        if request.HasField("ttl_seconds") or request.user_metadata:
            raise invalid_field(
                "ttl_seconds", "and user_metadata belong to checkpoints; an ephemeral snapshot has neither."
            )

        def work() -> Message:
            assert self._sampling is not None, "a worker without sampling"
            path = self._sampling.samplers.snapshot(run_id, seq_id)
            return ops.SaveWeightsForSamplerResponse(path=str(path))

        return work

    def _save_state(self, run_id: str, seq_id: int, request: ops.SaveStateRequest) -> Work:
        check_checkpoint_name(request.name)
        name, overwrite, label = request.name, request.overwrite, _label(request)

        def work() -> Message:
            self._engine.run_state(run_id).saving_seq_id = seq_id
            saved = self._engine.save_state(run_id, name, label, overwrite=overwrite)
            return ops.SaveStateResponse(path=saved.path, size_bytes=saved.size_bytes)

        return work

    def _load_state(self, run_id: str, seq_id: int, request: ops.LoadStateRequest) -> Work:
        CheckpointPath.parse(request.path)
        path, with_optimizer = request.path, request.with_optimizer

        def work() -> Message:
            return ops.LoadStateResponse(step=self._engine.load_state(run_id, path, with_optimizer=with_optimizer))

        return work


def _label(request: ops.SaveStateRequest | ops.SaveWeightsForSamplerRequest) -> Label:
    """What the caller says about a checkpoint.

    Raises:
        InvalidArgumentError: INVALID_FIELD. ResourceExhaustedError: LIMIT_EXCEEDED.
    """
    ttl_seconds = request.ttl_seconds if request.HasField("ttl_seconds") else None
    check_ttl_seconds(ttl_seconds)
    return Label(ttl_seconds, check_user_metadata(request.user_metadata))


def _lora_settings(request: CreateRunRequest) -> LoraSettings | None:
    """What a request says of LoRA; None where all parameters train, or an adapter decides.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it says something that would have no effect.
    """
    names = ("lora_alpha", "seed", "train_mlp", "train_attn", "train_unembed")
    given: dict[str, Any] = {name: getattr(request, name) for name in names if request.HasField(name)}
    if given and request.adapter_path:
        raise invalid_field(
            next(iter(given)), "is set together with adapter_path; an adapter decides that itself. Leave it out."
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


def _encoded(found: ForwardResult, batch: Batch) -> dict[str, Any]:
    by_hand = batch.typed_by_hand
    return {
        "loss_fn_outputs": {"logprobs": tensor_message(found.logprobs_TK, typed_by_hand=by_hand)},
        "cu_seqlens": tensor_message(found.cu_seqlens, typed_by_hand=by_hand),
        "metrics": found.metrics,
    }
