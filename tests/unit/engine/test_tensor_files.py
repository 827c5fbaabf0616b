"""Tensor files: safetensors reads what we write, we read what safetensors writes, and nothing else is taken for one."""

import gc
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer_service.engine.tensor_files import DTYPES, read_tensors, write_tensors


def some_of(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors of a dtype, of many shapes and of any bits."""
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (24 * dtype.itemsize,), dtype=torch.uint8)
    flat = raw.view(dtype)
    return {
        "table": flat.reshape(4, 6),
        "turned": flat.reshape(4, 6).T,
        "part": flat.reshape(4, 6)[1:3, ::2],
        "scalar": flat[3],
        "none": flat[:0].reshape(0, 7),
        "naïve.name": flat[:1].reshape(1, 1, 1),
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit; a NaN is equal to itself then."""
    return left.keys() == right.keys() and all(
        (one.dtype, one.shape) == (other.dtype, other.shape)
        and bytes(one.contiguous().reshape(-1).view(torch.uint8).numpy())
        == bytes(other.contiguous().reshape(-1).view(torch.uint8).numpy())
        for one, other in ((left[name], right[name]) for name in left)
    )


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    with path.open("wb") as file:
        write_tensors(file, tensors)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_goes_from_us_to_safetensors_and_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = some_of(dtype)
    ours = write(tmp_path / "ours", tensors)
    assert same(load_file(ours), tensors)
    assert same(read_tensors(ours), tensors)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in tensors.items()},
        tmp_path / "theirs",
        {"made": "by them"},
    )
    assert same(read_tensors(tmp_path / "theirs"), tensors)


def test_dtypes_mixed_so_that_tensors_begin_at_odd_bytes(tmp_path: Path) -> None:
    tensors = {
        "one": torch.tensor([7], dtype=torch.uint8),
        "float": torch.randn(5),
        "half": torch.randn(3).half(),
        "long": torch.arange(4),
    }
    assert same(read_tensors(write(tmp_path / "mixed", tensors)), tensors)


@pytest.mark.parametrize("tensors", [{}, {"none": torch.empty(3, 0)}])
def test_files_without_a_byte_of_tensors(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    assert same(read_tensors(write(tmp_path / "empty", tensors)), tensors)


def test_tensors_outlive_their_file_and_each_other_and_writing_to_them_stays_in_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"a": torch.arange(4.0), "b": torch.arange(4.0, 8.0)})
    before = path.read_bytes()
    tensors = read_tensors(path)
    first = tensors.pop("a").zero_()
    assert torch.equal(tensors["b"], torch.arange(4.0, 8.0))
    assert torch.equal(read_tensors(path)["a"], torch.arange(4.0))
    assert path.read_bytes() == before
    path.unlink()
    del tensors
    gc.collect()
    assert first.sum() == 0


def test_nothing_is_held_once_the_tensors_are_gone(tmp_path: Path) -> None:
    path = write(tmp_path / "a", {"a": torch.arange(4.0)})

    def handles() -> list[str]:
        opened = [str(link.resolve()) for link in Path("/proc/self/fd").iterdir()]
        mapped = Path("/proc/self/maps").read_text().splitlines()
        return [line for line in (*opened, *mapped) if line.endswith(str(path))]

    tensors = read_tensors(path)
    assert handles()
    del tensors
    assert not handles()


def file_of(header: Any, data: bytes = bytes(16)) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def tensor(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


NO_FILES = {
    "nothing": (b"", "has 0 bytes"),
    "a few bytes": (b"1234567", "has 7 bytes"),
    "a header longer than the file": ((1 << 60).to_bytes(8, "little") + b"{}", "has 10 bytes"),
    "a header cut short": (file_of({"a": tensor()}, b"")[:-9], "not the header it should begin with"),
    "no JSON": (file_of(b"{'a': 1}"), "has a header that is not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "has a header that is not JSON"),
    "JSON too deep": (file_of(b"[" * 100_000), "has a header that is not JSON"),
    "a list": (file_of([]), "has a list for a header"),
    "metadata that is none": (file_of({"__metadata__": {"a": 1}, "a": tensor()}), "__metadata__"),
    "a tensor that is none": (file_of({"a": 3}), "describes 'a' in a way that cannot be read"),
    "a tensor without a shape": (file_of({"a": {"dtype": "F32", "data_offsets": [0, 16]}}), "says of 'a'"),
    "an unknown dtype": (file_of({"a": tensor("F12")}), "says of 'a'"),
    "a dtype that is a list": (file_of({"a": tensor(["F32"])}), "says of 'a'"),
    "three offsets": (file_of({"a": tensor(offsets=[0, 8, 16])}), "says of 'a'"),
    "a shape that is a text": (file_of({"a": tensor(shape="4")}), "of shape '4'"),
    "a shape that is an object": (file_of({"a": tensor(shape={}, offsets=[0, 4])}), "of shape {}"),
    "a side that is a fraction": (file_of({"a": tensor(shape=[4.0])}), "of shape [4.0]"),
    "a side that is a truth": (file_of({"a": tensor(shape=[True, 4])}), "of shape [True, 4]"),
    "a negative side": (file_of({"a": tensor(shape=[-2, -2])}), "of shape [-2, -2]"),
    "sides beyond all counting": (
        file_of({"a": tensor(shape=[0, 1 << 62, 1 << 62], offsets=[0, 0])}, b""),
        "of shape [0, ",
    ),
    "a negative offset": (file_of({"a": tensor(offsets=[-16, 0])}), "from byte -16"),
    "an end before the begin": (file_of({"a": tensor(offsets=[16, 0])}), "has -16 bytes for 'a'"),
    "too few bytes for the shape": (file_of({"a": tensor(shape=[5])}), "whose shape and dtype need 20"),
    "tensors beyond the end": (
        file_of({"a": tensor()}, bytes(15)),
        "has 15 bytes after its header, but tensors of 16",
    ),
    "bytes nobody claims": (file_of({"a": tensor()}, bytes(17)), "has 17 bytes after its header, but tensors of 16"),
    "a gap": (file_of({"a": tensor(shape=[3], offsets=[4, 16])}), "has 'a' at byte 4 and not at 0"),
    "an overlap": (
        file_of({"a": tensor(shape=[3], offsets=[0, 12]), "b": tensor(shape=[2], offsets=[8, 16])}),
        "has 'b' at byte 8 and not at 12",
    ),
    "a tensor twice": (
        file_of(
            b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}}'
        ),
        "has 'a' at byte 8 and not at 0",
    ),
}


@pytest.mark.parametrize("how", NO_FILES)
def test_what_is_no_tensor_file_is_refused_saying_why(tmp_path: Path, how: str) -> None:
    content, why = NO_FILES[how]
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(why)):
        read_tensors(tmp_path / "a")
    # safetensors refuses all of them too, but for what it takes for a tensor without a byte.
    if how != "sides beyond all counting":
        with pytest.raises(SafetensorError):
            load_file(tmp_path / "a")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "U8"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    header=st.dictionaries(
        st.text(max_size=3),
        JSON | st.fixed_dictionaries({"dtype": JSON, "shape": JSON, "data_offsets": st.lists(st.integers(0, 16))}),
        max_size=3,
    ),
    size_bytes=st.integers(0, 20),
)
def test_any_header_is_read_or_refused_with_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, header: dict[str, Any], size_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "a"
    path.write_bytes(file_of(header, bytes(size_bytes)))
    try:
        tensors = read_tensors(path)
    except ValueError:
        return
    assert sum(one.numel() * one.element_size() for one in tensors.values()) == size_bytes
    assert same(load_file(path), tensors)
