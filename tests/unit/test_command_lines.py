"""Command lines from dataclasses: what a field says is what the option does."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from trainer_service.command_lines import SettingsError, add_options, command_line, option, options_of, read_options
from trainer_service.config import GatewayConfig, JobsConfig, TrainerConfig
from trainer_service.worker_config import WorkerConfig


@dataclass(frozen=True)
class Inner:
    ratio: float = option(0.5, name="inner-ratio", help="a ratio", at_least=0)


@dataclass(frozen=True)
class Pair:
    left: Path = option(help="left one")
    right: Path = option(help="right one")
    third: str = option("x", help="another")


@dataclass(frozen=True, kw_only=True)
class Settings:
    size: int = option(help="how large", at_least=1)
    name: str = option("a%b", help="a name, 100 % free", env="TEST_OPTIONS_NAME")
    mode: Literal["fast", "slow"] = option("fast", help="how")
    file: Path | None = option(None, help="a file", default_is="none")
    quick: bool = option(False, help="hurry")
    checks: bool = option(True, help="check nothing")
    words: tuple[str, ...] = option(("one",), name="word", also=("--vocable",), help="words")
    hidden: int = 7
    inner: Inner = options_of(Inner, "inside")
    pair: Pair | None = options_of(Pair, "a pair", optional=True)


def parser(settings: type = Settings) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="test")
    add_options(made, settings)
    return made


def read(*arguments: str) -> Settings:
    return read_options(Settings, parser().parse_args(arguments))


def test_what_is_not_given_is_the_field_s_default():
    assert read("--size", "3") == Settings(size=3)


def test_every_type_is_read_as_its_field_says():
    given = read(
        *("--size=3", "--name", "b", "--mode", "slow", "--file", "f", "--quick", "--no-checks", "--word", "two"),
        *("--vocable", "three", "--inner-ratio", "2", "--left", "l", "--right", "r"),
    )
    assert given == Settings(
        size=3,
        name="b",
        mode="slow",
        file=Path("f"),
        quick=True,
        checks=False,
        words=("two", "three"),
        inner=Inner(ratio=2.0),
        pair=Pair(Path("l"), Path("r")),
    )


def test_a_variable_gives_the_default_and_an_option_wins(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEST_OPTIONS_NAME", "told")
    assert read("--size", "3").name == "told"
    assert read("--size", "3", "--name", "given").name == "given"
    assert Settings(size=3).name == "a%b"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: --size"),
        (["--size", "0"], "argument --size: is 0; it must be at least 1"),
        (["--size", "x"], "argument --size: invalid int value: 'x'"),
        (["--size", "1", "--inner-ratio", "-1"], "argument --inner-ratio: is -1; it must be at least 0"),
        (["--size", "1", "--inner-ratio", "nan"], "argument --inner-ratio: is nan; it must be a finite number"),
        (["--size", "1", "--mode", "odd"], "argument --mode: invalid choice: 'odd'"),
        (["--size", "1", "--hidden", "8"], "unrecognized arguments: --hidden"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_option(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        read(*arguments)
    assert text in capsys.readouterr().err


def test_half_of_what_belongs_together_is_refused():
    with pytest.raises(SettingsError, match="--right must be given too"):
        read("--size", "1", "--left", "l")
    with pytest.raises(SettingsError, match="--left and --right must be given too"):
        read("--size", "1", "--third", "y")


def test_help_says_what_each_does_and_its_default():
    said = " ".join(parser().format_help().split())
    assert "--size N how large" in said
    assert "a name, 100 % free; default: a%b" in said
    assert "--file FILE a file; default: none" in said
    assert "--word WORD, --vocable WORD words" in said
    assert "inside: --inner-ratio N a ratio; default: 0.5" in said
    assert "a pair: --left FILE left one" in said


def test_a_command_line_says_the_same_settings():
    settings = Settings(
        size=3, name="-x", file=Path("-"), checks=False, words=("--a", ""), pair=Pair(Path("l"), Path("r"))
    )
    assert read(*command_line(settings)) == settings
    assert command_line(Inner()) == ["--inner-ratio=0.5"]


@pytest.mark.parametrize("settings", [TrainerConfig, JobsConfig, GatewayConfig, WorkerConfig])
def test_every_option_of_every_process_has_help(settings: type):
    for action in parser(settings)._actions:
        assert action.help, action.option_strings
