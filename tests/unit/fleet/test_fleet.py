"""The supervisor over real processes that are no real workers."""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import signal
import stat
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import GradwireError, UnavailableError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerEvent, WorkerHello

from tests.trainer_process import descendants, wait_gone
from tests.waiting import DEADLINE_S, until
from trainer_service.engine import __main__ as worker_main
from trainer_service.engine.worker.connection import TrainerConnection
from trainer_service.executing import executing_command
from trainer_service.fleet import link, silence
from trainer_service.fleet import supervisor as supervisor_module
from trainer_service.fleet.rank_processes import RankProcesses
from trainer_service.fleet.supervisor import WorkerSupervisor
from trainer_service.fleet.worker import Died
from trainer_service.worker_config import EngineSettings, WorkerConfig, WorkerTimeouts

CONFIG = WorkerConfig(base_model="fake", checkpoint_dir=Path("unused"), max_runs=8)


@pytest.fixture(autouse=True)
def _unhurried(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    """A worker that a busy machine keeps from its heartbeats is not taken for a silent one; see stop."""
    monkeypatch.setattr(silence, "HEARTBEAT_INTERVAL_S", DEADLINE_S)


def behaves(*behaviours: str) -> Callable[[str], list[str]]:
    """A command line for each start in turn; the last one stays."""
    line = list(behaviours)

    def command(socket: str) -> list[str]:
        behaviour = line.pop(0) if len(line) > 1 else line[0]
        return [sys.executable, "-m", "tests.worker_process", socket, behaviour]

    return command


@contextlib.asynccontextmanager
async def supervised(command: Callable[[str], list[str]], **timeouts: float) -> AsyncIterator[WorkerSupervisor]:
    supervisor = WorkerSupervisor(CONFIG, timeouts=WorkerTimeouts(**timeouts), command=command)
    await supervisor.start()
    try:
        yield supervisor
    finally:
        await supervisor.stop()


async def ready(supervisor: WorkerSupervisor) -> int:
    """Waits until a worker has loaded its model; its process id."""
    came = asyncio.Event()
    supervisor.on_ready(came.set)
    if supervisor.ready is None:
        await asyncio.wait_for(came.wait(), DEADLINE_S)
    assert supervisor.ready is not None
    return int(supervisor.ready.model.architecture)


def be_patient(supervisor: WorkerSupervisor) -> None:
    """Leaves the next worker all the time a busy machine may take."""
    supervisor._timeouts = WorkerTimeouts(start_timeout_s=DEADLINE_S)


async def hurry(supervisor: WorkerSupervisor) -> None:
    """Leaves a worker 2 s between the things it says, once it has begun to load."""
    await until(lambda: supervisor.status_message == "loading fake")
    supervisor._timeouts = WorkerTimeouts(start_timeout_s=2.0)
    assert supervisor._link is not None
    supervisor._link.spoke.set()  # Ends the wait under way.


def stop(supervisor: WorkerSupervisor, pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stops the worker's process, and has the trainer look every second whether anything came."""
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(silence, "HEARTBEAT_INTERVAL_S", 1.0)
    assert supervisor._link is not None
    supervisor._link.heard.set()  # Ends the look under way.


def submit(supervisor: WorkerSupervisor) -> "asyncio.Future[Any]":
    """Sends an operation; its outcome, when it comes."""
    outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    request = TrainRequest(seq_id=1, optim_step=ops.OptimStepRequest())
    supervisor.submit(WorkerCommand(run_id="run"), outcome.set_result, request=request.SerializeToString())
    return outcome


async def test_commands_are_answered_in_order_and_counters_come_along():
    async with supervised(behaves("work")) as supervisor:
        await ready(supervisor)
        answers = await asyncio.gather(*(submit(supervisor) for _ in range(3)))
        assert [answer.event.response.optim_step.step for answer in answers] == [1, 2, 3]
        assert supervisor.counters == {
            "gradwire_worker_world_size": 2,
            "gradwire_worker_local_world_size": 1,
            "gradwire_worker_nnodes": 2,
            "gradwire_worker_fsdp_size": 1,
            "gradwire_worker_dp_replicate_size": 2,
            "gradwire_worker_tp_size": 1,
            "gradwire_worker_ep_size": 1,
            "gradwire_worker_operations_total": 3,
            "gradwire_worker_up": 1,
            "gradwire_worker_silent_seconds": 0,
            "gradwire_worker_restarts_total": 0,
        }


async def test_a_worker_that_is_not_ready_takes_no_command():
    async with supervised(behaves("never-says-hello")) as supervisor:
        refused = await submit(supervisor)
        assert refused.reason == "WORKER_NOT_READY"
        assert refused.retry_after_s
        assert "starting the worker" in refused.message


async def test_a_killed_worker_is_noticed_at_once_and_a_fresh_one_started():
    # Silence alone never ends it.
    async with supervised(behaves("hangs", "work"), heartbeat_timeout_s=0) as supervisor:
        pid = await ready(supervisor)
        deaths: list[GradwireError] = []
        supervisor.on_death(deaths.append)
        pending = submit(supervisor)
        await until(lambda: executing_command(supervisor._socket.path))
        os.kill(pid, signal.SIGKILL)
        died = await asyncio.wait_for(pending, DEADLINE_S)
        assert died.reason == "WORKER_DIED"
        assert isinstance(died, UnavailableError)
        assert "signal SIGKILL" in died.message
        assert [death.message for death in deaths] == [died.message]
        assert isinstance(died, Died)
        assert died.executing
        assert died.metadata == {}
        assert await ready(supervisor) != pid
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert supervisor.counters["gradwire_worker_restarts_total"] == 1


@pytest.mark.parametrize(("behaviour", "executing"), [("hangs", [True, False]), ("hangs-in-sampling", [False, False])])
async def test_a_death_is_held_against_the_command_that_was_executing_and_no_other(
    behaviour: str, executing: list[bool]
):
    async with supervised(behaves(behaviour, "work")) as supervisor:
        pid = await ready(supervisor)
        pending = [submit(supervisor), submit(supervisor)]
        await until(lambda: supervisor.counters["gradwire_worker_operations_total"])
        os.kill(pid, signal.SIGKILL)
        assert [died.executing for died in await asyncio.gather(*pending)] == executing


async def test_the_reason_that_a_rank_leaves_is_of_the_command_it_died_of_and_of_no_other():
    async with supervised(behaves("leaves-a-reason", "exits-at-first-command", "work")) as supervisor:
        await ready(supervisor)
        first, second = await asyncio.gather(submit(supervisor), submit(supervisor))
        assert (first.executing, second.executing) == (True, False)
        assert first.because.reason == "DEVICE_OUT_OF_MEMORY"
        assert first.because.metadata == {"device": "fake"}
        assert second.because is None
        # It was said once, and the next death has another.
        await ready(supervisor)
        died = await submit(supervisor)
        assert died.executing
        assert died.because is None


async def test_a_worker_that_exits_is_quoted():
    async with supervised(behaves("exits-at-first-command", "work")) as supervisor:
        await ready(supervisor)
        died = await submit(supervisor)
        assert "exit code 1" in died.message
        assert died.message.endswith("Its last words: out of luck")


async def test_a_model_that_cannot_be_loaded_is_given_up_with_the_workers_reason():
    async with supervised(behaves("fails-to-load")) as supervisor:
        reason = await asyncio.wait_for(supervisor.gave_up, DEADLINE_S)
        assert reason == "There is no model here."
        assert supervisor.status_message == reason
        assert supervisor.ready is None


async def test_a_worker_that_never_starts_is_given_up_after_several_tries(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor_module, "_GIVE_UP_BACKOFF_S", 0.5)
    async with supervised(behaves("fails-before-hello")) as supervisor:
        reason = await asyncio.wait_for(supervisor.gave_up, DEADLINE_S)
        assert "no such device" in reason
        assert supervisor.counters["gradwire_worker_restarts_total"] == 1


async def test_a_worker_that_hangs_before_hello_is_killed_and_the_next_one_works(caplog: pytest.LogCaptureFixture):
    # Other tests' trainers may be below this process too.
    others = set(descendants(os.getpid()))
    async with supervised(behaves("never-says-hello", "work"), start_timeout_s=1.0) as supervisor:
        supervisor.on_death(lambda _: be_patient(supervisor))
        hanging: set[int] = set()
        while not hanging:
            hanging = set(descendants(os.getpid())) - others
            await asyncio.sleep(0.02)
        pid = await ready(supervisor)
        assert wait_gone(list(hanging - {pid})) == []
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert supervisor.counters["gradwire_worker_restarts_total"] == 1
    ended = [record for record in caplog.records if record.getMessage() == "Worker ended."]
    reason = ended[0].fields["reason"]  # pyright: ignore[reportAttributeAccessIssue]
    assert reason == "The worker process said nothing for 1 s and was killed."


async def test_a_worker_that_hangs_while_it_loads_is_killed_and_one_that_gets_on_slowly_is_not(
    caplog: pytest.LogCaptureFixture,
):
    async with supervised(behaves("hangs-while-loading", "loads-slowly")) as supervisor:
        supervisor.on_death(lambda _: be_patient(supervisor))
        await hurry(supervisor)
        await until(lambda: supervisor.counters["gradwire_worker_restarts_total"])
        await hurry(supervisor)
        await ready(supervisor)
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert supervisor.counters["gradwire_worker_restarts_total"] == 1
        # Once ready, it need not say anything new for as long as it likes.
        await asyncio.sleep(2.5)
        assert (await submit(supervisor)).event.response.optim_step.step == 2
    ended = [record for record in caplog.records if record.getMessage() == "Worker ended."]
    reason = ended[0].fields["reason"]  # pyright: ignore[reportAttributeAccessIssue]
    assert reason == "The worker process said nothing for 2 s after it began loading fake and was killed."


async def test_a_failed_load_after_a_good_one_is_tried_again():
    async with supervised(behaves("exits-at-first-command", "fails-to-load", "work")) as supervisor:
        await ready(supervisor)
        await submit(supervisor)
        await ready(supervisor)
        assert not supervisor.gave_up.done()
        assert supervisor.counters["gradwire_worker_restarts_total"] == 2


async def test_a_worker_of_another_version_is_given_up():
    async with supervised(behaves("other-version")) as supervisor:
        reason = await asyncio.wait_for(supervisor.gave_up, DEADLINE_S)
        assert "gradwire 0.0.0" in reason


async def test_a_worker_that_is_stopped_is_told_apart_from_a_busy_one_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(silence, "_UNRESPONSIVE_S", 3.0)
    async with supervised(behaves("hangs", "work"), heartbeat_timeout_s=4.0) as supervisor:
        supervisor.on_death(lambda _: monkeypatch.setattr(silence, "HEARTBEAT_INTERVAL_S", DEADLINE_S))
        pid = await ready(supervisor)
        pending = submit(supervisor)
        # It executes something and answers nothing, but its heart beats.
        await until(lambda: executing_command(supervisor._socket.path))
        link = supervisor._link
        assert link is not None
        for _ in range(2):
            link.heard.clear()
            await asyncio.wait_for(link.heard.wait(), DEADLINE_S)
        assert supervisor.responding
        assert not pending.done()
        changed, told = asyncio.Event(), list[tuple[bool, str, float]]()

        def look() -> None:
            up = supervisor.counters["gradwire_worker_up"]
            told.append((supervisor.responding, supervisor.status_message, up))
            changed.set()

        supervisor.on_responding(look)
        stop(supervisor, pid, monkeypatch)
        await asyncio.wait_for(changed.wait(), DEADLINE_S)
        assert told[0] == (False, "the worker has sent nothing for 3 s; after 4 s it is replaced", 0.0)
        assert supervisor.ready is not None
        assert supervisor.counters["gradwire_worker_silent_seconds"] >= 3
        died = await asyncio.wait_for(pending, DEADLINE_S)
        assert died.reason == "WORKER_DIED"
        assert isinstance(died, Died)
        assert died.executing
        assert died.metadata == {}
        assert "sent nothing for 4 s (stopped, or hanging) and was killed" in died.message
        assert await ready(supervisor) != pid
        assert wait_gone([pid]) == []
        assert supervisor.responding
        assert (await submit(supervisor)).event.response.optim_step.step == 1


async def test_a_worker_that_goes_on_in_time_is_kept(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(silence, "_UNRESPONSIVE_S", 2.0)
    async with supervised(behaves("work"), heartbeat_timeout_s=0) as supervisor:
        pid = await ready(supervisor)
        changes: asyncio.Queue[bool] = asyncio.Queue()
        supervisor.on_responding(lambda: changes.put_nowait(supervisor.responding))
        stop(supervisor, pid, monkeypatch)
        assert await asyncio.wait_for(changes.get(), DEADLINE_S) is False
        assert supervisor.status_message == "the worker has sent nothing for 2 s"
        os.kill(pid, signal.SIGCONT)
        while not await asyncio.wait_for(changes.get(), DEADLINE_S):
            pass
        assert supervisor.status_message == "ready"
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert supervisor.counters["gradwire_worker_restarts_total"] == 0


async def test_the_trainer_outlives_a_time_without_descriptors(monkeypatch: pytest.MonkeyPatch):
    """However long: more starts fail than a worker is given that never got ready."""
    monkeypatch.setattr(supervisor_module, "_MAX_BACKOFF_S", 0.01)
    start, failures = RankProcesses.start, [OSError(errno.EMFILE, "Too many open files")] * 8

    async def start_or_fail(*arguments: Any, **named: Any) -> RankProcesses:
        if failures:
            raise failures.pop()
        return await start(*arguments, **named)

    monkeypatch.setattr(RankProcesses, "start", start_or_fail)
    async with supervised(behaves("work")) as supervisor:
        await ready(supervisor)
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert supervisor.counters["gradwire_worker_restarts_total"] == 8
        assert not supervisor.gave_up.done()


async def test_a_program_that_is_not_there_is_given_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervisor_module, "_GIVE_UP_BACKOFF_S", 0.5)
    async with supervised(lambda socket: ["/no/such/program"]) as supervisor:
        reason = await asyncio.wait_for(supervisor.gave_up, DEADLINE_S)
        assert reason.startswith("The worker could not be started: ")
        assert "/no/such/program" in reason


async def test_a_socket_whose_folder_is_gone_is_made_anew_for_the_next_worker():
    async with supervised(behaves("work")) as supervisor:
        pid = await ready(supervisor)
        gone = supervisor._socket.folder
        shutil.rmtree(gone)
        # The one that is connected works on.
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        os.kill(pid, signal.SIGKILL)
        await until(lambda: supervisor.ready is None)
        assert await ready(supervisor) != pid
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert supervisor._socket.folder != gone
        assert stat.S_IMODE(os.stat(supervisor._socket.folder).st_mode) == 0o700
    with pytest.raises(FileNotFoundError):
        os.stat(supervisor._socket.folder)


async def test_only_the_worker_that_was_started_may_attach():
    async with supervised(behaves("work")) as supervisor:
        await ready(supervisor)
        stranger = await asyncio.to_thread(TrainerConnection, supervisor._socket.path, max_message_bytes=1024)
        stranger.send(WorkerEvent(hello=WorkerHello(token="guess")))
        assert await asyncio.to_thread(stranger.ended.wait, DEADLINE_S)
        assert not stranger.ended_cleanly()
        assert stranger.describe_end() == "refused: Not a worker this trainer started."
        assert (await submit(supervisor)).event.response.optim_step.step == 1


async def test_a_caller_that_never_says_hello_is_let_go(monkeypatch: pytest.MonkeyPatch):
    async with supervised(behaves("work")) as supervisor:
        await ready(supervisor)
        monkeypatch.setattr(link, "_HELLO_TIMEOUT_S", 0.2)
        reader, writer = await asyncio.open_unix_connection(supervisor._socket.path)
        writer.write(b"\xff")
        async with asyncio.timeout(DEADLINE_S):
            assert await reader.read() == b""
        writer.close()
        # The worker that said hello stays.
        assert (await submit(supervisor)).event.response.optim_step.step == 1


async def test_the_socket_is_private_and_short_and_gone_afterwards():
    async with supervised(behaves("work")) as supervisor:
        await ready(supervisor)
        socket = supervisor._socket.path
        assert stat.S_ISSOCK(os.stat(socket).st_mode)
        assert stat.S_IMODE(os.stat(os.path.dirname(socket)).st_mode) == 0o700
        assert len(socket) < 100
    with pytest.raises(FileNotFoundError):
        os.stat(os.path.dirname(socket))


async def test_whatever_a_worker_prints_is_logged_and_never_blocks_it(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="worker")
    async with supervised(behaves("prints")) as supervisor:
        pid = await ready(supervisor)
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        os.kill(pid, signal.SIGKILL)
        await submit(supervisor)
    lines = [record.getMessage() for record in caplog.records if record.name == "worker"]
    assert lines[:2] == ["10%", "20%"]
    assert any("last words" in line for line in lines)
    assert max(map(len, lines)) <= 4096


async def test_stop_ends_the_worker_and_answers_what_is_pending():
    async with supervised(behaves("hangs")) as supervisor:
        pid = await ready(supervisor)
        pending = submit(supervisor)
        await asyncio.sleep(0.05)
    stopped = await pending
    assert stopped.reason == "DRAINING"
    assert not stopped.executing
    assert (await submit(supervisor)).reason == "DRAINING"
    assert wait_gone([pid]) == []


async def test_stop_ends_a_worker_that_has_not_said_hello():
    others = set(descendants(os.getpid()))
    async with supervised(behaves("never-says-hello")) as supervisor:
        await until(lambda: set(descendants(os.getpid())) - others)
        started = set(descendants(os.getpid())) - others
    assert wait_gone(list(started)) == []
    assert supervisor.ready is None


@pytest.mark.parametrize("text", ["-model", "--socket=x", "-", "a model", "ordinary/model"])
async def test_a_worker_is_told_its_settings_whatever_they_begin_with(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = EngineSettings(compute_dtype="bfloat16", max_pack_tokens=7)
    config = WorkerConfig(
        base_model=text, checkpoint_dir=Path(text), max_runs=3, served_model_name=text, loss_module=text, engine=engine
    )
    command = WorkerSupervisor(config)._command("/tmp/socket")
    assert command[:3] == [sys.executable, "-m", "trainer_service.engine"]
    monkeypatch.setattr(sys, "argv", command[2:])
    assert worker_main._parse() == ("/tmp/socket", config)
