"""The benchmarks run: what they print is for a quiet machine to tell."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_row_of_the_table_is_measured():
    rows = "custom,service,padded,floor,memory,head,shared,client,datums,optimizer"
    if importlib.util.find_spec("pyarrow") is not None:
        rows += ",stream"
    command = [sys.executable, str(ROOT / "benchmarks" / "engine.py"), "--quick", "--rows", rows]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    table = [line for line in ran.stdout.splitlines() if line.startswith("|")][2:]
    assert len(table) >= 20, ran.stdout
    for line in table:
        what, measured, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        assert what
        assert any(character.isdigit() for character in measured), line
        assert "nan" not in measured, line
