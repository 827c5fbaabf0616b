"""Refuses messages with too many fields, or too much in one, before they are parsed or handled."""

from typing import Any

from google.protobuf.message import Message
from gradwire.v1 import checkpoint_service_pb2, sampling_service_pb2, trainer_service_pb2

from trainer_service.config import Limits
from trainer_service.field_limits import check_limits, check_num_fields

_REQUESTS: dict[str, Any] = {
    f"/{service.full_name}/{method.name}": method.input_type
    for file in (checkpoint_service_pb2, sampling_service_pb2, trainer_service_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
"""Request type of each call."""

_OPERATIONS = frozenset(
    f"/gradwire.v1.TrainerService/{field.message_type.name.removesuffix('Request')}"
    for field in trainer_service_pb2.TrainRequest.DESCRIPTOR.oneofs_by_name["operation"].fields
    if field.message_type is not None
)
"""Operations of runs: even a refused one takes its place in the run's order, so the run refuses it."""


class RequestChecks:
    """Checks a trainer's requests.

    Args:
        limits: The most a client may send.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def check_encoded(self, data: bytes, descriptor: Any) -> None:
        """Counts the fields of a message before it is parsed.

        Raises:
            ResourceExhaustedError: LIMIT_EXCEEDED.
        """
        if descriptor in _REQUESTS.values():
            check_num_fields(data, descriptor, self._limits)

    def check(self, method: str, request: Message) -> None:
        """Checks every field of a call's only message, unless its run does that.

        Raises:
            ResourceExhaustedError: LIMIT_EXCEEDED.
        """
        if method in _REQUESTS and method not in _OPERATIONS:
            check_limits(request, self._limits)
