"""`gradwire serve` and `gradwire jobs`: the same command as the client's, and another process's code."""

import importlib.util
import subprocess
import sys

import pytest
from gradwire import cli
from gradwire._client import server_commands


def test_a_server_command_becomes_the_servers_process(monkeypatch: pytest.MonkeyPatch):
    ran: list[list[str]] = []
    monkeypatch.setattr(server_commands.os, "execv", lambda path, command: ran.append([path, *command]))
    cli.main(["serve", "--base-model", "m", "--max-runs", "2"])
    cli.main(["jobs", "--help"])
    python = sys.executable
    assert ran == [
        [python, python, "-m", "trainer_service", "serve", "--base-model", "m", "--max-runs", "2"],
        [python, python, "-m", "trainer_service", "jobs", "--help"],
    ]


def test_without_the_server_a_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "peft") else object())
    assert cli.main(["serve", "--base-model", "m"]) == 2
    said = "gradwire: serve needs the server, but torch, peft cannot be imported. Install it with `pip install "
    assert capsys.readouterr().err == said + "'gradwire[server]'`.\n"


@pytest.mark.parametrize("command", [*server_commands.SERVER_COMMANDS])
def test_the_server_knows_each_command_under_its_name(command: str):
    done = subprocess.run(
        [sys.executable, "-m", "gradwire.cli", command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.startswith(f"usage: gradwire {command} ")
