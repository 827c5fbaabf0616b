"""Worker and trainer killed, connections cut and stalled, again and again, under a training loop."""

import contextlib
import sqlite3
from pathlib import Path

from gradwire import ServiceClient

from tests.chaos import FAULTS, Adversary, Loop, Trainer, left_behind, state_digests, undisturbed
from tests.cut_proxy import cut_proxy

SEED = 4
STEPS = 60


def test_a_loop_under_an_adversary_is_bit_identical_to_an_undisturbed_one(tiny_llama: Path, tmp_path: Path):
    with (
        Trainer(tiny_llama, tmp_path, "--snapshot-steps", "7") as trainer,
        cut_proxy(trainer.address) as proxy,
        ServiceClient(proxy.base_url, reconnect_timeout_s=120) as service,
    ):
        answers, digests = undisturbed(trainer, seed=SEED, steps=STEPS)
        client = service.create_training_client()
        loop = Loop(client, seed=SEED, steps=STEPS)
        adversary = Adversary(trainer, proxy, SEED, FAULTS, lambda: loop.answered, at_most=len(FAULTS) + 1)
        adversary.start()
        try:
            disturbed = loop.run()
        finally:
            adversary.stop()
        assert len(adversary.done) >= len(FAULTS)
        # Every future, once, with the right value.
        assert disturbed == answers
        assert state_digests(trainer, client, "final") == digests
        journal = trainer.data_dir / "runs" / client.run_id / "journal.sqlite"
        trainer.stop()
        assert left_behind(trainer) == []
    with contextlib.closing(sqlite3.connect(journal)) as db:
        [(operations, outcomes)] = db.execute("SELECT max(seq_id), (SELECT count(*) FROM outcomes) FROM operations")
    assert operations == outcomes
