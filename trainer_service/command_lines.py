"""Command lines from dataclasses: a field states its default, its help and its bounds, and nothing else does.

    @dataclass(frozen=True)
    class Settings:
        max_runs: int = option(8, help="runs held at once", at_least=1)

    add_options(parser, Settings)                            # --max-runs N  runs held at once; default: 8
    settings = read_options(Settings, parser.parse_args())
    command_line(settings)                                   # ["--max-runs=8"], for another process

The type of a field decides how its option is read: int, float, str, Path, the choices of a Literal, a flag for bool, a
repeatable option for a tuple. Fields that are not an `option` do not appear on the command line.
"""

import argparse
import dataclasses
import math
import os
import types
import typing
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

_Settings = TypeVar("_Settings")
_OPTION = "option"
_GROUP = "group"


class SettingsError(ValueError):
    """A setting that cannot be used; the message is for the person who set it."""


@dataclasses.dataclass(frozen=True)
class _Option:
    help: str
    name: str
    also: tuple[str, ...]
    metavar: str | None
    at_least: float | None
    env: str
    default_is: str
    parse: Callable[[str], Any] | None


@dataclasses.dataclass(frozen=True)
class _Group:
    title: str
    leave_out: Collection[str]
    optional: bool


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    name: str = "",
    also: tuple[str, ...] = (),
    metavar: str | None = None,
    at_least: float | None = None,
    env: str = "",
    default_is: str = "",
    parse: Callable[[str], Any] | None = None,
) -> Any:
    """A field of a dataclass that is a command-line option.

    Args:
        default: The field's default, or a callable that makes it. Without one, the option is required.
        help: What it does, for --help; the default is appended.
        name: The option, without dashes; "" derives it from the field: max_runs is --max-runs.
        also: Further names of the option, with their dashes.
        metavar: What --help calls the value; None depends on the type.
        at_least: The smallest number allowed; None allows any.
        env: An environment variable that gives the default if it is set.
        default_is: What --help says the default is; "" takes it from the value.
        parse: Reads the value from its text; None depends on the type.
    """
    meta = {_OPTION: _Option(help, name, also, metavar, at_least, env, default_is, parse)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


def options_of(settings: type[Any], title: str = "", *, leave_out: Collection[str] = (), optional: bool = False) -> Any:
    """A field whose own fields are options.

    Args:
        settings: The field's type, a dataclass.
        title: Title of the group in --help; "" for none.
        leave_out: Fields that are not options here.
        optional: The field is None unless one of the options is given.
    """
    meta = {_GROUP: _Group(title, leave_out, optional)}
    if optional:
        return dataclasses.field(default=None, metadata=meta)
    return dataclasses.field(default_factory=settings, metadata=meta)


def folder(text: str) -> Path:
    """Reads a folder's path and makes it absolute, so that it means the same folder in other processes."""
    return Path(text).resolve()


def add_options(parser: "argparse._ActionsContainer", settings: type[Any]) -> None:
    """Adds the options of a dataclass to a command line, or to a group of one."""
    _add_all(parser, settings, leave_out=(), optional=False)


def read_options(settings: type[_Settings], arguments: argparse.Namespace, **given: Any) -> _Settings:
    """The settings on a command line.

    Args:
        settings: A dataclass whose options the command line has.
        arguments: The parsed command line.
        **given: Values of fields that are not options.

    Raises:
        SettingsError: One of several options that belong together is missing.
    """
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):  # pyright: ignore[reportArgumentType]
        if field.name in given:
            continue
        if group := field.metadata.get(_GROUP):
            kind = _without_none(hints[field.name])
            if not group.optional or _any_given(kind, arguments):
                given[field.name] = read_options(kind, arguments)
        elif _OPTION in field.metadata and hasattr(arguments, _dest(field)):
            value = getattr(arguments, _dest(field))
            given[field.name] = tuple(value) if isinstance(value, list) else value
    if missing := [field for field in _required(settings) if field.name not in given]:
        raise SettingsError(f"{' and '.join(map(_flag, missing))} must be given too.")
    return settings(**given)


def command_line(settings: Any) -> list[str]:
    """The settings as options, for a process that reads them with `read_options`.

    Option and value are one argument, since a value may begin with a dash. None is left out.
    """
    parts: list[str] = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None:
            continue
        if _GROUP in field.metadata:
            parts += command_line(value)
        elif _OPTION not in field.metadata:
            continue
        elif isinstance(value, bool):
            parts += [] if value == field.default else [_flag(field)]
        else:
            parts += [f"{_flag(field)}={one}" for one in (value if isinstance(value, tuple) else (value,))]
    return parts


def _add_all(
    parser: "argparse._ActionsContainer", settings: type[Any], *, leave_out: Collection[str], optional: bool
) -> None:
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if field.name in leave_out:
            continue
        if group := field.metadata.get(_GROUP):
            inside = parser.add_argument_group(group.title) if group.title else parser
            kind = _without_none(hints[field.name])
            _add_all(inside, kind, leave_out=group.leave_out, optional=group.optional)
        elif _OPTION in field.metadata:
            _add(parser, field, hints[field.name], optional=optional)


def _add(parser: "argparse._ActionsContainer", field: "dataclasses.Field[Any]", hint: Any, *, optional: bool) -> None:
    spec: _Option = field.metadata[_OPTION]
    # Options that are not given get the dataclass's default.
    how: dict[str, Any] = {"dest": _dest(field), "default": os.environ.get(spec.env or "") or argparse.SUPPRESS}
    kind = _without_none(hint)
    if kind is bool:
        how["action"] = "store_false" if field.default else "store_true"
    else:
        if typing.get_origin(kind) is tuple:
            kind = typing.get_args(kind)[0]
            how["action"] = "append"
        how["metavar"] = spec.metavar or _metavar(field.name, kind)
        if typing.get_origin(kind) is Literal:
            how["choices"] = typing.get_args(kind)
        else:
            how["type"] = spec.parse or _reader(kind, spec.at_least)
        how["required"] = not optional and _has_no_default(field)
    parser.add_argument(_flag(field), *spec.also, help=_help(field), **how)


def _required(settings: Any) -> "list[dataclasses.Field[Any]]":
    return [field for field in dataclasses.fields(settings) if _OPTION in field.metadata and _has_no_default(field)]


def _has_no_default(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _any_given(settings: Any, arguments: argparse.Namespace) -> bool:
    return any(_OPTION in field.metadata and hasattr(arguments, _dest(field)) for field in dataclasses.fields(settings))


def _name(field: "dataclasses.Field[Any]") -> str:
    return field.metadata[_OPTION].name or field.name.replace("_", "-")


def _flag(field: "dataclasses.Field[Any]") -> str:
    return f"--{'no-' if field.default is True else ''}{_name(field)}"


def _dest(field: "dataclasses.Field[Any]") -> str:
    return _name(field).replace("-", "_")


def _help(field: "dataclasses.Field[Any]") -> str:
    text, default = field.metadata[_OPTION].help, field.metadata[_OPTION].default_is
    if not default and isinstance(field.default, int | float | str) and not isinstance(field.default, bool):
        default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
    if default:
        text += f"; default: {default}"
    # argparse would take it for the start of %(default)s.
    return text.replace("%", "%%")


def _without_none(hint: Any) -> Any:
    """The T of `T | None`."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(one for one in typing.get_args(hint) if one is not types.NoneType)
    return hint


def _metavar(name: str, kind: Any) -> str | None:
    if kind is Path:
        return "FOLDER" if name.endswith("_dir") else "FILE"
    if kind in (int, float):
        return "BYTES" if name.endswith("_bytes") else "SECONDS" if name.endswith("_s") else "N"
    return None


def _reader(kind: Any, at_least: float | None) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"is {text}; it must be a finite number")
        if at_least is not None and value < at_least:
            raise argparse.ArgumentTypeError(f"is {text}; it must be at least {at_least:g}")
        return value

    # argparse takes the word in "invalid int value" from this name.
    read.__name__ = kind.__name__
    return read
