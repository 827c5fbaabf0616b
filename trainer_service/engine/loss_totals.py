"""Adds up a loss over the microbatches of one operation."""

import math
from collections.abc import Mapping

import torch
from gradwire.errors import error
from gradwire.metrics import combine_metrics
from torch import Tensor

from trainer_service.engine.losses.loss import Loss, LossInputs


class LossTotals:
    """Values kept on the device: one transfer at the end, not one a microbatch. One microbatch holds one datum."""

    def __init__(self) -> None:
        self._found: list[dict[str, Tensor]] = []

    def add(self, loss: Loss, inputs: LossInputs, config: Mapping[str, float] | None) -> Tensor:
        """Evaluates the loss on one microbatch; returns it with its graph."""
        output = loss.fn(inputs, loss.settings(config))
        found = {**output.metrics, "loss:sum": output.loss, "num_loss_tokens:sum": output.num_loss_tokens}
        self._found.append({name: value.detach() for name, value in found.items()})
        return output.loss

    def metrics(self) -> dict[str, float]:
        """By `name:reduction`; empty where no loss was evaluated."""
        return combine_metrics(self._on_host())

    def _on_host(self) -> list[dict[str, float]]:
        values = [value.double() for found in self._found for value in found.values()]
        numbers = iter(torch.stack(values).tolist() if values else ())
        return [{name: next(numbers) for name in found} for found in self._found]

    def check_finite(self, name: str) -> None:
        """Refuses a loss that is NaN or infinite.

        Raises:
            FailedPreconditionError: NON_FINITE, naming the datum.
        """
        for number, found in enumerate(self._on_host()):
            value = found["loss:sum"]
            if not math.isfinite(value):
                raise error(
                    "NON_FINITE",
                    f"{name} of data[{number}] is {value}. Nothing of this call is applied; look at that datum's "
                    "loss inputs, or at the learning rate of the steps before.",
                    datum=number,
                )
