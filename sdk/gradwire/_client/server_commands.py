"""`gradwire serve` and its like: commands of the server, which the same wheel carries but this half never imports."""

import importlib.util
import os
import sys
from collections.abc import Sequence

SERVER_COMMANDS = {
    "serve": "serve one base model",
    "worker": "take part in the worker of a trainer on another machine",
    "jobs": "start and stop trainers, here or in a cluster",
    "gateway": "serve clients of hosted services over HTTP",
}
"""Each as `python -m trainer_service` takes it, and what it does."""
_PACKAGES = (
    "trainer_service",
    "torch",
    "transformers",
    "safetensors",
    "peft",
    "grpc_health",
    "grpc_reflection",
    "prometheus_client",
    "fsspec",
)


def missing_packages() -> list[str]:
    """What the server needs and this Python does not have; none of it is loaded."""
    return [name for name in _PACKAGES if importlib.util.find_spec(name) is None]


def run_server_command(argv: Sequence[str]) -> int:
    """Becomes the server's process, so that signals and the exit code are its own.

    Args:
        argv: The command, and its arguments.

    Returns:
        2, and only where the server is not installed.
    """
    missing = missing_packages()
    if missing:
        print(
            f"gradwire: {argv[0]} needs the server, but {', '.join(missing)} cannot be imported. Install it with "
            "`pip install 'gradwire[server]'`.",
            file=sys.stderr,
        )
        return 2
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-m", "trainer_service", *argv]
    return os.execv(command[0], command)  # noqa: S606  (there is no shell to guard against)
