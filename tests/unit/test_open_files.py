"""How many connections a process may hold, of the files it may open."""

import resource
import subprocess
import sys

import pytest

from trainer_service import open_files
from trainer_service.command_lines import SettingsError


def limited(monkeypatch: pytest.MonkeyPatch, soft: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, soft))


@pytest.mark.parametrize(
    ("limit", "connections"), [(176, 16), (256, 96), (1024, 768), (65_536, 49_152), (resource.RLIM_INFINITY, 49_152)]
)
def test_connections_leave_what_is_reserved_and_a_quarter(
    monkeypatch: pytest.MonkeyPatch, limit: int, connections: int
):
    limited(monkeypatch, limit)
    assert open_files.max_connections(reserved=160) == connections


def test_a_limit_that_leaves_no_connections_is_refused_with_the_one_that_would_do(monkeypatch: pytest.MonkeyPatch):
    limited(monkeypatch, 175)
    with pytest.raises(SettingsError, match="may open 175 files at once, and needs at least 176; raise"):
        open_files.max_connections(reserved=160)


def test_the_limit_is_raised_as_far_as_it_may_and_never_lowered():
    script = """
import resource
from trainer_service.open_files import raise_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 512))
raise_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
raise_limit()
print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.splitlines() == ["(512, 512)"] * 2
