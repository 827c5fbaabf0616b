"""The base model's tokenizer: fetched from the trainer, kept by content, loaded with transformers.

What a trainer sends is not trusted: names are of a fixed list, sizes and digests are compared, and no code of it runs.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import grpc.aio

from gradwire._client.loop import LOOP
from gradwire._client.retries import is_passing
from gradwire._client.transport import Connection
from gradwire._wire.tokenizer_files import MAX_FILE_BYTES, MAX_FILES, MAX_TOTAL_BYTES, may_be_of_a_tokenizer
from gradwire.errors import GradwireError, error
from gradwire.v1.trainer_service_pb2 import (
    DownloadTokenizerRequest,
    DownloadTokenizerResponse,
    GetTokenizerRequest,
    TokenizerFile,
)
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

_TIMEOUT_S = 600.0
"""For the trainer to be ready and say what there is."""
_IDLE_TIMEOUT_S = 60.0
"""How long it may send nothing before the connection counts as lost."""
_MAX_TRIES = 4
"""Of one file."""


def load_tokenizer(connection: Connection) -> Any:
    """The tokenizer of the model a trainer serves, as transformers.AutoTokenizer loads it.

    It comes from the trainer itself the first time, and then from $GRADWIRE_HOME/tokenizers (~/.gradwire/tokenizers);
    no hub is asked. Code that a tokenizer may bring along is never run.

    Raises:
        NotFoundError: TOKENIZER_NOT_FOUND: the model has none.
        DataLossError: TOKENIZER_DAMAGED: what came is not what the trainer says, or what no tokenizer has.
        UnavailableError: The trainer does not answer.
        ImportError: transformers is not installed here.
        OSError: The folder cannot be written.
        ValueError: What transformers says of a tokenizer it cannot load.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as exc:
        raise ImportError("get_tokenizer needs transformers on this machine: pip install transformers.") from exc
    folder = fetch_tokenizer(connection)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def fetch_tokenizer(connection: Connection) -> Path:
    """The folder with the tokenizer's files, fetched unless it is already here. Raises as load_tokenizer."""
    answer = connection.call(TrainerServiceStub, "GetTokenizer", GetTokenizerRequest(), timeout_s=_TIMEOUT_S)
    files = list(answer.files)
    _check(files)
    home = Path(os.environ.get("GRADWIRE_HOME") or Path.home() / ".gradwire") / "tokenizers"
    folder = home / _digest_of(files)
    if not _is_whole(folder, files):
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Its folder is for the user alone; so is what is renamed.
        with tempfile.TemporaryDirectory(prefix=".incoming-", dir=home) as aside:
            whole = Path(aside) / "whole"
            for file in files:
                _fetch(connection, file, whole / file.name)
            _refuse_paths(whole)
            _put_in_place(whole, folder, files)
    return folder


def _check(files: list[TokenizerFile]) -> None:
    """Refuses files that no tokenizer of an honest trainer has."""
    names = [file.name for file in files]
    sizes = [file.size_bytes for file in files]
    if len(files) > MAX_FILES or sum(sizes) > MAX_TOTAL_BYTES or max(sizes, default=0) > MAX_FILE_BYTES:
        raise _damaged(f"says {len(files)} files of {sum(sizes)} bytes, more than are taken")
    wrong = [name for name in names if not may_be_of_a_tokenizer(name)]
    if wrong:
        raise _damaged(f"names {wrong[0][:200]!r}, which is no file of a tokenizer")
    if not files or len(set(names)) < len(names):
        raise _damaged(f"says {len(names)} files by {len(set(names))} names")


def _digest_of(files: Iterable[TokenizerFile]) -> str:
    """A digest of a tokenizer's content, which names its folder."""
    lines = sorted(f"{file.sha256} {file.size_bytes} {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_whole(folder: Path, files: Iterable[TokenizerFile]) -> bool:
    return folder.is_dir() and all(_has_content(folder / file.name, file) for file in files)


def _has_content(path: Path, file: TokenizerFile) -> bool:
    try:
        with path.open("rb") as found:
            whole = os.fstat(found.fileno()).st_size == file.size_bytes
            return whole and hashlib.file_digest(found, "sha256").hexdigest() == file.sha256
    except OSError:
        return False


def _fetch(connection: Connection, file: TokenizerFile, target: Path) -> None:
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left_tries in reversed(range(_MAX_TRIES)):
        try:
            with target.open("wb") as out, contextlib.closing(_pieces(connection, file.name)) as pieces:
                left = file.size_bytes
                for data in pieces:
                    left -= len(data)
                    if left < 0:
                        raise _damaged(f"sent more of {file.name} than the {file.size_bytes} bytes it said")
                    out.write(data)
            break
        except GradwireError as exc:
            if not is_passing(exc) or not left_tries:
                raise
    if not _has_content(target, file):
        raise _damaged(f"sent {file.name} with another content than it said")


def _pieces(connection: Connection, name: str) -> Generator[bytes]:
    """One file's bytes. The loop only reads, since the training of the same process shares it."""

    async def begin() -> Any:
        request = DownloadTokenizerRequest(file=name)
        return TrainerServiceStub(connection.channel()).DownloadTokenizer(request, metadata=connection.metadata)

    async def read() -> bytes | None:
        try:
            message: Any = await asyncio.wait_for(call.read(), _IDLE_TIMEOUT_S)
        except grpc.aio.AioRpcError as exc:
            raise connection.explain(exc, "DownloadTokenizer") from None
        except TimeoutError:
            raise error("WORKER_NOT_READY", f"{connection.base_url} sent nothing for {_IDLE_TIMEOUT_S:g} s.") from None
        return message.data if isinstance(message, DownloadTokenizerResponse) else None

    call = LOOP.run(begin())
    try:
        while (data := LOOP.run(read())) is not None:
            yield data
    finally:
        LOOP.call_soon(call.cancel)


def _refuse_paths(folder: Path) -> None:
    """Refuses the one setting whose file names transformers follows wherever they lead, `fast_tokenizer_files`."""
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
    except FileNotFoundError:
        return
    except (ValueError, RecursionError):
        raise _damaged("sent a tokenizer_config.json that is no JSON") from None
    named = settings.get("fast_tokenizer_files", []) if isinstance(settings, dict) else []
    if any("/" in name or "\\" in name for name in map(str, named)):
        raise _damaged("sent a tokenizer_config.json whose fast_tokenizer_files lead out of its folder")


def _put_in_place(whole: Path, folder: Path, files: Iterable[TokenizerFile]) -> None:
    try:
        whole.rename(folder)
    except OSError:
        if _is_whole(folder, files):
            return  # Another process was faster, and may be reading it.
        shutil.rmtree(folder, ignore_errors=True)
        whole.rename(folder)


def _damaged(what: str) -> GradwireError:
    return error("TOKENIZER_DAMAGED", f"get_tokenizer: the trainer {what}; the tokenizer was not taken.")
