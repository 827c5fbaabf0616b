"""Lists, describes, keeps, fetches and deletes a trainer's checkpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from gradwire._client import downloads
from gradwire._client.transport import Connection
from gradwire.errors import error, invalid_field
from gradwire.types.run_info import LoraLayout
from gradwire.v1 import checkpoint_pb2
from gradwire.v1 import checkpoint_service_pb2 as pb
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from gradwire.v1.run_pb2 import Run

Folder = str | PathLike[str]
CheckpointKind = Literal["state", "sampler_weights"]

_KINDS: dict[Any, CheckpointKind] = {
    checkpoint_pb2.CHECKPOINT_KIND_STATE: "state",
    checkpoint_pb2.CHECKPOINT_KIND_SAMPLER_WEIGHTS: "sampler_weights",
}
_KIND_NUMBERS = {name: number for number, name in _KINDS.items()}


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a checkpoint."""

    name: str
    """Its path inside the checkpoint."""
    size_bytes: int
    """Its size."""
    sha256: str
    """Digest of its content, hex."""


@dataclass(frozen=True)
class Checkpoint:
    """What a run saved under a name. It outlives its run.

    Attributes:
        path: gradwire://<run_id>/<kind>/<name>, as saving returned it.
        run_id: The run that saved it.
        kind: "state", which training can resume from, "sampler_weights", or "unknown", a kind of a newer trainer.
        name: The name it was saved under.
        size_bytes: Size of all files.
        step: Optimizer steps applied when it was saved.
        base_model: What its run started from.
        architecture: Such as "LlamaForCausalLM".
        lora_rank: LoRA rank of its run; 0 if all parameters train.
        checkpoint_type: "base", or "delta": what changed since the one at base_path.
        base_path: Path of the base that a delta builds on; else "".
        dtype: What the parameters of sampler weights are written in, such as "bfloat16"; else "".
        created_at: When it was saved, UTC.
        expires_at: When it is deleted, UTC; None for never.
        user_metadata: What its owner wrote about it when it was saved.
        lora: How its run's adapter is laid out; None where all parameters train, where no settings make such an
            adapter, or where an early version saved it.
        files: Its files; empty in lists, which `CheckpointClient.get` fills.
    """

    path: str
    run_id: str
    kind: CheckpointKind | Literal["unknown"]
    name: str
    size_bytes: int
    step: int
    base_model: str
    architecture: str
    lora_rank: int
    checkpoint_type: Literal["base", "delta"]
    base_path: str
    created_at: datetime
    expires_at: datetime | None
    dtype: str = ""
    files: tuple[CheckpointFile, ...] = ()
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    lora: LoraLayout | None = None


class CheckpointClient:
    """The checkpoints that the key may see; `ServiceClient.checkpoints` is one.

    All calls but `list` raise NotFoundError (CHECKPOINT_NOT_FOUND) if the path has no checkpoint, and
    InvalidArgumentError (INVALID_FIELD) if it is not a path.
    """

    def __init__(self, connection: Connection, *, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    def list(self, *, run_id: str = "", kind: CheckpointKind | None = None) -> "list[Checkpoint]":
        """Checkpoints, newest first.

        Args:
            run_id: Only those of this run, which may have been deleted; "" lists those of all runs.
            kind: Only those of this kind; None lists both.
        """
        if kind is not None and kind not in _KIND_NUMBERS:
            raise invalid_field("kind", f'is {kind!r}; it must be "state" or "sampler_weights".')
        number = checkpoint_pb2.CHECKPOINT_KIND_UNSPECIFIED if kind is None else _KIND_NUMBERS[kind]
        request = pb.ListCheckpointsRequest(run_id=run_id, kind=number)
        return [_checkpoint(message) for message in self._call("ListCheckpoints", request).checkpoints]

    def get(self, path: str) -> Checkpoint:
        """One checkpoint, with its files."""
        return _checkpoint(downloads.get_checkpoint(self._connection, path, timeout_s=self._timeout_s))

    def delete(self, path: str) -> None:
        """Deletes a checkpoint for good.

        Raises:
            FailedPreconditionError: CHECKPOINT_IN_USE: deltas build on it; delete them first.
        """
        self._call("DeleteCheckpoint", pb.DeleteCheckpointRequest(path=path))

    def set_ttl(self, path: str, ttl_seconds: int | None) -> Checkpoint:
        """Sets how long a checkpoint is kept from now, 1 to 315,360,000 seconds; None keeps it for ever."""
        request = pb.SetCheckpointTtlRequest(path=path, ttl_seconds=check_ttl_seconds(ttl_seconds))
        return _checkpoint(self._call("SetCheckpointTtl", request).checkpoint)

    def download(self, path: str, folder: Folder, *, progress: downloads.Progress = lambda *_: None) -> Checkpoint:
        """Fetches a checkpoint's files into a folder, which is made if needed. Called again, it resumes.

        Raises:
            DataLossError: CHECKPOINT_DAMAGED: what arrived is not what the trainer says it sent.
            UnavailableError: The trainer went away and did not come back; call again to resume.
            OSError: The folder cannot be written.
        """
        return _checkpoint(downloads.download(self._connection, path, Path(folder), progress))

    def export(self, path: str, folder: Folder, *, progress: downloads.Progress = lambda *_: None) -> Checkpoint:
        """Fetches sampler weights as a folder that transformers (or peft) loads; a delta is made whole with its base.

        Raises:
            FailedPreconditionError: CHECKPOINT_MISMATCH: it is a resumable state. DELTA_BASE_UNUSABLE: a delta's base
                is gone, or is not as it was saved.
            FileExistsError: The path is a delta's, and the folder exists and is not empty.
            DataLossError: As in `download`.
            UnavailableError: As in `download`.
            OSError: As in `download`.
        """
        return _checkpoint(downloads.export(self._connection, path, Path(folder), progress))

    def _call(self, method: str, request: Any) -> Any:
        return self._connection.call(CheckpointServiceStub, method, request, timeout_s=self._timeout_s)


def check_ttl_seconds(ttl_seconds: int | None) -> int | None:
    """A time to live that can be sent; the trainer decides how long it may be.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if ttl_seconds is not None and (type(ttl_seconds) is not int or not 0 < ttl_seconds < 1 << 64):
        raise invalid_field(
            "ttl_seconds", f"is {ttl_seconds!r}; it must be a whole number of seconds, at least 1, or None for ever."
        )
    return ttl_seconds


def _checkpoint(message: checkpoint_pb2.Checkpoint) -> Checkpoint:
    delta = message.checkpoint_type == checkpoint_pb2.CHECKPOINT_TYPE_DELTA
    return Checkpoint(
        path=message.path,
        run_id=message.run_id,
        kind=_KINDS.get(message.kind, "unknown"),
        name=message.name,
        size_bytes=message.size_bytes,
        step=message.step,
        base_model=message.base_model,
        architecture=message.architecture,
        lora_rank=message.lora_rank,
        checkpoint_type="delta" if delta else "base",
        base_path=message.base_path,
        created_at=time_of(message, "created_at"),
        expires_at=time_of(message, "expires_at") if message.HasField("expires_at") else None,
        dtype=message.dtype,
        files=tuple(CheckpointFile(file.name, file.size_bytes, file.sha256) for file in message.files),
        user_metadata=dict(message.user_metadata),
        lora=lora_layout(message),
    )


def lora_layout(message: checkpoint_pb2.Checkpoint | Run) -> LoraLayout | None:
    """The layout of the adapter of a run or a checkpoint; None where it says none."""
    if not message.HasField("lora"):
        return None
    found = message.lora
    return LoraLayout(
        lora_alpha=found.lora_alpha,
        train_mlp=found.train_mlp,
        train_attn=found.train_attn,
        train_unembed=found.train_unembed,
        adapted=tuple(found.adapted),
        left_out=tuple(found.left_out),
    )


def time_of(message: Any, field: str) -> datetime:
    """A Timestamp of an answer, as a datetime.

    Raises:
        GradwireError: PROTOCOL_VIOLATION.
    """
    try:
        return getattr(message, field).ToDatetime(UTC)
    except (ValueError, OverflowError):
        text = f"The trainer answered a {field} that is no time."
        raise error("PROTOCOL_VIOLATION", text) from None
