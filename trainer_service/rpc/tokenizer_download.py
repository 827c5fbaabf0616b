"""The base model's tokenizer, file by file, for clients that can reach neither its folder nor a hub."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator
from pathlib import Path

from gradwire._wire.tokenizer_files import (
    CHAT_TEMPLATE_FOLDER,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_TOTAL_BYTES,
    MODEL_CONFIG,
    TOKENIZER_FILES,
    may_be_of_a_tokenizer,
)
from gradwire.errors import error, invalid_field
from gradwire.v1.trainer_service_pb2 import TokenizerFile

_PIECE_BYTES = 1 << 20


class TokenizerDownload:
    """Hands out the tokenizer in a model's folder. The disk is accessed on threads."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, TokenizerFile]] = {}
        """Files by path, each with what shows that it changed."""

    async def files(self, folder: Path) -> list[TokenizerFile]:
        """The files that the tokenizer in a model's folder is loaded from.

        Raises:
            NotFoundError: TOKENIZER_NOT_FOUND.
            ResourceExhaustedError: LIMIT_EXCEEDED: the tokenizer is too large to be sent.
        """
        return await asyncio.to_thread(self._list, folder)

    async def read(self, folder: Path, name: str) -> AsyncGenerator[bytes]:
        """One file's bytes, in pieces of 1 MiB.

        Raises:
            InvalidArgumentError: INVALID_FIELD: there is no such file, or it does not belong to a tokenizer.
            As files.
        """
        listed = {file.name: file for file in await self.files(folder)}
        if name not in listed:
            shown = repr(name[:200])
            raise invalid_field("file", f"is {shown}; it must be one of {', '.join(listed)}.")
        # No more than was listed: the client finds a later change by the digest.
        left = listed[name].size_bytes
        with await asyncio.to_thread((folder / name).open, "rb") as opened:
            while left and (data := await asyncio.to_thread(opened.read, min(left, _PIECE_BYTES))):
                left -= len(data)
                yield data

    def _list(self, folder: Path) -> list[TokenizerFile]:
        names = [name for name in (MODEL_CONFIG, *TOKENIZER_FILES) if (folder / name).is_file()]
        templates = (
            f"{CHAT_TEMPLATE_FOLDER}/{found.name}" for found in (folder / CHAT_TEMPLATE_FOLDER).glob("*.jinja")
        )
        names += sorted(name for name in templates if may_be_of_a_tokenizer(name))
        if not set(names) - {MODEL_CONFIG}:
            raise error(
                "TOKENIZER_NOT_FOUND",
                "The base model's folder on the trainer has no tokenizer. Load the one you need with transformers' "
                "AutoTokenizer, or put its files into that folder.",
            )
        sizes = [(folder / name).stat().st_size for name in names]
        for what, limit, got in (
            ("files", MAX_FILES, len(sizes)),
            ("bytes in one file", MAX_FILE_BYTES, max(sizes)),
            ("bytes in all files", MAX_TOTAL_BYTES, sum(sizes)),
        ):
            if got > limit:
                text = f"The base model's tokenizer has {got} {what}; at most {limit} are sent."
                raise error("LIMIT_EXCEEDED", text, limit=limit, got=got)
        return [self._look(folder, name) for name in names]

    def _look(self, folder: Path, name: str) -> TokenizerFile:
        """One file; read only if it has changed."""
        path = folder / name
        with path.open("rb") as opened:
            stat = path.stat()
            stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino
            known = self._known.get(path)
            if known is None or known[0] != stamp:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
                known = stamp, TokenizerFile(name=name, size_bytes=stat.st_size, sha256=digest)
                self._known[path] = known
        return known[1]
