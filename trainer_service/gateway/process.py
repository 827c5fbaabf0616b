"""The gateway as a process: listens, and stops when told."""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator

import uvicorn
from gradwire._wire.version import __version__

from trainer_service.addresses import split_address
from trainer_service.config import GatewayConfig
from trainer_service.gateway.app import make_app
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.trainers import Trainer, Trainers
from trainer_service.processes import parent_gone, write_ready_file

logger = logging.getLogger(__name__)

_BACKLOG = 2048


class _Server(uvicorn.Server):
    """uvicorn, told when to stop by us alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


async def serve_gateway(config: GatewayConfig) -> int:
    """Serves until SIGTERM, SIGINT or (exit_with_parent) EOF on stdin.

    Returns:
        The process's exit code.

    Raises:
        OSError: The address cannot be had.
        SettingsError: Another gateway uses the folder.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    ends: list[asyncio.Task[object]] = [asyncio.create_task(stop.wait())]
    if config.exit_with_parent:
        ends.append(asyncio.create_task(parent_gone()))
    host, port = split_address(config.listen)
    try:
        with listen_on(host, port) as sock:
            bracketed = f"[{host}]" if ":" in host else host
            address = f"{bracketed}:{sock.getsockname()[1]}"
            gateway = Gateway(config, _trainers(config))
            options = uvicorn.Config(
                make_app(gateway), lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=3
            )
            server = _Server(options)
            serving = asyncio.create_task(server.serve(sockets=[sock]))
            logger.info("Listening.", extra={"fields": {"address": address, "version": __version__}})
            try:
                if config.ready_file is not None:
                    write_ready_file(config.ready_file, address=address)
                await asyncio.wait([*ends, serving], return_when=asyncio.FIRST_COMPLETED)
            finally:
                gateway.stopping.set()
                server.should_exit = True
                await asyncio.gather(serving, return_exceptions=True)
                await gateway.close()
    finally:
        for task in ends:
            task.cancel()
    logger.info("Stopped.")
    return 0


def _trainers(config: GatewayConfig) -> Trainers:
    trainers = [Trainer(url, ca_file=config.trainer_ca_file) for url in config.trainers]
    # "NAME=MODEL", or NAME alone for the only model.
    aliases = [name.partition("=") for name in config.served_model_names]
    return Trainers(trainers, {name: model for name, _, model in aliases})


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sends without delay only on sockets whose protocol is said; else a body waits 40 ms behind its head.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(_BACKLOG)
    except OSError as exc:
        sock.close()
        raise OSError(f"cannot listen on {host}:{port}: {exc.strerror or exc}") from exc
    return sock
