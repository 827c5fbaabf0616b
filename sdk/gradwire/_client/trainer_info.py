"""Asks a trainer what it is, and waits until it takes work."""

import logging
import time

from gradwire._client import answers
from gradwire._client.transport import Connection
from gradwire._wire.version import PROTOCOL_VERSION, __version__
from gradwire.errors import OperationTimeoutError, error
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
    if not answer.min_protocol_version <= PROTOCOL_VERSION <= answer.max_protocol_version:
        raise error(
            "PROTOCOL_VERSION_UNSUPPORTED",
            f"This SDK (gradwire {__version__}) speaks protocol version {PROTOCOL_VERSION}, but the trainer at "
            f"{connection.base_url} (gradwire {answer.software_version}) speaks {answer.min_protocol_version} to "
            f"{answer.max_protocol_version}. Install the same gradwire on both sides.",
            client=PROTOCOL_VERSION,
            server=answer.max_protocol_version,
        )
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
