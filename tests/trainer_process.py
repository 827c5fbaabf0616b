"""A real trainer process for end-to-end tests: its own worker, a real socket, as a user starts it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradwire import ServiceClient

from tests.forked_trainer import ForkedTrainer, forked_rank
from tests.waiting import DEADLINE_S


@dataclass
class TrainerProcess:
    """A running trainer."""

    process: subprocess.Popen[bytes] | ForkedTrainer
    address: str
    metrics_address: str
    log: Path
    page_url: str = ""

    @property
    def base_url(self) -> str:
        """Where clients connect."""
        return f"http://{self.address}"

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Waits until the model is loaded."""
        with ServiceClient(self.base_url) as service:
            deadline = time.monotonic() + timeout_s
            while not service.get_server_info(timeout_s=timeout_s).ready:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.05)

    def worker_pid(self) -> int:
        """Process id of worker rank 0."""
        return self.rank_pid(0)

    def rank_pid(self, rank: int) -> int:
        """Process id of a rank of the worker."""
        for pid in descendants(self.process.pid):
            if rank_of(pid) == rank:
                return pid
        raise AssertionError(f"No rank {rank} under {self.process.pid}.\n{self.log.read_text()}")


def rank_of(pid: int) -> int | None:
    """Which rank of a worker a process is; None for one that is none, or gone."""
    folder = Path(f"/proc/{pid}")
    with contextlib.suppress(OSError):
        if b"trainer_service.engine" in (folder / "cmdline").read_bytes().split(b"\0"):
            variables = (folder / "environ").read_bytes().split(b"\0")
            return int(next(each for each in variables if each.startswith(b"RANK=")).removeprefix(b"RANK="))
        return forked_rank(pid)
    return None


def descendants(pid: int) -> list[int]:
    """Process ids below `pid`, at any depth."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The command name, in parentheses, may hold spaces.
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found: list[int] = []
    line = [pid]
    while line:
        below = children.get(line.pop(), [])
        found += below
        line += below
    return found


def wait_gone(pids: list[int], timeout_s: float = DEADLINE_S) -> list[int]:
    """Those of `pids` still alive after at most timeout_s; zombies count as gone."""
    deadline = time.monotonic() + timeout_s
    while True:
        alive = [pid for pid in pids if _alive(pid)]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def start_trainer(
    arguments: Sequence[str], env: Mapping[str, str], log: Path, *, forked: bool, max_open_files: int = 0
) -> subprocess.Popen[bytes] | ForkedTrainer:
    """Starts `python -m trainer_service`; see running_trainer. What it prints is added to its log."""
    if forked:
        assert not max_open_files
        return ForkedTrainer(arguments, env, log)
    command = [sys.executable, "-m", "trainer_service", *arguments]
    if max_open_files:
        command = ["bash", "-c", f'ulimit -n {max_open_files} && exec "$@"', "bash", *command]
    with log.open("ab") as out:
        return subprocess.Popen(command, stdout=out, stderr=out, env=env)


@contextlib.contextmanager
def running_trainer(
    model: Path,
    folder: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    max_open_files: int = 0,
    forked: bool = False,
) -> Iterator[TrainerProcess]:
    """Starts a trainer on a free port and stops it with SIGTERM; it must then exit 0 and leave nothing behind.

    Args:
        model: Its base model.
        folder: Gets its data and its log.
        *arguments: Further options.
        env: Added to its environment.
        max_open_files: The most it can have; 0 leaves that as it is.
        forked: From a process that has imported what it needs (tests.forked_trainer), and not executed, as users do.
    """
    ready_file = folder / "ready.json"
    log = folder / "trainer.log"
    command = ["serve", "--base-model", str(model), "--listen", "127.0.0.1:0", "--metrics-port", "0"]
    # A spare worker's imports would be time that other tests lack.
    command += ["--data-dir", str(folder / "data"), "--ready-file", str(ready_file), "--spare-worker-after-s", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    process = start_trainer([*command, *arguments], environment, log, forked=forked, max_open_files=max_open_files)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not ready_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        ready = json.loads(ready_file.read_text())
        yield TrainerProcess(process, ready["address"], ready["metrics_address"], log, ready["page_url"])
    finally:
        below = descendants(process.pid)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            raise AssertionError(f"The trainer did not stop on SIGTERM.\n{log.read_text()}") from None
        assert code in (0, -signal.SIGKILL), log.read_text()
        assert wait_gone(below) == [], log.read_text()
