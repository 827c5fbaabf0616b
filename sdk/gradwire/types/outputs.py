"""What training gives back: outputs of losses and of steps."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from gradwire.types.data import TensorData

LossFnType = str
"""Name of a loss; get_server_info() lists them."""


@dataclass(frozen=True)
class Timing:
    """Where one call's time went, summed over its operations, milliseconds."""

    queue_ms: float = 0.0
    """Time waiting for its turn on the trainer."""
    execute_ms: float = 0.0
    """Time on the device."""
    transfer_ms: float = 0.0
    """Time moving between trainer and worker."""


class LossFnOutputs(Sequence[dict[str, TensorData]]):
    """One dict a datum, in the order given, each made when it is first asked for: a batch may have thousands, and most
    loops look at none.

    Args:
        arrays: By name, all datums end to end, [T] or [T, K].
        cu_seqlens: int64 [N + 1]; datum i has rows cu_seqlens[i] to cu_seqlens[i + 1]. Both stay readable as
            attributes, for whoever wants all datums at once.
    """

    __slots__ = ("_made", "arrays", "cu_seqlens")

    def __init__(self, arrays: Mapping[str, npt.NDArray[Any]], cu_seqlens: npt.NDArray[np.int64]) -> None:
        self.arrays = arrays
        self.cu_seqlens = cu_seqlens
        self._made: dict[int, dict[str, TensorData]] = {}

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    @overload
    def __getitem__(self, index: int) -> dict[str, TensorData]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, TensorData]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, TensorData] | list[dict[str, TensorData]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        made = self._made.get(number)
        if made is None:
            start, stop = self.cu_seqlens[number], self.cu_seqlens[number + 1]
            made = {name: TensorData(array[start:stop]) for name, array in self.arrays.items()}
            self._made[number] = made
        return made

    def __add__(self, other: Iterable[dict[str, TensorData]]) -> list[dict[str, TensorData]]:
        return [*self, *other]

    def __radd__(self, other: Iterable[dict[str, TensorData]]) -> list[dict[str, TensorData]]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"LossFnOutputs({len(self)} datums of {', '.join(self.arrays)})"


@dataclass(frozen=True)
class ForwardBackwardOutput:
    """Result of forward, forward_backward and forward_backward_custom.

    Attributes:
        loss_fn_outputs: One dict a datum, in the order given; "logprobs" (float32, natural log, shaped as the targets)
            always.
        metrics: Numbers by `name:reduction`; "loss:sum" (nats) whenever a loss was evaluated; a custom loss's own
            metrics under their own names.
        timing: Where the time went.
    """

    loss_fn_outputs: LossFnOutputs
    metrics: dict[str, float]
    timing: Timing = Timing()


@dataclass(frozen=True)
class OptimStepResponse:
    """Result of optim_step.

    Attributes:
        step: Number of steps applied to the run, this one included.
        metrics: "grad_norm:mean" (global L2 norm before clipping) and others.
        timing: Where the time went.
    """

    step: int
    metrics: dict[str, float]
    timing: Timing = Timing()
