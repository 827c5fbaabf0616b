"""A real control plane over fake trainers.

Its process is `python -m tests.jobs_process READY_FILE DATA_DIR SETTINGS`, settings of JobsConfig as JSON.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.trainer_process import descendants, wait_gone
from tests.waiting import DEADLINE_S

API_KEY = "key-of-the-tests"
STOP_GRACE_S = 1.5
"""How long a trainer may take to leave by itself."""


@contextlib.contextmanager
def running_jobs(
    folder: Path, *, api_keys: str = f"tests {API_KEY} admin", **settings: Any
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The control plane's process and base_url; it is stopped with SIGTERM and must leave nothing behind.

    Args:
        folder: Its data is below it, in "data".
        api_keys: As in GRADWIRE_API_KEY.
        **settings: Of JobsConfig, in JSON's types; `tls` is a pair of paths, certificate and key.
    """
    ready_file, log = folder / "jobs.json", folder / "jobs.log"
    ready_file.unlink(missing_ok=True)
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.jobs_process", str(ready_file), str(folder / "data"), json.dumps(settings)],
            env={**os.environ, "GRADWIRE_API_KEY": api_keys},
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not ready_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield process, f"{'https' if 'tls' in settings else 'http'}://{json.loads(ready_file.read_text())['address']}"
    finally:
        below = descendants(process.pid)
        process.send_signal(signal.SIGTERM)
        process.wait(DEADLINE_S)
        assert process.stdin is not None
        process.stdin.close()
        assert wait_gone(below) == [], log.read_text()


def main() -> int:
    from trainer_service.config import JobsConfig, ServerTls
    from trainer_service.control_plane import serve_jobs
    from trainer_service.jobs.local import LocalJobs
    from trainer_service.logs import configure_logging
    from trainer_service.startup_checks import read_api_keys

    configure_logging(as_json=False)
    ready_file, data_dir, text = sys.argv[1:]
    settings = json.loads(text)
    if "tls" in settings:
        settings["tls"] = ServerTls(*map(Path, settings["tls"]))
    config = JobsConfig(
        listen="127.0.0.1:0",
        data_dir=Path(data_dir),
        api_keys=read_api_keys(),
        ready_file=Path(ready_file),
        exit_with_parent=True,
        **settings,
    )
    jobs = LocalJobs(config, trainer_command=(sys.executable, "-m", "tests.fake_trainer"), stop_grace_s=STOP_GRACE_S)
    return asyncio.run(serve_jobs(config, jobs))


if __name__ == "__main__":
    sys.exit(main())
