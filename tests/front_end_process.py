"""A trainer front end with a fake worker in a process of its own, whose memory can be measured.

`python -m tests.front_end_process KEY…` prints its address, and ends when its stdin does.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.front_end import front_end
from trainer_service.config import Limits
from trainer_service.processes import parent_gone


@dataclass
class FrontEndProcess:
    """One that runs."""

    address: str
    pid: int

    def memory_bytes(self) -> int:
        """Memory it holds now."""
        return _status(self.pid, "VmRSS")

    def peak_memory_bytes(self) -> int:
        """The most it has held since it began, or since forget_peak."""
        return _status(self.pid, "VmHWM")

    def forget_peak(self) -> None:
        """Begins to look for the peak anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")


@contextlib.contextmanager
def front_end_process(*api_keys: str) -> Iterator[FrontEndProcess]:
    """Starts one, and ends it.

    Args:
        *api_keys: Keys that open it; none lets everybody in.
    """
    command = [sys.executable, "-m", "tests.front_end_process", *api_keys]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, f"it ended with {process.wait(10)}"
            yield FrontEndProcess(address, process.pid)
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def _status(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no {name} of {pid}")


async def _main() -> None:
    async with front_end(api_keys=tuple(sys.argv[1:]), limits=Limits(max_runs=1000)) as trainer:
        print(trainer.address, flush=True)
        await parent_gone()


if __name__ == "__main__":
    asyncio.run(_main())
    # Threads of grpc must not keep a test waiting.
    os._exit(0)
