"""Layers that carry something from token to token, over a pack: convolutions, state spaces, delta rules.

transformers' models call functions of their own modules for these, with the arguments of the kernels of causal-conv1d,
mamba-ssm and flash-linear-attention. Here each of them gets its sequences apart: a convolution with a gap before each,
a recurrence as rows of similar length, padded with zeros on the right. All else of such a model sees the pack as it is,
without padding.

Shape suffixes: T tokens of the pack, W tokens of a convolution with its gaps, S tokens of all rows, B rows of one call,
L tokens of each, C channels.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer_service.engine.packed.attention import PackAttention, pack_now

_SHORTEST_ROWS = 32
"""Rows up to this length go together, then up to twice that, and so on."""
_DELTA_CHUNK = 64
"""What a delta rule pads rows to, unless it is told to take less at once."""


class CarriesStateError(Exception):
    """Sequences share beginnings, and what a layer carries from there is gone on from once."""


def take_over(model: nn.Module) -> None:
    """Has what a model's layers carry something by work on the pack in use. Without one it stays as it was.

    The functions are replaced in the modules of transformers that the layers' classes are from, for the whole process.
    """
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    for source in {cls.__module__ for cls in classes if cls.__module__.startswith("transformers.models.")}:
        functions = vars(sys.modules[source])
        for name, over_pack in _OVER_PACK.items():
            if name in functions and not hasattr(functions[name], "gradwire_packed"):
                functions[name] = _packed(functions[name], over_pack)


@dataclass(frozen=True)
class _Call:
    """A call of such a function. What was given by position stays so: kernels have names of their own for it."""

    function: Callable[..., Any]
    names: tuple[str, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return dict(zip(self.names, self.args, strict=False)).get(name, self.kwargs.get(name))

    def of(self, **others: Any) -> Any:
        """What it answers to these arguments in place of its own."""
        args = [others.pop(name, value) for name, value in zip(self.names, self.args, strict=False)]
        return self.function(*args, **self.kwargs | others)


def _packed(function: Callable[..., Any], over_pack: Callable[[_Call, PackAttention], Any]) -> Callable[..., Any]:
    """The function, which runs over the pack in use where there is one of several sequences."""
    names = tuple(inspect.signature(function).parameters)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        pack = pack_now()
        if pack is None:
            return function(*args, **kwargs)
        pack.num_recurrences += 1
        if not pack.flat:
            raise CarriesStateError("its layers carry a state")
        if len(pack.lengths) == 1:
            return function(*args, **kwargs)
        return over_pack(_Call(function, names, args, kwargs), pack)

    wrapped.gradwire_packed = True  # pyright: ignore[reportAttributeAccessIssue]
    return wrapped


def _convolve(call: _Call, pack: PackAttention) -> Tensor:
    """[1, C, T], with a gap of zeros before each sequence as long as what the convolution reaches back."""
    hidden_CT, weight = call["hidden_states"], call["weight"]
    place_T, length = _with_gaps(pack, weight.shape[-1] - 1, hidden_CT.device)
    apart_CW = _spread(hidden_CT, place_T, length, dim=2)
    return call.of(hidden_states=apart_CW).index_select(2, place_T)


@dataclass(frozen=True)
class _Recurrence:
    """A function that carries a state.

    Attributes:
        over_time: Arguments that have a value a token.
        time: Their dimension of tokens, and the answer's. The first is of rows.
        pads_to: Argument that says what rows are padded to, where they need not be padded to as much as they are.
    """

    over_time: tuple[str, ...]
    time: int
    pads_to: str = ""

    def __call__(self, call: _Call, pack: PackAttention) -> Any:
        """As the function answers, with None for the state in the end where that is part of it."""
        given = {name: call[name] for name in self.over_time if call[name] is not None}
        rows = _rows(pack, next(iter(given.values())).device)
        spread = {name: _spread(value, rows.place_T, rows.num_tokens, dim=self.time) for name, value in given.items()}
        found: list[Tensor] = []
        has_state = False
        for start, num_rows, length in rows.parts:
            these = {name: _cut(value, start, num_rows, length, dim=self.time) for name, value in spread.items()}
            output = call.of(**these, **self._padding(length))
            has_state = isinstance(output, tuple)
            output = output[0] if has_state else output
            # [B, …, L, …] → [1, …, B · L, …]
            found.append(output.movedim(0, self.time - 1).flatten(self.time - 1, self.time)[None])
        together = torch.cat(found, dim=self.time).index_select(self.time, rows.place_T)
        return (together, None) if has_state else together

    def _padding(self, length: int) -> dict[str, int]:
        return {self.pads_to: _shortest(length)} if self.pads_to and length < _DELTA_CHUNK else {}


_DELTA_RULE = _Recurrence(("query", "key", "value", "g", "beta"), time=1, pads_to="chunk_size")
_OVER_PACK: dict[str, Callable[[_Call, PackAttention], Any]] = {
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": _DELTA_RULE,
    "chunk_kimi_delta_attention": _DELTA_RULE,
    "mamba2_chunk_scan": _Recurrence(("hidden_states", "dt", "B", "C", "z"), time=1),
    "mamba_selective_scan": _Recurrence(("hidden_states", "dt", "B", "C", "z"), time=2),
}


def _spread(value: Tensor, place_T: Tensor, length: int, *, dim: int) -> Tensor:
    """Tokens at their places among zeros."""
    shape = list(value.shape)
    shape[dim] = length
    return value.new_zeros(shape).index_copy(dim, place_T, value)


def _cut(value: Tensor, start: int, num_rows: int, length: int, *, dim: int) -> Tensor:
    """Rows out of [1, …, S, …], [B, …, L, …]."""
    part = value[0].narrow(dim - 1, start, num_rows * length)
    return part.unflatten(dim - 1, (num_rows, length)).movedim(dim - 1, 0)


@dataclass(frozen=True)
class _Rows:
    """Where a pack's tokens stand in rows that are behind one another.

    Attributes:
        place_T: Of each token.
        num_tokens: S.
        parts: First token, number and length of rows that go into one call.
    """

    place_T: Tensor
    num_tokens: int
    parts: tuple[tuple[int, int, int], ...]


def _rows(pack: PackAttention, device: torch.device) -> _Rows:
    found = pack.layouts.get("rows")
    if found is None:
        found = pack.layouts["rows"] = _lay_out_rows(pack.lengths, device)
    return found


def _lay_out_rows(lengths: tuple[int, ...], device: torch.device) -> _Rows:
    kinds: dict[int, list[int]] = {}
    for number, length in enumerate(lengths):
        kinds.setdefault(_shortest(length), []).append(number)
    first_of = [0] * len(lengths)
    parts: list[tuple[int, int, int]] = []
    end = 0
    for _, numbers in sorted(kinds.items()):
        longest = max(lengths[number] for number in numbers)
        parts.append((end, len(numbers), longest))
        for number in numbers:
            first_of[number] = end
            end += longest
    place_T = torch.cat([torch.arange(first, first + length) for first, length in zip(first_of, lengths, strict=True)])
    return _Rows(place_T.to(device), end, tuple(parts))


def _shortest(length: int) -> int:
    """Rows of up to this length go with one of that length."""
    return max(_SHORTEST_ROWS, 1 << (length - 1).bit_length())


def _with_gaps(pack: PackAttention, gap: int, device: torch.device) -> tuple[Tensor, int]:
    """Where a pack's tokens stand with a gap before each sequence but the first, and how long that is."""
    found = pack.layouts.get(f"gaps of {gap}")
    if found is None:
        lengths = torch.tensor(pack.lengths)
        number_T = torch.arange(len(lengths)).repeat_interleave(lengths)
        place_T = torch.arange(len(number_T)) + gap * number_T
        found = pack.layouts[f"gaps of {gap}"] = (place_T.to(device), int(place_T[-1]) + 1)
    return found
