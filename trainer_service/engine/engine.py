"""The verbs of training over any number of runs of one base model. Plain arrays in, plain values out; no gRPC.

One thread calls it. Arguments are already checked (validation.py), except for what depends on a run's state.
Shape suffixes: T tokens of one batch or microbatch, V vocabulary, K targets a token (absent where targets are [T]).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from gradwire._wire.codec import Batch
from gradwire.errors import error, invalid_field
from gradwire.types import AdamParams
from transformers import PreTrainedModel

from trainer_service import model_folder
from trainer_service.config import Limits
from trainer_service.engine.adapter_offload import AdapterOffload
from trainer_service.engine.base_models import BaseModels
from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device, out_of_memory
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.memory import parameter_bytes, training_bytes
from trainer_service.engine.microbatch import ModelSize, plan_forwards
from trainer_service.engine.models.base_dtype import KeptBase
from trainer_service.engine.models.load import describe
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.models.lora_targets import find_targets
from trainer_service.engine.models.quantized import held_bytes
from trainer_service.engine.models.source import ModelSource
from trainer_service.engine.parallel.expert_parallel import num_gathered
from trainer_service.engine.parallel.sharding import free_cycles, readable, reshard
from trainer_service.engine.passes import ForwardResult, Passes, Staged
from trainer_service.engine.rank_channels import Ranks
from trainer_service.engine.run_state import HeldGraph, RunState
from trainer_service.engine.storage.checkpoints import Checkpoints, Label, SavedCheckpoint
from trainer_service.engine.storage.snapshots import restore_snapshot
from trainer_service.worker_config import EngineSettings

logger = logging.getLogger(__name__)
T = TypeVar("T")
Normalization = Literal["none", "num_loss_tokens", "num_sequences"]


@dataclass(frozen=True)
class OptimStepResult:
    """What an optimizer step did: steps applied to the run, this one included, and metrics by `name:reduction`."""

    step: int
    metrics: dict[str, float]


class Engine:
    """Runs of one base model on one device.

    Args:
        base_model: Hub id or folder. Loaded here; the first run takes this copy.
        device: Where models are.
        checkpoint_dir: Where checkpoints go, in a folder for each run.
        limits: max_runs is enforced here; the others apply to batches, before they get here.
        settings: Settings for memory and precision.
        max_context_length: Longest sequence allowed, tokens; 0 means the model's own limit.
        served_model_name: Name of the model in messages and files for callers; "" for base_model.
        ranks: Share models and batches; each rank has an engine, and calls the same verbs.
        findings_folder: See ModelSource.

    Raises:
        InvalidArgumentError: The model cannot be loaded.
    """

    def __init__(
        self,
        base_model: str,
        *,
        device: Device,
        checkpoint_dir: Path,
        limits: Limits | None = None,
        settings: EngineSettings | None = None,
        max_context_length: int = 0,
        served_model_name: str = "",
        ranks: Ranks | None = None,
        findings_folder: Path | None = None,
    ) -> None:
        name = served_model_name or base_model
        self.ranks = ranks or Ranks()
        self.limits = limits or Limits()
        self.device = device
        self.counters = Counters()
        self.folder = model_folder.fetch(base_model)
        """Where the base model's files are."""
        settings = settings or EngineSettings()
        kept = self._kept = KeptBase(settings.base_dtype, device, self.folder, self.ranks)
        self.source = ModelSource(base_model, self.folder, device, self.ranks, findings_folder)
        """Where its models come from."""
        described = describe(self.source.example, base_model=name, device=device, max_context_length=max_context_length)
        self.model = replace(described, dtype=kept.dtype)
        """What is trained, for GetServerInfo."""
        self._checkpoints = Checkpoints(checkpoint_dir, self.model, self.folder, self.ranks.execution)
        self.traits = self.source.find_traits(max_context_length=self.model.max_context_length)
        """What the architecture allows."""
        example = self.source.example
        size = ModelSize(num_gathered(example, self.ranks), vocab_size=example.config.get_text_config().vocab_size)
        own = -(-(total := described.num_parameters) // (self.ranks.fsdp_size * self.ranks.tp_size))
        self._plan_passes(settings, replace(size, model_bytes=training_bytes(own), whole_bytes=parameter_bytes(total)))
        first = self.source.load()
        self.lora_targets = find_targets(first, lambda: self._passes.try_forward(first))
        """What LoRA runs can adapt."""
        # What that forward gathered without gradients is not what a pass may train.
        reshard(first)
        first = kept.copy(first, self.lora_targets)
        if not kept.trains:
            free_cycles()
            held, whole = held_bytes(first), held_bytes(first) * self.ranks.fsdp_size
            self._plan_passes(settings, replace(size, model_bytes=held, whole_bytes=whole))
        self._base_models = BaseModels(
            name,
            first=first,
            load=lambda: kept.copy(self.source.load(), self.lora_targets),
            for_adapters=lambda model: kept.shared_copy(model, self.lora_targets),
            targets=self.lora_targets,
            ranks=self.ranks,
        )
        self._runs: dict[str, RunState] = {}
        self._adapter_offload = AdapterOffload(self.memory.max_device_adapter_bytes, self.counters)
        self.before_change: Callable[[PreTrainedModel], object] = lambda model: None
        """Called before the parameters of a model change, since samplers may be reading them."""

    def base_model(self) -> PreTrainedModel:
        """The base model, for reading: a copy that no run has changed, loaded if there is none; see `_readable`."""
        what = f"the base model's {self.model.num_parameters} parameters"
        return self._attempt(lambda: self._readable(self._base_models.base_model()), what=what)

    def adapted_model(self, folder: Path) -> PreTrainedModel:
        """The base model with the adapter in a folder, for reading."""
        return self._attempt(lambda: self._readable(self._base_models.adapted_model(folder)), what="an adapter")

    def create_run(self, run_id: str, *, lora: LoraSettings | None = None, adapter: str = "") -> None:
        """Creates a run with its own copy of the base model's parameters, or with an adapter beside a shared copy.

        Args:
            run_id: Name of the run.
            lora: Trains a new adapter.
            adapter: Trains the adapter in this folder.

        Raises:
            InvalidArgumentError: INVALID_FIELD: settings or an adapter that do not fit the model.
            ResourceExhaustedError: LIMIT_EXCEEDED: there are max_runs runs already.
        """
        if len(self._runs) >= self.limits.max_runs:
            text = f"This trainer holds {len(self._runs)} runs, its limit; delete one first."
            raise error("LIMIT_EXCEEDED", text, limit=self.limits.max_runs, got=len(self._runs) + 1)
        assert run_id not in self._runs
        if not self._kept.trains and lora is None and not adapter:
            raise invalid_field(
                "lora_rank",
                f"is 0, which trains all parameters, but this trainer keeps its base model in {self._kept.dtype} "
                "(--base-dtype), where only LoRA runs train; set lora_rank.",
            )

        def make() -> RunState:
            if adapter:
                return self._base_models.from_adapter(run_id, Path(adapter))
            return self._base_models.lora(run_id, lora) if lora else self._base_models.full(run_id)

        what = "an adapter" if lora or adapter else f"a run's {self.model.num_parameters} parameters"
        self._runs[run_id] = self._attempt(make, what=what)
        self._count_held()

    def restore_run(self, run_id: str, snapshot_folder: Path) -> None:
        """Restores a snapshot into a run just created; if that fails, the run is deleted.

        Raises:
            GradwireError: The snapshot is damaged, or belongs to another model.
        """
        try:
            self._attempt(
                lambda: restore_snapshot(self.run_state(run_id), snapshot_folder, self.ranks.execution),
                what="the optimizer's state",
            )
        except BaseException:
            self.delete_run(run_id)
            raise

    def delete_run(self, run_id: str) -> None:
        """Frees a run's memory; its exports stay. Does nothing if the run does not exist."""
        if self._runs.pop(run_id, None) is not None:
            self._base_models.deleted(run_id)
            self._adapter_offload.forget(run_id)
            if self.ranks.world_size > 1:
                free_cycles()
            self.device.release_cached_memory()
            self._count_held()

    def stage(self, batch: Batch, loss: Loss | None = None, config: Mapping[str, float] | None = None) -> Staged:
        """The argument of forward and forward_backward. Prepares what can be done before their turn, on any thread.

        If the device has no memory to spare, the rest waits for their turn, and fits then or fails with an error.

        Args:
            batch: The checked batch.
            loss: The loss to evaluate; None for none.
            config: The loss settings that the caller gave.
        """
        staged = self._passes.stage(batch, loss, config)
        try:
            staged.place_ahead()
        except Exception as exc:
            if not out_of_memory(exc):
                raise
        return staged

    def forward(self, run_id: str, seq_id: int, staged: Staged, *, keep_graph: bool = False) -> ForwardResult:
        """Logprobs of the targets, and the metrics of the loss if any; keep_graph holds the graph for one backward."""
        assert not (keep_graph and staged.loss)
        run = self._run(run_id)
        work = lambda: self._passes.forward(run, seq_id, staged, keep_graph=keep_graph)  # noqa: E731
        try:
            return self._attempt(work, what=f"the forward of {staged.batch.num_tokens} tokens")
        finally:
            self._count_held()

    def forward_backward(self, run_id: str, seq_id: int, staged: Staged) -> ForwardResult:
        """Runs a built-in loss and adds its gradients to the run's. Any exception taints the accumulation.

        Raises:
            FailedPreconditionError: NON_FINITE: the loss is NaN or infinite.
            DeviceOutOfMemoryError: The device has no room for it.
        """
        run = self._run(run_id, taints=seq_id)
        what = f"the forward_backward of {staged.batch.num_tokens} tokens"
        return self._attempt(lambda: self._passes.forward_backward(run, staged), what=what, taints=(run, seq_id))

    def backward(
        self, run_id: str, seq_id: int, *, forward_seq_id: int, gradients_TK: npt.NDArray[np.float32]
    ) -> dict[str, float]:
        """Runs backward through a held graph, which is used up, and adds the gradients to the run's.

        Returns:
            Metrics by `name:reduction`.

        Raises:
            FailedPreconditionError: NO_HELD_GRAPH.
            InvalidArgumentError: Gradients not shaped as the logprobs; the graph stays held.
            DeviceOutOfMemoryError: The device has no room for it. Whatever is raised taints the accumulation.
        """
        run = self._run(run_id, taints=seq_id)
        work = lambda: self._passes.backward(run, forward_seq_id=forward_seq_id, gradients_TK=gradients_TK)  # noqa: E731
        try:
            return self._attempt(work, what=f"the backward of forward {forward_seq_id}", taints=(run, seq_id))
        finally:
            self._count_held()

    def fail_pass(self, run_id: str, seq_id: int) -> None:
        """Taints a run whose pass was refused before it got here, as if it had failed here."""
        self._run(run_id).taint(seq_id)

    def optim_step(
        self, run_id: str, seq_id: int, params: AdamParams, normalization: Normalization = "none"
    ) -> OptimStepResult:
        """Applies AdamW to the accumulated gradients and clears them. Drops held graphs, whose parameters have changed.

        Raises:
            FailedPreconditionError: PRIOR_OPERATION_FAILED, or NON_FINITE if gradients are not finite or the result
                would not be: gradients are cleared, parameters and optimizer state are as before. NO_GRADIENTS.
            DeviceOutOfMemoryError: The optimizer's state does not fit; gradients are as before.
        """
        run = self._run(run_id)
        if (failure := run.prior_failure()) is not None:
            run.clear_gradients()
            raise failure
        accumulation = run.accumulation
        if not accumulation.num_passes:
            raise error(
                "NO_GRADIENTS",
                "optim_step has no gradients to apply: none were accumulated since the last optim_step or zero_grad. "
                "Call forward_backward or forward_backward_custom first.",
            )
        # Without loss tokens all gradients are zero, whatever the divisor.
        divisor = max(1, accumulation.divisor(normalization))
        self._will_change(run)
        result = self._attempt(
            lambda: run.optimizer.step(params, divisor=divisor), what="the optimizer's state, twice the parameters"
        )
        run.clear_gradients()
        if not result.applied:
            raise run.step_failure(params, result)
        run.step += 1
        self.counters.optim_steps_total += 1
        run.drop_graphs(f"was dropped by optim_step {seq_id}, which changed the parameters it was computed with")
        self._count_held()
        metrics = {
            "grad_norm:mean": result.grad_norm,
            "num_loss_tokens:sum": float(accumulation.num_loss_tokens),
            "num_sequences:sum": float(accumulation.num_sequences),
        }
        return OptimStepResult(step=run.step, metrics=metrics)

    def zero_grad(self, run_id: str) -> None:
        """Clears gradients and the taint of a failed pass. Held graphs stay."""
        self._run(run_id).clear_gradients()

    def cancel(self, run_id: str, forward_seq_ids: list[int], *, taint: bool = False) -> int:
        """Drops held graphs whose loss will not come; with taint, as if their backward had failed. Returns how many."""
        run = self._run(run_id)
        dropped = run.drop_graphs("was dropped by cancel", forward_seq_ids)
        if taint and forward_seq_ids:
            run.taint(min(forward_seq_ids))
        self._count_held()
        return dropped

    def drop_graphs(self, run_id: str) -> None:
        """Drops every graph of a run whose client is gone. Does nothing if the run does not exist."""
        if run_id in self._runs:
            self._runs[run_id].drop_graphs("was dropped because the client went away")
            self._count_held()

    def save_weights_for_sampler(
        self,
        run_id: str,
        name: str,
        label: Label | None = None,
        *,
        merged: bool = False,
        delta: bool = False,
        overwrite: bool = False,
        dtype: str = "",
    ) -> SavedCheckpoint:
        """Exports the parameters as a Hugging Face folder, or those of a LoRA run, unless merged, as a PEFT folder.

        For `dtype`, see Checkpoints.save_weights_for_sampler.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED.
        """
        run = self._run(run_id)

        def work() -> SavedCheckpoint:
            model = self._base_models.merged(run) if merged and run.adapter is not None else None
            return self._checkpoints.save_weights_for_sampler(
                run, name, label, merged=model, delta=delta, overwrite=overwrite, dtype=dtype
            )

        return self._attempt(work, what="the merged weights")

    def save_state(
        self, run_id: str, name: str, label: Label | None = None, *, overwrite: bool = False
    ) -> SavedCheckpoint:
        """Saves resumable state.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED.
        """
        run = self._run(run_id)
        return self._checkpoints.save_state(run, name, label, overwrite=overwrite)

    def load_state(self, run_id: str, path: str, *, with_optimizer: bool) -> int:
        """Loads resumable state; see Checkpoints.load_state. Returns the optimizer steps in it."""
        run = self._run(run_id)

        def work() -> int:
            self._will_change(run)
            return self._checkpoints.load_state(run, path, with_optimizer=with_optimizer)

        step = self._attempt(work, what=f"the state {path}")
        self._count_held()
        return step

    def live_model(self, run_id: str) -> PreTrainedModel:
        """A run's own model, for reading until it changes; see before_change, `_readable`."""
        run = self._run(run_id)
        model = self._readable(run.model)
        run.being_read = model is run.model
        return model

    def run_state(self, run_id: str) -> RunState:
        """The state of a run, for the thread that calls the verbs.

        Raises:
            NotFoundError: RUN_NOT_FOUND.
        """
        return self._run(run_id)

    def _plan_passes(self, settings: EngineSettings, size: ModelSize) -> None:
        """Divides what a model leaves of memory, alike on all ranks."""
        forwards = plan_forwards(self.device, self.traits, settings, self.ranks, size)
        self.memory, self._passes = forwards.memory, Passes(forwards, self.counters, self._held_graphs, self.ranks)

    def _readable(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model to sample from; of one in parts a copy, whole where there is room."""
        return readable(model, in_parts=self.memory.samples_in_parts)

    def _will_change(self, run: RunState) -> None:
        self._base_models.will_change(run)
        reshard(run.model)
        self.before_change(run.model)
        run.being_read = False

    def _run(self, run_id: str, *, taints: int | None = None) -> RunState:
        """A run, all of it on the device; if it does not fit, the pass `taints` has failed."""
        run = self._runs.get(run_id)
        if run is None:
            raise error("RUN_NOT_FOUND", f'The worker holds no run "{run_id}".', run_id=run_id)
        failed = None if taints is None else (run, taints)
        self._attempt(lambda: self._adapter_offload.use(run), what="an adapter that was in host memory", taints=failed)
        return run

    def _attempt(self, work: Callable[[], T], *, what: str, taints: tuple[RunState, int] | None = None) -> T:
        """Runs `work`. Any exception taints the accumulation; running out of device memory becomes a clear error."""
        try:
            result = work()
            self.device.synchronize()
            return result
        except BaseException as exc:
            if taints is not None:
                run, seq_id = taints
                run.taint(seq_id)
            if not out_of_memory(exc):
                raise
            logger.warning("Out of memory.", extra={"fields": {"what": what, "why": str(exc).partition("\n")[0]}})
        # Out here the exception is gone, and with it the frames that held tensors of the failed work.
        self.device.release_cached_memory()
        failure = error(
            "DEVICE_OUT_OF_MEMORY",
            f"{self.device.name} has no memory left for {what}, in forwards of at most {self.memory.max_pack_tokens} "
            f"tokens beside at most {self.memory.max_held_graph_bytes >> 20} MiB of held graphs. The run goes on. "
            "Start the trainer with a smaller --max-pack-tokens or --max-held-graph-bytes, or with "
            "--activation-checkpointing on, send shorter or fewer sequences a call, or delete runs that are done.",
            device=self.device.name,
            what=what,
            max_pack_tokens=self.memory.max_pack_tokens,
            max_held_graph_bytes=self.memory.max_held_graph_bytes,
        )
        raise self.ranks.alone_with(failure)

    def _held_graphs(self) -> list[HeldGraph]:
        return [graph for run in self._runs.values() for graph in run.graphs.values()]

    def _count_held(self) -> None:
        graphs = self._held_graphs()
        self.counters.held_graphs = len(graphs)
        self.counters.held_graph_bytes = sum(piece.held_bytes for graph in graphs for piece in graph.pieces)
        self.counters.runs = len(self._runs)
