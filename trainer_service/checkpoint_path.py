"""Where a checkpoint is: gradwire://<run_id>/<kind>/<name>. Names come from callers and become folders. Ground."""

import re
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import invalid_field

STATE = "state"
"""Kind of a resumable state."""
SAMPLER_WEIGHTS = "sampler_weights"
"""Kind of an export for inference: all parameters, or a delta."""

MAX_TTL_SECONDS = 10 * 365 * 24 * 3600

_SCHEME = "gradwire://"
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", re.ASCII)


@dataclass(frozen=True, order=True)
class CheckpointPath:
    """Names one checkpoint; what `parse` returns is confined to its folder."""

    run_id: str
    kind: str
    name: str

    @classmethod
    def parse(cls, path: str, *, field: str = "path") -> "CheckpointPath":
        """The checkpoint a path names; `field` is what the caller calls the path.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is not of this form, or would lead elsewhere.
        """
        run_id, kind, name = [*path.removeprefix(_SCHEME).split("/", 3), "", "", ""][:3]
        well_formed = (
            path == f"{_SCHEME}{run_id}/{kind}/{name}"
            and _RUN_ID.fullmatch(run_id)
            and kind in (STATE, SAMPLER_WEIGHTS)
            and _NAME.fullmatch(name)
        )
        if not well_formed:
            raise invalid_field(
                field,
                f"is {_shown(path)}; it must be gradwire://<run_id>/{STATE}/<name> or "
                f"gradwire://<run_id>/{SAMPLER_WEIGHTS}/<name>, as saving returned it.",
            )
        return cls(run_id, kind, name)

    def __str__(self) -> str:
        return f"{_SCHEME}{self.key}"

    @property
    def key(self) -> str:
        """Its place below a folder or in a store."""
        return f"{self.run_id}/{self.kind}/{self.name}"

    def folder(self, root: Path) -> Path:
        """Its place below a folder."""
        return root / self.run_id / self.kind / self.name


def check_checkpoint_name(name: str) -> None:
    """A checkpoint's name becomes a folder's.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if not _NAME.fullmatch(name):
        raise invalid_field(
            "name",
            f"is {_shown(name)}; it must be 1 to 128 letters, digits, '.', '_' or '-', and not start with '.'.",
        )


def check_ttl_seconds(ttl_seconds: int | None) -> None:
    """How long a checkpoint is kept; None for ever.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if ttl_seconds is not None and not 0 < ttl_seconds <= MAX_TTL_SECONDS:
        raise invalid_field("ttl_seconds", f"is {ttl_seconds}; it must be 1 to {MAX_TTL_SECONDS} (ten years).")


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 200 else f"{text[:40]!r}… of {len(text)} characters"
