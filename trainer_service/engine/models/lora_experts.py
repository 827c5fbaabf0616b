"""Stacked weights of experts with an adapter: peft's, computed without a copy of the weights.

peft adapts a parameter by one wrapper around its module; of two parameters, one wrapper is within the other. Each adds
what it adapts by to the call, and our implementation of experts (experts.py) takes it from there. A module that does
not go by transformers' interface is left to peft, which adds the product to the weights for each forward.

Shape suffixes: E experts, I and O inputs and outputs of an expert's layer, R the LoRA rank.
"""

from collections.abc import Iterator
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from trainer_service.engine.models.cpu_experts import ExpertsLowRank
from trainer_service.engine.models.experts import GROUPED
from trainer_service.engine.models.lora_layer import ADAPTER
from trainer_service.engine.parallel.expert_parallel import goes_by_interface


class AdaptedExperts(ParamWrapper):
    """peft's wrapper; what it adapts by is computed beside the experts' weights."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As the module within."""
        base: Any = self.get_base_layer()
        if self.disable_adapters or self.merged or base.config._experts_implementation != GROUPED:
            return super().forward(x, *args, **kwargs)
        low_rank = {**kwargs.pop("low_rank", {}), self.parameter_name: self._low_rank()}
        return self.base_layer(x, *args, low_rank=low_rank, **kwargs)

    def _low_rank(self) -> ExpertsLowRank:
        a: Any = self.lora_A[ADAPTER]
        b: Any = self.lora_B[ADAPTER]
        # peft's layout: [E·R, I], an expert's rows behind one another, and [O, R·E], an expert's columns apart.
        a_ERI = a.weight.view(self.num_experts, -1, a.in_features)
        b_EOR = b.weight.view(b.out_features, -1, self.num_experts).permute(2, 0, 1)
        return ExpertsLowRank(a_ERI, b_EOR, self.scaling[ADAPTER])


def take_over(model: nn.Module) -> None:
    """Has the wrappers that peft made computed by AdaptedExperts, where that can."""
    for module in model.modules():
        # The class is changed since peft lets nobody else make its wrappers, and knows them by their name.
        if type(module) is ParamWrapper and module.num_experts > 1 and goes_by_interface(module.get_base_layer()):
            module.__class__ = AdaptedExperts


def adapted_weights(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """What has an adapter, by name: modules for linear layers, parameters for weights of experts."""
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper):
            within = ".".join(part for part in name.split(".") if part != "base_layer")
            yield f"{within}.{module.parameter_name}", module
        elif isinstance(module, LoraLayer):
            yield name, module
