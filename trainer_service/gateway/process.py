"""The gateway as a process: it listens, and stops when told."""

import asyncio
import logging

from gradwire._wire.protocol_version import __version__

from trainer_service.addresses import listens_on_loopback
from trainer_service.config import GatewayConfig
from trainer_service.gateway.app import make_app
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.trainers import Trainer, Trainers
from trainer_service.http_server import HttpServer
from trainer_service.processes import told_to_stop, write_ready_file

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 3


async def serve_gateway(config: GatewayConfig) -> int:
    """Serves until SIGTERM, SIGINT or (exit_with_parent) EOF on stdin.

    Returns:
        The process's exit code.

    Raises:
        OSError: The address cannot be used.
        SettingsError: Another gateway uses the folder.
    """
    told = asyncio.create_task(told_to_stop(exit_with_parent=config.exit_with_parent))
    server = HttpServer(config.listen, tls=config.tls)
    gateway = None
    try:
        gateway = Gateway(config, _trainers(config))
        await server.start(make_app(gateway), stop_grace_s=_STOP_GRACE_S)
        if config.tls is None and gateway.api_keys.required and not listens_on_loopback(config.listen):
            logger.warning("API keys cross the network in plaintext; give --tls-cert-file, or put TLS in front.")
        logger.info("Listening.", extra={"fields": {"address": server.address, "version": __version__}})
        if config.ready_file is not None:
            write_ready_file(config.ready_file, address=server.address)
        await told
    finally:
        if gateway is not None:
            gateway.end_polls()
        await server.stop()
        if gateway is not None:
            await gateway.close()
        told.cancel()
    logger.info("Stopped.")
    return 0


def _trainers(config: GatewayConfig) -> Trainers:
    trainers = [Trainer(url, ca_file=config.trainer_ca_file) for url in config.trainers]
    # "NAME=MODEL", or NAME alone for the only model.
    aliases = [name.partition("=") for name in config.served_model_names]
    return Trainers(trainers, {name: model for name, _, model in aliases})
