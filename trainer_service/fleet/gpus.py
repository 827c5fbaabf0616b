"""How many GPUs this machine has, asked without loading torch into this process."""

import asyncio
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE

from trainer_service.command_lines import SettingsError
from trainer_service.worker_config import QUANTIZED, BaseDtype, ProcessesPerNode

_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Of NVIDIA, of AMD, and of either below WSL; without one there is no GPU, and nothing to ask."""


async def count_gpus() -> int:
    """GPUs that torch sees, CUDA_VISIBLE_DEVICES taken into account.

    Raises:
        SettingsError: torch cannot be asked.
    """
    if not any(map(os.path.exists, _DRIVERS)):
        return 0
    code = "import torch; print(torch.cuda.device_count())"
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdin=DEVNULL, stdout=PIPE, stderr=PIPE)
    told, complaints = await process.communicate()
    if not told.strip().isdigit():
        last = (complaints.decode(errors="replace").strip().splitlines() or ["nothing"])[-1]
        raise SettingsError(f"torch does not say how many GPUs there are: {last}; give --nproc-per-node.")
    return int(told)


def local_world_size(asked: ProcessesPerNode, *, num_gpus: int, base_dtype: BaseDtype) -> int:
    """Ranks on each machine.

    Args:
        asked: --nproc-per-node.
        num_gpus: GPUs of this machine; 0 computes on the CPU.
        base_dtype: --base-dtype; what is quantised is for one rank.

    Raises:
        SettingsError: There are no GPUs, or fewer than ranks.
    """
    if asked == "auto":
        return num_gpus if num_gpus and base_dtype not in QUANTIZED else 1
    if asked == "gpu" and not num_gpus:
        raise SettingsError(
            "--nproc-per-node is gpu, and this machine has no GPU; give a number to compute on the CPU."
        )
    ranks = num_gpus if asked == "gpu" else int(asked)
    if 0 < num_gpus < ranks:
        raise SettingsError(
            f"--nproc-per-node is {ranks}, and this machine has {num_gpus} GPUs; each rank needs one of its own."
        )
    return ranks
