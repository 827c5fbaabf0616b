"""grpcurl commands as the documents give them, run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def bash(script: str, address: str, **env: str) -> str:
    """Runs a page's text with its address replaced and this environment's grpcurl first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script.replace("127.0.0.1:7777", address)],
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def documents(text: str) -> list[dict]:
    """JSON objects printed one after the other, other lines between them."""
    found, decoder = [], json.JSONDecoder()
    place = text.find("{\n")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            found.append(snake_case(value))
        except json.JSONDecodeError:
            end = place + 1
        place = text.find("{\n", end)
    return found


def snake_case(value: Any) -> Any:
    """Keys as the proto has them; newer grpcurls print camelCase."""
    if isinstance(value, dict):
        return {re.sub(r"(?<=[a-z])([A-Z])", lambda m: "_" + m[1].lower(), k): snake_case(v) for k, v in value.items()}
    return [snake_case(each) for each in value] if isinstance(value, list) else value
