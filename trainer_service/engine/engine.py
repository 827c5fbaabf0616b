"""The verbs of training over any number of runs of one base model. Plain arrays in, plain values out; no gRPC.

One thread calls it. Arguments were checked (validation.py); what only a run's state can tell is checked here.
Shape suffixes: T tokens of one batch or microbatch, V vocabulary, K targets a token (absent where targets are [T]).
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from gradwire.codec import Batch
from gradwire.errors import error
from gradwire.types import AdamParams
from torch import Tensor
from transformers import PreTrainedModel

from trainer_service.config import EngineSettings, Limits
from trainer_service.engine.checkpoints import Checkpoints, SavedCheckpoint
from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device, out_of_memory
from trainer_service.engine.loss_totals import LossTotals
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.memory import plan_memory
from trainer_service.engine.microbatch import Columns, Forwards, Microbatch, gather
from trainer_service.engine.models.load import describe, fetch, load_model
from trainer_service.engine.models.runner import find_traits, prepare
from trainer_service.engine.optim import AdamW
from trainer_service.engine.packing import Pack, plan_packs
from trainer_service.engine.run_state import HeldGraph, HeldPiece, RunState
from trainer_service.engine.snapshots import restore_snapshot
from trainer_service.engine.validation import check_gradients_shape

logger = logging.getLogger(__name__)
T = TypeVar("T")
Normalization = Literal["none", "num_loss_tokens", "num_sequences"]


@dataclass(frozen=True)
class ForwardResult:
    """What a forward or forward_backward found.

    Attributes:
        logprobs_TK: Of the targets, natural log, float32, [T] or [T, K] as the targets.
        cu_seqlens: The batch's, int64 [N + 1].
        metrics: By `name:reduction`.
    """

    logprobs_TK: npt.NDArray[np.float32]
    cu_seqlens: npt.NDArray[np.int64]
    metrics: dict[str, float]


@dataclass(frozen=True)
class OptimStepResult:
    """What an optimizer step did: steps applied to the run, this one included, and metrics by `name:reduction`."""

    step: int
    metrics: dict[str, float]


class Engine:
    """Runs of one base model on one device.

    Args:
        base_model: Hub id or folder. Loaded here; the first run takes this copy.
        device: Where.
        checkpoint_dir: Where checkpoints go, in a folder a run.
        limits: max_runs is kept here; the rest is for those who check batches.
        settings: What the trainer's owner decided about memory.
        max_context_length: Longest sequence taken, tokens; 0 takes the model's own limit.

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
    ) -> None:
        self.limits = limits or Limits()
        self.device = device
        self.counters = Counters()
        self._base_model = base_model
        self._folder = fetch(base_model)
        self._spare: PreTrainedModel | None = load_model(base_model, self._folder, device)
        self.model = describe(self._spare, base_model=base_model, device=device, max_context_length=max_context_length)
        """What is trained, for GetServerInfo."""
        self._checkpoints = Checkpoints(checkpoint_dir, self.model, self._folder)
        settings = settings or EngineSettings()
        self.traits = find_traits(self._spare, device.torch_device, max_context_length=self.model.max_context_length)
        """What the architecture allows."""
        self.memory = plan_memory(device, self.traits, settings, num_parameters=self.model.num_parameters)
        """How memory is shared out."""
        self._forwards = Forwards(
            device,
            self.traits,
            self.memory,
            settings.activation_checkpointing,
            self._spare.config.get_text_config().vocab_size,
        )
        prepare(self._spare, self.traits)
        self._runs: dict[str, RunState] = {}

    def create_run(self, run_id: str, *, lora_rank: int = 0) -> None:
        """Makes a run with parameters of its own, equal to the base model's.

        Raises:
            UnimplementedError: lora_rank above 0.
            ResourceExhaustedError: LIMIT_EXCEEDED: as many runs as there may be.
        """
        if lora_rank > 0:
            raise error(
                "NOT_IMPLEMENTED",
                f"lora_rank is {lora_rank}, but this version trains all parameters only; pass lora_rank=0.",
            )
        if len(self._runs) >= self.limits.max_runs:
            raise error(
                "LIMIT_EXCEEDED",
                f"This trainer holds {len(self._runs)} runs, as many as it may; delete one first.",
                limit=self.limits.max_runs,
                got=len(self._runs) + 1,
            )
        assert run_id not in self._runs

        def load() -> RunState:
            model, self._spare = self._spare, None
            if model is None:
                model = load_model(self._base_model, self._folder, self.device)
                prepare(model, self.traits)
            return RunState(run_id=run_id, model=model, optimizer=AdamW(model.parameters()))

        self._runs[run_id] = self._attempt(load, what=f"a run's {self.model.num_parameters} parameters")
        self._count_held()

    def restore_run(self, run_id: str, snapshot_folder: Path) -> None:
        """Makes a run just created what a snapshot says; it is deleted where that fails.

        Raises:
            GradwireError: The snapshot is damaged, or of another model.
        """
        try:
            self._attempt(
                lambda: restore_snapshot(self.run_state(run_id), snapshot_folder), what="the optimizer's state"
            )
        except BaseException:
            self.delete_run(run_id)
            raise

    def delete_run(self, run_id: str) -> None:
        """Frees a run's memory; its exports stay. A run that is not there is passed over."""
        if self._runs.pop(run_id, None) is not None:
            self.device.release_cached_memory()
            self._count_held()

    def forward(
        self,
        run_id: str,
        seq_id: int,
        batch: Batch,
        *,
        keep_graph: bool = False,
        loss: Loss | None = None,
        config: Mapping[str, float] | None = None,
    ) -> ForwardResult:
        """Logprobs of the targets; with keep_graph held for one backward, with a loss that loss's metrics too."""
        assert not (keep_graph and loss)
        run = self._run(run_id)

        def work() -> ForwardResult:
            columns = self._to_device(batch, loss)
            pieces: list[tuple[Microbatch, Tensor]] = []
            held: list[HeldPiece] = []
            totals = LossTotals(loss, config) if loss else None
            for pack in self._plan(batch):
                microbatch = Microbatch(pack, columns, self._forwards)
                with_graph = keep_graph and self._make_room(microbatch, held)
                with torch.set_grad_enabled(with_graph):
                    logprobs_RK = self._logprobs(run, microbatch)
                pieces.append((microbatch, logprobs_RK.detach()))
                if keep_graph:
                    held.append(HeldPiece(microbatch, logprobs_RK if with_graph else None))
                if totals is not None:
                    totals.add(pack, microbatch.loss_inputs(logprobs_RK))
            metrics = _batch_metrics(batch, pieces) | (totals.metrics() if totals else {})
            result = ForwardResult(gather(pieces, columns.targets_TK), batch.cu_seqlens, metrics)
            if keep_graph:
                run.graphs[seq_id] = HeldGraph(held, result.logprobs_TK.shape, batch.num_sequences)
                self._count_held()
            return result

        return self._attempt(work, what=f"the forward of {batch.num_tokens} tokens")

    def forward_backward(
        self, run_id: str, seq_id: int, batch: Batch, loss: Loss, config: Mapping[str, float] | None = None
    ) -> ForwardResult:
        """A built-in loss, whose gradients are added to the run's. Whatever it raises taints the accumulation.

        Raises:
            FailedPreconditionError: NON_FINITE: the loss is NaN or infinite.
            DeviceOutOfMemoryError: As it says.
        """
        run = self._run(run_id)

        def work() -> ForwardResult:
            columns = self._to_device(batch, loss)
            pieces: list[tuple[Microbatch, Tensor]] = []
            totals = LossTotals(loss, config)
            for pack in self._plan(batch):
                microbatch = Microbatch(pack, columns, self._forwards)
                logprobs_RK = self._logprobs(run, microbatch)
                pieces.append((microbatch, logprobs_RK.detach()))
                self._backward(microbatch, totals.add(pack, microbatch.loss_inputs(logprobs_RK)))
            totals.check_finite()
            metrics = _batch_metrics(batch, pieces) | totals.metrics()
            result = ForwardResult(gather(pieces, columns.targets_TK), batch.cu_seqlens, metrics)
            run.accumulation.add(num_loss_tokens=int(metrics["num_loss_tokens:sum"]), num_sequences=batch.num_sequences)
            return result

        return self._attempt(work, what=f"the forward_backward of {batch.num_tokens} tokens", taints=(run, seq_id))

    def backward(
        self, run_id: str, seq_id: int, *, forward_seq_id: int, gradients_TK: npt.NDArray[np.float32]
    ) -> dict[str, float]:
        """Runs backward through a held graph, which is used up, and adds the gradients to the run's.

        Returns:
            Metrics by `name:reduction`.

        Raises:
            FailedPreconditionError: NO_HELD_GRAPH.
            InvalidArgumentError: Gradients not shaped as the logprobs; the graph stays held.
            DeviceOutOfMemoryError: As it says. Whatever is raised taints the accumulation.
        """
        run = self._run(run_id)

        def work() -> dict[str, float]:
            check_gradients_shape(gradients_TK, run.peek_graph(forward_seq_id).shape, forward_seq_id)
            graph = run.take_graph(forward_seq_id)
            on_device_TK = self._copy(gradients_TK)
            recomputed = 0
            while graph.pieces:
                # Taken out, so that each microbatch's graph is freed before the next one's backward.
                piece = graph.pieces.pop(0)
                logprobs_RK = piece.logprobs_RK
                if logprobs_RK is None:
                    recomputed += 1
                    logprobs_RK = self._logprobs(run, piece.microbatch)
                self._backward(piece.microbatch, logprobs_RK, on_device_TK[piece.microbatch.rows_R])
            self.counters.recomputed_graphs_total += recomputed
            num_loss_tokens = int(np.count_nonzero(gradients_TK))
            run.accumulation.add(num_loss_tokens=num_loss_tokens, num_sequences=graph.num_sequences)
            return {"num_loss_tokens:sum": float(num_loss_tokens), "forward_passes:sum": float(recomputed)}

        try:
            return self._attempt(work, what=f"the backward of forward {forward_seq_id}", taints=(run, seq_id))
        finally:
            self._count_held()

    def fail_pass(self, run_id: str, seq_id: int) -> None:
        """A pass was refused before it got here (its request was bad): as if it had failed here."""
        self._run(run_id).taint(seq_id)

    def optim_step(
        self, run_id: str, seq_id: int, params: AdamParams, normalization: Normalization = "none"
    ) -> OptimStepResult:
        """Applies AdamW to the accumulated gradients and clears them. Held graphs go: their parameters changed.

        Raises:
            FailedPreconditionError: PRIOR_OPERATION_FAILED or NON_FINITE: gradients were cleared. NO_GRADIENTS.
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
        # Without a loss token all gradients are zero, whatever they are divided by.
        divisor = max(1, accumulation.divisor(normalization))
        result = self._attempt(
            lambda: run.optimizer.step(params, divisor=divisor), what="the optimizer's state, twice the parameters"
        )
        run.clear_gradients()
        if not result.applied:
            raise error(
                "NON_FINITE",
                f"The accumulated gradients have norm {result.grad_norm}, so this optim_step was not applied. They "
                "were cleared and the parameters are as before; look at the losses and gradients of the last passes.",
                grad_norm=result.grad_norm,
            )
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
        """Clears gradients and the mark of a failed pass. Held graphs stay."""
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
        """Drops every graph of a run whose client is gone; a run that is not there is passed over."""
        if run_id in self._runs:
            self._runs[run_id].drop_graphs("was dropped because the client went away")
            self._count_held()

    def save_weights_for_sampler(self, run_id: str, name: str, *, overwrite: bool = False) -> SavedCheckpoint:
        """Exports the parameters as a Hugging Face folder.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED.
        """
        return self._checkpoints.save_weights_for_sampler(self._run(run_id), name, overwrite=overwrite)

    def save_state(
        self, run_id: str, name: str, *, overwrite: bool = False, ttl_seconds: int | None = None
    ) -> SavedCheckpoint:
        """Saves resumable state.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED.
        """
        run = self._run(run_id)
        return self._checkpoints.save_state(run, name, overwrite=overwrite, ttl_seconds=ttl_seconds)

    def load_state(self, run_id: str, path: str, *, with_optimizer: bool) -> int:
        """Loads resumable state; see Checkpoints.load_state. Returns the optimizer steps in it."""
        run = self._run(run_id)
        work = lambda: self._checkpoints.load_state(run, path, with_optimizer=with_optimizer)  # noqa: E731
        step = self._attempt(work, what=f"the state {path}")
        self._count_held()
        return step

    def live_model(self, run_id: str) -> PreTrainedModel:
        """A run's own model, for measurements and tests that look inside."""
        return self._run(run_id).model

    def run_state(self, run_id: str) -> RunState:
        """What is held for a run, for the thread that calls the verbs.

        Raises:
            NotFoundError: RUN_NOT_FOUND.
        """
        return self._run(run_id)

    def _run(self, run_id: str) -> RunState:
        run = self._runs.get(run_id)
        if run is None:
            raise error("RUN_NOT_FOUND", f'The worker holds no run "{run_id}".', run_id=run_id)
        return run

    def _plan(self, batch: Batch) -> list[Pack]:
        packed = not self.traits.why_not_packed
        return plan_packs(
            batch.tokens_T,
            batch.cu_seqlens,
            max_tokens=self.memory.max_pack_tokens if packed else 1,
            share=packed and not self.traits.why_not_shared,
        )

    def _to_device(self, batch: Batch, loss: Loss | None) -> Columns:
        return Columns(
            tokens_T=self._copy(batch.tokens_T).long(),
            targets_TK=self._copy(batch.loss_fn_inputs["target_tokens"]),
            inputs={name: self._copy(batch.loss_fn_inputs[name]) for name in (loss.inputs if loss else ())},
        )

    def _copy(self, array: npt.NDArray[Any]) -> Tensor:
        # A copy also on the CPU: arrays off the wire are read-only, which torch does not take, and a held graph must
        # not see what its caller does to an array later.
        return torch.from_numpy(np.array(array)).to(self.device.torch_device)

    def _logprobs(self, run: RunState, microbatch: Microbatch) -> Tensor:
        """Logprobs of one microbatch's targets, float32, with a graph where grad is enabled."""
        logprobs_RK = microbatch.logprobs(run.model)
        self.counters.forward_passes_total += 1
        self.counters.tokens_total += microbatch.pack.num_tokens
        self.counters.shared_tokens_total += microbatch.pack.num_shared_tokens
        return logprobs_RK

    def _backward(self, microbatch: Microbatch, output: Tensor, gradient: Tensor | None = None) -> None:
        microbatch.backward(output, gradient)
        self.counters.backward_passes_total += 1

    def _make_room(self, microbatch: Microbatch, own: list[HeldPiece]) -> bool:
        """Lets the oldest graphs go until this one fits; whether it does. Those of the same forward stay.

        What was let go is computed again at its backward, as this one would be, and its backward may never come.
        """
        budget = self.memory.max_held_graph_bytes - sum(piece.held_bytes for piece in own) - microbatch.held_bytes
        others = [piece for run in self._runs.values() for graph in run.graphs.values() for piece in graph.pieces]
        held = sum(piece.held_bytes for piece in others)
        if budget < 0:
            return False
        for piece in sorted(others, key=lambda piece: piece.age):
            if held <= budget:
                break
            held -= piece.held_bytes
            piece.logprobs_RK = None
        return True

    def _attempt(self, work: Callable[[], T], *, what: str, taints: tuple[RunState, int] | None = None) -> T:
        """Runs `work`. What it raises taints the accumulation; a device out of memory becomes an error that says so."""
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
        # Out here the exception is gone, and with it the frames that held the failed work's tensors.
        self.device.release_cached_memory()
        raise error(
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

    def _count_held(self) -> None:
        graphs = [graph for run in self._runs.values() for graph in run.graphs.values()]
        self.counters.held_graphs = len(graphs)
        self.counters.held_graph_bytes = sum(piece.held_bytes for graph in graphs for piece in graph.pieces)
        self.counters.runs = len(self._runs)


def _batch_metrics(batch: Batch, pieces: list[tuple[Microbatch, Tensor]]) -> dict[str, float]:
    return {
        "num_tokens:sum": float(batch.num_tokens),
        "num_sequences:sum": float(batch.num_sequences),
        "num_shared_tokens:sum": float(sum(microbatch.pack.num_shared_tokens for microbatch, _ in pieces)),
        "forward_passes:sum": float(len(pieces)),
    }
