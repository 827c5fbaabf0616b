"""A trainer's process with `--page`, a real worker behind it."""

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradwire import AdamParams, ServiceClient, datum_from_tokens_weights

from tests.page.conftest import POST
from tests.trainer_process import TrainerProcess, running_trainer


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    with running_trainer(tiny_llama, tmp_path_factory.mktemp("trainer"), "--page", "127.0.0.1:0") as running:
        running.wait_ready()
        yield running


def test_a_custom_loss_draws_a_curve_on_the_page_and_a_sample_streams(trainer: TrainerProcess):
    def loss(data: list[Any], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = -torch.cat(logprobs_list).sum()
        return total, {"reward": 0.25, "pairs:sum": 2.0}

    page = http.client.HTTPConnection(trainer.page_url.split("/")[2], timeout=60)
    with ServiceClient(trainer.base_url) as service:
        client = service.create_training_client(display_name="custom")
        page.request("GET", f"/api/events?runs={client.run_id}")
        events = page.getresponse()
        datum = datum_from_tokens_weights([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0])
        told = client.forward_backward_custom([datum], loss).result(60)
        client.optim_step(AdamParams(learning_rate=1e-3)).result(60)
        found = service.metrics(client.run_id)
        assert found["reward"].tolist() == [0.25]
        assert found["pairs:sum"].tolist() == [2.0]
        assert found["loss:sum"].tolist() == [told.metrics["loss:sum"]]
        assert found["num_tokens:sum"].tolist() == [told.metrics["num_tokens:sum"]]
        assert found["grad_norm:mean"][0] > 0
        assert found["execute_ms:sum"][0] > 0
        while b'"reward":[0.25]' not in (line := events.readline()):
            assert line
        events.close()
        page.close()
    body = json.dumps({"source": "base", "prompt": "hello", "max_tokens": 5, "temperature": 1.0, "seed": 1})
    page.request("POST", "/api/sample", body, POST)
    lines = [json.loads(line) for line in page.getresponse().read().splitlines()]
    assert sum(len(line.get("logprobs", [])) for line in lines) == 5
    assert all(logprob < 0 for line in lines for logprob in line.get("logprobs", []))
    assert lines[-1] == {"stop_reason": "length"}
    # The run as it is, once the trainer has noticed that nobody is attached any more.
    body = json.dumps({"source": client.run_id, "prompt": "hello", "max_tokens": 3})
    answer = b"RUN_ATTACHED"
    while b"RUN_ATTACHED" in answer:
        page.request("POST", "/api/sample", body, POST)
        answer = page.getresponse().read()
    assert b'"stop_reason":"length"' in answer
    page.close()


def test_a_trainer_with_an_open_page_stops_when_told_to(trainer: TrainerProcess):
    page = http.client.HTTPConnection(trainer.page_url.split("/")[2], timeout=60)
    page.request("GET", "/api/events")
    events = page.getresponse()
    assert events.status == 200
    trainer.process.terminate()
    assert trainer.process.wait(40) == 0
    events.close()
    page.close()
