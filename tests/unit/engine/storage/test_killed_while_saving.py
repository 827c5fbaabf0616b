"""A process killed at any instant while it saves leaves the checkpoint whole or not at all."""

import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer_service.atomic_folders import read_manifest, settle, verify

NUM_INSTANTS = 50
SAVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from trainer_service.engine.storage.state_files import State, write_state

torch.set_num_threads(1)

def save(folder, version):
    tensors = {f"layer.{i}": torch.full((40, 1000), float(version)) for i in range(10)}
    state = State(tensors, {}, {}, {"step": version})
    write_state(state, Path(folder), about={"step": version}, overwrite=True)

for line in sys.stdin:
    folder, version, delay_s = line.split()
    started = time.perf_counter()
    # A child a save: torch is loaded once.
    pid = os.fork()
    if pid == 0:
        try:
            save(folder, int(version))
        finally:
            os._exit(0)
    if float(delay_s) >= 0:
        time.sleep(float(delay_s))
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    print(time.perf_counter() - started, flush=True)
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: what a process leaves when it is killed does not depend on the disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.mark.slow
def test_killed_at_fifty_instants_it_leaves_the_old_state_or_the_new_one(scratch: Path) -> None:
    folder = scratch / "states" / "a"
    command = [sys.executable, "-W", "ignore", "-c", SAVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as saver:
        assert saver.stdin is not None
        assert saver.stdout is not None

        def save(version: int, delay_s: float) -> float:
            assert saver.stdin is not None
            assert saver.stdout is not None
            print(folder, version, delay_s, file=saver.stdin, flush=True)
            return float(saver.stdout.readline())

        # How long a save takes here, so that instants fall all over it, and somewhat behind it.
        took_s = min(save(0, -1) for _ in range(3))
        rng = random.Random(0)
        seen: set[bool] = set()
        there = 0
        for version in range(1, NUM_INSTANTS + 1):
            save(version, rng.uniform(0, 2) * took_s)
            settle(folder.parent)
            assert [path.name for path in folder.parent.iterdir()] == ["a"]
            manifest = read_manifest(folder)
            verify(folder, manifest)
            assert manifest.about["step"] in (there, version)
            seen.add(manifest.about["step"] == version)
            there = manifest.about["step"]
        saver.stdin.close()
    assert seen == {False, True}
