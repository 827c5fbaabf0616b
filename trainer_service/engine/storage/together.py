"""Folders that all ranks write together: whole or not at all, as `atomic_folders.whole_folder` has it of one process.

The leader makes the folder and puts it in its place; in between each rank writes its own files. What goes wrong for one
goes wrong for all, in the same words.
"""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError

from trainer_service.atomic_folders import FolderWriter, storage_failed, whole_folder
from trainer_service.engine.rank_channels import Channel


def write_together(
    channel: Channel,
    write: Callable[[FolderWriter], object],
    folder: Path,
    *,
    about: Mapping[str, Any],
    overwrite: bool,
    needed_bytes: int,
) -> int:
    """Writes a folder. Every rank calls this; what only the leader knows is looked at on the leader alone.

    Args:
        channel: To the other ranks.
        write: Writes this rank's files.
        folder: Where it goes; on a file system that all ranks share.
        about: Goes into the manifest.
        overwrite: Replace what is there.
        needed_bytes: What this rank is known to write.

    Returns:
        Size of all files, bytes.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder is there and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    needed_bytes = sum(channel.gather(needed_bytes))
    with contextlib.ExitStack() as stack:

        def begin() -> FolderWriter | None:
            if not channel.leads:
                return None
            made = whole_folder(folder, about=about, overwrite=overwrite, needed_bytes=needed_bytes)
            return stack.enter_context(made)

        writer = channel.alike(begin)
        path = channel.tell(None if writer is None else str(writer.path))
        files = writer or FolderWriter(Path(path), {})
        channel.alike(lambda: _write(write, files, folder))
        for digests in channel.gather(files.digests):
            files.digests.update(digests)
        finish = stack.pop_all()
    channel.alike(finish.close)
    return channel.tell(files.size_bytes)


def _write(write: Callable[[FolderWriter], object], files: FolderWriter, folder: Path) -> None:
    try:
        write(files)
    except OSError as exc:
        if isinstance(exc, GradwireError):
            raise
        raise storage_failed(folder, str(exc)) from exc
