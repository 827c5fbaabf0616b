"""What a user writes about runs and checkpoints, on its way to the trainer."""

from collections.abc import Mapping
from typing import Any

from gradwire.errors import invalid_field


def check_user_metadata(user_metadata: Mapping[str, str] | None) -> dict[str, str]:
    """It, as it can be sent; how much of it may be is the trainer's to say.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it is no mapping of text to text.
    """
    if user_metadata is None:
        return {}
    given: Any = user_metadata
    if not isinstance(given, Mapping):
        raise invalid_field("user_metadata", f"is a {type(given).__name__}; it must be a dict of texts.")
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise invalid_field(f"user_metadata[{key!r:.80}]", f"is {value!r:.80}; keys and values must be texts.")
        try:
            f"{key}{value}".encode()
        except UnicodeEncodeError:
            raise invalid_field(f"user_metadata[{key!r:.80}]", "is no text that UTF-8 can carry.") from None
    return dict(given)
