"""Trainers that are there in a moment: forked from a process that has imported all that they and their workers need.

A worker's imports take more than four seconds of a core, as much as most tests of a trainer take besides. What runs is
what `python -m trainer_service` runs, in a process of its own, and so are the worker's ranks, which the trainer starts,
waits for and ends as ever. They differ in where they come from: a process beside the trainer, its nursery, forks them
when the trainer executes their command, and the kernel makes them the trainer's children.

What a process is told and given when it is executed (command line, environment in /proc, limits) is for tests whose
trainer is: running_trainer and Trainer without forked=True, as benchmarks have them.
"""

import contextlib
import ctypes
import json
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from trainer_service.processes import die_with_parent

_PR_SET_NAME, _PR_SET_CHILD_SUBREAPER = 15, 36
_REQUEST_BYTES = 1 << 17


def fork_server() -> ForkServerContext:
    """Forks processes that have imported tests.preloaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


class ForkedTrainer:
    """A trainer's process, with what tests use of subprocess.Popen.

    Args:
        arguments: Of `python -m trainer_service`.
        env: Its environment.
        log: Gets what it prints, at its end.
    """

    def __init__(self, arguments: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        told = (list(arguments), dict(env), str(log))
        self._process = fork_server().Process(target=_run_trainer, args=told, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            TimeoutExpired: It runs on, `timeout` seconds later.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("trainer_service", timeout or 0.0)
        return self.returncode

    def send_signal(self, sig: int) -> None:
        """Sends it a signal, unless it has ended."""
        if self.returncode is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()


def forked_rank(pid: int) -> int | None:
    """Which rank a process is that a nursery forked; None for any other."""
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    return int(name.removeprefix("rank-")) if name.startswith("rank-") else None


def _run_trainer(arguments: list[str], env: dict[str, str], log: str) -> None:
    _dup_to_first_three([os.open(os.devnull, os.O_RDONLY), *[os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)] * 2])
    _take_environment(env)
    # Processes whose parent ends become this one's children, and not those of the first process of all.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    _fork_what_would_be_executed(_start_nursery())
    _run("trainer_service", arguments)


def _fork_what_would_be_executed(nursery: socket.socket) -> None:
    """Has subprocess.Popen ask the nursery for processes that run our programs."""
    execute = subprocess._fork_exec  # pyright: ignore[reportAttributeAccessIssue]

    def fork_or_execute(args: Sequence[Any], *rest: Any) -> int:
        program, *options = map(os.fsdecode, args)
        if (program, options[:1]) != (sys.executable, ["-m"]) or not options[1].startswith("trainer_service"):
            return execute(args, *rest)
        _, _, _, cwd, env, stdin, _, _, stdout, _, stderr, _, _, _, new_session, *_ = rest
        given = dict(os.environ) if env is None else dict(os.fsdecode(each).split("=", 1) for each in env)
        fds = [fd if there < 0 else there for fd, there in enumerate((stdin, stdout, stderr))]
        where = None if cwd is None else os.fsdecode(cwd)
        socket.send_fds(nursery, [json.dumps([options[1], options[2:], given, where, new_session]).encode()], fds)
        return int(nursery.recv(32))

    subprocess._fork_exec = fork_or_execute  # pyright: ignore[reportAttributeAccessIssue]


def _start_nursery() -> socket.socket:
    """Starts it, while this process is a single thread, and so forks as it should. Where to ask it for processes."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    trainer = os.getpid()
    if os.fork():
        theirs.close()
        return ours
    try:
        die_with_parent()
        ours.close()
        _serve_requests(theirs, trainer)
    finally:
        os._exit(0)


def _serve_requests(requests: socket.socket, trainer: int) -> None:
    while True:
        request, fds, _, _ = socket.recv_fds(requests, _REQUEST_BYTES, 3)
        if not request:
            return
        told, tell = os.pipe()
        between = os.fork()
        if not between:
            child = os.fork()
            if not child:
                _be_born(request, fds, trainer)
            os.write(tell, str(child).encode())
            os._exit(0)
        # Once it has ended, its child is the trainer's.
        os.waitpid(between, 0)
        requests.send(os.read(told, 32))
        for fd in (told, tell, *fds):
            os.close(fd)


def _be_born(request: bytes, fds: Sequence[int], trainer: int) -> None:
    code = 1
    try:
        while os.getppid() != trainer:
            # Raises once it is gone.
            os.kill(trainer, 0)
            time.sleep(0.0002)
        module, arguments, env, cwd, new_session = json.loads(request)
        if new_session:
            os.setsid()
        _dup_to_first_three(fds)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        if cwd is not None:
            os.chdir(cwd)
        _take_environment(env)
        # Its command line is the fork server's, and so is its environment in /proc.
        name = f"rank-{env.get('RANK', 0)}" if module == "trainer_service.engine" else "forked"
        ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)
        _run(module, arguments)
        code = 0
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _dup_to_first_three(fds: Sequence[int]) -> None:
    # Above them first: they may be some of the three.
    above = [os.dup(fd) for fd in fds]
    for fd, there in enumerate(above):
        os.dup2(there, fd)
        os.close(there)


def _take_environment(env: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    with contextlib.suppress(KeyError):
        sys.path[:0] = [path for path in env["PYTHONPATH"].split(os.pathsep) if path and path not in sys.path]


def _run(module: str, arguments: Sequence[str]) -> None:
    """As `python -m` does."""
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
