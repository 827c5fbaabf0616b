"""A trainer's process with `--page`, a real worker behind it."""

import http.client
import importlib.util
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from gradwire import AdamParams, ServiceClient, datum_from_tokens_weights
from gradwire.v1.operation_pb2 import OptimStepRequest
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

from tests.otlp_collector import Collector, otlp_collector
from tests.page.conftest import POST
from tests.trainer_process import TrainerProcess, running_trainer


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector | None]:
    """None where OpenTelemetry is not installed."""
    if importlib.util.find_spec("opentelemetry.exporter") is None:
        yield None
        return
    with otlp_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def trainer(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector | None
) -> Iterator[TrainerProcess]:
    options = ["--page", "127.0.0.1:0"] + (["--otlp-endpoint", collector.endpoint] if collector else [])
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
    folder = tmp_path_factory.mktemp("trainer")
    with running_trainer(tiny_llama, folder, *options, env=environment) as running:
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
        assert found["memory_bytes:max"][0] > 1e6
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


def test_traces_of_a_real_worker_reach_a_collector(trainer: TrainerProcess, collector: Collector | None):
    if collector is None:
        pytest.skip("opentelemetry-exporter-otlp-proto-grpc is not installed; see the dev extra")
    trace_id = bytes(range(16))
    with ServiceClient(trainer.base_url) as service:
        client = service.create_training_client()
        datum = datum_from_tokens_weights([1, 2, 3, 4], [0.0, 1.0, 1.0, 1.0])
        client.forward_backward([datum]).result(60)
        run_id = client.run_id
        client.close()
        request = OptimStepRequest(run_id=run_id)
        traceparent = f"00-{trace_id.hex()}-{'b' * 16}-01"
        step_by_hand(trainer.base_url, request, traceparent)

    def told(spans: list[tuple[str, Any]]) -> bool:
        return sum(span.name == "execute" and span.trace_id == trace_id for _, span in spans) == 1

    spans = collector.wait_for(told)
    assert {service for service, _ in spans} == {"gradwire-trainer"}
    [operation] = [span for _, span in spans if span.name == "optim_step" and span.trace_id == trace_id]
    attributes = {each.key: each.value for each in operation.attributes}
    assert attributes["gradwire.run_id"].string_value == run_id
    [executed] = [span for _, span in spans if span.name == "execute" and span.trace_id == trace_id]
    assert executed.end_time_unix_nano > executed.start_time_unix_nano
    assert executed.parent_span_id == operation.span_id


def step_by_hand(base_url: str, request: OptimStepRequest, traceparent: str) -> None:
    """One optim_step as a unary call, again until the trainer has noticed that nobody is attached any more."""
    with grpc.insecure_channel(base_url.removeprefix("http://")) as channel:
        while True:
            try:
                TrainerServiceStub(channel).OptimStep(request, metadata=[("traceparent", traceparent)], timeout=30)
                return
            except grpc.RpcError as exc:
                if "is attached" not in str(exc):
                    raise
                time.sleep(0.02)


def test_a_trainer_with_an_open_page_stops_when_told_to(trainer: TrainerProcess):
    page = http.client.HTTPConnection(trainer.page_url.split("/")[2], timeout=60)
    page.request("GET", "/api/events")
    events = page.getresponse()
    assert events.status == 200
    trainer.process.send_signal(signal.SIGTERM)
    assert trainer.process.wait(40) == 0
    events.close()
    page.close()
