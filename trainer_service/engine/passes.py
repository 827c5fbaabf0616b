"""Forward and backward passes over a batch: planned ahead, run pack by pack, with graphs held within a budget.

Shape suffixes: T tokens of one batch, K targets per token (absent if targets are [T]), R rows of one microbatch.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gradwire._wire.codec import Batch
from torch import Tensor
from transformers import PreTrainedModel

from trainer_service.engine.counters import Counters
from trainer_service.engine.loss_totals import LossTotals
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.microbatch import Columns, Forwards, Microbatch, gather
from trainer_service.engine.models.batching import plan
from trainer_service.engine.parallel.sharding import expect
from trainer_service.engine.parallel.shares import plan_shares
from trainer_service.engine.rank_channels import Ranks
from trainer_service.engine.run_state import HeldGraph, HeldPiece, RunState
from trainer_service.engine.validation import check_gradients_shape


@dataclass(frozen=True)
class ForwardResult:
    """The answer of a forward or forward_backward.

    Attributes:
        logprobs_TK: Natural-log probabilities of the targets, float32, [T] or [T, K] like the targets.
        cu_seqlens: The batch's, int64 [N + 1].
        metrics: Metrics by `name:reduction`.
    """

    logprobs_TK: npt.NDArray[np.float32]
    cu_seqlens: npt.NDArray[np.int64]
    metrics: dict[str, float]


@dataclass(frozen=True)
class DeviceBatch:
    """A batch on the device.

    Attributes:
        columns: Its tokens, targets and loss inputs.
        microbatches: Together they answer every row once.
    """

    columns: Columns
    microbatches: tuple[Microbatch, ...]


class Staged:
    """What a pass needs: a batch, its loss, and a place on the device, taken before its turn or during it.

    Attributes:
        batch: The checked batch.
        loss: The loss to evaluate; None for none.
        config: The loss settings that the caller gave.
        place: Puts this rank's share on the device.
        ranks: Share it.
    """

    def __init__(
        self,
        batch: Batch,
        loss: Loss | None,
        config: Mapping[str, float] | None,
        place: Callable[[], DeviceBatch],
        ranks: Ranks,
    ) -> None:
        self.batch, self.loss, self.config = batch, loss, config
        self._ranks = ranks
        self._place = place
        self._ahead: DeviceBatch | None = None

    def place_ahead(self) -> None:
        """Puts the batch on the device before its turn comes. May run on any thread, while the device is busy."""
        self._ahead = self._place()

    def on_device(self) -> DeviceBatch:
        """The batch on the device, put there now if it is not there yet."""
        return self._ahead or self._place()

    def totals(self) -> LossTotals | None:
        """Adds up its loss; None if it has none."""
        return LossTotals(self.loss, self.config, self._ranks) if self.loss else None


class Passes:
    """Runs passes of any run's model. One that raises may leave gradients of half a batch: the caller taints the run.

    Args:
        forwards: How microbatches go through a model.
        counters: Counts passes and tokens.
        held_graphs: Returns all held graphs, of every run.
        ranks: Share every batch.
    """

    def __init__(
        self, forwards: Forwards, counters: Counters, held_graphs: Callable[[], Iterable[HeldGraph]], ranks: Ranks
    ) -> None:
        self._ranks = ranks
        self._forwards = forwards
        self._counters = counters
        self._held_graphs = held_graphs

    def stage(self, batch: Batch, loss: Loss | None = None, config: Mapping[str, float] | None = None) -> Staged:
        """A pass over a checked batch, with or without a loss, not on the device yet."""
        return Staged(batch, loss, config, lambda: self._place(batch, loss), self._ranks)

    def try_forward(self, model: PreTrainedModel) -> None:
        """A forward of two tokens, as in training."""
        two = Batch(np.zeros(2, dtype=np.int32), np.array([0, 2]), {"target_tokens": np.zeros(2, dtype=np.int64)})
        for microbatch in self.stage(two).on_device().microbatches:
            microbatch.logprobs(model)

    def forward(self, run: RunState, seq_id: int, staged: Staged, *, keep_graph: bool) -> ForwardResult:
        """Logprobs, and the metrics of the loss if there is one; keep_graph holds the graph for one backward."""
        placed, totals = staged.on_device(), staged.totals()
        pieces: list[tuple[Microbatch, Tensor]] = []
        held: list[HeldPiece] = []
        for microbatch in placed.microbatches:
            with_graph = keep_graph and self._make_room(microbatch, held)
            self._expect(run, backward=False, last=len(pieces) + 1 == len(placed.microbatches))
            with torch.set_grad_enabled(with_graph):
                logprobs_RK = self._logprobs(run, microbatch)
            pieces.append((microbatch, logprobs_RK.detach()))
            if keep_graph:
                held.append(HeldPiece(microbatch, logprobs_RK if with_graph else None))
            if totals is not None and microbatch.number is not None:
                totals.add(microbatch.number, microbatch.pack, microbatch.loss_inputs(logprobs_RK))
        result = self._result(staged.batch, placed.columns, pieces, totals.metrics() if totals else {})
        if keep_graph:
            run.graphs[seq_id] = HeldGraph(held, result.logprobs_TK.shape, staged.batch.num_sequences)
        return result

    def forward_backward(self, run: RunState, staged: Staged) -> ForwardResult:
        """Runs a loss, and adds its gradients to the run's.

        Raises:
            FailedPreconditionError: NON_FINITE: the loss is NaN or infinite.
        """
        placed, totals = staged.on_device(), staged.totals()
        assert totals is not None
        pieces: list[tuple[Microbatch, Tensor]] = []
        for microbatch in placed.microbatches:
            self._expect(run, backward=True, last=len(pieces) + 1 == len(placed.microbatches))
            logprobs_RK = self._logprobs(run, microbatch)
            pieces.append((microbatch, logprobs_RK.detach()))
            if microbatch.number is None:
                # Of no row: a gradient of zeros.
                self._backward(microbatch, logprobs_RK.sum())
                continue
            loss = totals.add(microbatch.number, microbatch.pack, microbatch.loss_inputs(logprobs_RK))
            self._backward(microbatch, loss)
        totals.check_finite(staged.batch)
        result = self._result(staged.batch, placed.columns, pieces, totals.metrics())
        run.accumulation.add(
            num_loss_tokens=int(result.metrics["num_loss_tokens:sum"]), num_sequences=staged.batch.num_sequences
        )
        return result

    def backward(
        self, run: RunState, *, forward_seq_id: int, gradients_TK: npt.NDArray[np.float32]
    ) -> dict[str, float]:
        """Runs backward through a held graph, which it consumes, and adds gradients to the run's. Returns metrics.

        Raises:
            FailedPreconditionError: NO_HELD_GRAPH.
            InvalidArgumentError: The gradients do not have the logprobs' shape; the graph stays held.
        """
        check_gradients_shape(gradients_TK, run.peek_graph(forward_seq_id).shape, forward_seq_id)
        graph = run.take_graph(forward_seq_id)
        on_device_TK = self._copy(gradients_TK)
        recomputed = 0
        while graph.pieces:
            # Removed, so that each microbatch's graph is freed before the next one's backward.
            piece = graph.pieces.pop(0)
            self._expect(run, backward=True, last=not graph.pieces)
            logprobs_RK = piece.logprobs_RK
            if logprobs_RK is None:
                recomputed += len(piece.microbatch.round.packs)
                logprobs_RK = self._logprobs(run, piece.microbatch)
            self._backward(piece.microbatch, logprobs_RK, on_device_TK[piece.microbatch.rows_R])
        self._counters.recomputed_graphs_total += recomputed
        num_loss_tokens = int(np.count_nonzero(gradients_TK))
        run.accumulation.add(num_loss_tokens=num_loss_tokens, num_sequences=graph.num_sequences)
        return {"num_loss_tokens:sum": float(num_loss_tokens), "forward_passes:sum": float(recomputed)}

    def _place(self, batch: Batch, loss: Loss | None) -> DeviceBatch:
        """Cuts a batch into microbatches and puts this rank's on the device, with the inputs of its loss."""
        traits = self._forwards.traits
        shares = plan_shares(
            lambda max_tokens: plan(batch.tokens_T, batch.cu_seqlens, traits, max_tokens=max_tokens),
            max_tokens=self._forwards.memory.max_pack_tokens,
            world_size=self._ranks.dp_size,
        )
        columns = Columns(
            tokens_T=self._copy(batch.tokens_T).long(),
            targets_TK=self._copy(batch.loss_fn_inputs["target_tokens"]),
            inputs={name: self._copy(batch.loss_fn_inputs[name]) for name in (loss.inputs if loss else ())},
        )
        own = shares[self._ranks.dp_rank]
        return DeviceBatch(columns, tuple(Microbatch(place, columns, self._forwards) for place in own))

    def _copy(self, array: npt.NDArray[Any]) -> Tensor:
        # A copy even on the CPU: arrays off the wire are read-only, which torch does not accept, and a held graph must
        # not see later changes by the caller.
        return torch.from_numpy(np.array(array)).to(self._forwards.device.torch_device)

    def _logprobs(self, run: RunState, microbatch: Microbatch) -> Tensor:
        """Logprobs of one microbatch's targets, float32, with a graph if grad is enabled."""
        logprobs_RK = microbatch.logprobs(run.model)
        self._counters.forward_passes_total += len(microbatch.round.packs)
        self._counters.tokens_total += microbatch.round.num_tokens
        self._counters.shared_tokens_total += microbatch.round.num_shared_tokens
        self._counters.padding_tokens_total += microbatch.round.num_padding_tokens
        return logprobs_RK

    def _expect(self, run: RunState, *, backward: bool, last: bool) -> None:
        expect(run.model, backward=backward, last=last, keep=self._forwards.memory.keeps_gathered)

    def _backward(self, microbatch: Microbatch, output: Tensor, gradient: Tensor | None = None) -> None:
        microbatch.backward(output, gradient)
        self._counters.backward_passes_total += len(microbatch.round.packs)

    def _make_room(self, microbatch: Microbatch, own: list[HeldPiece]) -> bool:
        """Drops the oldest graphs until this one fits, except those of the same forward. Returns whether it fits.

        A dropped graph is recomputed for its backward, as this one would be, but its backward may never come.
        """
        budget = self._forwards.memory.max_held_graph_bytes
        budget -= sum(piece.held_bytes for piece in own) + microbatch.held_bytes
        if budget < 0:
            return False
        others = [piece for graph in self._held_graphs() for piece in graph.pieces]
        held = sum(piece.held_bytes for piece in others)
        for piece in sorted(others, key=lambda piece: piece.age):
            if held <= budget:
                break
            held -= piece.held_bytes
            piece.logprobs_RK = None
        return True

    def _result(
        self, batch: Batch, columns: Columns, pieces: list[tuple[Microbatch, Tensor]], metrics: Mapping[str, float]
    ) -> ForwardResult:
        """What a pass has found, put together from all ranks."""
        counted = {
            "num_tokens:sum": float(batch.num_tokens),
            "num_sequences:sum": float(batch.num_sequences),
            "num_shared_tokens:sum": float(sum(microbatch.round.num_shared_tokens for microbatch, _ in pieces)),
            "forward_passes:sum": float(sum(len(microbatch.round.packs) for microbatch, _ in pieces)),
        }
        logprobs_TK = gather(pieces if self._ranks.answers else [], columns.targets_TK, self._ranks.execution)
        return ForwardResult(logprobs_TK, batch.cu_seqlens, {**counted, **metrics})
