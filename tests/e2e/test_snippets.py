"""Every block of Python or shell in the README and in docs/ runs as it stands, against a real trainer.

The blocks of a page run in order, Python in one namespace, in an empty folder. Before a block may stand, unseen by
readers, `<!-- setup … -->` with Python that the reader has already, or `<!-- run by … -->` with the file of what runs
it elsewhere.
"""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from gradwire import ServiceClient

from tests.trainer_process import TrainerProcess

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
_MARK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^<!-- run by (?P<test>[\w./]+)(?:::\S+|, [^>]*?)? -->\n+(?P<marked>```.*?^```$)"
    r"|^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_BASH = """import subprocess
subprocess.run(["bash", "-euo", "pipefail", "-c", {script!r}], check=True)
"""


@dataclass(frozen=True)
class Block:
    """A block to run: Python, with the line of the page it begins at."""

    line: int
    code: str


def blocks_of(page: str) -> tuple[list[Block], list[str]]:
    """(what is to run, files that run the rest)."""
    blocks: list[Block] = []
    elsewhere: list[str] = []
    for found in _MARK.finditer(page):
        line = page.count("\n", 0, found.start()) + 2
        if found["setup"] is not None:
            blocks.append(Block(line, found["setup"]))
        elif found["test"] is not None:
            elsewhere.append(found["test"])
        elif found["language"] == "python":
            blocks.append(Block(line, found["code"]))
        elif found["language"] in ("bash", "sh", "console"):
            blocks.append(Block(line, _BASH.format(script=found["code"])))
    return blocks, elsewhere


def test_blocks_are_told_apart():
    page = """# T

<!-- setup
x = 1
-->

```python
y = x
```
<!-- run by tests/a.py -->

```bash
rm
```
```
 a drawing
```
```bash
ls
```
"""
    blocks, elsewhere = blocks_of(page)
    assert [(block.line, block.code) for block in blocks[:2]] == [(4, "x = 1\n"), (8, "y = x\n")]
    assert "'ls\\n'" in blocks[2].code
    assert (len(blocks), elsewhere) == (3, ["tests/a.py"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_of_a_page_runs(page: Path, trainer: TrainerProcess, service: ServiceClient, tmp_path: Path):
    blocks, elsewhere = blocks_of(page.read_text())
    assert [name for name in elsewhere if not (ROOT / name).is_file()] == []
    if not blocks:
        return
    # As far down as in the page, so that a traceback's lines are the page's.
    codes = ["\n" * (block.line - 1) + block.code for block in blocks]
    script = "".join(f"exec(compile({code!r}, {page.name!r}, 'exec'), names)\n" for code in codes)
    script = f"names = {{}}\n{script}names['service'].close() if 'service' in names else None\n"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    try:
        done = subprocess.run(
            [sys.executable, "-c", script.replace("127.0.0.1:7777", trainer.address)],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "GRADWIRE_BASE_URL": trainer.base_url},
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    finally:
        # The trainer holds a few runs at a time, and the next page makes its own.
        for run in service.list_runs():
            service.training_client(run.run_id).delete_run()
    assert done.returncode == 0, done.stdout + done.stderr
