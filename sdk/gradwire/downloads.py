"""Fetches checkpoints from a trainer: file by file, from where it was cut off, with digests compared."""

import asyncio
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio

from gradwire import delta
from gradwire.errors import GradwireError, error
from gradwire.transport import LOOP, Connection
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_KIND_SAMPLER_WEIGHTS, Checkpoint, CheckpointFile
from gradwire.v1.checkpoint_service_pb2 import (
    DownloadCheckpointRequest,
    DownloadCheckpointResponse,
    GetCheckpointRequest,
)
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub

Progress = Callable[[str, int, int], object]
"""Told, now and then, the file, its bytes that are here, and its size."""

_MAX_TRIES = 8
_IDLE_TIMEOUT_S = 60.0
"""How long a trainer may send nothing before the connection counts as lost."""


def get_checkpoint(connection: Connection, path: str, *, timeout_s: float = 60.0) -> Checkpoint:
    """A checkpoint with its files.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND.
    """
    request = GetCheckpointRequest(path=path)
    return connection.call(CheckpointServiceStub, "GetCheckpoint", request, timeout_s=timeout_s).checkpoint


def download(connection: Connection, path: str, folder: Path, progress: Progress = lambda *_: None) -> Checkpoint:
    """Fetches a checkpoint's files into a folder. What is there already, whole or in part, is not fetched again.

    Args:
        connection: To the trainer.
        path: As saving returned it.
        folder: Where; made if need be. A file under way is `.<name>.part`.
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
    for file in checkpoint.files:
        target = (folder / file.name).resolve()
        if folder.resolve() not in target.parents:
            raise error("CHECKPOINT_DAMAGED", f"{path} names a file outside its folder: {file.name!r}.", path=path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not _there(target, file):
            LOOP.run(_fetch(connection, path, file, target, progress), None)
        progress(file.name, file.size_bytes, file.size_bytes)
    return checkpoint


def export(connection: Connection, path: str, folder: Path, progress: Progress = lambda *_: None) -> Checkpoint:
    """Fetches sampler weights as a folder that transformers (or peft) loads; a delta is made whole with its base.

    Raises:
        As download; FailedPreconditionError: CHECKPOINT_MISMATCH: it is a resumable state; DELTA_BASE_UNUSABLE.
        FileExistsError: The folder is there and not empty.
    """
    checkpoint = get_checkpoint(connection, path)
    if checkpoint.kind != CHECKPOINT_KIND_SAMPLER_WEIGHTS:
        text = f"{path} is resumable state, which only training reads; export what save_weights_for_sampler made."
        raise error("CHECKPOINT_MISMATCH", text, path=path)
    if not checkpoint.base_path:
        return download(connection, path, folder, progress)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; a delta is made whole in an empty folder.")
    with tempfile.TemporaryDirectory(prefix=".gradwire-", dir=folder.resolve().parent) as aside:
        for name, each in (("delta", path), ("base", checkpoint.base_path)):
            download(connection, each, Path(aside) / name, progress)
        delta.expand_folder(Path(aside) / "delta", Path(aside) / "base", folder)
    return checkpoint


def _there(target: Path, file: CheckpointFile) -> bool:
    if not target.is_file() or target.stat().st_size != file.size_bytes:
        return False
    with target.open("rb") as found:
        return hashlib.file_digest(found, "sha256").hexdigest() == file.sha256


async def _fetch(connection: Connection, path: str, file: CheckpointFile, target: Path, progress: Progress) -> None:
    part = target.with_name(f".{target.name}.part")
    tries = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        if before > file.size_bytes:
            part.unlink()
            continue
        try:
            await _append(connection, path, file, part, before, progress)
            break
        except GradwireError as exc:
            if exc.code != grpc.StatusCode.UNAVAILABLE.value[0]:
                raise
            # A try that brought something does not count.
            came = part.exists() and part.stat().st_size > before
            tries = 0 if came else tries + 1
            if tries >= _MAX_TRIES:
                raise
            await asyncio.sleep(min(5.0, 0.2 * 2**tries))
    with part.open("rb") as whole:
        if hashlib.file_digest(whole, "sha256").hexdigest() != file.sha256:
            part.unlink()
            text = f"{file.name} of {path} came with another content than the trainer says; it was removed. Try again."
            raise error("CHECKPOINT_DAMAGED", text, path=path, file=file.name)
    os.replace(part, target)


async def _append(
    connection: Connection, path: str, file: CheckpointFile, part: Path, offset: int, progress: Progress
) -> None:
    request = DownloadCheckpointRequest(path=path, file=file.name, offset=offset, sha256=file.sha256)
    call: Any = CheckpointServiceStub(connection.channel()).DownloadCheckpoint(request, metadata=connection.metadata)
    try:
        with part.open("ab") as out:
            while True:
                message = await asyncio.wait_for(call.read(), _IDLE_TIMEOUT_S)
                if not isinstance(message, DownloadCheckpointResponse):
                    return
                out.write(message.data)
                offset += len(message.data)
                progress(file.name, offset, file.size_bytes)
    except grpc.aio.AioRpcError as exc:
        raise connection.explain(exc, "DownloadCheckpoint") from None
    except TimeoutError:
        text = f"{connection.base_url} sent nothing for {_IDLE_TIMEOUT_S:g} s."
        raise error("WORKER_NOT_READY", text) from None
    finally:
        call.cancel()
