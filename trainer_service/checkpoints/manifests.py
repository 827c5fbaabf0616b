"""Manifests of checkpoints. They are untrusted: anybody who can write to the folder or the store may have written them.

What `read` returns is safe to act on: its values have the protocol's types, and none of its names leads out of the
checkpoint's folder. A damaged manifest is refused as a whole.
"""

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from gradwire.errors import GradwireError

from trainer_service.atomic_folders import MANIFEST, MAX_MANIFEST_BYTES, Manifest, damaged
from trainer_service.paths import SAMPLER_WEIGHTS, CheckpointPath

UPLOAD = "upload"
"""Key in a stored manifest: the name of the folder with its files."""

_UPLOAD = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_LORA_FLAGS = ("train_mlp", "train_attn", "train_unembed")


def read(path: CheckpointPath, content: bytes) -> Manifest:
    """The manifest of a checkpoint.

    Args:
        path: The checkpoint's.
        content: The manifest file's.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED: it is not a valid manifest of that checkpoint.
    """
    try:
        if len(content) > MAX_MANIFEST_BYTES:
            raise ValueError(f"it has {len(content)} bytes")
        manifest = Manifest.from_json(content)
    except ValueError as exc:
        raise damaged(path.name, MANIFEST, f"cannot be read: {exc}") from exc
    for key, sound in _SOUND.items():
        value = manifest.about.get(key)
        if value is not None and not sound(value):
            raise damaged(path.name, MANIFEST, f"says that its {key} is {value!r:.200}")
    base_path = manifest.about.get("base_path")
    if base_path and not _is_base_of(base_path, path):
        raise damaged(path.name, MANIFEST, f"says that its base is {base_path[:200]!r}")
    return manifest


def time_of(about: Mapping[str, Any], key: str) -> datetime | None:
    """A time in a manifest; None if it has none."""
    value = about.get(key)
    return None if value is None else _time(value)


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).astimezone(UTC)


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and _time(value) is not None
    except (ValueError, OverflowError):
        return False


def _is_base_of(base_path: str, path: CheckpointPath) -> bool:
    """Whether a delta at `path` may build on `base_path`. A base of another run is refused: it may be somebody else's,
    and the delta would keep it from being deleted."""
    try:
        base = CheckpointPath.parse(base_path)
    except GradwireError:
        return False
    return base != path and (base.run_id, base.kind) == (path.run_id, SAMPLER_WEIGHTS)


def _whole_number(below: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 0 <= value < below


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_lora(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    alpha = value.get("alpha")
    sound = isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)
    # Checkpoints of an earlier version do not name what is adapted.
    named = all(_is_text(value.get(name) or "") for name in ("adapted", "left_out"))
    return sound and named and all(type(value.get(flag)) is bool for flag in _LORA_FLAGS)


_SOUND: dict[str, Callable[[Any], bool]] = {
    "step": _whole_number(1 << 63),
    "lora_rank": _whole_number(1 << 32),
    "base_model": _is_text,
    "architecture": _is_text,
    "checkpoint_type": _is_text,
    "dtype": _is_text,
    "base_path": _is_text,
    "lora": _is_lora,
    "user_metadata": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())),
    "created_at": _is_time,
    "expires_at": _is_time,
    UPLOAD: lambda value: isinstance(value, str) and _UPLOAD.fullmatch(value) is not None,
}
"""Checks of values, by key; an absent or null value is always sound."""
