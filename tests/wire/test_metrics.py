"""GetMetrics over the wire: the SDK's arrays, the command line's table, CSV and JSON, and whose runs they are."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gradwire import AdamParams, Datum, ModelInput, ServiceClient, cli
from gradwire._client.run_metrics import METRICS_OF_INTEREST
from gradwire.errors import NotFoundError

from tests.front_end import FrontEnd, front_end_on_a_thread


@pytest.fixture(scope="module")
def trainer() -> Iterator[FrontEnd]:
    with front_end_on_a_thread(api_keys=("alice a", "bob b")) as trainer:
        yield trainer


@pytest.fixture(scope="module")
def run_id(trainer: FrontEnd) -> str:
    """A run of alice's with three steps."""
    with ServiceClient(f"http://{trainer.address}", "a") as service:
        client = service.create_training_client()
        datum = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": np.array([2, 3])})
        for _ in range(3):
            client.forward_backward([datum])
            client.optim_step(AdamParams(learning_rate=0.5)).result(30)
        return client.run_id


def printed(trainer: FrontEnd, capsys: pytest.CaptureFixture[str], *words: str, key: str = "a") -> str:
    assert cli.main(["metrics", *words, "--base-url", f"http://{trainer.address}", "--api-key", key]) == 0
    return capsys.readouterr().out


def test_metrics_are_arrays_by_step(trainer: FrontEnd, run_id: str):
    with ServiceClient(f"http://{trainer.address}", "a") as service:
        found = service.metrics(run_id)
        assert (len(found), found.step.tolist(), found.step.dtype) == (3, [1, 2, 3], np.int64)
        # The fake's loss is its operation's number.
        assert found["loss:sum"].tolist() == [1.0, 3.0, 5.0]
        assert found["learning_rate"].tolist() == [0.5] * 3
        assert found["loss:sum"].dtype == np.float64
        assert np.all(np.diff(found.time_s) >= 0)
        assert set(found.values) >= {"queue_ms:sum", "execute_ms:sum", "transfer_ms:sum"}
        some = service.metrics(run_id, ["loss:sum"], since_step=2)
        assert (some.step.tolist(), list(some.values)) == ([2, 3], ["loss:sum"])
        with pytest.raises(KeyError, match="has no metric 'reward'; it has loss:sum"):
            some["reward"]


def test_somebody_elses_run_has_no_metrics(trainer: FrontEnd, run_id: str):
    with ServiceClient(f"http://{trainer.address}", "b") as service, pytest.raises(NotFoundError) as caught:
        service.metrics(run_id)
    assert caught.value.reason == "RUN_NOT_FOUND"


def test_a_run_without_steps_has_empty_arrays(trainer: FrontEnd, capsys: pytest.CaptureFixture[str]):
    with ServiceClient(f"http://{trainer.address}", "b") as service:
        run_id = service.create_training_client().run_id
        assert (len(service.metrics(run_id)), dict(service.metrics(run_id).values)) == (0, {})
    assert printed(trainer, capsys, run_id, "--csv", key="b") == "step,seq_id,time_s\n"
    assert json.loads(printed(trainer, capsys, run_id, "--json", key="b")) == []


def test_the_command_line_prints_them(trainer: FrontEnd, run_id: str, capsys: pytest.CaptureFixture[str]):
    rows = list(csv.DictReader(io.StringIO(printed(trainer, capsys, run_id, "--csv"))))
    assert [(row["step"], row["loss:sum"]) for row in rows] == [("1", "1.0"), ("2", "3.0"), ("3", "5.0")]
    found: list[dict[str, Any]] = json.loads(printed(trainer, capsys, run_id, "--json", "--since-step", "3"))
    assert [(row["step"], row["loss:sum"], row["learning_rate"]) for row in found] == [(3, 5.0, 0.5)]
    table = printed(trainer, capsys, run_id).splitlines()
    assert table[0].split()[:2] == ["STEP", METRICS_OF_INTEREST[0]]
    assert [line.split()[:2] for line in table[1:]] == [["1", "1"], ["2", "3"], ["3", "5"]]
    assert printed(trainer, capsys, run_id, "--name", "learning_rate").splitlines()[0].split() == [
        "STEP",
        "learning_rate",
    ]
