"""Runs a user's loss function over logprobs and takes its gradients. torch is imported only here, when it is called."""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gradwire.errors import error

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("gradwire")

CustomLossFn = Callable[[list[Any], "list[torch.Tensor]"], "tuple[torch.Tensor, Mapping[str, Any]]"]
"""(data, logprobs_list) → (scalar loss, metrics)."""


def run_custom_loss(
    fn: CustomLossFn, data: list[Any], logprobs_T: npt.NDArray[np.float32], cu_seqlens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float32], float, dict[str, float]]:
    """Calls `fn(data, logprobs_list)` and differentiates its loss.

    Args:
        fn: Gets one float32 leaf with requires_grad a datum, shaped as its targets, [N] or [N, K]; returns a scalar
            and a dict of metrics.
        data: What the user passed, handed through.
        logprobs_T: float32 [T] or [T, K], all datums end to end.
        cu_seqlens: int64 [number of datums + 1].

    Returns:
        Derivative of the loss with respect to each logprob, shaped as logprobs_T, zero where the loss ignores one; the
        loss; the user's metrics.

    Raises:
        TypeError, ValueError: `fn` returned something else.
        GradwireError: NON_FINITE: the loss or a gradient is NaN or infinite.
        Exception: Whatever `fn` raised.
    """
    import torch

    flat = torch.from_numpy(np.array(logprobs_T, dtype=np.float32))
    gradients = torch.zeros_like(flat)
    leaves: list[torch.Tensor] = []
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        leaf = flat[start:stop].detach().requires_grad_()
        # backward adds into an existing .grad in place, so the pieces land in one buffer ready to send.
        leaf.grad = gradients[start:stop]
        leaves.append(leaf)
    with torch.enable_grad():
        loss, metrics = _checked(fn(data, list(leaves)))
        if not bool(torch.isfinite(loss)):
            raise error(
                "NON_FINITE",
                f"The custom loss is {loss.item():g}. Nothing was sent back; the run is as before. Look for a "
                "logarithm of something negative or a division by zero in the loss.",
            )
        if loss.requires_grad:
            loss.backward()
        else:
            logger.warning(
                "The custom loss does not depend on the logprobs (it has no grad), so its gradients are zero. "
                "Was a tensor detached or turned into a number on the way?"
            )
    for number, (leaf, start, stop) in enumerate(zip(leaves, cu_seqlens[:-1], cu_seqlens[1:], strict=True)):
        grad = leaf.grad
        if grad is not None and grad.data_ptr() != gradients[start:stop].data_ptr():
            gradients[start:stop] = grad  # The user's function replaced the buffer.
        if not bool(torch.isfinite(gradients[start:stop]).all()):
            raise error(
                "NON_FINITE",
                f"The custom loss has a NaN or infinite gradient for data[{number}] (loss {loss.item():g}). Nothing "
                "was sent back; the run is as before. Look for a logarithm or division by zero in the loss.",
                datum=number,
            )
    return gradients.numpy(), float(loss.item()), metrics


def _checked(returned: Any) -> tuple["torch.Tensor", dict[str, float]]:
    import torch

    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise TypeError(
            f"The custom loss must return (loss, metrics), a scalar tensor and a dict; got {type(returned).__name__}."
        )
    loss, metrics = returned
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"shape {list(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TypeError(f"The custom loss must return a scalar tensor as loss; got {got}.")
    if not isinstance(metrics, dict):
        raise TypeError(f"The custom loss must return a dict of metrics; got {type(metrics).__name__}.")
    return loss.reshape(()), {str(name): float(value) for name, value in metrics.items()}


class LossThread:
    """A daemon thread that runs one client's loss functions, one after the other, in the order they were called."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Runs `job()`, which must not raise, after those before it."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._jobs.put(job)

    def current(self) -> bool:
        """Whether the caller runs on this thread: inside a loss function."""
        return threading.current_thread() is self._thread

    def stop(self) -> None:
        """Ends the thread after the jobs already there."""
        self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
