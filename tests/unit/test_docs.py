"""What the README and the documentation name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_NAMED = re.compile(
    r"(?<![\w/.-])(?:tests|benchmarks|examples|scripts|trainer_service|sdk|protos|docs|deploy)/[\w./-]*\w"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page: Path):
    # A link is relative to its page; what stands in the text is a path of the tree.
    text = page.read_text()
    linked = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    made = {"protocol.md"}
    assert [name for name in linked if name not in made and not (page.parent / name).exists()] == []
    named = set(_NAMED.findall(re.sub(r"\]\([^)]*\)", "]", text)))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_what_survives_what_says_of_every_fault_which_test_shows_it():
    page = (ROOT / "docs" / "durability.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 15
    shown = {row[0]: re.findall(r"`tests/[\w./]*`", row[-1]) for row in rows}
    assert [fault for fault, tests in shown.items() if not tests] == []
