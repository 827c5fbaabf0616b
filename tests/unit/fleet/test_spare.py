"""A spare worker takes over when the worker dies, and is never in the way."""

import os
import signal
from pathlib import Path

from tests.trainer_process import descendants, wait_gone
from tests.unit.fleet.test_fleet import behaves, ready, submit, supervised
from tests.waiting import until
from trainer_service.fleet.supervisor import WorkerSupervisor


async def spare_of(supervisor: WorkerSupervisor, worker: int, *, others: set[int]) -> int:
    """Waits for a second worker process beside the first; its id."""
    await until(lambda: supervisor._spare._ranks is not None)
    await until(lambda: worker_processes() - {worker} - others)
    [spare] = worker_processes() - {worker} - others
    return spare


def worker_processes() -> set[int]:
    found = set()
    for pid in descendants(os.getpid()):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"tests.worker_process" in command:
            found.add(pid)
    return found


async def next_worker(supervisor: WorkerSupervisor, before: int) -> int:
    await until(lambda: (loaded := supervisor.ready) and loaded.model.architecture != str(before))
    return await ready(supervisor)


async def test_the_spare_becomes_the_worker_and_gets_a_spare_of_its_own() -> None:
    others = worker_processes()
    async with supervised(behaves("work"), spare_after_s=0.01) as supervisor:
        pid = await ready(supervisor)
        spare = await spare_of(supervisor, pid, others=others)
        os.kill(pid, signal.SIGKILL)
        assert await next_worker(supervisor, pid) == spare
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        second = await spare_of(supervisor, spare, others=others)
    wait_gone([spare, second])


async def test_a_spare_that_died_is_replaced_by_a_worker_started_as_the_first_one() -> None:
    others = worker_processes()
    async with supervised(behaves("work"), spare_after_s=0.01) as supervisor:
        pid = await ready(supervisor)
        spare = await spare_of(supervisor, pid, others=others)
        os.kill(spare, signal.SIGKILL)
        await until(lambda: supervisor._spare._ranks is not None and not supervisor._spare._ranks.all_run)
        os.kill(pid, signal.SIGKILL)
        assert await next_worker(supervisor, pid) not in (pid, spare)


async def test_no_spare_is_started_where_none_is_wanted() -> None:
    others = worker_processes()
    async with supervised(behaves("work"), spare_after_s=0.0) as supervisor:
        pid = await ready(supervisor)
        assert (await submit(supervisor)).event.response.optim_step.step == 1
        assert worker_processes() - others == {pid}
