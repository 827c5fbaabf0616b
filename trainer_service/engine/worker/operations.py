"""The operations of a run: a TrainRequest decoded and checked, and the answer it gets."""

from collections.abc import Callable
from typing import Any

from google.protobuf.message import Message
from gradwire._wire.codec import Batch, decode_batch, decode_tensor, tensor_message
from gradwire.errors import error, invalid_field
from gradwire.types import AdamParams
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_TYPE_DELTA, CheckpointType
from gradwire.v1.trainer_service_pb2 import TrainRequest

from trainer_service.engine import validation
from trainer_service.engine.engine import Engine, ForwardResult, Normalization
from trainer_service.engine.losses import find_loss
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.storage.checkpoints import Label
from trainer_service.engine.worker.prepared import Work
from trainer_service.field_limits import check_lease_ms, check_ttl_seconds
from trainer_service.paths import CheckpointPath, check_checkpoint_name
from trainer_service.user_metadata import check_user_metadata

_NORMALIZATIONS: dict[int, Normalization] = {
    ops.GRAD_ACCUMULATION_NORMALIZATION_UNSPECIFIED: "none",
    ops.GRAD_ACCUMULATION_NORMALIZATION_NONE: "none",
    ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS: "num_loss_tokens",
    ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES: "num_sequences",
}
_GRADIENT_PASSES = ("forward_backward", "backward")


class RunOperations:
    """Prepares operations of runs for an engine.

    Args:
        engine: Executes them.
        sampling: Keeps the frozen weights that operations make; None if nothing is sampled.
    """

    def __init__(self, engine: Engine, sampling: Sampling | None) -> None:
        self._engine = engine
        self._sampling = sampling
        self._kinds: dict[str, Callable[[str, int, Any], Work]] = {
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

    def prepare(self, run_id: str, request: TrainRequest) -> Work:
        """Decodes and checks an operation.

        Raises:
            GradwireError: What is wrong with it.
        """
        kind = request.WhichOneof("operation") or "nothing"
        if kind not in self._kinds:
            raise error("PROTOCOL_VIOLATION", f'The worker was sent "{kind}", which is no operation of a run.')
        return self._kinds[kind](run_id, request.seq_id, getattr(request, kind))

    def refused(self, run_id: str, seq_id: int, kind: str) -> None:
        """Marks the run of a refused operation as if it had failed while executing."""
        if kind in _GRADIENT_PASSES:
            self._engine.fail_pass(run_id, seq_id)

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
                "loss_fn", f'is "{request.loss_fn}", and keep_graph is set; a kept graph gets its loss from backward.'
            )
        if request.loss_fn_config and not request.loss_fn:
            raise invalid_field("loss_fn_config", "is set without loss_fn; name the loss it configures.")
        loss = find_loss(request.loss_fn) if request.loss_fn else None
        batch = self._checked_batch(request, loss)
        staged, keep_graph = self._engine.stage(batch, loss, dict(request.loss_fn_config)), request.keep_graph

        def work() -> Message:
            found = self._engine.forward(run_id, seq_id, staged, keep_graph=keep_graph)
            return ops.ForwardResponse(**_encoded(found, batch))

        return work

    def _forward_backward(self, run_id: str, seq_id: int, request: ops.ForwardBackwardRequest) -> Work:
        loss = find_loss(request.loss_fn)
        batch = self._checked_batch(request, loss)
        staged = self._engine.stage(batch, loss, dict(request.loss_fn_config))

        def work() -> Message:
            found = self._engine.forward_backward(run_id, seq_id, staged)
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
        if request.lease_ms:
            raise invalid_field("lease_ms", "applies to ephemeral frozen weights; a checkpoint stays by itself.")
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
            raise invalid_field("name", "and overwrite belong to checkpoints; ephemeral frozen weights have neither.")
        if request.dtype:
            raise invalid_field("dtype", "is of exported files; ephemeral frozen weights have the dtype that trains.")
        if request.HasField("ttl_seconds") or request.user_metadata:
            raise invalid_field(
                "ttl_seconds", "and user_metadata belong to checkpoints; ephemeral frozen weights have neither."
            )
        check_lease_ms(request.lease_ms)
        lease_s = request.lease_ms / 1000

        def work() -> Message:
            assert self._sampling is not None, "a worker without sampling"
            path = self._sampling.samplers.freeze(run_id, seq_id, lease_s=lease_s)
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


def _encoded(found: ForwardResult, batch: Batch) -> dict[str, Any]:
    by_hand = batch.typed_by_hand
    return {
        "loss_fn_outputs": {"logprobs": tensor_message(found.logprobs_TK, typed_by_hand=by_hand)},
        "cu_seqlens": tensor_message(found.cu_seqlens, typed_by_hand=by_hand),
        "metrics": found.metrics,
    }
