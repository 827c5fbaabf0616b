"""What the command line prints: tables, messages, JSON, and how far a download is."""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

from google.protobuf.json_format import MessageToDict, SerializeToJsonError

from gradwire._wire.untrusted import printable
from gradwire.errors import error

_MOVING_INTERVAL_S = 0.1
_LINE_INTERVAL_S = 5.0
_DEFAULT_COLUMNS = 80
_AMOUNT_COLUMNS = len("150.0 of 150.0 MiB")
_NOTE_COLUMNS = len("1023.9 MiB/s")
_METADATA_COLUMNS = 60
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


# ── texts that others wrote ───────────────────────────────────────────────────────────────────────────────────────────


def say(text: str, *, out: TextIO | None = None) -> None:
    """Prints a line, whoever wrote its words. All output but a moving progress bar goes through here.

    Args:
        text: The line.
        out: Where to; None is standard output.
    """
    print(printable(text).rstrip(), file=out, flush=out is not None)


# ── results, on standard output ───────────────────────────────────────────────────────────────────────────────────────


def print_json(found: Any) -> None:
    """Prints JSON for programs. Everything but printable ASCII is escaped."""
    print(json.dumps(found, indent=2).replace("\x7f", "\\u007f"))


def json_numbers(row: Mapping[str, float]) -> dict[str, float | str]:
    """A dict of numbers as JSON can say it: infinities and NaN as protobuf's JSON spells them."""
    names = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
    return {name: names.get(str(value), value) for name, value in row.items()}


def print_table(rows: Sequence[Sequence[str]], *, indent: str = "") -> None:
    """Columns side by side, each as wide as its widest cell."""
    shown = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        say(indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def print_message(message: Any) -> None:
    """Prints a message's fields for people; empty ones are left out."""
    rows: list[tuple[str, str]] = []
    lists: list[tuple[str, list[dict[str, Any]]]] = []
    for name, value in as_json(message).items():
        if isinstance(value, list):
            lists.append((name, value))
        elif isinstance(value, dict):
            kind = message.DESCRIPTOR.fields_by_name[name].message_type
            fields = kind.fields_by_name
            is_map = kind.GetOptions().map_entry
            rows += [
                (f"{name}.{inner}", _text(fields["value" if is_map else inner], each))
                for inner, each in value.items()
                if each != []
            ]
        elif value != "":
            rows.append((name, _text(message.DESCRIPTOR.fields_by_name[name], value)))
    print_table(rows)
    for name, values in lists:
        if values:
            say(f"{name}:")
            print_table([[str(cell) for cell in each.values()] for each in values], indent="  ")


def as_json(message: Any) -> dict[str, Any]:
    """A message in protobuf's JSON, its fields in the order they are declared in.

    Raises:
        InvalidArgumentError: PROTOCOL_VIOLATION: it says what no message can, such as a time after the year 9999.
    """
    try:
        found = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    except (ValueError, SerializeToJsonError) as exc:
        raise error("PROTOCOL_VIOLATION", f"The trainer answered what cannot be shown: {exc}.") from None
    return _in_order(message.DESCRIPTOR, found)


def _in_order(descriptor: Any, found: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for field in descriptor.fields:
        if field.name in found:
            value = found[field.name]
            if isinstance(value, dict):
                is_map = field.message_type.GetOptions().map_entry
                # A map's entries come in any order.
                value = dict(sorted(value.items())) if is_map else _in_order(field.message_type, value)
            elif isinstance(value, list) and field.message_type is not None:
                value = [_in_order(field.message_type, each) for each in value]
            made[field.name] = value
    return made


def _text(field: Any, value: Any) -> str:
    if field.enum_type is not None and isinstance(value, str):
        return value.removeprefix(field.enum_type.values[0].name.removesuffix("UNSPECIFIED")).lower()
    if field.name == "size_bytes":
        return f"{value} ({size_text(int(value))})"
    return str(value).lower() if isinstance(value, bool) else str(value)


def time_text(stamp: Any) -> str:
    """A protobuf Timestamp, to the second; "?" for one that is not a time."""
    try:
        return datetime.fromtimestamp(stamp.seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "?"


def metadata_text(user_metadata: Mapping[str, str]) -> str:
    """ "epoch=3, run=a", cut at some 60 characters."""
    text = ", ".join(f"{key}={value}" for key, value in sorted(user_metadata.items()))
    return _shortened(text, _METADATA_COLUMNS)


def size_text(size_bytes: float) -> str:
    """ "1.5 MiB"."""
    exponent = _exponent(size_bytes)
    return f"{_scaled(size_bytes, exponent)} {_UNITS[exponent]}"


def _exponent(size_bytes: float) -> int:
    exponent = 0
    while exponent + 1 < len(_UNITS) and size_bytes >= 1024 ** (exponent + 1):
        exponent += 1
    return exponent


def _scaled(size_bytes: float, exponent: int) -> str:
    return f"{size_bytes / 1024**exponent:.{1 if exponent else 0}f}"


# ── progress, on standard error ───────────────────────────────────────────────────────────────────────────────────────


class ProgressBar:
    """Shows how far a download is: a bar that moves on a terminal, elsewhere a line a file, and one every few seconds.

    May be updated from any thread.

    Args:
        out: Where to; None is standard error.
        clock: Seconds.
    """

    def __init__(self, out: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = sys.stderr if out is None else out
        self._clock = clock
        self._moving = self._out.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._closed = False
        self._half_drawn = False
        self._file: str | None = None
        self._start_s = self._shown_s = 0.0
        self._start_bytes = 0
        self.began = False
        """Whether bytes of a file have come, or were there from before."""

    def update(self, file: str, done_bytes: int, size_bytes: int) -> None:
        """See downloads.Progress."""
        with self._lock, contextlib.suppress(OSError):
            # OSError: nobody reads standard error any more, which is no reason to stop.
            if not self._closed:
                self.began = self.began or done_bytes > 0
                self._update(file, done_bytes, size_bytes)

    def close(self) -> None:
        """Shows nothing from here on, and ends the line of a bar that is not full."""
        with self._lock, contextlib.suppress(OSError):
            self._closed = True
            if self._half_drawn:
                print(file=self._out, flush=True)

    def _update(self, file: str, done_bytes: int, size_bytes: int) -> None:
        now = self._clock()
        new = file != self._file
        if new or done_bytes < self._start_bytes:
            self._file, self._start_s, self._start_bytes = file, now, done_bytes
            self._shown_s = now
        if done_bytes == size_bytes:
            self._show(
                file, done_bytes, size_bytes, "here already" if new and size_bytes else self._rate(now, done_bytes)
            )
            self._file, self._half_drawn = None, False
        elif self._moving:
            if new or now - self._shown_s >= _MOVING_INTERVAL_S:
                self._shown_s = now
                self._half_drawn = True
                self._show(file, done_bytes, size_bytes, self._rate(now, done_bytes))
        elif new and done_bytes:
            self._show(file, done_bytes, size_bytes, "goes on from there")
        elif now - self._shown_s >= _LINE_INTERVAL_S:
            self._shown_s = now
            self._show(file, done_bytes, size_bytes, self._rate(now, done_bytes))

    def _rate(self, now: float, done_bytes: int) -> str:
        elapsed_s = now - self._start_s
        return f"{size_text((done_bytes - self._start_bytes) / elapsed_s)}/s" if elapsed_s > 0.05 else ""

    def _show(self, file: str, done_bytes: int, size_bytes: int, note: str) -> None:
        whole = done_bytes == size_bytes
        # Rounded down: 100% is for what is whole.
        percent = 100 * done_bytes // size_bytes if size_bytes else 100
        size, exponent = size_text(size_bytes), _exponent(size_bytes)
        done = _scaled(done_bytes, exponent)
        if not self._moving:
            parts = (f"{percent}%", size if whole else f"{done} of {size}", note)
            say(f"{file}: {', '.join(part for part in parts if part)}", out=self._out)
            return
        columns = _columns(self._out)
        bar_columns = 20 if columns >= 100 else 10 if columns >= 80 else 0
        bar = f"[{'#' * (bar_columns * percent // 100):<{bar_columns}}] " if bar_columns else ""
        amount = size if whole else f"{done} of {size}"
        # Names stay one below the other.
        head = f"{bar}{percent:3}%  {amount:>{_AMOUNT_COLUMNS}}  {note:<{_NOTE_COLUMNS}}  "
        # One short of the last column: a line that wraps cannot be drawn over.
        text = (head + _shortened(printable(file), max(8, columns - 1 - len(head))))[: columns - 1]
        print(f"\r\x1b[K{text}", end="\n" if whole else "", file=self._out, flush=True)


def _columns(out: TextIO) -> int:
    try:
        return os.get_terminal_size(out.fileno()).columns or _DEFAULT_COLUMNS
    except (OSError, ValueError):
        return _DEFAULT_COLUMNS


def _shortened(text: str, width: int) -> str:
    """Beginning and end of a text that is too long: shards differ in the middle or at the end."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return f"{text[: width - 3 - tail]}...{text[len(text) - tail :]}"
