"""Deltas: what changed in a checkpoint's tensors since a base, without loss. Both sides of the wire; numpy only.

A delta is a folder of

    delta.json          the base it builds on and the files it makes, with sizes and digests
    delta.safetensors   a U8 tensor a chunk, "<file>#<number>": the file's bytes XOR the base's, byte planes apart,
                        deflated; empty where nothing changed
    …                   the checkpoint's other files (config, tokenizer) as they are

Neighbouring parameters change in their low bytes alone, so that XOR and planes leave runs of zeros to deflate.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gradwire._wire.untrusted import parse_json, stays_inside
from gradwire.errors import GradwireError, error

DESCRIPTION = "delta.json"
TENSORS = "delta.safetensors"
_CHUNK_BYTES = 4 << 20
_ITEM_BYTES = 4
"""Bytes of a float32. Chunks are a multiple of it, and so is where tensors begin in a file."""
_THREADS = 2
_MAX_HEADER_BYTES = 100 << 20


def compress(base: bytes, changed: bytes) -> bytes:
    """The bytes that turn `base` into `changed`, which is as long; empty if they are equal."""
    difference = np.bitwise_xor(np.frombuffer(base, np.uint8), np.frombuffer(changed, np.uint8))
    if not difference.any():
        return b""
    whole = len(difference) // _ITEM_BYTES * _ITEM_BYTES
    planes = difference[:whole].reshape(-1, _ITEM_BYTES).T.tobytes() + difference[whole:].tobytes()
    return zlib.compress(planes, level=1)


def expand(base: bytes, compressed: bytes) -> bytes:
    """The bytes that `compress` was given as `changed`.

    Raises:
        ValueError: It is not what compress made.
    """
    if not compressed:
        return base
    inflate = zlib.decompressobj()
    try:
        # One byte more than there may be, so that more is noticed and not made room for.
        planes = np.frombuffer(inflate.decompress(compressed, len(base) + 1), np.uint8)
    except zlib.error as exc:
        raise ValueError(str(exc)) from exc
    if len(planes) != len(base):
        raise ValueError(f"a chunk has {len(planes)} bytes instead of {len(base)}")
    if not inflate.eof or inflate.unused_data:
        raise ValueError("a chunk does not end where its data end")
    whole = len(base) // _ITEM_BYTES * _ITEM_BYTES
    difference = np.empty(len(base), np.uint8)
    difference[:whole].reshape(-1, _ITEM_BYTES)[:] = planes[:whole].reshape(_ITEM_BYTES, -1).T
    difference[whole:] = planes[whole:]
    return np.bitwise_xor(difference, np.frombuffer(base, np.uint8)).tobytes()


def write_chunks(base: Path, changed: Path, out: BinaryIO) -> tuple[list[int], str, str]:
    """Appends the compressed chunks of one file.

    Returns:
        Their sizes, and the digests (SHA-256, hex) of base and changed file.
    """
    digests = hashlib.sha256(), hashlib.sha256()
    sizes: list[int] = []

    def pairs() -> Iterator[tuple[bytes, bytes]]:
        with base.open("rb") as old, changed.open("rb") as new:
            while chunk := new.read(_CHUNK_BYTES):
                yield old.read(_CHUNK_BYTES), chunk

    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: list[Any] = []

        def take() -> None:
            piece = waiting.pop(0).result()
            out.write(piece)
            sizes.append(len(piece))

        for old, new in pairs():
            digests[0].update(old)
            digests[1].update(new)
            waiting.append(pool.submit(compress, old, new))
            if len(waiting) > _THREADS:
                take()
        while waiting:
            take()
    return sizes, digests[0].hexdigest(), digests[1].hexdigest()


def safetensors_header(sizes: Mapping[str, list[int]]) -> bytes:
    """What comes before the chunks of all files, one file after the other."""
    header: dict[str, Any] = {}
    end = 0
    for name, chunks in sizes.items():
        for number, size in enumerate(chunks):
            begin, end = end, end + size
            header[f"{name}#{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def describe(folder: Path, *, name: str = "") -> dict[str, Any] | None:
    """delta.json of a checkpoint: "base" ({"path", "files": {name: sha256}}) and "files" ({name: {"size_bytes",
    "sha256"}}); None if it is not a delta.

    Args:
        folder: The checkpoint's.
        name: What errors call it; "" is the folder's name.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        found = parse_json(path.read_bytes())
        base, files = found["base"], found["files"]
        sound = (
            isinstance(base["path"], str)
            and base["files"].keys() == files.keys()
            and all(isinstance(sha256, str) for sha256 in base["files"].values())
            and all(_sound_entry(file, entry) for file, entry in files.items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise _damaged(name or folder.name, DESCRIPTION) from exc
    if not sound:
        raise _damaged(name or folder.name, DESCRIPTION)
    return found


def _sound_entry(file: str, entry: Any) -> bool:
    return (
        "/" not in file
        and stays_inside(file)
        and file.endswith(".safetensors")
        and type(entry["size_bytes"]) is int
        and 0 <= entry["size_bytes"] < 1 << 63
        and isinstance(entry["sha256"], str)
    )


def expand_folder(delta: Path, base: Path, out: Path, *, name: str = "") -> None:
    """Writes the whole checkpoint that a delta and its base make, comparing every digest.

    Args:
        delta: Folder of the delta.
        base: Folder of its base.
        out: A folder that is there and empty.
        name: What errors call the delta; "" is its folder's name.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED: the delta is damaged.
        FailedPreconditionError: DELTA_BASE_UNUSABLE: the base is not there, or not what the delta was made from.
    """
    name = name or delta.name
    description = describe(delta, name=name)
    if description is None:
        raise _damaged(name, DESCRIPTION)
    for path in delta.iterdir():
        if path.name not in (DESCRIPTION, TENSORS, "manifest.json") and not path.name.startswith("."):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, out / path.name)
    try:
        tensors = (delta / TENSORS).open("rb")
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise _damaged(name, TENSORS) from exc
    with tensors:
        chunks = _Chunks(name, tensors)
        for file, entry in description["files"].items():
            _expand_file(name, base / file, description["base"]["files"][file], out / file, entry, chunks)


class _Chunks:
    """The compressed chunks of an open delta.safetensors.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED.
    """

    def __init__(self, name: str, file: BinaryIO) -> None:
        self._file = file
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            self._header = parse_json(file.read(min(header_bytes, _MAX_HEADER_BYTES)))
        except ValueError as exc:
            raise _damaged(name, TENSORS) from exc
        self._start = 8 + header_bytes

    def read(self, file: str, number: int) -> bytes:
        """One chunk.

        Raises:
            ValueError, KeyError, TypeError: There is none, or it is longer than compressing could make it.
        """
        begin, end = self._header[f"{file}#{number}"]["data_offsets"]
        if not (type(begin) is type(end) is int and 0 <= begin <= end <= min(begin + 2 * _CHUNK_BYTES, 1 << 62)):
            raise ValueError(f"chunk {number} of {file} is from {begin} to {end}")
        self._file.seek(self._start + begin)
        return self._file.read(end - begin)


def _expand_file(name: str, base: Path, base_sha256: str, out: Path, entry: Mapping[str, Any], chunks: _Chunks) -> None:
    digest, base_digest = hashlib.sha256(), hashlib.sha256()
    failed: Exception | None = None
    try:
        with base.open("rb") as old, out.open("wb") as file:
            for number in range(-(-entry["size_bytes"] // _CHUNK_BYTES)):
                chunk = old.read(_CHUNK_BYTES)
                base_digest.update(chunk)
                made = expand(chunk, chunks.read(base.name, number))
                digest.update(made)
                file.write(made)
    except FileNotFoundError as exc:
        raise unusable_base(name, f"it has no {base.name}, or is not there any more") from exc
    except (ValueError, KeyError, TypeError) as exc:
        failed = exc
    if failed is None and digest.hexdigest() == entry["sha256"]:
        return
    with base.open("rb") as old:
        base_is = hashlib.file_digest(old, "sha256").hexdigest()
    if base_is != base_sha256:
        raise unusable_base(name, "it was saved anew or damaged since") from failed
    raise _damaged(name, TENSORS) from failed


def unusable_base(name: str, why: str) -> GradwireError:
    """The DELTA_BASE_UNUSABLE error."""
    text = f'The delta "{name}" cannot be used with its base: {why}. Save a base, and deltas on it, anew.'
    return error("DELTA_BASE_UNUSABLE", text, name=name)


def _damaged(name: str, file: str) -> GradwireError:
    text = f'The checkpoint "{name}" is damaged: {file} is not as it was written. Load another one.'
    return error("CHECKPOINT_DAMAGED", text, name=name, file=file)
