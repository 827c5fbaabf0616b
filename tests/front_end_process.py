"""A trainer with a fake worker in a process of its own: `python -m tests.front_end_process`, until its stdin ends."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

from tests.fakes import front_end
from trainer_service.config import Limits


@contextlib.contextmanager
def running_front_end(*api_keys: str) -> Iterator[str]:
    """Its address, host:port.

    Args:
        *api_keys: Keys that open it; none lets everybody in.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.front_end_process", *api_keys],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().strip()
        assert address, "the front end did not start"
        yield address
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


async def _serve() -> None:
    async with front_end(api_keys=tuple(sys.argv[1:]), limits=Limits(max_runs=1000)) as trainer:
        print(trainer.server.address, flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_serve())
