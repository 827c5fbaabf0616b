"""What a process holds: memory and file handles, from /proc."""

from pathlib import Path


def resident_mib(pid: int) -> float:
    """The process's own memory, MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise AssertionError(f"/proc/{pid}/status has no RssAnon")


def num_handles(pid: int) -> int:
    """Open files, sockets and pipes."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
