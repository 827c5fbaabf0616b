"""The benchmarks run: what they print is for a quiet machine to tell."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table(script: str, *arguments: str) -> list[list[str]]:
    """Rows of the table that a script prints, as cells; every one has figures."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    for what, measured, *others in rows:
        assert what
        assert any(character.isdigit() for character in measured), rows
        assert "nan" not in [measured, *others], rows
    return rows


@pytest.mark.slow
def test_every_row_of_the_table_is_measured():
    assert len(table("engine.py")) >= 21


@pytest.mark.slow
def test_lora_is_measured():
    rows = table("lora.py")
    assert len(rows) == 8
    assert all(float(ratio) > 0 for _, _, ratio, _ in rows), rows


@pytest.mark.slow
def test_a_plain_peft_loop_is_measured():
    rows = table("peers.py")
    assert len(rows) == 2
    assert all(float(ratio) > 0 for _, _, ratio, _ in rows), rows


@pytest.mark.slow
def test_how_threads_wait_is_measured():
    rows = table("waiting.py")
    assert len(rows) == 6
    assert min(float(ratio) for _, _, ratio, _ in rows) == 1.0, rows


def test_sampling_is_measured():
    speeds, mismatches = (rows := table("sampling.py"))[:5], rows[5:]
    assert all(float(ratio) > 0 for _, _, ratio, _ in speeds), rows
    assert len(mismatches) == 3
    assert all(float(largest.removeprefix("max ")) < 0.1 for _, _, largest, _ in mismatches), rows


def test_pages_are_measured():
    [steps, processor, *_] = table("page.py")
    assert float(steps[2].partition(" ± ")[0]) > 0, steps
    assert "% of a core" in processor[1]
