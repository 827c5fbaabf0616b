"""What a worker found out about its model by trying it, kept for the next worker of the same trainer.

Trying takes seconds, and comes out the same for the same model, device and libraries.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from gradwire._wire.protocol_version import __version__

T = TypeVar("T")


class Findings:
    """Findings in files, one each.

    Args:
        folder: Private to this user; None where nothing is kept.
        about: What they depend on, beside the versions of libraries. What was found about anything else is not taken.
    """

    def __init__(self, folder: Path | None = None, about: Sequence[str] = ()) -> None:
        self._folder = folder
        self._about = [__version__, str(torch.__version__), transformers.__version__, *about]

    def recall(self, name: str, find: Callable[[], T], *, made_of: Sequence[type[Any]]) -> T:
        """What was found before, or what is found now, which is kept.

        Args:
            name: Of the finding and its file.
            find: Finds out.
            made_of: Classes of what it returns, beside Python's own; nothing else is read from a file.
        """
        if self._folder is None:
            return find()
        file = self._folder / f"{name}.finding"
        # Of a file that is not there, or whatever else is wrong with it, nothing is lost but the time of finding out.
        with contextlib.suppress(Exception):
            with torch.serialization.safe_globals([*made_of]):
                about, found = torch.load(file, weights_only=True)
            if about == self._about:
                return found
        found, aside = find(), file.with_name(f".{file.name}-{os.getpid()}")
        with contextlib.suppress(OSError, RuntimeError):
            torch.save((self._about, found), aside)
            aside.replace(file)
        return found
