"""Asks a trainer what it is, and waits until it takes work."""

import logging
import time

from gradwire._client import answers
from gradwire._client.transport import Connection
from gradwire._wire.protocol_version import check_server
from gradwire.errors import OperationTimeoutError
from gradwire.types.server_info import ServerInfo
from gradwire.v1.trainer_service_pb2 import GetServerInfoRequest
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

logger = logging.getLogger("gradwire")


def get_server_info(connection: Connection, timeout_s: float) -> ServerInfo:
    """What the trainer says of itself.

    Raises:
        FailedPreconditionError: PROTOCOL_VERSION_UNSUPPORTED: the trainer does not speak our version.
    """
    answer = connection.call(TrainerServiceStub, "GetServerInfo", GetServerInfoRequest(), timeout_s=timeout_s)
    trainer = f"the trainer at {connection.base_url} (gradwire {answer.software_version})"
    check_server(answer.min_protocol_version, answer.max_protocol_version, trainer)
    return answers.server_info(answer)


def wait_until_ready(connection: Connection, timeout_s: float) -> None:
    """Waits until the trainer has loaded its model; logs what it waits for if that takes a while.

    Raises:
        OperationTimeoutError: It is not ready within timeout_s.
    """
    start = time.monotonic()
    said = ""
    while not (info := get_server_info(connection, timeout_s)).ready:
        waited_s = time.monotonic() - start
        if waited_s > timeout_s:
            raise OperationTimeoutError(
                f"The trainer at {connection.base_url} was not ready within {timeout_s:g} s: {info.status_message}."
            )
        if waited_s > 2 and info.status_message != said:
            said = info.status_message
            logger.info("Waiting for the trainer at %s: %s.", connection.base_url, said)
        time.sleep(min(1.0, 0.1 + waited_s / 10))
