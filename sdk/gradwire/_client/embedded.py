"""The control plane as a child of the user's script: started on first use, gone when the script is, however it ends."""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path
from typing import IO

from gradwire._client.server_commands import missing_packages
from gradwire.errors import FailedPreconditionError, error

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 30.0
"""A little more than the control plane gives its trainers."""
_LOG_TAIL_BYTES = 4096


class EmbeddedControlPlane:
    """A control plane on this machine that serves one manager.

    It holds the read end of a pipe and stops, with all its trainers, at the pipe's end: when `stop` closes it, and when
    this process ends, be it by SIGKILL.

    Args:
        api_key: Required from its clients; "" requires none. It listens on loopback only.
    """

    def __init__(self, api_key: str) -> None:
        if "," in api_key or api_key != api_key.strip():
            raise ValueError("api_key has a comma, or spaces around it; the local control plane takes neither.")
        self._api_key = api_key
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None
        self._base_url = ""

    @property
    def started(self) -> bool:
        """Whether `start` was called and `stop` was not."""
        return self._process is not None

    def start(self) -> str:
        """Starts it unless it runs, and returns its base_url.

        Raises:
            FailedPreconditionError: The server is not installed, or the control plane could not start or has ended.
        """
        with self._lock:
            if self._process is None:
                self._start()
            elif self._process.poll() is not None:
                raise _failed(f"The local control plane has ended ({self._process.returncode}).{self._last_words()}")
            return self._base_url

    def _start(self) -> None:
        missing = missing_packages()
        if missing:
            raise FailedPreconditionError(
                f"Starting a trainer on this machine needs the server, but {', '.join(missing)} cannot be imported. "
                "Run `pip install 'gradwire[server]'`, or pass the base_url of a control plane that runs elsewhere.",
            )
        env = {name: value for name, value in os.environ.items() if name != "GRADWIRE_API_KEY"}
        if self._api_key:
            env["GRADWIRE_API_KEY"] = self._api_key
        # The script's folder is no place to import from: a tokenize.py there would stand in for Python's own.
        env["PYTHONSAFEPATH"] = "1"
        # Without a name, so that nothing is left of it, however this process ends.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the control plane runs)
        with tempfile.TemporaryDirectory(prefix="gradwire-") as folder:
            ready_file = Path(folder) / "ready.json"
            command = [sys.executable, "-m", "trainer_service", "jobs", "--listen", "127.0.0.1:0"]
            command += ["--embedded", "--exit-with-parent", "--ready-file", str(ready_file)]
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=self._log,
                env=env,
                # Ctrl-C is for the script, which then takes the rest down in order.
                start_new_session=True,
            )
            _PLANES.add(self)
            atexit.register(self.stop)
            try:
                self._base_url = f"http://{self._await_address(self._process, ready_file)}"
            except BaseException:
                self._stop()
                raise

    def _await_address(self, process: subprocess.Popen[bytes], ready_file: Path) -> str:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not ready_file.exists():
            if process.poll() is not None:
                raise _failed(f"The local control plane could not start.{self._last_words()}")
            if time.monotonic() > deadline:
                raise _failed(f"The local control plane was not up within {_START_TIMEOUT_S:g} s.{self._last_words()}")
            time.sleep(0.02)
        return json.loads(ready_file.read_text())["address"]

    def stop(self) -> None:
        """Stops it and all its trainers, and waits until they are gone."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # Its trainers see their own pipes end, and follow.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None

    def _last_words(self) -> str:
        if self._log is None:
            return ""
        # pread, as the child writes at the same file's end.
        size = os.fstat(self._log.fileno()).st_size
        tail = os.pread(self._log.fileno(), _LOG_TAIL_BYTES, max(0, size - _LOG_TAIL_BYTES))
        return f" Its last words:\n{tail.decode(errors='replace').strip()}" if tail.strip() else ""

    def forget(self) -> None:
        """In a forked child: lets go of the pipe, which the parent alone must hold."""
        self._lock = threading.Lock()
        process, self._process = self._process, None
        if process is not None and process.stdin is not None:
            process.stdin.close()
            # Not ours to wait for, and not worth a warning.
            process.returncode = 0


def _failed(text: str) -> Exception:
    return error("TRAINER_JOB_FAILED", text)


_PLANES: "weakref.WeakSet[EmbeddedControlPlane]" = weakref.WeakSet()


def _forget_all() -> None:
    for plane in _PLANES:
        plane.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
