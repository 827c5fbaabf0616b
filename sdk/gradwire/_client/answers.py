"""Turns the trainer's answers into the values users get."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from gradwire._wire.codec import decode_tensor
from gradwire._wire.metrics import combine_metrics
from gradwire.checkpoint_client import lora_layout, time_of
from gradwire.errors import from_status
from gradwire.sampling_client import SamplerSource
from gradwire.types import (
    ForwardBackwardOutput,
    LossFnOutputs,
    OptimStepResponse,
    SavedState,
    SaveWeightsResult,
    Timing,
)
from gradwire.types.replay import ReplayDifference, ReplayReport
from gradwire.types.run_info import ListedRun, RunInfo, ServerCapabilities, SupportedModel
from gradwire.types.server_info import Limits, LossInfo, Mesh, ModelInfo, ServerInfo
from gradwire.v1.run_pb2 import Run, RunState
from gradwire.v1.trainer_service_pb2 import GetServerInfoResponse, ReplayRunResponse, TrainResponse

T = TypeVar("T")


def timing(responses: Iterable[TrainResponse]) -> Timing:
    """Times of a call from those of its operations."""
    queue_ms = execute_ms = transfer_ms = 0.0
    for response in responses:
        queue_ms += response.queue_ms
        execute_ms += response.execute_ms
        transfer_ms += response.transfer_ms
    return Timing(queue_ms, execute_ms, transfer_ms)


def _body(response: TrainResponse) -> Any:
    return getattr(response, response.WhichOneof("result") or "error")


def forward_output(responses: Sequence[TrainResponse]) -> ForwardBackwardOutput:
    """Output of forward or forward_backward; its tensors are views of one buffer."""
    bodies = [_body(response) for response in responses]
    return ForwardBackwardOutput(
        loss_fn_outputs=_joined(bodies),
        metrics=combine_metrics(dict(body.metrics) for body in bodies),
        timing=timing(responses),
    )


def _joined(bodies: Sequence[Any]) -> LossFnOutputs:
    """The outputs of all pieces end to end."""
    arrays: dict[str, list[npt.NDArray[Any]]] = {}
    lengths: list[npt.NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
    for body in bodies:
        for name, tensor in body.loss_fn_outputs.items():
            arrays.setdefault(name, []).append(decode_tensor(tensor, name))
        lengths.append(np.diff(decode_tensor(body.cu_seqlens, "cu_seqlens")))
    joined = {name: found[0] if len(found) == 1 else np.concatenate(found) for name, found in arrays.items()}
    return LossFnOutputs(joined, np.cumsum(np.concatenate(lengths)))


def custom_output(
    forward: ForwardBackwardOutput, backward: Sequence[TrainResponse], loss: float, user_metrics: dict[str, float]
) -> ForwardBackwardOutput:
    """Output of forward_backward_custom: the user's own metrics, then the loss, then the trainer's."""
    trainer_metrics = combine_metrics([forward.metrics, *(dict(response.backward.metrics) for response in backward)])
    times = timing(backward)
    return ForwardBackwardOutput(
        loss_fn_outputs=forward.loss_fn_outputs,
        metrics={**user_metrics, "loss:sum": loss}
        | {k: v for k, v in trainer_metrics.items() if k not in user_metrics},
        timing=Timing(
            forward.timing.queue_ms + times.queue_ms,
            forward.timing.execute_ms + times.execute_ms,
            forward.timing.transfer_ms + times.transfer_ms,
        ),
    )


def optim_step(responses: Sequence[TrainResponse]) -> OptimStepResponse:
    """Output of optim_step."""
    body = responses[0].optim_step
    return OptimStepResponse(step=body.step, metrics=dict(body.metrics), timing=timing(responses))


def save_weights(responses: Sequence[TrainResponse]) -> SaveWeightsResult:
    """Output of save_weights_for_sampler."""
    body = responses[0].save_weights_for_sampler
    return SaveWeightsResult(
        path=body.path, snapshot_name=body.path.rpartition("/")[2], uri=body.uri, size_bytes=body.size_bytes
    )


def sampler_source(responses: Sequence[TrainResponse]) -> SamplerSource:
    """What names the snapshot that save_weights_for_sampler made."""
    return SamplerSource(model_path=responses[0].save_weights_for_sampler.path)


def saved_state(responses: Sequence[TrainResponse]) -> SavedState:
    """Output of save_state."""
    return SavedState(responses[0].save_state.path)


def nothing(_responses: Sequence[TrainResponse]) -> None:
    """Output of calls that only succeed."""


def loaded(responses: Sequence[TrainResponse]) -> int:
    """Output of load_state as GetAnswer tells it: the step in the loaded state."""
    return responses[0].load_state.step


def backward_metrics(responses: Sequence[TrainResponse]) -> dict[str, float]:
    """Output of the backward of a custom loss."""
    return dict(responses[0].backward.metrics)


def one_operation(response: TrainResponse) -> Any:
    """What one operation gave, whichever it is.

    Raises:
        GradwireError: What it failed with.
    """
    kind = response.WhichOneof("result") or "error"
    if kind == "error":
        raise from_status(response.error)
    return _OF_KIND.get(kind, nothing)([response])


_OF_KIND: dict[str, Callable[[Sequence[TrainResponse]], Any]] = {
    "forward": forward_output,
    "forward_backward": forward_output,
    "backward": backward_metrics,
    "optim_step": optim_step,
    "save_weights_for_sampler": save_weights,
    "save_state": saved_state,
    "load_state": loaded,
}


def run_state_name(state: int) -> str:
    """ "active" for RUN_STATE_ACTIVE, and so on; the number of one that only a newer trainer knows."""
    known = RunState.DESCRIPTOR.values_by_number.get(state)
    return str(state) if known is None else known.name.removeprefix("RUN_STATE_").lower()


def _copied(made: type[T], message: Any, **read: Any) -> T:
    """A dataclass with the fields of a message of the same names; those in `read` are given."""
    # A dataclass's own fields, so that a message of a newer trainer may have more.
    return made(**{f.name: getattr(message, f.name) for f in fields(made) if f.name not in read} | read)  # type: ignore[arg-type]


def server_info(message: GetServerInfoResponse) -> ServerInfo:
    """Output of get_server_info."""
    return _copied(
        ServerInfo,
        message,
        models=tuple(
            _copied(
                ModelInfo,
                model,
                aliases=tuple(model.aliases),
                # A trainer that does not say has one rank, no replicas, whole layers, or all experts.
                mesh=_copied(
                    Mesh,
                    model.mesh,
                    dp_replicate_size=model.mesh.dp_replicate_size or 1,
                    tp_size=model.mesh.tp_size or 1,
                    ep_size=model.mesh.ep_size or 1,
                )
                if model.HasField("mesh")
                else Mesh(),
            )
            for model in message.models
        ),
        losses=tuple(
            _copied(
                LossInfo,
                loss,
                loss_fn_inputs=tuple(loss.loss_fn_inputs),
                loss_fn_config_keys=tuple(loss.loss_fn_config_keys),
                loss_fn_config_defaults=dict(loss.loss_fn_config_defaults),
            )
            for loss in message.losses
        ),
        limits=_copied(Limits, message.limits),
    )


def server_capabilities(info: ServerInfo) -> ServerCapabilities:
    """Output of get_server_capabilities."""
    named = ((name, model) for model in info.models for name in (model.base_model, *model.aliases))
    return ServerCapabilities([SupportedModel(name, model.max_context_length) for name, model in named])


def listed_run(run: Run) -> ListedRun:
    """One run of list_runs."""
    return _copied(
        ListedRun,
        run,
        state=run_state_name(run.state),
        created_at=time_of(run, "created_at"),
        user_metadata=dict(run.user_metadata),
    )


def run_info(run: Run, model: ModelInfo) -> RunInfo:
    """Output of get_info."""
    return RunInfo(
        run_id=run.run_id,
        base_model=run.base_model,
        lora_rank=run.lora_rank,
        step=run.step,
        state=run_state_name(run.state),
        vocab_size=model.vocab_size,
        max_context_length=model.max_context_length,
        num_parameters=model.num_parameters,
        architecture=model.architecture,
        display_name=run.display_name,
        user_metadata=dict(run.user_metadata),
        lora=lora_layout(run),
    )


def replay_report(message: ReplayRunResponse) -> ReplayReport:
    """Output of replay_run."""
    difference = _copied(ReplayDifference, message.difference) if message.HasField("difference") else None
    return _copied(ReplayReport, message, difference=difference)
