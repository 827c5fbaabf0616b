"""Safetensors files, written and read without holding a tensor twice.

The format's own writer needs all tensors at once in host memory; its reader (0.8.0) leaks 64 bytes for every tensor it
returns, which adds up in a worker that loads states for weeks.

A file is the header's length (8 bytes, little-endian), the header (JSON: name → dtype, shape and where its bytes begin
and end after the header), and the tensors' bytes without a gap, row-major and little-endian.
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes that tensors may have, by the format's names."""
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
_CHUNK_BYTES = 8 << 20


class Sink(Protocol):
    """Takes a file's bytes."""

    def write(self, chunk: bytes | memoryview, /) -> object:
        """Appends all of the content."""
        ...


def write_tensors(file: Sink, tensors: Mapping[str, Tensor]) -> None:
    """Writes a file. Tensors on a device come to the host a few MiB at a time."""
    write_header(file, tensors)
    for tensor in tensors.values():
        write_values(file, tensor)


def write_header(file: Sink, tensors: Mapping[str, Tensor], *, about: Mapping[str, str] | None = None) -> None:
    """Writes what comes before the tensors' values, which `write_values` writes next, in this order.

    Args:
        file: Empty.
        tensors: Have dtypes and shapes; only those are looked at.
        about: Goes into the file's __metadata__.
    """
    header: dict[str, Any] = {} if about is None else {"__metadata__": dict(about)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The format wants tensors to begin at a multiple of 8.
    encoded += b" " * (-len(encoded) % _LENGTH_BYTES)
    file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)


def write_values(file: Sink, tensor: Tensor) -> None:
    """Writes the next tensor's values, a few MiB at a time."""
    for chunk in _chunks(tensor.detach()):
        file.write(chunk)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, in the order of their bytes.

    Nothing is read until it is used: they are views of one memory map, which is closed with the last of them. Writing
    to one changes neither the file nor another tensor.

    Raises:
        ValueError: It is not such a file; the text continues the word "it".
        OSError: It cannot be read.
    """
    with path.open("rb") as file:
        header, size_bytes = _read_header(file)
        start, found = file.tell(), list[tuple[str, torch.dtype, list[int], int, int]]()
        for name, entry in header.items():
            found.append((name, *_read_entry(name, entry)))
        found.sort(key=lambda one: one[-2:])
        end = 0
        for name, _, _, begin, its_end in found:
            if begin != end:
                raise ValueError(f"has {name!r} at byte {begin} and not at {end}, where the tensor before it ends")
            end = its_end
        if end != size_bytes - start:
            raise ValueError(f"has {size_bytes - start} bytes after its header, but tensors of {end}")
        # A memory map may not be empty, and the header never is.
        mapped = np.memmap(file, np.uint8, "c")
    return {
        name: _tensor(mapped[start + begin : start + end], dtype, shape) for name, dtype, shape, begin, end in found
    }


def _read_header(file: Any) -> tuple[dict[str, Any], int]:
    """What a file says about its tensors, and its size; leaves the file at the first tensor."""
    size_bytes = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    if size_bytes < _LENGTH_BYTES or length > min(size_bytes - _LENGTH_BYTES, _MAX_HEADER_BYTES):
        raise ValueError(f"has {size_bytes} bytes, and not the header it should begin with")
    try:
        header = json.loads(file.read(length).decode())
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"has a header that is not JSON: {exc}") from exc
    if not isinstance(header, dict):
        raise ValueError(f"has a {type(header).__name__} for a header")
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(text, str) for text in about.values()):
        raise ValueError(f"has something other than texts for __metadata__: {about!r:.200}")
    return header, size_bytes


def _read_entry(name: str, entry: Any) -> tuple[torch.dtype, list[int], int, int]:
    """dtype, shape, begin and end of a tensor."""
    try:
        dtype, shape, (begin, end) = _BY_NAME[entry["dtype"]], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (KeyError, TypeError, ValueError) as exc:
        raise ValueError(f"describes {name!r} in a way that cannot be read: {entry!r:.200}") from exc
    plausible = type(shape) is list and all(type(number) is int and number >= 0 for number in numbers)
    # A dimension of zero does not excuse others that are impossibly large.
    if not plausible or math.prod(side or 1 for side in shape) >= 1 << 63:
        raise ValueError(f"has {name!r} of shape {shape!r:.200} from byte {begin!r:.40} to {end!r:.40}")
    wanted = math.prod(shape) * dtype.itemsize
    if end - begin != wanted:
        raise ValueError(f"has {end - begin} bytes for {name!r}, whose shape and dtype need {wanted}")
    return dtype, shape, begin, end


def _tensor(raw: np.ndarray[Any, Any], dtype: torch.dtype, shape: list[int]) -> Tensor:
    # Tensors may be laid out so that one is not aligned for its dtype; such a tensor is copied.
    aligned = raw if raw.ctypes.data % dtype.itemsize == 0 else raw.copy()
    return torch.from_numpy(aligned).view(dtype).reshape(shape)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major and (as every machine torch runs on) little-endian."""
    flat = tensor.reshape(-1)
    length = max(1, _CHUNK_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), length):
        chunk: Any = flat[start : start + length].cpu().contiguous().view(torch.uint8).numpy()
        yield memoryview(chunk)
