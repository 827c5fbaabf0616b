"""What callers note about their runs and checkpoints: short texts by key. Ground floor."""

from collections.abc import Mapping

from gradwire.errors import error, invalid_field

MAX_ENTRIES = 64
MAX_KEY_BYTES = 128
MAX_VALUE_BYTES = 4096
MAX_BYTES = 16_384
"""Of all keys and values together, in UTF-8."""


def check_user_metadata(user_metadata: Mapping[str, str]) -> dict[str, str]:
    """Checks user_metadata, and returns it sorted by key.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a key is empty, or a key or value is too long.
        ResourceExhaustedError: LIMIT_EXCEEDED: too many entries or bytes.
    """
    if len(user_metadata) > MAX_ENTRIES:
        text = f"user_metadata has {len(user_metadata)} entries; it may have {MAX_ENTRIES}."
        raise error("LIMIT_EXCEEDED", text, limit=MAX_ENTRIES, got=len(user_metadata))
    total_bytes = 0
    for key, value in user_metadata.items():
        key_bytes, value_bytes = len(key.encode()), len(value.encode())
        if not 0 < key_bytes <= MAX_KEY_BYTES:
            raise invalid_field(
                "user_metadata", f"has a key of {key_bytes} bytes, {key[:40]!r}; it must have 1 to {MAX_KEY_BYTES}."
            )
        if value_bytes > MAX_VALUE_BYTES:
            raise invalid_field(
                f"user_metadata[{key!r}]", f"has {value_bytes} bytes; a value may have {MAX_VALUE_BYTES}."
            )
        total_bytes += key_bytes + value_bytes
    if total_bytes > MAX_BYTES:
        text = f"user_metadata has {total_bytes} bytes; its keys and values may have {MAX_BYTES} together."
        raise error("LIMIT_EXCEEDED", text, limit=MAX_BYTES, got=total_bytes)
    return dict(sorted(user_metadata.items()))


def read_user_metadata(found: object) -> dict[str, str]:
    """The user_metadata in a manifest, whoever wrote it; empty if it is not valid."""
    if not isinstance(found, dict) or not all(
        isinstance(text, str) and _is_utf8(text) for entry in found.items() for text in entry
    ):
        return {}
    return found


def _is_utf8(text: str) -> bool:
    try:
        return len(text.encode()) <= MAX_VALUE_BYTES
    except UnicodeEncodeError:
        return False
