"""Forks and replays of a run on a real worker."""

import contextlib
import sqlite3

import numpy as np
import pytest
from gradwire import AdamParams, ServiceClient, TrainingClient
from gradwire.errors import InvalidArgumentError

from tests.chaos import make_data, margin_loss
from tests.trainer_process import TrainerProcess
from tests.training import all_logprobs

PROBE = make_data(99)


def train(client: TrainingClient, steps: range) -> None:
    """Steps with both kinds of losses."""
    for number in steps:
        client.forward_backward(make_data(number), "cross_entropy")
        client.forward_backward_custom(make_data(number + 50), margin_loss)
        client.optim_step(AdamParams(learning_rate=1e-2 / (1 + number)))
    client.forward(PROBE).result(60)


def test_a_fork_is_the_run_as_it_was_and_goes_its_own_way(client: TrainingClient, service: ServiceClient):
    train(client, range(2))
    then = all_logprobs(client, PROBE)
    train(client, range(2, 4))
    now = all_logprobs(client, PROBE)
    fork = client.fork(2, display_name="from two")
    try:
        assert fork.get_info().step == 2
        np.testing.assert_array_equal(all_logprobs(fork, PROBE), then)
        # On the same data it gets where the other got; the other has not moved.
        train(fork, range(2, 4))
        np.testing.assert_array_equal(all_logprobs(fork, PROBE), now)
        np.testing.assert_array_equal(all_logprobs(client, PROBE), now)
        beginning = service.fork_run(fork.run_id, 2)
        np.testing.assert_array_equal(all_logprobs(beginning, PROBE), then)
        beginning.delete_run()
        report = service.replay_run(fork.run_id)
        assert (report.after_seq_id, report.difference) == (0, None)
    finally:
        fork.delete_run()


def test_a_step_the_journal_does_not_have_is_refused_naming_those_it_has(client: TrainingClient):
    train(client, range(2))
    with pytest.raises(InvalidArgumentError, match="step is 7, which .* it has optimizer steps 1 to 2"):
        client.fork(7)


def test_a_replay_finds_every_answer_as_it_was_or_the_first_that_is_not(
    client: TrainingClient, service: ServiceClient, trainer: TrainerProcess
):
    train(client, range(2))
    client.forward_backward(PROBE, "no such loss").exception(60)
    client.optim_step().exception(60)
    client.save_state("kept").result(60)
    train(client, range(2, 3))
    report = service.replay_run(client.run_id)
    assert report.difference is None
    # Of two steps and a third: a built-in pass, a custom loss of two operations, the step; three forwards behind.
    assert (report.after_seq_id, report.compared, report.not_compared) == (0, 14, 3)
    journal = trainer.log.parent / "data" / "runs" / client.run_id / "journal.sqlite"
    with contextlib.closing(sqlite3.connect(journal)) as db, db:
        [(seq_id, answer)] = db.execute(
            "SELECT seq_id, answer FROM outcomes JOIN operations USING (seq_id) "
            "WHERE kind = 'optim_step' AND step = 2 AND reason = ''"
        )
        changed = bytearray(answer)
        # One bit of a metric.
        changed[answer.index(b"grad_norm:mean") + 20] ^= 1
        db.execute("UPDATE outcomes SET answer = ? WHERE seq_id = ?", (bytes(changed), seq_id))
    difference = service.replay_run(client.run_id).difference
    assert difference is not None
    assert (difference.seq_id, difference.kind, difference.step) == (seq_id, "optim_step", 1)
    assert difference.recorded_digest != difference.replayed_digest
