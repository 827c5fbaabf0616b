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
        TypeError: `fn` returned something else; names the metric that is no number.
        GradwireError: NON_FINITE: the loss or a gradient is NaN or infinite.
        Exception: Whatever `fn` raised.
    """
    import torch

    # Per datum as little as can be: with thousands of them it is these calls that cost, not the floats. "unsafe" splits
    # into tensors that do not know of each other, which is what leaves are.
    flat = torch.from_numpy(np.array(logprobs_T, dtype=np.float32))
    leaves = list(torch.unsafe_split_with_sizes(flat, np.diff(cu_seqlens).tolist()))
    for leaf in leaves:
        leaf.requires_grad_()
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
    found = [leaf.grad for leaf in leaves]
    pairs = zip(leaves, found, strict=True)
    gradients = torch.cat([torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs])
    # A sum is finite only if all it sums is; one that is not may still have overflowed.
    if not bool(torch.isfinite(gradients.sum())) and not bool(torch.isfinite(gradients).all()):
        number = next(n for n, grad in enumerate(found) if grad is not None and not bool(torch.isfinite(grad).all()))
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
    if not isinstance(metrics, Mapping):
        raise TypeError(f"The custom loss must return a dict of metrics; got {type(metrics).__name__}.")
    return loss.reshape(()), {str(name): _metric(str(name), value) for name, value in metrics.items()}


def _metric(name: str, value: Any) -> float:
    """One metric; NaN and infinity are the user's own."""
    if not isinstance(value, str | bytes):
        try:
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
    shape = getattr(value, "shape", None)
    got = f"a {type(value).__name__}" + (f" of shape {list(shape)}" if shape is not None else "")
    raise TypeError(
        f'The custom loss returned the metric "{name}" as {got}; a metric must be one number. Reduce it, by a mean, '
        "or return its parts under names of their own."
    )


_MAX_REPORTED = 256
"""Of one loss: as many as a trainer takes (max_metrics)."""
_MAX_NAME_BYTES = 4096


def reported_metrics(metrics: Mapping[str, float], loss: float) -> dict[str, float]:
    """What a trainer is told for the run's curves: a loss's metrics, and its value as "loss:sum".

    What is too much for it is left out, with a warning; whoever called the loss has it all the same.
    """
    kept = {name: value for name, value in metrics.items() if _is_text(name) and len(name.encode()) <= _MAX_NAME_BYTES}
    kept = dict(list(kept.items())[: _MAX_REPORTED - 1])
    if len(kept) < len(metrics):
        logger.warning(
            "The custom loss returned %d metrics; %d of them, those beyond %d or with a name that is longer than %d "
            "bytes or no UTF-8, get no curve.",
            len(metrics),
            len(metrics) - len(kept),
            _MAX_REPORTED - 1,
            _MAX_NAME_BYTES,
        )
    return kept | {"loss:sum": loss}


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


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
