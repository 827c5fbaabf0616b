"""Who may call: API keys, and the caller of the call being served. Ground floor.

rpc/border.py looks up the key of every call here, as page/sessions.py and gateway/endpoints.py do.
"""

import contextvars
import hashlib
import hmac
import logging
import os
import re
import stat
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer_service.command_lines import SettingsError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_COMMENT = re.compile(r"(^|\s)#.*")
_MAX_FILE_BYTES = 4 << 20
SETTLE_S = 1.0
"""How long a key file that is written in place must stay unchanged before it counts."""
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Caller:
    """Who makes a call, known by their key."""

    name: str
    """For logs: the key's name, "unnamed" for a key without one, "" where no keys are required."""
    owner: str
    """Owner of the runs they create. Keys of one name share it, so that a key can be replaced; a key without a name has
    an owner of its own."""
    admin: bool = False
    """Sees everybody's runs."""
    digest: bytes = field(default=b"", repr=False)
    """sha256 of the key."""

    def may_see(self, owner: str) -> bool:
        """Whether they may see what `owner` created."""
        return self.admin or self.owner == owner


ANYBODY = Caller(name="", owner="", admin=True)
"""The caller where no keys are required, and the trainer itself."""

current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("current_caller", default=ANYBODY)
"""Who makes the call being served; the trainer itself outside of calls."""


class ApiKeys:
    """The keys that open a server.

    Only digests are kept, so neither a log line nor a core dump reveals a key. Every call looks at the file. A file put
    in place of the old one counts at once; a file written in place counts once it has been unchanged for SETTLE_S,
    since half of it may be missing until then. A file that cannot be read or has a bad line changes nothing, and the
    log says so.

    A line, or an entry of `environment`, is `key`, `name key` or `name key admin`; the key is as callers send it, or
    `sha256:` and the hex digest of that. In a file, # begins a comment where a word could begin.

    Args:
        environment: Entries given by GRADWIRE_API_KEY.
        file: One entry a line; None for no file.

    Raises:
        SettingsError: An entry is none of these, or there is a file but no key at all.
        OSError: The file cannot be read.
    """

    def __init__(self, environment: tuple[str, ...] = (), file: Path | None = None) -> None:
        self._fixed = tuple(
            _read_entry(entry, f"GRADWIRE_API_KEY, entry {i + 1}") for i, entry in enumerate(environment)
        )
        self._file = file
        self._version: _Version | None = None
        """Version of the file that counts."""
        self._fresh: tuple[_Version, float] | None = None
        """A newer version that does not count yet, and when it was first seen, by time.monotonic."""
        self._complained: object = None
        self._callers = self._fixed
        if file is not None:
            self._version, text = _read(file)
            self._callers += _parse(file, text)
        if file is not None and not self._callers:
            raise SettingsError(f"--api-key-file {file} has no key; a line is `key`, `name key` or `name key admin`.")
        self.required = bool(self._callers)
        """Whether calls need a key. Stays true when the last key is removed from the file: then nobody passes."""

    def find(self, key: str) -> Caller | None:
        """Whose key this is; None for nobody's. The time it takes does not reveal how close a wrong key was."""
        digest = hashlib.sha256(key.encode()).digest()
        return self._with_digest(digest) if key else None

    def still_opens(self, caller: Caller) -> bool:
        """Whether the caller's key is still valid, with the same name and rights."""
        return not self.required or self._with_digest(caller.digest) == caller

    def _with_digest(self, digest: bytes) -> Caller | None:
        self._reload()
        found = None
        for caller in self._callers:
            if hmac.compare_digest(caller.digest, digest):
                found = found or caller
        return found

    def _reload(self) -> None:
        if self._file is None:
            return
        try:
            if _version(os.stat(self._file)) == self._version:
                return
            version, text = _read(self._file)
            if not self._settled(version, text):
                return
            callers = self._fixed + _parse(self._file, text)
        except (OSError, SettingsError) as exc:
            if self._complained != str(exc):
                self._complained = str(exc)
                logger.error("The API key file cannot be used; the keys stay as they were.", extra=_fields(exc))
            return
        self._version, self._fresh, self._callers, self._complained = version, None, callers, None
        names = sorted({caller.name for caller in callers})
        logger.info("API keys were read again.", extra={"fields": {"names": ",".join(names)}})

    def _settled(self, version: "_Version", text: bytes) -> bool:
        """Whether a version of the file seems complete."""
        seen, since_s = self._fresh or (self._version, 0.0)
        if seen is not None and version.inode != seen.inode and text.endswith(b"\n"):
            # It replaced the old file, so it was complete before.
            return True
        if version != seen:
            since_s = time.monotonic()
        self._fresh = version, since_s
        # The file system's clock may be ahead of ours.
        return max(time.time() - version.changed_ns / 1e9, time.monotonic() - since_s) >= SETTLE_S


class _Version(NamedTuple):
    """Distinguishes a file from earlier versions of it."""

    changed_ns: int
    size_bytes: int
    inode: int
    status_changed_ns: int


def _fields(exc: Exception) -> dict[str, dict[str, str]]:
    return {"fields": {"error": str(exc)}}


def _version(of: os.stat_result) -> _Version:
    return _Version(of.st_mtime_ns, of.st_size, of.st_ino, of.st_ctime_ns)


def _read(file: Path) -> tuple[_Version, bytes]:
    """A file as it was at one moment.

    Raises:
        SettingsError: It is not a regular file, or too large for a key file.
        OSError: It cannot be read, or changes while it is.
    """
    # Otherwise opening a FIFO would wait for a writer.
    handle = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        before = os.fstat(handle)
        if not stat.S_ISREG(before.st_mode):
            raise SettingsError(f"{file} is not a regular file.")
        if before.st_size > _MAX_FILE_BYTES:
            raise SettingsError(f"{file} has more than {_MAX_FILE_BYTES} bytes.")
        with open(handle, "rb", closefd=False) as opened:
            text = opened.read(before.st_size)
        version = _version(os.fstat(handle))
    finally:
        os.close(handle)
    if version != _version(before) or len(text) != version.size_bytes:
        raise OSError(f"{file} changed while it was read")
    return version, text


def _parse(file: Path, text: bytes) -> tuple[Caller, ...]:
    try:
        lines = text.decode().splitlines()
    except UnicodeDecodeError:
        raise SettingsError(f"{file} is not a text file.") from None
    entries = ((number, _COMMENT.sub("", line).strip()) for number, line in enumerate(lines, start=1))
    return tuple(_read_entry(entry, f"{file}, line {number}") for number, entry in entries if entry)


def _read_entry(entry: str, where: str) -> Caller:
    """The caller of an entry. Errors name its place, never the entry itself, which may contain a key."""
    words = entry.split()
    if len(words) > 3 or (len(words) == 3 and words[2] != "admin"):
        raise SettingsError(f"{where}: must be `key`, `name key` or `name key admin`; got {len(words)} words.")
    name, key = ("", words[0]) if len(words) == 1 else words[:2]
    if name and not _NAME.fullmatch(name):
        raise SettingsError(f"{where}: the name must be 1 to 64 letters, digits, '.', '_', '@' or '-'.")
    if key.startswith("sha256:"):
        hashed = _HASHED.fullmatch(key)
        if hashed is None:
            raise SettingsError(f"{where}: sha256: must be followed by 64 hex digits, the key's digest.")
        digest = bytes.fromhex(hashed[1])
    else:
        digest = hashlib.sha256(key.encode()).digest()
    return Caller(name=name or "unnamed", owner=name or _unnamed_owner(digest), admin=len(words) == 3, digest=digest)


def _unnamed_owner(digest: bytes) -> str:
    """Owner that journals and checkpoints name for a key without a name. Not its digest, which a key file may
    contain."""
    return f"key:{hashlib.sha256(b'gradwire owner' + digest).hexdigest()[:16]}"
