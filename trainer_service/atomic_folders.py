"""Folders that appear whole or not at all: written aside, synced, described by a manifest, renamed. Ground floor.

A reader sees the old folder or the new one, never half of one, even if the writer is killed at any instant.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradwire._wire.untrusted import parse_json, stays_inside
from gradwire.errors import GradwireError, error

MANIFEST = "manifest.json"
FORMAT = 1
"""Version of manifests, and of the files they describe."""

SPARE_BYTES = 16 << 20
"""Disk space required beyond the known need, for small files and the file system itself."""

_CHUNK_BYTES = 8 << 20
_HASHING_THREADS = 4
_PARTIAL = ".partial-"
_REPLACED = ".replaced-"
MAX_MANIFEST_BYTES = 16 << 20
_MAX_TEXT = 4096
"""Longest text in a manifest, characters."""
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class FileEntry:
    """One file in a manifest."""

    size_bytes: int
    sha256: str
    """Hex digest."""


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        about: What it is, in JSON's types; the writer of the folder decides.
        files: Every file but the manifest, by its path inside the folder.
    """

    about: Mapping[str, Any]
    files: Mapping[str, FileEntry]

    @property
    def size_bytes(self) -> int:
        """Size of all files, the manifest's own included."""
        return sum(entry.size_bytes for entry in self.files.values()) + len(self.to_json().encode())

    def to_json(self) -> str:
        """The manifest file's content."""
        files = {name: vars(entry) for name, entry in sorted(self.files.items())}
        return json.dumps({"format": FORMAT, **self.about, "files": files}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Reads what to_json wrote.

        Raises:
            ValueError: It is not a manifest, or has another format.
        """
        about = parse_json(text)
        if not isinstance(about, dict) or not isinstance(about.get("files"), dict):
            raise ValueError("it is no manifest")
        if about.pop("format", None) != FORMAT:
            raise ValueError(f"it is not of format {FORMAT}, the one this version reads")
        files: dict[str, FileEntry] = {}
        for name, entry in about.pop("files").items():
            if not stays_inside(name) or name == MANIFEST or not isinstance(entry, dict):
                raise ValueError(f"it names a file {name[:200]!r}")
            size_bytes, sha256 = entry.get("size_bytes"), entry.get("sha256")
            if type(size_bytes) is not int or not 0 <= size_bytes < 1 << 63:
                raise ValueError(f"it has no size of {name!r}")
            if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
                raise ValueError(f"it has no digest of {name!r}")
            files[name] = FileEntry(size_bytes, sha256)
        if sum(entry.size_bytes for entry in files.values()) >= 1 << 63:
            raise ValueError("it has more bytes than can be counted")
        for key, value in about.items():
            inner = [*value.keys(), *value.values()] if isinstance(value, dict) else (value,)
            if not (_is_text(key) and all(_is_plain(one) for one in inner)):
                raise ValueError(f"it says of {key[:200]!r} what no manifest does")
        return cls(about, files)


class DigestedFile:
    """A file that is digested as it is written."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes | memoryview) -> None:
        """Appends."""
        self._hash.update(chunk)
        left = memoryview(chunk)
        while left:
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Closes it."""
        self._file.close()

    @property
    def digest(self) -> str:
        """Hex digest of what is written so far."""
        return self._hash.hexdigest()


class FolderWriter:
    """A folder being written; see whole_folder.

    Attributes:
        path: Where to write, for now.
        about: Goes into the manifest; entries may be added until the end.
        size_bytes: Size of all files, once the folder is whole.
        digests: Of files that were digested as they were written, by whoever wrote them.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = dict(about)
        self.size_bytes = 0
        self.digests: dict[str, str] = {}

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[DigestedFile]:
        """A new file in the folder. Files written below `path` by other means are digested at the end."""
        file = DigestedFile(self.path / name)
        try:
            yield file
        finally:
            file.close()
            self.digests[name] = file.digest

    def finish(self) -> None:
        """Digests the remaining files and syncs everything to disk, the manifest last."""
        files: dict[str, FileEntry] = {}
        for root, _, names in os.walk(self.path, topdown=False):
            for name in names:
                path = Path(root, name)
                inside = path.relative_to(self.path).as_posix()
                digest = self.digests.get(inside) or sha256_of(path)
                files[inside] = FileEntry(path.stat().st_size, digest)
                sync(path)
            sync(Path(root))
        manifest = Manifest(self.about, files)
        self.size_bytes = manifest.size_bytes
        (self.path / MANIFEST).write_text(manifest.to_json())
        sync(self.path / MANIFEST)
        sync(self.path)


@contextlib.contextmanager
def whole_folder(
    folder: Path, *, about: Mapping[str, Any], overwrite: bool, needed_bytes: int = 0
) -> Iterator[FolderWriter]:
    """Writes a folder aside, and moves it into place when the block ends without an exception.

    Any number of threads and processes on one machine may write at the same time.

    Args:
        folder: Where it goes.
        about: Goes into the manifest.
        overwrite: Replace an existing folder.
        needed_bytes: Known size of what will be written; refused at once if the disk has less.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder is there and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    partial = folder.with_name(f"{_PARTIAL}{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        _refuse_taken(folder, overwrite)
        settle(folder.parent)
        refuse_without_room(folder, needed_bytes)
        with contextlib.ExitStack() as stack:
            with alone(folder.parent):
                partial.mkdir()
                stack.enter_context(alone(partial))
            writer = FolderWriter(partial, about)
            yield writer
            writer.finish()
            with alone(folder.parent):
                _refuse_taken(folder, overwrite)
                _swap_in(partial, folder)
    except OSError as exc:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(exc, GradwireError):
            raise
        raise storage_failed(folder, str(exc)) from exc
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_without_room(folder: Path, needed_bytes: int) -> None:
    """Refuses a folder that the disk has no room for, before its content is made.

    Raises:
        FailedPreconditionError: STORAGE_FAILED: the disk has less than that and a reserve.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_space(folder.parent, needed_bytes + SPARE_BYTES)
    except OSError as exc:
        raise storage_failed(folder, str(exc)) from exc


def settle(parent: Path) -> None:
    """Removes what killed writers left below `parent`.

    A folder whose writer was killed between its two renames is restored. What another process or thread is writing
    stays: it holds a lock, which the kernel releases when it dies.
    """
    if not parent.is_dir():
        return
    with alone(parent):
        for left in parent.glob(f"{_REPLACED}*"):
            original = left.with_name(left.name.removeprefix(_REPLACED))
            if original.exists():
                shutil.rmtree(left)
            else:
                left.rename(original)
        for left in parent.glob(f"{_PARTIAL}*"):
            # Its writer holds it, or it is gone meanwhile.
            with contextlib.suppress(OSError), alone(left, wait=False):
                shutil.rmtree(left, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND: there is no such folder.
        DataLossError: CHECKPOINT_DAMAGED: its manifest is missing or cannot be read.
    """
    try:
        with (folder / MANIFEST).open("rb") as file:
            return Manifest.from_json(file.read(MAX_MANIFEST_BYTES))
    except FileNotFoundError:
        if not folder.is_dir():
            raise error("CHECKPOINT_NOT_FOUND", f'There is no checkpoint "{folder.name}".', name=folder.name) from None
        raise damaged(folder.name, MANIFEST, "is missing") from None
    except (OSError, ValueError, RecursionError) as exc:
        raise damaged(folder.name, MANIFEST, f"cannot be read: {exc}") from exc


def verify(folder: Path, manifest: Manifest) -> None:
    """Reads every file and compares size and digest.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED names the first file that is not as the manifest says.
    """
    with ThreadPoolExecutor(_HASHING_THREADS, "digests") as pool:
        # Digests are made without Python's lock.
        checks = [pool.submit(_verify_file, folder, name, entry) for name, entry in manifest.files.items()]
    for check in checks:
        check.result()


def _verify_file(folder: Path, name: str, entry: FileEntry) -> None:
    path = folder / name
    try:
        size_bytes = path.stat().st_size
        if size_bytes != entry.size_bytes:
            raise damaged(folder.name, name, f"has {size_bytes} bytes instead of {entry.size_bytes}")
        if sha256_of(path) != entry.sha256:
            raise damaged(folder.name, name, "has different content than was written")
    except FileNotFoundError:
        raise damaged(folder.name, name, "is missing") from None
    except OSError as exc:
        if isinstance(exc, GradwireError):
            raise
        raise damaged(folder.name, name, f"cannot be read: {exc}") from exc


@contextlib.contextmanager
def alone(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Locks a folder; with wait off, raises BlockingIOError if it is locked already."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Hex digest of a file."""
    hashed = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            hashed.update(chunk)
    return hashed.hexdigest()


def sync(path: Path) -> None:
    """Syncs a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def damaged(name: str, file: str, how: str) -> GradwireError:
    """CHECKPOINT_DAMAGED: a file differs from what was written."""
    text = f'The checkpoint "{name}" is damaged: {file} {how}. Nothing of it was used; load another one.'
    return error("CHECKPOINT_DAMAGED", text, name=name, file=file)


def _is_plain(value: object) -> bool:
    """Whether a value can be passed on unchanged, to other manifests and to messages."""
    number = isinstance(value, int | float) and abs(value) < 1 << 63
    return value is None or number or (isinstance(value, str) and _is_text(value))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return len(value) <= _MAX_TEXT


def _refuse_taken(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise error(
            "CHECKPOINT_EXISTS",
            f'A checkpoint named "{folder.name}" exists; choose another name, or pass overwrite=True to replace it.',
            name=folder.name,
        )


def _check_space(where: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(where).free
    if free < needed_bytes:
        raise OSError(errno.ENOSPC, f"{needed_bytes >> 20} MiB are needed, and {free >> 20} MiB are free")


def _swap_in(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(f"{_REPLACED}{folder.name}")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def storage_failed(folder: Path, why: str) -> GradwireError:
    """STORAGE_FAILED: a folder could not be written."""
    return error(
        "STORAGE_FAILED",
        f'The checkpoint "{folder.name}" could not be written to {folder.parent}: {why}. Nothing was left behind and '
        "the run is as before; free some space there and save again.",
        name=folder.name,
        folder=folder.parent,
    )
