"""What the adapter of a LoRA run adapts, as GetRun tells it."""

import contextlib
from pathlib import Path

from gradwire.v1.checkpoint_pb2 import LoraLayout
from gradwire.v1.run_pb2 import Run
from gradwire.v1.trainer_service_pb2 import CreateRunRequest
from gradwire.v1.worker_service_pb2 import LoraTargets

from trainer_service.adapter_folders import DEFAULT_ALPHA, adapted_modules, read_adapter_config, starred


def tell_layout(run: Run, request: CreateRunRequest, targets: LoraTargets) -> None:
    """Says in a run's message what its adapter adapts, if it has one."""
    if request.lora_rank:
        # A copy of an adapter that cannot be read is told when the run is restored from it.
        with contextlib.suppress(OSError, ValueError, KeyError):
            run.lora.CopyFrom(lora_layout(request, targets))


def lora_layout(request: CreateRunRequest, targets: LoraTargets) -> LoraLayout:
    """The layout of a LoRA run's adapter.

    Args:
        request: What made the run; adapter_path is its own copy of the adapter it started from.
        targets: What of the model can be adapted.

    Raises:
        OSError, ValueError, KeyError: That copy cannot be read.
    """
    kinds = {"train_attn": targets.attn, "train_mlp": targets.mlp, "train_unembed": targets.unembed}
    names = [name for kind in kinds.values() for name in kind]
    if request.adapter_path:
        folder = Path(request.adapter_path)
        alpha = read_adapter_config(folder)["lora_alpha"]
        modules = set(starred(adapted_modules(folder)))
        # Weights of experts are parameters of the module that has matrices.
        adapted = {name for name in names if name in modules or name.rpartition(".")[0] in modules}
    else:
        alpha = request.lora_alpha if request.HasField("lora_alpha") else DEFAULT_ALPHA
        wanted = [field for field in kinds if not request.HasField(field) or getattr(request, field)]
        adapted = {name for field in wanted for name in kinds[field]}
    return LoraLayout(
        lora_alpha=alpha,
        adapted=sorted(adapted),
        left_out=sorted({*names, *targets.others} - adapted),
        **{field: bool(kind) and adapted >= set(kind) for field, kind in kinds.items()},
    )
