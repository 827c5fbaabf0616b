"""The control plane as a whole: serves trainer jobs until told to stop."""

import asyncio
import logging

import grpc.aio
from gradwire._wire.version import __version__
from gradwire.v1 import trainer_job_service_pb2
from gradwire.v1.trainer_job_service_pb2_grpc import add_TrainerJobServiceServicer_to_server
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trainer_service import descriptors
from trainer_service.access import ApiKeys
from trainer_service.addresses import listens_on_loopback
from trainer_service.config import JobsConfig
from trainer_service.jobs.owned import OwnedJobs
from trainer_service.jobs.trainer_job import TrainerJobs
from trainer_service.observability import Metrics
from trainer_service.processes import parent_gone, wait_for_signal, write_ready_file
from trainer_service.rpc.border import Border
from trainer_service.rpc.ports import open_port, serve_health
from trainer_service.rpc.trainer_job_servicer import TrainerJobServicer
from trainer_service.rpc.transport import server_options

logger = logging.getLogger(__name__)

SERVICE = trainer_job_service_pb2.DESCRIPTOR.services_by_name["TrainerJobService"].full_name
_MAX_MESSAGE_BYTES = 1024 * 1024
_DESCRIPTORS_RESERVED = 128
"""For what is not a client's connection: the control plane itself, and its trainers' pipes and channels."""


async def serve_jobs(config: JobsConfig, jobs: TrainerJobs) -> int:
    """Serves `jobs` until SIGTERM, SIGINT or (exit_with_parent) EOF on stdin, then stops all of them.

    Returns:
        The process's exit code.

    Raises:
        OSError: The address cannot be had.
        SettingsError: Too few files may be open.
    """
    # Set up before anything is started, so that a signal in between is not lost.
    ends = [asyncio.create_task(wait_for_signal())]
    if config.exit_with_parent:
        ends.append(asyncio.create_task(parent_gone()))
    api_keys = ApiKeys(config.api_keys, config.api_key_file)
    border = Border(api_keys=api_keys, metrics=Metrics(), max_message_bytes=_MAX_MESSAGE_BYTES)
    options = server_options(
        max_message_bytes=_MAX_MESSAGE_BYTES,
        max_connections=descriptors.max_connections(reserved=_DESCRIPTORS_RESERVED),
    )
    server = grpc.aio.server(interceptors=[border], options=options)
    owned = OwnedJobs(jobs, max_jobs=config.max_jobs, max_jobs_per_key=config.max_jobs_per_key)
    servicer = TrainerJobServicer(owned, embedded=config.embedded, own_hosts=config.kubernetes is not None)
    add_TrainerJobServiceServicer_to_server(servicer, server)
    health_servicer = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = open_port(server, config.listen, config.tls)
    for name in ("", SERVICE):
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    await jobs.start()
    await server.start()
    health_port = None if config.health_listen is None else await serve_health(config.health_listen, health_servicer)
    if config.tls is None and api_keys.required and not listens_on_loopback(config.listen):
        logger.warning("API keys cross the network in plaintext; give --tls-cert-file, or put TLS in front.")
    logger.info("Listening.", extra={"fields": {"address": address, "version": __version__}})
    try:
        if config.ready_file is not None:
            write_ready_file(config.ready_file, address=address)
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        logger.info("Stopping.")
        await health_servicer.enter_graceful_shutdown()
        await jobs.stop()
        await server.stop(grace=1.0)
        if health_port is not None:
            await health_port.stop(grace=None)
        for task in ends:
            task.cancel()
    logger.info("Stopped.")
    return 0
