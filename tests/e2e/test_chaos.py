"""Worker and trainer killed, connections cut and stalled, the disk filled, again and again, under training loops."""

import contextlib
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradwire import ServiceClient

from tests.chaos import FAULTS, Adversary, Loop, Trainer, left_behind, state_digests, undisturbed
from tests.cut_proxy import cut_proxy
from tests.full_disk import FileLimit, NoMount, SmallDisk, small_disk

SEED = 4
STEPS = 30
LORA_RANKS = (0, 4)
"""A run that trains all parameters and one with an adapter, side by side."""


def test_loops_under_an_adversary_are_bit_identical_to_undisturbed_ones(tiny_llama: Path, tmp_path: Path):
    with (
        contextlib.ExitStack() as stack,
        Trainer(
            tiny_llama, tmp_path, "--snapshot-steps", "7", data_dir=data_dir(tmp_path, stack), forked=True
        ) as trainer,
        cut_proxy(trainer.address) as proxy,
        ServiceClient(proxy.base_url, reconnect_timeout_s=120) as service,
        ThreadPoolExecutor() as threads,
    ):
        wanted = [undisturbed(trainer, seed=SEED, steps=STEPS, lora_rank=rank) for rank in LORA_RANKS]
        clients = [service.create_training_client(lora_rank=rank) for rank in LORA_RANKS]
        loops = [Loop(client, seed=SEED, steps=STEPS) for client in clients]
        mounted = (tmp_path / "disk").is_mount()
        disk = SmallDisk(tmp_path / "disk") if mounted else FileLimit(trainer.pids)
        adversary = Adversary(
            trainer, disk, proxy, SEED, FAULTS, lambda: sum(loop.answered for loop in loops), at_most=len(FAULTS)
        )
        adversary.start()
        try:
            got = list(threads.map(lambda loop: loop.run(), loops))
        finally:
            adversary.stop()
        assert {fault for _, fault in adversary.done} == set(FAULTS)
        for client, disturbed, (answers, digests) in zip(clients, got, wanted, strict=True):
            # Every future, once, with the right value.
            assert disturbed == answers
            assert state_digests(trainer.data_dir, client, "final") == digests
            assert state_digests(trainer.data_dir, client.fork(), "fork") == digests
        journals = [trainer.data_dir / "runs" / client.run_id / "journal.sqlite" for client in clients]
        trainer.stop()
        assert left_behind(trainer) == []
        for journal in journals:
            with contextlib.closing(sqlite3.connect(journal)) as db:
                numbers = "SELECT max(seq_id), (SELECT count(*) FROM outcomes) FROM operations"
                [(operations, outcomes)] = db.execute(numbers)
            assert operations == outcomes


def data_dir(folder: Path, stack: contextlib.ExitStack) -> Path:
    """On a disk that can be filled, where one can be mounted."""
    with contextlib.suppress(NoMount):
        return stack.enter_context(small_disk(folder / "disk", 256 << 20)).path / "data"
    return folder / "data"
