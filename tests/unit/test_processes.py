"""Children that never outlive their parent."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer_process import wait_gone
from tests.waiting import DEADLINE_S, until, wait_until
from trainer_service.processes import descendants, process_key, start_child, stop_child, write_ready_file

SLEEP = f"{sys.executable} -c 'import time; time.sleep(600)'"


def read_pid(path: Path) -> int:
    """The number a child wrote there, once it has."""
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text().split()[0])


def open_files(pid: int) -> list[str]:
    """What a process's descriptors are."""
    found: list[str] = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # Closed meanwhile.
            found.append(os.readlink(descriptor))
    return found


async def test_stop_child_asks_first():
    script = "import signal, sys; signal.signal(15, lambda *_: sys.exit(7)); print(flush=True); signal.pause()"
    child = await start_child(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    await child.stdout.readline()
    assert await stop_child(child, grace_s=DEADLINE_S) == 7
    await child.stdout.read()


async def test_stop_child_does_not_ask_for_ever():
    script = "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); signal.pause()"
    child = await start_child(sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    await child.stdout.readline()
    assert await stop_child(child, grace_s=0.1) == -signal.SIGKILL
    await child.stdout.read()


@pytest.mark.parametrize("command", [SLEEP, f"setsid {SLEEP}"])
async def test_stop_child_takes_grandchildren_in_sessions_of_their_own_too(command: str, tmp_path: Path):
    file = tmp_path / "pid"
    # bash dies of SIGTERM at once and leaves its child alone.
    child = await start_child("bash", "-c", f"{command} & echo $! > {file}; wait")
    grandchild = read_pid(file)
    await until(lambda: grandchild in {key.pid for key in descendants(child.pid)})
    await stop_child(child, grace_s=1)
    assert wait_gone([grandchild]) == []


WITHOUT_DESCRIPTORS = """
import asyncio, resource
from trainer_service.processes import descendants, process_key, start_child, stop_child

async def main():
    child = await start_child("sleep", "600")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    try:
        # Not None, which would say that the process is gone.
        process_key(child.pid)
    except OSError:
        print(descendants(child.pid), await stop_child(child, grace_s=30))

asyncio.run(main())
"""


def test_a_child_is_ended_without_a_descriptor_to_look_for_others():
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_DESCRIPTORS], capture_output=True, text=True, timeout=60, check=True
    )
    assert shown.stdout == f"set() {-signal.SIGTERM}\n"


async def test_a_child_leads_its_own_session_so_that_ctrl_c_passes_it_by():
    child = await start_child("sleep", "600")
    assert os.getsid(child.pid) == child.pid != os.getsid(0)
    await stop_child(child, grace_s=1)


def test_a_process_id_used_again_is_another_process():
    with subprocess.Popen(["sleep", "600"]) as first:
        key = process_key(first.pid)
        assert key is not None
        assert process_key(first.pid) == key
        first.kill()
    assert process_key(first.pid) is None


WATCHER = "import asyncio; from trainer_service.processes import parent_gone; asyncio.run(parent_gone())"


def test_parent_gone_at_the_end_of_stdin():
    watcher = subprocess.Popen([sys.executable, "-c", WATCHER], stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        watcher.wait(0.5)
    assert watcher.stdin is not None
    watcher.stdin.close()
    assert watcher.wait(DEADLINE_S) == 0


def test_parent_gone_when_stdin_is_no_pipe_says_so_at_once_rather_than_fail():
    command = [sys.executable, "-c", WATCHER]
    assert subprocess.run(command, stdin=subprocess.DEVNULL, timeout=DEADLINE_S, check=False).returncode == 0


def test_parent_gone_when_the_parent_is_killed_though_another_process_holds_the_pipe(tmp_path: Path):
    parent_script = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {WATCHER!r}], stdin=subprocess.PIPE)
holder = os.fork()
if holder == 0:
    time.sleep(600)  # Has the pipe's write end, as a forked data loader would.
open({str(tmp_path / "pids")!r}, "w").write(f"{{child.pid}} {{holder}}\\n")
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", parent_script])
    read_pid(tmp_path / "pids")
    watcher, holder = map(int, (tmp_path / "pids").read_text().split())
    # Its parent is the one it watches: one that has died before is nobody's.
    wait_until(lambda: any("pidfd" in target for target in open_files(watcher)))
    parent.kill()
    parent.wait()
    try:
        assert wait_gone([watcher]) == []
    finally:
        os.kill(holder, signal.SIGKILL)


def test_the_ready_file_is_whole_or_not_there(tmp_path: Path):
    file = tmp_path / "folder" / "ready.json"
    write_ready_file(file, address="127.0.0.1:1")
    assert json.loads(file.read_text()) == {"address": "127.0.0.1:1", "pid": os.getpid()}
    assert [path.name for path in file.parent.iterdir()] == ["ready.json"]
