"""A trainer whose disk is so full that not even its refusals can be written down, and that then ends."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
from gradwire import ServiceClient, datum_from_tokens_weights
from gradwire.errors import GradwireError
from gradwire.v1.trainer_service_pb2 import TrainRequest

from tests.front_end import front_end_on_a_thread
from tests.full_disk import nothing_can_be_written

DATUM = datum_from_tokens_weights([1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0])


def test_the_client_takes_the_forgotten_numbers_and_leaves_the_mark_of_what_was_refused(tmp_path: Path):
    with contextlib.ExitStack() as clients, contextlib.ExitStack() as full:
        with front_end_on_a_thread(data_dir=tmp_path) as first:
            client = clients.enter_context(ServiceClient(f"http://{first.address}")).create_training_client()
            client.optim_step().result(60)
            full.enter_context(nothing_can_be_written())
            for refused in (client.forward_backward([DATUM]), client.optim_step(), client.zero_grad()):
                with pytest.raises(GradwireError, match="Make room") as caught:
                    refused.result(60)
                assert caught.value.reason == "STORAGE_FAILED"
        full.close()
        with front_end_on_a_thread(data_dir=tmp_path, listen=first.address) as second:
            assert client.optim_step().result(60).step == 2
            assert second.operations() == [(1, "optim_step"), *((n, "cancel") for n in (2, 3, 4)), (5, "optim_step")]
    with contextlib.closing(sqlite3.connect(tmp_path / "runs" / client.run_id / "journal.sqlite")) as db:
        cancels = [row[0] for row in db.execute("SELECT request FROM operations WHERE kind = 'cancel' ORDER BY seq_id")]
    # The pass that was refused is missing from the gradients, and they are marked for it, as they were.
    assert [TrainRequest.FromString(request).cancel.taint for request in cancels] == [True, False, False]
