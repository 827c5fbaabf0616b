"""What the README names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_every_test_script_and_example_that_the_readme_names_is_there():
    named = set(re.findall(r"(?:tests|benchmarks|examples|scripts|trainer_service|sdk|protos)/[\w./-]*\w", README))
    assert {"tests/e2e/test_chaos.py", "benchmarks/chaos.py"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_what_survives_what_says_of_every_fault_which_test_shows_it():
    section = README.partition("## What survives what")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    shown = {row[0]: re.findall(r"`tests/[\w./]*`", row[-1]) for row in rows}
    assert [fault for fault, tests in shown.items() if not tests] == []
