"""Every error Gradwire raises, on both sides of the wire.

GradwireError                        .reason .metadata .field_violations .retry_after_s
├── InvalidArgumentError             also ValueError
├── NotFoundError                    also LookupError
├── AlreadyExistsError               also FileExistsError
├── FailedPreconditionError          also RuntimeError
│   ├── NoGradientsError             optim_step with nothing accumulated
│   ├── OperationPoisonedError       the worker died three times under it; .seq_id
│   └── PriorOperationFailedError    an operation this one builds on failed; .failed_seq_id
├── AbortedError                     also RuntimeError
├── OutOfRangeError                  also ValueError
├── ResourceExhaustedError
│   └── DeviceOutOfMemoryError       also MemoryError
├── UnauthenticatedError             also PermissionError
├── UnavailableError                 also ConnectionError
│   └── WorkerDiedError              the worker process died while a run was made or deleted
├── OperationCancelledError
├── OperationTimeoutError            also TimeoutError
├── UnimplementedError               also NotImplementedError
├── DataLossError                    a checkpoint is damaged
└── InternalError                    also RuntimeError

Code branches on `reason`, a name of the ErrorReason enum without its prefix ("RUN_NOT_FOUND"); people read the message.
The server raises these too and `to_status` carries them over the wire; `from_status` and `from_rpc_error` bring them
back. `ERROR_CODES` is the one table from reason to gRPC code.
"""

from typing import Any, cast

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from gradwire._wire.untrusted import printable

DOMAIN = "gradwire.v1"
MAX_TEXT_CHARS = 4096
"""Of an error's message, of each of its variables and of each field path, as they cross the wire."""

ERROR_CODES: dict[str, int] = {
    "INVALID_FIELD": code_pb2.INVALID_ARGUMENT,
    "UNKNOWN_LOSS": code_pb2.INVALID_ARGUMENT,
    "SEQUENCE_TOO_LONG": code_pb2.INVALID_ARGUMENT,
    "RUN_NOT_FOUND": code_pb2.NOT_FOUND,
    "TRAINER_JOB_NOT_FOUND": code_pb2.NOT_FOUND,
    "BASE_MODEL_MISMATCH": code_pb2.FAILED_PRECONDITION,
    "NO_GRADIENTS": code_pb2.FAILED_PRECONDITION,
    "PRIOR_OPERATION_FAILED": code_pb2.FAILED_PRECONDITION,
    "NO_HELD_GRAPH": code_pb2.FAILED_PRECONDITION,
    "SEQ_ID_GAP": code_pb2.OUT_OF_RANGE,
    "SEQ_ID_CONFLICT": code_pb2.ABORTED,
    "ANSWER_RELEASED": code_pb2.ABORTED,
    "ATTACH_SUPERSEDED": code_pb2.ABORTED,
    "RUN_ATTACHED": code_pb2.FAILED_PRECONDITION,
    "PROTOCOL_VIOLATION": code_pb2.INVALID_ARGUMENT,
    "PROTOCOL_VERSION_UNSUPPORTED": code_pb2.FAILED_PRECONDITION,
    "INVALID_API_KEY": code_pb2.UNAUTHENTICATED,
    "WORKER_DIED": code_pb2.UNAVAILABLE,
    "WORKER_NOT_READY": code_pb2.UNAVAILABLE,
    "RUN_LOST": code_pb2.FAILED_PRECONDITION,
    "DRAINING": code_pb2.UNAVAILABLE,
    "LIMIT_EXCEEDED": code_pb2.RESOURCE_EXHAUSTED,
    "DEVICE_OUT_OF_MEMORY": code_pb2.RESOURCE_EXHAUSTED,
    "CHECKPOINT_EXISTS": code_pb2.ALREADY_EXISTS,
    "NOT_IMPLEMENTED": code_pb2.UNIMPLEMENTED,
    "INTERNAL": code_pb2.INTERNAL,
    "STORAGE_FAILED": code_pb2.FAILED_PRECONDITION,
    "TRAINER_JOB_FAILED": code_pb2.FAILED_PRECONDITION,
    "CANCELLED": code_pb2.CANCELLED,
    "NON_FINITE": code_pb2.FAILED_PRECONDITION,
    "OPERATION_POISONED": code_pb2.FAILED_PRECONDITION,
    "CHECKPOINT_NOT_FOUND": code_pb2.NOT_FOUND,
    "CHECKPOINT_DAMAGED": code_pb2.DATA_LOSS,
    "CHECKPOINT_MISMATCH": code_pb2.FAILED_PRECONDITION,
    "DELTA_BASE_UNUSABLE": code_pb2.FAILED_PRECONDITION,
    "LOSS_FAILED": code_pb2.FAILED_PRECONDITION,
    "SAMPLER_NOT_FOUND": code_pb2.NOT_FOUND,
    "TOKENIZER_NOT_FOUND": code_pb2.NOT_FOUND,
    "TOKENIZER_DAMAGED": code_pb2.DATA_LOSS,
    "CHECKPOINT_IN_USE": code_pb2.FAILED_PRECONDITION,
    "CHECKPOINT_CHANGED": code_pb2.ABORTED,
}


class GradwireError(Exception):
    """Base of every Gradwire error.

    Attributes:
        message: A sentence: what, where, got, allowed, next step.
        reason: Name of the ErrorReason enum without its prefix, such as "NO_GRADIENTS"; "" when the error was not
            Gradwire's own (a proxy's, say).
        metadata: The error's variables as strings.
        field_violations: (field path, description) pairs of an INVALID_ARGUMENT.
        retry_after_s: When to try again, seconds; None where nobody knows.
        code: gRPC status code as an int.
    """

    default_code: int = code_pb2.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        metadata: dict[str, str] | None = None,
        field_violations: tuple[tuple[str, str], ...] = (),
        retry_after_s: float | None = None,
        code: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = metadata or {}
        self.field_violations = field_violations
        self.retry_after_s = retry_after_s
        self.code = self.default_code if code is None else code

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions cross process borders in users' code (multiprocessing); keep everything.
        return (from_status, (to_status(self),))


class InvalidArgumentError(GradwireError, ValueError):
    """A value is not allowed; `field_violations` names the field."""

    default_code = code_pb2.INVALID_ARGUMENT


class NotFoundError(GradwireError, LookupError):
    """There is no such run, trainer job, checkpoint or sampler."""

    default_code = code_pb2.NOT_FOUND


class AlreadyExistsError(GradwireError, FileExistsError):
    """The name is taken."""

    default_code = code_pb2.ALREADY_EXISTS


class FailedPreconditionError(GradwireError, RuntimeError):
    """The operation is not possible in the current state."""

    default_code = code_pb2.FAILED_PRECONDITION


class NoGradientsError(FailedPreconditionError):
    """optim_step was called with no gradients accumulated."""


class PriorOperationFailedError(FailedPreconditionError):
    """An operation this one builds on failed. Gradients were cleared; parameters are as before."""

    @property
    def failed_seq_id(self) -> int:
        """seq_id of the operation that failed."""
        return int(self.metadata.get("failed_seq_id", 0))


class OperationPoisonedError(FailedPreconditionError):
    """The worker died three times under this operation, which was given up. The run went on without it."""

    @property
    def seq_id(self) -> int:
        """seq_id of the operation."""
        return int(self.metadata.get("seq_id", 0))


class AbortedError(GradwireError, RuntimeError):
    """Another client or request interfered."""

    default_code = code_pb2.ABORTED


class OutOfRangeError(GradwireError, ValueError):
    """seq_id skips numbers."""

    default_code = code_pb2.OUT_OF_RANGE


class ResourceExhaustedError(GradwireError):
    """The request exceeds a limit of the trainer."""

    default_code = code_pb2.RESOURCE_EXHAUSTED


class DeviceOutOfMemoryError(ResourceExhaustedError, MemoryError):
    """The device ran out of memory; the run stays usable."""


class UnauthenticatedError(GradwireError, PermissionError):
    """The API key is missing or not valid."""

    default_code = code_pb2.UNAUTHENTICATED


class UnavailableError(GradwireError, ConnectionError):
    """The trainer cannot be reached, or takes no work now."""

    default_code = code_pb2.UNAVAILABLE


class WorkerDiedError(UnavailableError):
    """The worker process died while a run was made or deleted; operations wait for the next worker instead."""


class OperationCancelledError(GradwireError):
    """The operation was given up before it ran."""

    default_code = code_pb2.CANCELLED


class OperationTimeoutError(GradwireError, TimeoutError):
    """No answer within the timeout."""

    default_code = code_pb2.DEADLINE_EXCEEDED


class UnimplementedError(GradwireError, NotImplementedError):
    """The call is known but not implemented yet."""

    default_code = code_pb2.UNIMPLEMENTED


class DataLossError(GradwireError):
    """Stored data is missing or has changed."""

    default_code = code_pb2.DATA_LOSS


class InternalError(GradwireError, RuntimeError):
    """A fault of Gradwire's own."""

    default_code = code_pb2.INTERNAL


_BY_CODE: dict[int, type[GradwireError]] = {
    cls.default_code: cls
    for cls in (
        InvalidArgumentError,
        NotFoundError,
        AlreadyExistsError,
        FailedPreconditionError,
        AbortedError,
        OutOfRangeError,
        ResourceExhaustedError,
        UnauthenticatedError,
        UnavailableError,
        OperationCancelledError,
        OperationTimeoutError,
        UnimplementedError,
        DataLossError,
        InternalError,
    )
}
_BY_REASON: dict[str, type[GradwireError]] = {
    "NO_GRADIENTS": NoGradientsError,
    "PRIOR_OPERATION_FAILED": PriorOperationFailedError,
    "DEVICE_OUT_OF_MEMORY": DeviceOutOfMemoryError,
    "OPERATION_POISONED": OperationPoisonedError,
    "WORKER_DIED": WorkerDiedError,
}


def error(reason: str, message: str, *, retry_after_s: float | None = None, **metadata: object) -> GradwireError:
    """The exception for one of our own reasons.

    Args:
        reason: Name of the ErrorReason enum without its prefix.
        message: The sentence for people.
        retry_after_s: When to try again, seconds.
        **metadata: The error's variables; sent as strings.
    """
    code = ERROR_CODES[reason]
    cls = _BY_REASON.get(reason, _BY_CODE[code])
    strings = {key: str(value) for key, value in metadata.items()}
    return cls(message, reason=reason, metadata=strings, retry_after_s=retry_after_s, code=code)


def invalid_field(field: str, description: str, *, reason: str = "INVALID_FIELD", **metadata: object) -> GradwireError:
    """INVALID_ARGUMENT about one field.

    Args:
        field: Path of the field as the caller wrote it: `data[3].loss_fn_inputs["advantages"]`.
        description: What is wrong with it, to be read right after the path: "has 511 values, but …".
        reason: INVALID_FIELD, UNKNOWN_LOSS or SEQUENCE_TOO_LONG.
        **metadata: The error's variables.
    """
    made = error(reason, f"{field} {description}", **{"field": field, **metadata})
    made.field_violations = ((field, description),)
    return made


def to_status(exc: GradwireError) -> status_pb2.Status:
    """The error as a google.rpc.Status with its ErrorInfo, BadRequest and RetryInfo.

    Texts are cut behind MAX_TEXT_CHARS: they quote what came, which may be of any length.
    """
    details: list[any_pb2.Any] = []

    def add(message: Any) -> None:
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)

    metadata = {name: _cut(value) for name, value in exc.metadata.items()}
    add(error_details_pb2.ErrorInfo(reason=exc.reason or "INTERNAL", domain=DOMAIN, metadata=metadata))
    if exc.field_violations:
        violation = error_details_pb2.BadRequest.FieldViolation
        add(
            error_details_pb2.BadRequest(
                field_violations=[
                    violation(field=_cut(field), description=_cut(text)) for field, text in exc.field_violations
                ]
            )
        )
    if exc.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(exc.retry_after_s * 1000))
        add(error_details_pb2.RetryInfo(retry_delay=delay))
    return status_pb2.Status(code=exc.code, message=_cut(exc.message), details=details)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]}…({len(text)} characters)"


def from_status(status: status_pb2.Status) -> GradwireError:
    """The exception a google.rpc.Status stands for."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    retry_after_s = None
    for detail in status.details:
        if not detail.Unpack(info) and not detail.Unpack(bad_request) and detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    reason = info.reason if info.domain == DOMAIN else ""
    cls = _BY_REASON.get(reason) or _BY_CODE.get(status.code, GradwireError)
    return cls(
        # It will stand in a traceback on a terminal.
        printable(status.message, lines=True),
        reason=reason,
        metadata=dict(info.metadata),
        field_violations=tuple((v.field, v.description) for v in bad_request.field_violations),
        retry_after_s=retry_after_s,
        code=status.code,
    )


def from_rpc_error(exc: grpc.RpcError) -> GradwireError:
    """The exception a failed gRPC call stands for, with or without Gradwire's details in it."""
    try:
        status = rpc_status.from_call(cast(grpc.Call, exc))
    except ValueError:
        # Code or message in the details disagree with the call's own: not a server of ours.
        status = None
    if status is not None:
        return from_status(status)
    code = exc.code()
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code_pb2.UNKNOWN
    return _BY_CODE.get(number, GradwireError)(printable(exc.details() or str(exc), lines=True), code=number)
