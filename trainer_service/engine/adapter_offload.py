"""Where adapters are: those in use on the device, and idle ones in host memory once there are too many.

Every operation of a run first calls `use`. It brings the run's adapter back if it is away, and before that sends
adapters away, the one unused for longest first, until those that stay fit the budget. What moves is what only the run
itself touches: AdamW's moments, accumulated gradients, and the parameters unless a sampler reads them. It comes back
bit for bit.

A parameter whose values are away is an empty tensor on the device, so that code that forgot to call `use` fails.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

from trainer_service.engine.counters import Counters
from trainer_service.engine.run_state import RunState

_TENSORS_PER_PARAMETER = 4
"""The parameter, its gradient and the optimizer's two moments."""


@dataclass(frozen=True)
class _Waiting:
    """What host memory holds of one parameter; None for what stayed on the device or does not exist."""

    values: Tensor | None
    grad: Tensor | None
    moments: dict[str, Tensor]


@dataclass
class _Adapter:
    run: RunState
    full_bytes: int
    held_bytes: int = 0
    """Bytes on the device when the adapter was last measured."""
    waiting: dict[Parameter, _Waiting] = field(default_factory=dict)

    def measure(self) -> None:
        """Measures the bytes it has on the device."""
        optimizer = self.run.optimizer
        self.held_bytes = sum(
            p.nbytes + (0 if p.grad is None else p.grad.nbytes) + sum(t.nbytes for t in optimizer.state_of(p).values())
            for p in self.run.trained_parameters().values()
        )


class AdapterOffload:
    """Keeps the adapters on the device within a budget. Does not touch runs that train all parameters.

    Args:
        max_device_bytes: The budget, which the adapter in use alone may exceed. None keeps everything on the device.
        counters: Counts the adapters in host memory.
    """

    def __init__(self, max_device_bytes: int | None, counters: Counters) -> None:
        self._max_device_bytes = max_device_bytes
        self._counters = counters
        self._adapters: dict[str, _Adapter] = {}  # The one unused for longest comes first.

    def use(self, run: RunState) -> None:
        """Brings all of a run's adapter to the device, where it stays at least until another run's turn.

        Raises:
            torch.OutOfMemoryError: It does not fit. It stays in host memory, and nothing is lost.
        """
        if run.adapter is None or self._max_device_bytes is None:
            return
        own = self._adapters.pop(run.run_id, None) or _Adapter(run, _full_bytes(run))
        others = list(self._adapters.values())
        if others:
            # Only a run's own operations change what it holds, so measuring once after its turn is enough.
            others[-1].measure()
        self._adapters[run.run_id] = own
        held = own.full_bytes + sum(other.held_bytes for other in others)
        for other in others:
            # A held graph refers to the parameters.
            if held > self._max_device_bytes and not other.waiting and not other.run.graphs:
                held -= other.held_bytes
                _send_away(other)
                other.measure()
                held += other.held_bytes
        _bring_back(own)
        self._count_waiting()

    def forget(self, run_id: str) -> None:
        """Forgets a deleted run."""
        self._adapters.pop(run_id, None)
        self._count_waiting()

    def _count_waiting(self) -> None:
        self._counters.adapters_in_host_memory = sum(bool(adapter.waiting) for adapter in self._adapters.values())


def _full_bytes(run: RunState) -> int:
    """Bytes of an adapter in the middle of a step."""
    return _TENSORS_PER_PARAMETER * sum(parameter.nbytes for parameter in run.trained_parameters().values())


def _send_away(adapter: _Adapter) -> None:
    run = adapter.run
    for parameter in run.trained_parameters().values():
        moments = {name: _on_host(tensor) for name, tensor in run.optimizer.state_of(parameter).items()}
        values = grad = None
        if not run.being_read:
            values = _on_host(parameter.detach())
            grad = None if parameter.grad is None else _on_host(parameter.grad)
        adapter.waiting[parameter] = _Waiting(values, grad, moments)
        run.optimizer.drop_state_of(parameter)
        if values is not None:
            parameter.grad = None
            parameter.data = values.new_empty(0, device=parameter.device)


def _bring_back(adapter: _Adapter) -> None:
    optimizer = adapter.run.optimizer
    while adapter.waiting:
        parameter, waiting = next(iter(adapter.waiting.items()))
        # Everything is on the device before anything is changed, since memory may run out on the way.
        values, grad = (_on_device(tensor, parameter) for tensor in (waiting.values, waiting.grad))
        moments = {name: tensor.to(parameter.device, copy=True) for name, tensor in waiting.moments.items()}
        if values is not None:
            parameter.data = values
            parameter.grad = grad
        if moments:
            optimizer.load_state_of(parameter, moments)
        del adapter.waiting[parameter]


def _on_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, pinned if a GPU will read it."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor)


def _on_device(tensor: Tensor | None, parameter: Parameter) -> Tensor | None:
    return None if tensor is None else tensor.to(parameter.device, copy=True)
