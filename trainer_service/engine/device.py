"""Where the model runs and in which precision: the one place that decides.

Parameters, gradients and optimizer state are float32 everywhere. Matrix products run in float32 on the CPU and, under
autocast, in bfloat16 on CUDA; --compute-dtype asks for the other.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer_service.engine import freed_memory
from trainer_service.processes import held_bytes
from trainer_service.worker_config import ComputeDtype


@dataclass(frozen=True)
class Device:
    """A device and its precision.

    Attributes:
        torch_device: Where tensors are.
        name: For people: "cpu", or "cuda:0 (NVIDIA H200)".
        compute_dtype: Dtype of matrix products.
        num_sharing: How many ranks have a part of it: all of this machine's where it is the CPU.
    """

    torch_device: torch.device
    name: str
    compute_dtype: torch.dtype
    num_sharing: int = 1

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The autocast context that every forward runs in."""
        if self.compute_dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.compute_dtype)

    def synchronize(self) -> None:
        """Waits for what was queued on the device, so that times and failures belong to their operation."""
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def total_bytes(self) -> int:
        """Total memory: of the GPU, or this rank's share of this machine or its control group.

        Not what is free now: what depends on it (the shape of packs) must be the same after a restart, or the same log
        would give different bits.
        """
        if self.torch_device.type == "cuda":
            return torch.cuda.get_device_properties(self.torch_device).total_memory
        return total_host_bytes() // self.num_sharing

    def take_peak_bytes(self) -> int:
        """Memory in use: of a GPU the most that tensors took since this was asked last, elsewhere what the process
        holds now; 0 where the system does not say."""
        if self.torch_device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.torch_device)
            torch.cuda.reset_peak_memory_stats(self.torch_device)
            return peak
        return held_bytes()

    def release_cached_memory(self) -> None:
        """Returns memory that is kept though it is free."""
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        else:
            freed_memory.give_back()


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype that products of a tensor are made in: autocast's where that is on, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def pick_device(local_rank: int = 0, compute_dtype: ComputeDtype = "auto", local_world_size: int = 1) -> Device:
    """CUDA if there is a GPU, otherwise the CPU; "auto" computes in bfloat16 on CUDA and in float32 on the CPU."""
    asked = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16}[compute_dtype]
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
        return Device(device, f"{device} ({torch.cuda.get_device_name(device)})", asked or torch.bfloat16)
    return Device(torch.device("cpu"), "cpu", asked or torch.float32, num_sharing=local_world_size)


def set_num_threads(local_world_size: int = 1) -> int:
    """Lets torch use this rank's share of the CPUs that this process may run on, unless OMP_NUM_THREADS sets a number.
    Returns the number."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_available_cpus() // local_world_size))
    return torch.get_num_threads()


def num_available_cpus() -> int:
    """CPUs of the process's affinity mask, or fewer if its control group (a container's limit) allows fewer."""
    cpus = num_usable_cpus()
    # No such file outside Linux's control groups, and "max" in place of a number where there is no limit.
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cpus = min(cpus, max(1, round(int(quota) / int(period))))
    return cpus


def num_usable_cpus() -> int:
    """CPUs of the process's affinity mask, even if it is granted only part of their time."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def total_host_bytes() -> int:
    """Memory of this machine, or less if its control group allows less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # No such file outside Linux's control groups, and "max" in place of a number where there is no limit.
    with contextlib.suppress(OSError, ValueError):
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def out_of_memory(exc: BaseException) -> bool:
    """Whether an exception means that the device is out of memory."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    # torch has no separate class for a failed allocation on the CPU.
    return isinstance(exc, RuntimeError) and "DefaultCPUAllocator" in str(exc)


def broken(exc: BaseException) -> bool:
    """Whether an exception means that the device is unusable until the process restarts."""
    return isinstance(exc, torch.AcceleratorError) and not out_of_memory(exc)
