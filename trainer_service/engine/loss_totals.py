"""Adds up a loss over the microbatches of one operation."""

import math
from collections.abc import Mapping

import torch
from gradwire.errors import error
from torch import Tensor

from trainer_service.engine.losses.loss import Loss, LossInputs


class LossTotals:
    """Sums kept on the device: one transfer at the end, not one a microbatch. One microbatch holds one datum."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}

    def add(self, loss: Loss, inputs: LossInputs, config: Mapping[str, float] | None) -> Tensor:
        """Evaluates the loss on one microbatch; returns it with its graph."""
        output = loss.fn(inputs, config or {})
        found = {"loss:sum": output.loss, "num_loss_tokens:sum": output.num_loss_tokens, **output.metrics}
        for name, value in found.items():
            self._sums.setdefault(name, []).append(value.detach())
        return output.loss

    def metrics(self) -> dict[str, float]:
        """By `name:sum`; empty where no loss was evaluated. Added in float64, so that the order does not show."""
        return {name: math.fsum(torch.stack(values).double().tolist()) for name, values in self._sums.items()}

    def check_finite(self, name: str) -> None:
        """Refuses a loss that is NaN or infinite.

        Raises:
            FailedPreconditionError: NON_FINITE, naming the datum.
        """
        for number, value in enumerate(torch.stack(self._sums["loss:sum"]).tolist()):
            if not math.isfinite(value):
                raise error(
                    "NON_FINITE",
                    f"{name} of data[{number}] is {value}. Nothing of this call is applied; look at that datum's "
                    "loss inputs, or at the learning rate of the steps before.",
                    datum=number,
                )
