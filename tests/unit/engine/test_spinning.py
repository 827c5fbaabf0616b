"""Threads spin where nothing else wants their cores, and only there."""

import os
import time

import pytest
import torch

from trainer_service.engine import spinning
from trainer_service.engine.spinning import Contention, SleepingTeam

QUIET = round(spinning._QUIET_S / 0.1)
"""Quiet intervals that it takes."""


def watch(contention: Contention, *, waited: float, intervals: int, busy: float = 2.0) -> list[bool]:
    """Intervals of a tenth of a second in which threads waited for that part of the time that they wanted to run."""
    return [
        contention.update(ran_s=0.1 * busy * (1 - waited), waited_s=0.1 * busy * waited, elapsed_s=0.1)
        for _ in range(intervals)
    ]


def test_cores_are_taken_for_contended_until_they_were_quiet_for_a_while() -> None:
    contention = Contention()
    assert all(watch(contention, waited=0.02, intervals=QUIET - 1))
    assert watch(contention, waited=0.02, intervals=3)[-1] is False


def test_one_contended_interval_is_enough_and_quiet_must_last_again() -> None:
    contention = Contention()
    watch(contention, waited=0.0, intervals=QUIET + 5)
    assert watch(contention, waited=0.4, intervals=1) == [True]
    assert all(watch(contention, waited=0.02, intervals=QUIET - 2))
    assert watch(contention, waited=0.02, intervals=4)[-1] is False


def test_quiet_is_counted_afresh_after_a_disturbance_while_nothing_spins() -> None:
    contention = Contention()
    watch(contention, waited=0.0, intervals=QUIET - 3)
    watch(contention, waited=0.12, intervals=1)
    assert all(watch(contention, waited=0.0, intervals=QUIET - 2))


def test_an_idle_process_learns_nothing() -> None:
    contention = Contention()
    watch(contention, waited=0.0, intervals=QUIET + 5)
    assert watch(contention, waited=0.9, intervals=30, busy=0.01) == [False] * 30


def test_a_sleeping_team_has_more_threads_than_there_are_cpus_and_ends_them() -> None:
    openmp = spinning._gnu_openmp()
    if openmp is None:
        pytest.skip("torch uses another OpenMP here")
    num_cpus = openmp.omp_get_num_procs()
    before = set(os.listdir("/proc/self/task"))
    team = SleepingTeam(openmp)
    asleep = set(os.listdir("/proc/self/task")) - before
    team.dismiss()
    assert len(asleep) >= num_cpus + 1
    deadline = time.monotonic() + 60
    while asleep & set(os.listdir("/proc/self/task")):
        assert time.monotonic() < deadline, "they sleep on"
        time.sleep(0.001)
    assert torch.ones(1 << 17).sum() == 1 << 17


def test_nothing_is_done_where_the_environment_says_how_threads_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(torch, "get_num_threads", lambda: pytest.fail("it looked further"))
    spinning.spin_when_alone()
