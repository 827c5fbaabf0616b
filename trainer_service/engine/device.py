"""Where the model runs and in which precision: the one place that decides.

Parameters, gradients and optimizer state are float32 everywhere. Matrix products run in float32 on the CPU and, under
autocast, in bfloat16 on CUDA.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Device:
    """A device and its precision.

    Attributes:
        torch_device: Where tensors live.
        name: For people: "cpu", or "cuda:0 (NVIDIA H200)".
        compute_dtype: What matrix products run in.
    """

    torch_device: torch.device
    name: str
    compute_dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """What every forward runs in."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.compute_dtype)

    def synchronize(self) -> None:
        """Waits for what was queued on the device, so that times and failures belong to their operation."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def release_cached_memory(self) -> None:
        """Gives memory that torch keeps for later back to the device."""
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()


def pick_device(local_rank: int = 0) -> Device:
    """CUDA with bfloat16 compute where there is a GPU, otherwise the CPU in float32."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        return Device(device, f"{device} ({torch.cuda.get_device_name(device)})", torch.bfloat16)
    return Device(torch.device("cpu"), "cpu", torch.float32)


def set_num_threads() -> int:
    """Lets torch use every CPU this process may run on, unless OMP_NUM_THREADS says how many. Returns their number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_available_cpus())
    return torch.get_num_threads()


def num_available_cpus() -> int:
    """CPUs of the process's affinity mask, or fewer where its control group (a container's limit) grants fewer."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # No such file outside Linux's control groups, and "max" in place of a number where there is no limit.
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return cpus


def out_of_memory(exc: BaseException) -> bool:
    """Whether an exception means that the device had no more memory to give."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no class of its own for a refused allocation on the CPU.
    return isinstance(exc, RuntimeError) and "DefaultCPUAllocator" in str(exc)


def broken(exc: BaseException) -> bool:
    """Whether an exception means that the device answers nothing any more until the process starts afresh."""
    return isinstance(exc, torch.AcceleratorError) and not out_of_memory(exc)
