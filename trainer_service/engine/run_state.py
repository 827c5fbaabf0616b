"""What the worker holds for one run: parameters, accumulated gradients, held graphs, optimizer."""

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gradwire.errors import GradwireError, error
from gradwire.types import AdamParams
from peft import PeftModel
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel

from trainer_service.engine.microbatch import Microbatch
from trainer_service.engine.models.lora import LoraSettings, adapter_rank
from trainer_service.engine.optim import AdamW, StepResult

_REASONS_KEPT = 1024


@dataclass
class HeldPiece:
    """One microbatch of a held graph.

    Attributes:
        microbatch: What to run again if the graph is gone.
        logprobs_RK: With their graph; None if that would have exceeded the budget.
        age: Larger for younger pieces.
    """

    microbatch: Microbatch
    logprobs_RK: Tensor | None
    age: int = field(default_factory=itertools.count().__next__)

    @property
    def held_bytes(self) -> int:
        """Memory that the graph holds."""
        return 0 if self.logprobs_RK is None else self.microbatch.held_bytes


@dataclass(frozen=True)
class HeldGraph:
    """What a forward keeps for its backward.

    Attributes:
        pieces: One for each microbatch.
        shape: Shape of all logprobs together, [T] or [T, K].
        num_sequences: Number of sequences in the batch.
    """

    pieces: list[HeldPiece]
    shape: tuple[int, ...]
    num_sequences: int


@dataclass
class Accumulation:
    """What went into the gradients since they were last cleared.

    Attributes:
        num_passes: Backward passes that succeeded.
        num_loss_tokens: Targets whose weight, or custom gradient, is not zero.
        num_sequences: Sequences in those passes.
        failed_seq_id: First operation that failed, or None. Once set, the gradients are never applied.
    """

    num_passes: int = 0
    num_loss_tokens: int = 0
    num_sequences: int = 0
    failed_seq_id: int | None = None

    def add(self, *, num_loss_tokens: int, num_sequences: int) -> None:
        """Counts one pass that succeeded."""
        self.num_passes += 1
        self.num_loss_tokens += num_loss_tokens
        self.num_sequences += num_sequences

    def divisor(self, normalization: str) -> int:
        """What the gradients are divided by for "none", "num_loss_tokens" or "num_sequences"."""
        return {"none": 1, "num_loss_tokens": self.num_loss_tokens, "num_sequences": self.num_sequences}[normalization]


@dataclass
class RunState:
    """All that the worker holds for one run. Only the device thread touches it."""

    run_id: str
    model: PreTrainedModel
    optimizer: AdamW
    trained: Mapping[str, Parameter]
    """The parameters that train, by name; tied ones once. They stay the same for as long as the run lives."""
    adapter: PeftModel | None = None
    """For a LoRA run: PEFT's view of `model`."""
    lora: LoraSettings | None = None
    """Of a LoRA run: settings that make another adapter of the same layout; None where no settings do."""
    adapted: tuple[str, ...] = ()
    """Of a LoRA run: what has an adapter, by name, with * for the numbers of layers."""
    left_out: tuple[str, ...] = ()
    """Of a LoRA run: matrices that have none, likewise."""
    step: int = 0
    """Optimizer steps applied."""
    being_read: bool = False
    """Whether samplers may be reading its parameters in place."""
    saving_seq_id: int = 0
    """The operation that is saving the run; its checkpoint records it."""
    accumulation: Accumulation = field(default_factory=Accumulation)
    graphs: dict[int, HeldGraph] = field(default_factory=dict)
    """Held graphs by the seq_id of their forward."""
    _gone: OrderedDict[int, str] = field(default_factory=OrderedDict)
    """Why graphs are no longer held, for error messages; only the latest reasons are kept."""

    @property
    def lora_rank(self) -> int:
        """0 if all parameters train."""
        return 0 if self.adapter is None else adapter_rank(self.adapter)

    def trained_parameters(self) -> Mapping[str, Parameter]:
        """`trained`."""
        return self.trained

    def clear_gradients(self) -> None:
        """Clears gradients and the taint of a failed pass."""
        # None, not zeros, so that the next backward stores its buffer here instead of adding to one.
        for parameter in self.trained_parameters().values():
            parameter.grad = None
        self.accumulation = Accumulation()

    def taint(self, seq_id: int) -> None:
        """Records that a pass failed: nothing accumulated is applied until the gradients are cleared."""
        first = self.accumulation.failed_seq_id
        self.clear_gradients()
        self.accumulation.failed_seq_id = seq_id if first is None else first

    def prior_failure(self) -> GradwireError | None:
        """The error that says why the gradients must not be applied; None if no pass failed."""
        seq_id = self.accumulation.failed_seq_id
        if seq_id is None:
            return None
        return error(
            "PRIOR_OPERATION_FAILED",
            f"Operation {seq_id} failed, so this optim_step was not applied: it would have used part of the gradients. "
            "They were cleared, the parameters are as before, and the run goes on with the next forward_backward.",
            failed_seq_id=seq_id,
        )

    def step_failure(self, params: AdamParams, result: StepResult) -> GradwireError:
        """The error that says why a step was not applied."""
        if result.overflowing is None:
            return error(
                "NON_FINITE",
                f"The accumulated gradients have norm {result.grad_norm}, so this optim_step was not applied. They "
                "were cleared and the parameters are as before; check the losses and gradients of the last passes.",
                grad_norm=result.grad_norm,
            )
        named = self.trained_parameters().items()
        name = next(name for name, parameter in named if parameter is result.overflowing)
        return error(
            "NON_FINITE",
            f"This optim_step would make {name}, or its AdamW state, NaN or infinite, so it was not applied. Gradients "
            "were cleared; parameters and optimizer state are as before. learning_rate is "
            f"{params.learning_rate:g}, weight_decay {params.weight_decay:g}, eps {params.eps:g}, grad_clip_norm "
            f"{params.grad_clip_norm:g}, the gradients' norm {result.grad_norm:g}; change what is out of proportion.",
            parameter=name,
            grad_norm=result.grad_norm,
        )

    def peek_graph(self, forward_seq_id: int) -> HeldGraph:
        """The graph of a forward, which stays held.

        Raises:
            FailedPreconditionError: NO_HELD_GRAPH, with the reason.
        """
        graph = self.graphs.get(forward_seq_id)
        if graph is None:
            why = self._gone.get(forward_seq_id, "never was: no forward of that seq_id had keep_graph")
            raise error(
                "NO_HELD_GRAPH",
                f"backward names forward_seq_id {forward_seq_id}, whose graph {why}. Run the forward with keep_graph "
                "again.",
                forward_seq_id=forward_seq_id,
            )
        return graph

    def take_graph(self, forward_seq_id: int) -> HeldGraph:
        """Like peek_graph, but the graph is no longer held."""
        graph = self.peek_graph(forward_seq_id)
        self._forget(forward_seq_id, "was used by an earlier backward; one forward serves one backward")
        return graph

    def drop_graphs(self, why: str, forward_seq_ids: Iterable[int] | None = None) -> int:
        """Drops the graphs of these forwards, or all. Returns how many were held.

        Args:
            why: Continues the sentence "…, whose graph".
            forward_seq_ids: None for all; forwards without a held graph are ignored.
        """
        held = self.graphs.keys() & set(self.graphs if forward_seq_ids is None else forward_seq_ids)
        for seq_id in sorted(held):
            self._forget(seq_id, why)
        return len(held)

    def _forget(self, seq_id: int, why: str) -> None:
        del self.graphs[seq_id]
        self._gone[seq_id] = why
        if len(self._gone) > _REASONS_KEPT:
            self._gone.popitem(last=False)
