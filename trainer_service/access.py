"""Who may call: API keys, and the caller of the call being served. Ground floor."""

import contextvars
import hashlib
import hmac
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from trainer_service.config import SettingsError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASHED = re.compile(r"sha256:([0-9a-fA-F]{64})")


@dataclass(frozen=True)
class Caller:
    """Whoever makes a call, as its key tells."""

    name: str
    """For logs: the key's name, "unnamed" for a key without one, "" where no keys are asked for."""
    owner: str
    """Under this, runs are theirs. Keys of one name share it, so that a key can be replaced; a key without a name
    has one of its own."""
    admin: bool = False
    """Sees everybody's runs."""
    digest: bytes = field(default=b"", repr=False)
    """sha256 of the key."""

    def may_see(self, owner: str) -> bool:
        """Whether what `owner` made is theirs to see."""
        return self.admin or self.owner == owner


ANYBODY = Caller(name="", owner="", admin=True)
"""The caller where no keys are asked for, and the trainer itself."""

current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("current_caller", default=ANYBODY)
"""Who makes the call being served; the trainer itself outside of calls."""


class ApiKeys:
    """The keys that open a server.

    Only digests are kept, so neither a log line nor a core dump tells a key. The file is looked at with every call: a
    line added or taken out counts from then on. A file that cannot be read or has a bad line changes nothing, and is
    complained of in the log.

    A line, or an entry of `environment`, is `key`, `name key` or `name key admin`; the key is as callers send it, or
    `sha256:` and the hex digest of that. # begins a comment.

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
        self._stamp: tuple[int, ...] = ()
        self._complained: object = None
        self._callers = self._fixed
        if file is not None:
            self._stamp = _stamp(file)
            self._callers += _read_file(file)
        if file is not None and not self._callers:
            raise SettingsError(f"--api-key-file {file} has no key; a line is `key`, `name key` or `name key admin`.")
        self.required = bool(self._callers)
        """Whether calls need a key. It stays so when the last key is taken out of the file: then nobody passes."""

    def find(self, key: str) -> Caller | None:
        """Whose key this is; None for nobody's. The time taken tells nothing of which was near."""
        digest = hashlib.sha256(key.encode()).digest()
        return self._with_digest(digest) if key else None

    def still_opens(self, caller: Caller) -> bool:
        """Whether the key a caller came with is one of the keys now, of the same name and rights."""
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
            stamp = _stamp(self._file)
            if stamp == self._stamp:
                return
            callers = self._fixed + _read_file(self._file)
        except (OSError, SettingsError) as exc:
            if self._complained != str(exc):
                self._complained = str(exc)
                logger.error("The API key file cannot be used; the keys stay as they were.", extra=_fields(exc))
            return
        self._stamp, self._callers, self._complained = stamp, callers, None
        names = sorted({caller.name for caller in callers})
        logger.info("API keys were read again.", extra={"fields": {"names": ",".join(names)}})


def _fields(exc: Exception) -> dict[str, dict[str, str]]:
    return {"fields": {"error": str(exc)}}


def _stamp(file: Path) -> tuple[int, ...]:
    stat = os.stat(file)
    return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_ctime_ns


def _read_file(file: Path) -> tuple[Caller, ...]:
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError:
        raise SettingsError(f"{file} is not a text file.") from None
    entries = ((number, line.partition("#")[0].strip()) for number, line in enumerate(lines, start=1))
    return tuple(_read_entry(entry, f"{file}, line {number}") for number, entry in entries if entry)


def _read_entry(entry: str, where: str) -> Caller:
    """The caller an entry stands for. Messages name the place, never the entry, which may hold a key."""
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
    owner = name or f"sha256:{digest.hex()}"
    return Caller(name=name or "unnamed", owner=owner, admin=len(words) == 3, digest=digest)
