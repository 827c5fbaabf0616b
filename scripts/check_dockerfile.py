"""Does what of `docker build` and `docker run` needs no Docker engine, in an empty folder for each stage's root.

    python scripts/check_dockerfile.py [--keep FOLDER]

It parses the Dockerfile, copies what COPY copies, and nothing else, out of what .dockerignore leaves, and runs the RUN
steps that install Python packages, with their paths below the folder and this machine's Python. Then the image's
command runs with the image's environment: a trainer gets ready on a tiny model, and the image's health check says so.
What it does not show: that the base image can be had, what its Python and its C library make of the wheels, apt-get,
users and file modes.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_ELSEWHERE = re.compile(r"(?<![\w./-])/(build|opt|data)(?=[/\s\"';]|$)")
"""Paths of the image that stand in commands."""
_NOT_HERE = ("apt-get", "useradd")
"""In steps that change the machine."""


@dataclass
class Step:
    """One instruction."""

    name: str
    text: str


@dataclass
class Stage:
    """What follows a FROM."""

    base: str
    name: str
    steps: list[Step] = field(default_factory=list)


def parse(text: str) -> tuple[dict[str, str], list[Stage]]:
    """(defaults of the ARGs before the first FROM, stages) of a Dockerfile.

    Raises:
        ValueError: An instruction stands where none can.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(None, map(str.strip, whole.splitlines())):
        name, _, rest = line.partition(" ")
        if name == "FROM":
            parts = rest.split()
            stages.append(Stage(parts[0], parts[2] if len(parts) == 3 else str(len(stages))))
        elif stages:
            stages[-1].steps.append(Step(name, rest.strip()))
        elif name == "ARG":
            argument, _, value = rest.partition("=")
            arguments[argument] = value
        else:
            raise ValueError(f"{name} stands before the first FROM")
    return arguments, stages


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps a path of the repository out, by the few kinds of patterns that ours has."""
    out = False
    for pattern in patterns:
        kept, pattern = pattern.startswith("!"), pattern.lstrip("!")
        matches = pattern == "*" or path == pattern or path.startswith(f"{pattern}/")
        if pattern.startswith("**/"):
            matches = pattern[3:] in path.split("/")
        if matches:
            out = not kept
    return out


def dockerignore() -> list[str]:
    """Its patterns."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line for line in map(str.strip, lines) if line and not line.startswith("#")]


def reachable_device() -> str:
    """DEVICE of the image: cpu where PyTorch's own index answers, which has that build."""
    try:
        urllib.request.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=4).close()
    except OSError:
        return "cuda"
    return "cpu"


def build(image: Path, stages: list[Stage], device: str) -> dict[str, str]:
    """Runs the stages, each in a folder of its own below `image`; returns the environment of the last."""
    environment: dict[str, str] = {}
    for stage in stages:
        root = image / stage.name
        root.mkdir(parents=True)
        (root / "tmp").mkdir()
        # The base image's Python, which steps install into as well.
        python = root / "usr"
        subprocess.run([sys.executable, "-m", "venv", str(python)], check=True)
        path = f"{python / 'bin'}:{os.environ['PATH']}"
        work, environment = root, {"PATH": path, "HOME": str(root / "tmp"), "DEVICE": device}
        for step in stage.steps:
            if step.name == "WORKDIR":
                work = root / step.text.lstrip("/")
                work.mkdir(parents=True, exist_ok=True)
            elif step.name == "ENV":
                for name, value in (pair.split("=", 1) for pair in shlex.split(step.text)):
                    environment[name] = _ELSEWHERE.sub(
                        rf"{root}/\1", os.path.expandvars(value).replace("$PATH", environment["PATH"])
                    )
            elif step.name == "COPY":
                copy(image, root, work, step.text)
            elif step.name == "RUN" and not any(word in step.text for word in _NOT_HERE):
                command = _ELSEWHERE.sub(rf"{root}/\1", step.text)
                print(f"[{stage.name}] {command[:110]} …", flush=True)
                subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=work, env=environment, check=True)
    return environment


def copy(image: Path, root: Path, work: Path, text: str) -> None:
    """COPY [--from=STAGE] source … target."""
    parts = text.split()
    source_root = ROOT
    if parts[0].startswith("--from="):
        source_root = image / parts.pop(0).removeprefix("--from=")
    *sources, target = parts
    where = root / target.lstrip("/") if target.startswith("/") else work / target
    patterns = dockerignore() if source_root == ROOT else []
    for source in sources:
        path = source_root / source.lstrip("/")
        if ignored(source, patterns):
            raise ValueError(f".dockerignore keeps {source} out, which COPY copies")
        if path.is_dir():
            shutil.copytree(
                path,
                where if len(sources) == 1 else where / path.name,
                symlinks=True,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns("__pycache__") if patterns else None,
            )
        else:
            into = where / path.name if target.endswith("/") else where
            into.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, into)


def relocate(image: Path, stages: list[Stage]) -> None:
    """A virtual environment knows where it is; the image's is copied to where it was made, ours is not."""
    made, there = image / stages[0].name / "opt", image / stages[-1].name / "opt"
    for script in (there / "gradwire" / "bin").iterdir():
        if not script.is_symlink() and script.is_file() and b"\0" not in script.read_bytes()[:512]:
            script.write_text(script.read_text().replace(str(made), str(there)))


def run(image: Path, stage: Stage, environment: dict[str, str]) -> None:
    """Runs the image's command until the image's health check is content."""
    root = image / stage.name
    (root / "data").mkdir(exist_ok=True)
    steps = {step.name: step.text for step in stage.steps}
    entry = json.loads(steps["ENTRYPOINT"])
    # tini, which hands signals on, is Debian's.
    command = entry[entry.index("--") + 1 :] if "--" in entry else entry
    check = json.loads(steps["HEALTHCHECK"].partition("CMD")[2])
    sys.path.insert(0, str(ROOT))
    from tests.tiny import make_tiny_llama

    model = make_tiny_llama(root / "data" / "model")
    environment = environment | {"GRADWIRE_HEALTH_ADDRESS": "127.0.0.1:17777"}
    arguments = ["serve", "--listen", "127.0.0.1:17777", "--base-model", str(model)]
    server = subprocess.Popen([*command, *arguments], cwd=root / "data", env=environment)
    try:
        check = [_ELSEWHERE.sub(rf"{root}/\1", part) for part in check]
        deadline = time.monotonic() + 120
        while subprocess.run(check, env=environment, cwd=root / "data", capture_output=True).returncode != 0:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("The image's command did not get ready.")
            time.sleep(0.5)
    finally:
        server.terminate()
        server.wait(60)
    code = server.returncode
    if code != 0:
        raise RuntimeError(f"The image's command ended with {code} at SIGTERM.")
    subprocess.run([*command, "jobs", "--help"], env=environment, cwd=root / "data", check=True, capture_output=True)
    backend = "import trainer_service.jobs.kubernetes, s3fs"
    subprocess.run([command[0], "-c", backend], env=environment, cwd=root / "data", check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="build in this folder, and leave it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=reachable_device(), help="default: %(default)s")
    args = parser.parse_args()
    _, stages = parse((ROOT / "Dockerfile").read_text())
    with tempfile.TemporaryDirectory(prefix="gradwire-image-") as folder:
        image = args.keep or Path(folder)
        environment = build(image, stages, args.device)
        relocate(image, stages)
        run(image, stages[-1], environment)
    print("The steps ran, and the image's command got ready. Not shown: the base image, apt-get, users and file modes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
