"""What others made, taken in with care: JSON, names of files, texts for a terminal. Both sides of the wire."""

import json
from pathlib import Path
from typing import Any

_MAX_NAME_BYTES = 200
"""Of one part of a name. File systems take 255, and a part under way has a longer name than its file."""
_MAX_PARTS = 16


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: It is no JSON, or nested beyond what can be read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def stays_inside(name: str) -> bool:
    """Whether a name of somebody else's leads to a file in whatever folder it is put behind, and to no hidden one."""
    parts = name.split("/")
    return (
        name.isprintable()
        and not any(char in name for char in "\\:")
        and len(parts) <= _MAX_PARTS
        and all(part and part[0] != "." and len(part.encode()) <= _MAX_NAME_BYTES for part in parts)
    )


def confined(folder: Path, name: str) -> Path:
    """The place in a folder that somebody else's name stands for.

    Raises:
        ValueError: It stands for none; the text goes on from the name.
    """
    if not stays_inside(name):
        raise ValueError("is no name of a file in a folder")
    place = folder / name
    # Links that lie in the folder may lead out of it.
    if not place.parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError("leads out of the folder over a link")
    return place


def printable(text: str, *, lines: bool = False) -> str:
    """A text with what a terminal would obey (control characters, marks that turn the direction of writing) shown as
    Python writes it: "\\x1b[2J".

    Args:
        text: The text to show.
        lines: Leave newlines as they are.
    """
    return "".join(
        char if char.isprintable() or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )
