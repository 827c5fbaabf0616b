"""A real gateway process for tests: a real socket, as a user starts it, and the official tinker SDK as its client."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class GatewayProcess:
    """A gateway that can be killed and started again at the same address."""

    trainer_url: str
    folder: Path
    arguments: tuple[str, ...] = ()
    address: str = "127.0.0.1:0"
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def base_url(self) -> str:
        """Where clients connect."""
        return f"http://{self.address}"

    @property
    def log(self) -> Path:
        """Its log."""
        return self.folder / "gateway.log"

    def start(self) -> None:
        """Starts it, and returns once it listens; the address stays what it was."""
        ready_file = self.folder / "gateway.json"
        ready_file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "trainer_service", "gateway", "--trainer", self.trainer_url]
        command += ["--listen", self.address, "--data-dir", str(self.folder), "--ready-file", str(ready_file)]
        with self.log.open("ab") as out:
            self.process = subprocess.Popen([*command, *self.arguments], stdout=out, stderr=out, env={**os.environ})
        deadline = time.monotonic() + 60
        while not ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        self.address = json.loads(ready_file.read_text())["address"]

    def kill(self) -> None:
        """As a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(30)

    def stop(self) -> None:
        """SIGTERM; it must end with 0, and without an exception in its log."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            assert self.process.wait(30) == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()


@contextlib.contextmanager
def running_gateway(trainer_url: str, folder: Path, *arguments: str) -> Iterator[GatewayProcess]:
    """Starts one on a free port, and stops it.

    Args:
        trainer_url: What it stands before.
        folder: Gets its data and its log.
        *arguments: Further options.
    """
    gateway = GatewayProcess(trainer_url, folder, arguments)
    gateway.start()
    try:
        yield gateway
    finally:
        gateway.stop()
