"""Adds up a loss over the microbatches of one operation."""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from gradwire._wire.codec import Batch
from gradwire._wire.metrics import combine_metrics
from gradwire.errors import error
from torch import Tensor

from trainer_service.engine.losses.loss import Loss, LossInputs
from trainer_service.engine.packed.packing import Pack
from trainer_service.engine.rank_channels import Ranks


class LossTotals:
    """Keeps values on the device: one transfer at the end, not one for each microbatch.

    Args:
        loss: The loss to evaluate.
        config: The settings that the caller gave; the others take their defaults.
        ranks: Each evaluates it on its own microbatches.
    """

    def __init__(self, loss: Loss, config: Mapping[str, float] | None, ranks: Ranks) -> None:
        self._loss = loss
        self._answers = ranks.answers
        self._channel = ranks.execution
        self._settings = loss.settings(config)
        self._found: list[tuple[int, dict[str, Tensor]]] = []
        self._seen: list[tuple[Pack, LossInputs]] = []
        self._numbers: list[dict[str, float]] | None = None

    def add(self, number: int, pack: Pack, inputs: LossInputs) -> Tensor:
        """Evaluates the loss on the microbatch of that number in the batch; returns it with its graph."""
        output = self._loss.fn(inputs, self._settings)
        self._numbers = None
        found = {**output.metrics, "loss:sum": output.loss, "num_loss_tokens:sum": output.num_loss_tokens}
        self._found.append((number, {name: value.detach() for name, value in found.items()}))
        self._seen.append((pack, LossInputs(inputs.target_logprobs_TK.detach(), inputs.inputs, inputs.cu_seqlens)))
        return output.loss

    def metrics(self) -> dict[str, float]:
        """Metrics over all microbatches, by `name:reduction`. Every rank calls this."""
        return combine_metrics(self._on_host())

    def check_finite(self, batch: Batch) -> None:
        """Refuses a loss that is NaN or infinite. Every rank calls this.

        Args:
            batch: The batch of the operation; it names its datums.

        Raises:
            FailedPreconditionError: NON_FINITE, naming the datum.
        """
        values = [found["loss:sum"] for found in self._on_host()]
        if all(math.isfinite(value) for value in values):
            return
        # Every loss may be finite but their sum infinite.
        everybodys = [tuple(found) for own in self._channel.gather(list(self._not_finite())) for found in own]
        datum, value = min(everybodys, default=(None, math.fsum(values)))
        where = "the whole batch" if datum is None else batch.datum_path(datum)
        text = (
            f"{self._loss.name} of {where} is {value}. Nothing of this call is applied; check that datum's loss "
            "inputs, or at the learning rate of the steps before."
        )
        raise error("NON_FINITE", text, **({} if datum is None else {"datum": batch.first_datum_index + datum}))

    def _on_host(self) -> list[dict[str, float]]:
        if self._numbers is not None:
            return self._numbers
        values = [value.double() for _, found in self._found for value in found.values()]
        numbers = iter(torch.stack(values).tolist() if values else ())
        own = [(number, {name: next(numbers) for name in found}) for number, found in self._found]
        everybodys = [found for each in self._channel.gather(own if self._answers else []) for found in each]
        # In the batch's order, so that sums do not depend on who evaluated what.
        self._numbers = [found for _, found in sorted(everybodys, key=lambda one: one[0])]
        return self._numbers

    def _not_finite(self) -> Iterator[tuple[int, float]]:
        """(number of the datum, its loss) for each datum whose loss is not finite."""
        for pack, inputs in self._seen:
            for sequence, (start, stop) in zip(pack.sequences, pairwise(pack.cu_seqlens.tolist()), strict=True):
                rows = slice(start, stop)
                own = {name: values[rows] for name, values in inputs.inputs.items()}
                bounds = torch.tensor([0, stop - start], device=inputs.cu_seqlens.device)
                alone = LossInputs(inputs.target_logprobs_TK[rows], own, bounds)
                value = self._loss.fn(alone, self._settings).loss.item()
                if not math.isfinite(value):
                    yield sequence, value
