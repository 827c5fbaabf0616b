"""The control plane as a whole: serves trainer jobs until told to stop."""

import asyncio
import logging

from gradwire.v1 import trainer_job_service_pb2
from gradwire.v1.trainer_job_service_pb2_grpc import add_TrainerJobServiceServicer_to_server

from trainer_service.access import ApiKeys
from trainer_service.config import JobsConfig
from trainer_service.jobs.owned import OwnedJobs
from trainer_service.jobs.trainer_job import TrainerJobs
from trainer_service.metrics import Metrics
from trainer_service.processes import told_to_stop, write_ready_file
from trainer_service.rpc.grpc_server import GrpcServer
from trainer_service.rpc.trainer_job_servicer import TrainerJobServicer

logger = logging.getLogger(__name__)

SERVICE = trainer_job_service_pb2.DESCRIPTOR.services_by_name["TrainerJobService"].full_name
_MAX_MESSAGE_BYTES = 1024 * 1024
_MAX_CALLS = 1024
"""Simultaneous calls of one client."""
_RESERVED_DESCRIPTORS = 128
"""File descriptors for everything but clients: the control plane itself, its trainers' pipes and channels."""


async def serve_jobs(config: JobsConfig, jobs: TrainerJobs) -> int:
    """Serves `jobs` until SIGTERM, SIGINT or (exit_with_parent) EOF on stdin, then stops all of them.

    Returns:
        The process's exit code.

    Raises:
        OSError: An address cannot be used.
        SettingsError: The limit on open files is too low.
    """
    # Before anything is started, so that a signal in between is not lost.
    told = asyncio.create_task(told_to_stop(exit_with_parent=config.exit_with_parent))
    server = GrpcServer(
        config,
        api_keys=ApiKeys(config.api_keys, config.api_key_file),
        metrics=Metrics(),
        max_message_bytes=_MAX_MESSAGE_BYTES,
        max_calls=_MAX_CALLS,
        reserved_descriptors=_RESERVED_DESCRIPTORS,
    )
    owned = OwnedJobs(jobs, max_jobs=config.max_jobs, max_jobs_per_key=config.max_jobs_per_key)
    servicer = TrainerJobServicer(owned, embedded=config.embedded, own_hosts=config.kubernetes is not None)
    add_TrainerJobServiceServicer_to_server(servicer, server.server)
    server.bind(SERVICE)
    await server.set_serving(SERVICE, True)
    await jobs.start()
    await server.start()
    try:
        if config.ready_file is not None:
            write_ready_file(config.ready_file, address=server.address)
        await told
    finally:
        logger.info("Stopping.")
        await server.stop_serving()
        await jobs.stop()
        await server.stop(grace_s=1.0)
        told.cancel()
    logger.info("Stopped.")
    return 0
