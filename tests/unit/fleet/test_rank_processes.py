"""Ranks of one machine: they meet without a server, listen on loopback at most, and end together."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from tests.listening import listening
from tests.trainer_process import descendants, wait_gone
from trainer_service.fleet.rank_processes import Place, RankProcesses, rank_environment, worker_environment


async def started(*command: str, folder: Path, count: int) -> RankProcesses:
    return await RankProcesses.start(
        [sys.executable, *command], env=dict(os.environ), folder=str(folder), place=Place(count)
    )


async def test_two_ranks_make_a_process_group_that_listens_on_loopback_alone(tmp_path: Path):
    before = set(descendants(os.getpid()))
    ranks = await started("-m", "tests.gloo_rank", str(tmp_path), folder=tmp_path, count=2)
    try:
        async with asyncio.timeout(120):
            while not all((tmp_path / str(rank)).exists() for rank in range(2)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        # It is a group: both have the sum of both.
        assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["3.0", "3.0"]
        below = [pid for pid in descendants(os.getpid()) if pid not in before]
        assert len(below) == 2
        addresses = listening(below)
        assert addresses, "a gloo group listens; if it does not, this test has lost its eyes"
        assert {address.rpartition(":")[0] for address in addresses} == {"127.0.0.1"}
    finally:
        await ranks.stop(grace_s=0)
    assert wait_gone(below) == []


RANK = """
import os, sys, time
place = [os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]
open(sys.argv[1] + "/" + place[0], "w").write(" ".join(place))
if place[0] == "1":
    while not os.path.exists(sys.argv[1] + "/0"):
        time.sleep(0.01)
    sys.exit("rank 1 has had enough")
time.sleep(600)
"""


async def test_the_rank_that_ended_first_says_what_the_worker_died_of(tmp_path: Path):
    ranks = await started("-c", RANK, str(tmp_path), folder=tmp_path, count=2)
    try:
        await asyncio.wait_for(ranks.one_ended(), 60)
        explained = await ranks.explain()
    finally:
        await ranks.stop(grace_s=0)
    assert explained == "The worker process ended (exit code 1). Its last words: rank 1 has had enough"
    assert [(tmp_path / str(rank)).read_text() for rank in range(2)] == ["0 0 2 2", "1 1 2 2"]


def test_ranks_of_several_machines_are_numbered_through_and_listen_where_the_machines_meet():
    place = Place(4, node_rank=1, nnodes=2, interface="eth7", start_id="start")
    env = rank_environment(3, place, "/tmp/socket")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    assert [env[name] for name in names] == ["7", "3", "8", "4", "eth7", "eth7"]


def test_ranks_get_no_secret_that_they_do_not_need(monkeypatch: pytest.MonkeyPatch):
    for name in ("GRADWIRE_API_KEY", "GRADWIRE_JOIN_TOKEN"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in worker_environment(OTHER="1").values()
