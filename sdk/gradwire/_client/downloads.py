"""Fetches checkpoints from a trainer: file by file, resuming where a download stopped, with digests compared."""

import asyncio
import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import grpc.aio

from gradwire._client.loop import LOOP
from gradwire._client.transport import Connection
from gradwire._wire import delta
from gradwire._wire.untrusted import confined
from gradwire.errors import GradwireError, error
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_KIND_SAMPLER_WEIGHTS, Checkpoint, CheckpointFile
from gradwire.v1.checkpoint_service_pb2 import (
    DownloadCheckpointRequest,
    DownloadCheckpointResponse,
    GetCheckpointRequest,
)
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub

Progress = Callable[[str, int, int], object]
"""Told the file, its bytes that are here, and its size: now and then while it comes, beginning with what was here, and
once, with all of them, when it is whole. Of a file that was whole before, only that. On the caller's thread; what it
raises stops the download, and another call goes on from there."""

_MAX_TRIES = 8
_IDLE_TIMEOUT_S = 60.0
"""How long a trainer may send nothing before the connection counts as lost."""
_ASIDE = ".gradwire-export"
_READ_FIRST = ("config.json", "adapter_config.json")
"""A folder without them is no model to any reader."""


def get_checkpoint(connection: Connection, path: str, *, timeout_s: float = 60.0) -> Checkpoint:
    """A checkpoint with its files.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND.
    """
    request = GetCheckpointRequest(path=path)
    return connection.call(CheckpointServiceStub, "GetCheckpoint", request, timeout_s=timeout_s).checkpoint


def download(connection: Connection, path: str, folder: Path, progress: Progress = lambda *_: None) -> Checkpoint:
    """Fetches a checkpoint's files into a folder. What is already there, whole or in part, is not fetched again.

    Args:
        connection: To the trainer.
        path: As saving returned it.
        folder: Where; made if need be. A file under way is `.<name>.part`; other files of these names are replaced.
        progress: See Progress.

    Returns:
        The checkpoint.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND.
        DataLossError: CHECKPOINT_DAMAGED: what came is not what the trainer says it sent.
        UnavailableError: The trainer went away and did not come back; call again to go on.
        OSError: The folder cannot be written.
    """
    checkpoint = get_checkpoint(connection, path)
    _fetch_files(connection, checkpoint, folder, progress)
    return checkpoint


def export(connection: Connection, path: str, folder: Path, progress: Progress = lambda *_: None) -> Checkpoint:
    """Fetches sampler weights as a folder that transformers (or peft) loads; a delta is made whole with its base.

    Until a delta is whole, everything of it is in `.gradwire-export` in the folder, and a second call goes on there.

    Raises:
        As download; FailedPreconditionError: CHECKPOINT_MISMATCH: it is a resumable state; DELTA_BASE_UNUSABLE.
        FileExistsError: It is a delta, and the folder is there and not empty.
    """
    checkpoint = get_checkpoint(connection, path)
    if checkpoint.kind != CHECKPOINT_KIND_SAMPLER_WEIGHTS:
        text = f"{path} is resumable state, which only training reads; export what save_weights_for_sampler made."
        raise error("CHECKPOINT_MISMATCH", text, path=path)
    if not checkpoint.base_path:
        _fetch_files(connection, checkpoint, folder, progress)
        return checkpoint
    _make_folder(folder)
    aside = folder / _ASIDE
    if not aside.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a delta is made whole in an empty folder.")
    folders: list[Path] = []
    for each in (checkpoint, get_checkpoint(connection, checkpoint.base_path)):
        # By content, so that nothing is taken for another's that an earlier call left.
        digests = "".join(file.sha256 for file in each.files)
        folders.append(aside / hashlib.sha256(digests.encode()).hexdigest()[:16])
        _fetch_files(connection, each, folders[-1], progress)
    whole = aside / "whole"
    shutil.rmtree(whole, ignore_errors=True)
    whole.mkdir()
    try:
        delta.expand_folder(folders[0], folders[1], whole, name=path)
    except GradwireError:
        shutil.rmtree(aside)
        raise
    # Stopped here, too, it does not look whole.
    for made in sorted(whole.iterdir(), key=lambda made: made.name in _READ_FIRST):
        os.replace(made, folder / made.name)
    shutil.rmtree(aside)
    return checkpoint


def _fetch_files(connection: Connection, checkpoint: Checkpoint, folder: Path, progress: Progress) -> None:
    _make_folder(folder)
    # All of them are looked at before the first is written.
    targets = [_target(checkpoint, file, folder) for file in checkpoint.files]
    for file, target in zip(checkpoint.files, targets, strict=True):
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _has_content(target, file):
            _fetch_file(connection, checkpoint.path, file, target, progress)
        progress(file.name, file.size_bytes, file.size_bytes)


def _target(checkpoint: Checkpoint, file: CheckpointFile, folder: Path) -> Path:
    try:
        return confined(folder, file.name)
    except ValueError as exc:
        text = f"{checkpoint.path} names a file {file.name[:200]!r}, which {exc}; nothing of it was fetched."
        raise error("CHECKPOINT_DAMAGED", text, path=checkpoint.path) from None


def _make_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    folder.mkdir(parents=True, exist_ok=True)


def _has_content(target: Path, file: CheckpointFile) -> bool:
    if not target.is_file() or target.stat().st_size != file.size_bytes:
        return False
    with target.open("rb") as found:
        return hashlib.file_digest(found, "sha256").hexdigest() == file.sha256


def _fetch_file(connection: Connection, path: str, file: CheckpointFile, target: Path, progress: Progress) -> None:
    part = target.with_name(f".{target.name}.part")
    while True:
        resumed = _size(part) > 0
        _complete(connection, path, file, part, progress)
        # Not on the loop: large files take seconds, in which it must be free to close the connection after Ctrl-C.
        if _has_content(part, file):
            os.replace(part, target)
            return
        part.unlink()
        if not resumed:
            raise _damaged(path, file)
        # The part was of something else: of another checkpoint, or of this one before it was saved anew.


def _damaged(path: str, file: CheckpointFile) -> GradwireError:
    text = f"{file.name} of {path} came with another content than the trainer says; it was removed. Try again."
    return error("CHECKPOINT_DAMAGED", text, path=path, file=file.name)


def _complete(connection: Connection, path: str, file: CheckpointFile, part: Path, progress: Progress) -> None:
    tries = 0
    while True:
        before = _size(part)
        if before > file.size_bytes:
            part.unlink()
            continue
        try:
            _append(connection, path, file, part, before, progress)
            return
        except GradwireError as exc:
            if exc.code != grpc.StatusCode.UNAVAILABLE.value[0]:
                raise
            # A try that brought something does not count.
            tries = 0 if _size(part) > before else tries + 1
            if tries >= _MAX_TRIES:
                raise
            time.sleep(min(5.0, 0.2 * 2**tries))


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0


def _append(
    connection: Connection, path: str, file: CheckpointFile, part: Path, offset: int, progress: Progress
) -> None:
    """Brings what a part lacks. Only reading is the loop's, which the training of the same process shares."""
    request = DownloadCheckpointRequest(path=path, file=file.name, offset=offset, sha256=file.sha256)
    call = LOOP.run(_begin(connection, request))
    try:
        with part.open("ab") as out:
            while True:
                if offset < file.size_bytes:
                    progress(file.name, offset, file.size_bytes)
                message = LOOP.run(_read(connection, call))
                if message is None:
                    return
                if not message.data or offset + len(message.data) > file.size_bytes:
                    # Nothing, for ever, or more than was said: neither may go on.
                    part.unlink()
                    raise _damaged(path, file)
                _write(out, message.data, part)
                offset += len(message.data)
    finally:
        LOOP.call_soon(call.cancel)


async def _begin(connection: Connection, request: DownloadCheckpointRequest) -> Any:
    return CheckpointServiceStub(connection.channel()).DownloadCheckpoint(request, metadata=connection.metadata)


async def _read(connection: Connection, call: Any) -> DownloadCheckpointResponse | None:
    try:
        message = await asyncio.wait_for(call.read(), _IDLE_TIMEOUT_S)
    except grpc.aio.AioRpcError as exc:
        raise connection.explain(exc, "DownloadCheckpoint") from None
    except TimeoutError:
        text = f"{connection.base_url} sent nothing for {_IDLE_TIMEOUT_S:g} s."
        raise error("WORKER_NOT_READY", text) from None
    return message if isinstance(message, DownloadCheckpointResponse) else None


def _write(out: IO[bytes], data: bytes, part: Path) -> None:
    try:
        out.write(data)
        out.flush()
    except OSError as exc:
        # Where a write fails, Python does not say which file's.
        raise OSError(exc.errno, exc.strerror, str(part)) from exc
