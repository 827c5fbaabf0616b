"""Settings of the processes. Ground floor: imports nothing of ours but the SDK's wire half."""

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

MIN_PROTOCOL_VERSION = 1
"""Oldest protocol version this trainer speaks; the newest is gradwire.version.PROTOCOL_VERSION."""


class SettingsError(ValueError):
    """A setting that cannot be; the message is for the person who set it."""


@dataclass(frozen=True)
class Limits:
    """The most a client may send; announced by GetServerInfo."""

    max_message_bytes: int = 64 * 1024 * 1024
    """One message, either way."""
    target_message_bytes: int = 1024 * 1024
    """Size the SDK splits batches at: larger protobuf messages move slower through gRPC, smaller ones cost overhead."""
    max_in_flight_operations: int = 64
    """Operations of one run sent and not yet answered; the trainer reads no further beyond it."""
    max_runs: int = 8
    """Runs held at once; each full-parameter run has parameters, gradients and optimizer state of its own."""
    max_datums: int = 65_536
    """Sequences in one operation."""
    max_tokens: int = 4_194_304
    """Tokens in one operation."""


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a trainer."""

    base_model: str
    """Hub id or folder."""
    listen: str = "127.0.0.1:7777"
    """host:port; port 0 takes a free one."""
    metrics_listen: str | None = None
    """host:port of the Prometheus endpoint; None serves none."""
    data_dir: Path = field(default_factory=lambda: default_data_dir())
    """Where checkpoints go."""
    max_context_length: int = 0
    """Longest sequence taken, tokens; 0 takes the model's own limit."""
    api_keys: tuple[str, ...] = ()
    """Keys that open the trainer; none opens it to everybody who can reach it."""
    allow_no_api_key: bool = False
    """Listen beyond loopback without a key."""
    reflection: bool = True
    ready_file: Path | None = None
    """Gets {"address", "metrics_address", "pid"} as JSON once the trainer listens."""
    drain_timeout_s: float = 30.0
    """How long queued operations may take to finish after SIGTERM."""
    detach_grace_s: float = 60.0
    """How long a run whose client is gone keeps the graphs of its custom losses."""
    exit_with_parent: bool = False
    """Stop when stdin reaches its end."""
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class JobsConfig:
    """Settings of the control plane."""

    listen: str = "127.0.0.1:7070"
    """host:port; port 0 takes a free one."""
    data_dir: Path = field(default_factory=lambda: default_data_dir())
    """Where trainers' logs and checkpoints go."""
    api_keys: tuple[str, ...] = ()
    """Keys that open the control plane and the trainers it starts."""
    allow_no_api_key: bool = False
    """Listen beyond loopback without a key."""
    ready_file: Path | None = None
    """Gets {"address", "pid"} as JSON once the control plane listens."""
    exit_with_parent: bool = False
    """Stop, with all trainers, when stdin reaches its end."""


def default_data_dir() -> Path:
    """$GRADWIRE_HOME, or ~/.gradwire."""
    return Path(os.environ.get("GRADWIRE_HOME") or Path.home() / ".gradwire")


def read_api_keys(api_key_file: Path | None) -> tuple[str, ...]:
    """Keys from the file (one a line, # for comments) and from GRADWIRE_API_KEY (comma separated)."""
    lines = os.environ.get("GRADWIRE_API_KEY", "").split(",")
    if api_key_file is not None:
        lines += [line.partition("#")[0] for line in api_key_file.read_text().splitlines()]
    return tuple(dict.fromkeys(key for line in lines if (key := line.strip())))


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port".

    Raises:
        SettingsError: No host or no port in it.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f'address {address!r} must be "host:port", for example "127.0.0.1:7777".')
    return host, int(port)


def check_exposure(listen: str, *, api_keys: tuple[str, ...], allow_no_api_key: bool) -> None:
    """Refuses to listen beyond this machine without a key.

    Raises:
        SettingsError: Names the ways out.
    """
    host, _ = split_address(listen)
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback and not api_keys and not allow_no_api_key:
        raise SettingsError(
            f"--listen {listen} is reachable from other machines, and there is no API key. Set GRADWIRE_API_KEY or "
            "--api-key-file, or pass --allow-no-api-key if something in front of Gradwire checks who calls."
        )


def check_base_model(base_model: str) -> None:
    """Refuses what is spelt as a folder and is none, seconds before a worker could.

    Raises:
        SettingsError: Says so.
    """
    if base_model.startswith(("/", "./", "../", "~")) and not os.path.isdir(base_model):
        raise SettingsError(
            f"--base-model {base_model} does not exist or is no folder; give a Hugging Face model folder or a hub id."
        )
