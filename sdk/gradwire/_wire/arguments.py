"""Checks of single arguments, for both sides of the wire: what does not fit is refused with the argument's name."""

import math
import operator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gradwire.errors import invalid_field

FLOAT32_MAX = float(np.finfo(np.float32).max)
"""Largest number of float32, in which parameters, gradients and losses are computed."""


def check_number(
    field: str, value: Any, *, at_least: float | None = None, above: float | None = None, below: float | None = None
) -> float:
    """A number that float32 holds.

    Args:
        field: The argument's name, as the caller wrote it.
        value: A number, or what turns into one by `float()`; text and bool do not.
        at_least: Smallest number allowed.
        above: What it must be larger than.
        below: What it must be smaller than, also after rounding to float32.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it is no number, not finite, out of range, or rounds to infinity or 0.
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__float__"):
        raise invalid_field(field, f"is {_shown(value)}; it must be a number.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    except (TypeError, ValueError, RuntimeError):
        raise invalid_field(field, f"is {_shown(value)}; it must be a single number.") from None
    if not math.isfinite(number):
        raise invalid_field(field, f"is {number:g}; it must be a finite number.")
    if at_least is not None and number < at_least:
        raise invalid_field(field, f"is {number:g}; it must be at least {at_least:g}{_and_below(below)}.")
    if above is not None and number <= above:
        raise invalid_field(field, f"is {number:g}; it must be above {above:g}.")
    if below is not None and number >= below:
        raise invalid_field(field, f"is {number:g}; it must be at least {at_least or 0:g}{_and_below(below)}.")
    if abs(number) > FLOAT32_MAX:
        raise invalid_field(field, f"is {number:g}, beyond float32, whose largest number is {FLOAT32_MAX:.4g}.")
    rounded = float(np.float32(number))
    if below is not None and rounded >= below:
        raise invalid_field(field, f"is {number!r}, which float32 rounds to {below:g}; it must be below {below:g}.")
    if number and not rounded:
        raise invalid_field(field, f"is {number:g}, which float32 rounds to 0; its smallest number is 1.4e-45.")
    return number


def check_whole_number(field: str, value: Any, *, at_least: int, at_most: int) -> int:
    """A whole number in a range; text, bool and floats, 2.0 too, are none.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise invalid_field(field, f"is {_shown(value)}; it must be a whole number.") from None
    if not at_least <= number <= at_most:
        raise invalid_field(field, f"is {_shown(number)}; it must be {at_least} to {at_most}.")
    return number


def check_flag(field: str, value: Any) -> bool:
    """True or False, and nothing that only counts as such.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if not isinstance(value, bool | np.bool_):
        raise invalid_field(field, f"is {_shown(value)}; it must be True or False.")
    return bool(value)


def check_array(field: str, array: npt.NDArray[Any], dtype: Literal["float32", "int64"]) -> npt.NDArray[Any]:
    """Numbers in a dtype that holds them; shares memory where it is that of `array`. float32 rounds, to 0 too.

    Raises:
        InvalidArgumentError: INVALID_FIELD: elements are no numbers, or the dtype cannot hold one; names its place.
    """
    if array.dtype == dtype:
        return array
    if array.dtype.kind not in "fiub":
        raise invalid_field(field, f"has dtype {array.dtype}; it takes numbers.")
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(dtype)
    if dtype == "float32":
        bad = np.isinf(cast) & np.isfinite(array) if array.dtype.itemsize > 4 else np.zeros(0, np.bool_)
        why = f"which is beyond float32, whose largest number is {FLOAT32_MAX:.4g}."
    elif array.dtype.kind == "f":
        # 2^63 itself is no int64, and the largest float below it is.
        bad = ~((array == np.floor(array)) & (array >= -(2.0**63)) & (array < 2.0**63))
        why = "which is no int64."
    else:
        bad = array > np.iinfo(np.int64).max if array.dtype.kind == "u" else np.zeros(0, np.bool_)
        why = "which is no int64."
    if bad.any():
        place = tuple(int(i) for i in np.argwhere(bad)[0])
        raise invalid_field(field + "".join(f"[{i}]" for i in place), f"is {array[place]}, {why}")
    return cast


def _and_below(below: float | None) -> str:
    return "" if below is None else f" and below {below:g}"


def _shown(value: Any) -> str:
    """The value, shortened; a large one by its type."""
    if isinstance(value, int) and value.bit_length() > 256:
        return "a number of more than 77 digits"
    shown = repr(value)
    return shown if len(shown) <= 80 and "\n" not in shown else f"a {type(value).__name__}"
