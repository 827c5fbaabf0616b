"""The secret that a node shows to take part in a worker. Ground floor."""

import hmac
import os
from collections.abc import Iterable
from pathlib import Path

from trainer_service.command_lines import SettingsError

VARIABLE = "GRADWIRE_JOIN_TOKEN"
_HEADER = "authorization"
_SCHEME = "Bearer "
_LEAST_CHARS = 16


def read_join_token(file: Path | None) -> str:
    """The token in a file, or else in the environment.

    Raises:
        SettingsError: There is none, or one that could be guessed.
        OSError: The file cannot be read.
    """
    text = (os.environ.get(VARIABLE, "") if file is None else file.read_text()).strip()
    where = VARIABLE if file is None else f"--join-token-file {file}"
    if not text:
        raise SettingsError(
            f"Several nodes need a token that those that join show: set {VARIABLE} or --join-token-file to the same "
            "on all of them, such as the output of `openssl rand -hex 32`."
        )
    if len(text) < _LEAST_CHARS or not (text.isascii() and text.isprintable()):
        raise SettingsError(f"{where} must be {_LEAST_CHARS} or more printable ASCII characters.")
    return text


def as_metadata(token: str) -> list[tuple[str, str]]:
    """gRPC metadata that shows the token."""
    return [(_HEADER, _SCHEME + token)]


def shows_token(metadata: Iterable[tuple[str, str | bytes]] | None, token: str) -> bool:
    """Whether a call's metadata shows the token; in a time that does not tell how much of it."""
    shown = next((value for name, value in metadata or () if name == _HEADER), "")
    shown = shown.encode() if isinstance(shown, str) else shown
    return hmac.compare_digest(shown, (_SCHEME + token).encode())
