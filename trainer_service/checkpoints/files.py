"""Files in a checkpoint's folder, which may be replaced while they are read or written."""

import contextlib
import io
import os
import stat
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

from gradwire.errors import error, invalid_field

from trainer_service.atomic_folders import Manifest, damaged

_PIECE_BYTES = 4 << 20


def check_range(manifest: Manifest, name: str, offset: int, sha256: str) -> None:
    """Refuses to read a file that is not there, has changed, or ends before an offset.

    Raises:
        InvalidArgumentError: INVALID_FIELD: no such file, or an offset beyond its end.
        AbortedError: CHECKPOINT_CHANGED: the file has another digest.
    """
    entry = manifest.files.get(name)
    if entry is None:
        raise invalid_field("file", f"is {name[:200]!r}; the checkpoint has {', '.join(sorted(manifest.files))}.")
    if sha256 and sha256 != entry.sha256:
        text = f"{name} was saved anew since its digest was read; read the digest again and begin at offset 0."
        raise error("CHECKPOINT_CHANGED", text, file=name, sha256=entry.sha256)
    if offset > entry.size_bytes:
        raise invalid_field("offset", f"is {offset}, but {name} has {entry.size_bytes} bytes.")


def pieces(file: io.FileIO, offset: int, size_bytes: int) -> Generator[bytes]:
    """An open file's bytes from an offset up to size_bytes. At its end, or once it is closed, it closes the file."""
    found = _pieces(file, offset, size_bytes)
    # Closing a generator that has not begun runs nothing of it.
    next(found)
    return found


def _pieces(file: io.FileIO, offset: int, size_bytes: int) -> Generator[bytes]:
    with file:
        file.seek(offset)
        yield b""
        while piece := file.read(min(_PIECE_BYTES, max(0, size_bytes - file.tell()))):
            yield piece


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[int]:
    """A handle of a folder, which stays the same folder even if another takes its place."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield handle
    finally:
        os.close(handle)


def read_at(folder: int, name: str) -> bytes:
    """The content of a small file in an opened folder."""
    with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=folder), "rb") as file:
        return file.read()


def open_at(folder: int, name: str, *, of: str) -> io.FileIO:
    """A file in an opened folder, or in a folder inside it; links are not followed.

    Args:
        folder: A handle of the checkpoint's folder.
        name: The file's path in it.
        of: The checkpoint's name, for errors.

    Raises:
        FileNotFoundError: There is no such file.
        DataLossError: CHECKPOINT_DAMAGED: it is not a regular file.
    """
    *parents, last = name.split("/")
    with contextlib.ExitStack() as stack:
        try:
            for part in parents:
                folder = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                stack.callback(os.close, folder)
            # Non-blocking: opening a pipe would wait for a writer.
            found = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except FileNotFoundError:
            raise
        except OSError as exc:
            raise damaged(of, name, f"cannot be read: {exc.strerror}") from exc
    if not stat.S_ISREG(os.fstat(found).st_mode):
        os.close(found)
        raise damaged(of, name, "is no file")
    return io.FileIO(found)


def replace(folder: int, name: str, content: bytes) -> None:
    """Writes a small file in an opened folder, whole or not at all."""
    aside = f".{name}.{uuid.uuid4().hex[:8]}"
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=folder), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)
