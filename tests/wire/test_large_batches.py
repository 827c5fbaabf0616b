"""A call of many messages, of which the first are sent while the others are made."""

import itertools
from typing import Any

import numpy as np
import pytest
from gradwire import Datum, ServiceClient, training_client
from gradwire.errors import GradwireError

from tests.front_end import front_end_on_a_thread


def data(count: int) -> list[Datum]:
    """Datums of a message each, told apart by their targets."""
    tokens = np.zeros(60_000, dtype=np.int64)
    return [Datum(tokens, {"target_tokens": tokens + number}) for number in range(count)]


def test_the_pieces_of_a_batch_come_whole_and_in_their_order():
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}") as service:
        client = service.create_training_client()
        # The fake worker answers with the targets.
        outputs = client.forward(data(5)).result(60).loss_fn_outputs
        assert [int(output["logprobs"].to_numpy()[-1]) for output in outputs] == list(range(5))
        assert trainer.operations() == [(seq_id, "forward") for seq_id in range(1, 6)]


def test_calls_behind_a_batch_wait_until_all_of_it_is_made():
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}") as service:
        client = service.create_training_client()
        client.forward_backward(data(3))
        client.optim_step().result(60)
        kinds = [kind for _, kind in trainer.operations()]
        assert kinds == ["forward_backward"] * 3 + ["optim_step"]


def test_a_batch_that_breaks_off_in_the_middle_marks_the_gradients_that_lack_the_rest(monkeypatch: pytest.MonkeyPatch):
    make, numbers = training_client.batch_content, itertools.count()

    def no_memory_at_the_third(*args: Any) -> Any:
        if next(numbers) == 2:
            raise MemoryError
        return make(*args)

    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}") as service:
        client = service.create_training_client()
        monkeypatch.setattr(training_client, "batch_content", no_memory_at_the_third)
        with pytest.raises(MemoryError):
            client.forward_backward(data(5))
        client.zero_grad().result(60)
        kinds = [kind for _, kind in trainer.operations()]
        assert kinds[-1] == "zero_grad"
        sent = kinds.count("forward_backward")
        assert sent <= 2
        assert kinds.count("cancel") == bool(sent)


def test_a_batch_of_which_one_message_would_be_too_large_is_not_sent_at_all(monkeypatch: pytest.MonkeyPatch):
    with front_end_on_a_thread() as trainer, ServiceClient(f"http://{trainer.address}") as service:
        client = service.create_training_client()
        limits = client._calls.limits
        tokens = np.zeros((limits.max_message_bytes - 40) // 12, dtype=np.int64)
        too_large = Datum(tokens, {"target_tokens": tokens})
        with pytest.raises(GradwireError, match="The call needs a message of"):
            client.forward([*data(2), too_large]).result(60)
        client.zero_grad().result(60)
        assert [kind for _, kind in trainer.operations()] == ["zero_grad"]
