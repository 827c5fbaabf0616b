"""Traces of OpenTelemetry, over real sockets: from the caller's span through client and trainer to the worker."""

import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradwire import AdamParams, Datum, ModelInput, SamplingParams, ServiceClient
from gradwire._client.tracing import start_span
from gradwire.errors import GradwireError, error
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest

from tests.fakes import FakeWorker
from tests.front_end import FrontEnd, front_end, front_end_on_a_thread
from tests.http_gateway import HttpGateway, http_gateway, one_pass

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed; see the dev extra")

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext

from trainer_service.tracing import tracer_of

TRACE_ID, SPAN_ID = 0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331
TRACEPARENT = f"00-{TRACE_ID:032x}-{SPAN_ID:016x}-01"
DATUM = Datum(ModelInput.from_ints([1, 2]), {"target_tokens": np.array([2, 3]), "weights": [1.0, 1.0]})
PARTS = ["journal", "queue", "execute", "answer"]


class Traced:
    """Spans that ended, of clients and trainers of this process."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def tracer(self) -> Any:
        return tracer_of(self.provider)

    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> ReadableSpan:
        """The one of that name."""
        [found] = [span for span in self.spans() if span.name == name]
        return found

    def children(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """In the order they began."""
        own = [span for span in self.spans() if span.parent and span.parent.span_id == context(parent).span_id]
        return sorted(own, key=lambda span: span.start_time or 0)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Traced:
    """A process that traces. The provider that OpenTelemetry has once a process is left to others."""
    traced = Traced()
    monkeypatch.setattr(trace, "get_tracer", traced.provider.get_tracer)
    return traced


@pytest.fixture
def trainer(traced: Traced) -> Iterator[FrontEnd]:
    with front_end_on_a_thread(tracer=traced.tracer) as trainer:
        yield trainer


@pytest.fixture
def service(trainer: FrontEnd) -> Iterator[ServiceClient]:
    with ServiceClient(f"http://{trainer.address}") as service:
        yield service


def context(span: ReadableSpan) -> SpanContext:
    """Where a span belongs."""
    assert span.context is not None
    return span.context


def names(spans: list[ReadableSpan]) -> list[str]:
    return [span.name for span in spans]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_step_is_one_trace_from_the_callers_span_to_the_worker(traced: Traced, service: ServiceClient):
    client = service.create_training_client()
    with traced.provider.get_tracer("loop").start_as_current_span("step") as step:
        passed = client.forward_backward([DATUM])
        client.optim_step(AdamParams()).result(30)
        passed.result(30)
    calls = traced.children(traced.named("step"))
    assert names(calls) == ["gradwire.forward_backward", "gradwire.optim_step"]
    for call, kind, seq_id in zip(calls, ("forward_backward", "optim_step"), (1, 2), strict=True):
        assert attributes(call)["gradwire.run_id"] == client.run_id
        [operation] = traced.children(call)
        assert operation.name == kind
        assert context(operation).trace_id == step.get_span_context().trace_id
        assert attributes(operation) == {
            "gradwire.run_id": client.run_id,
            "gradwire.seq_id": seq_id,
            "gradwire.attempts": 1,
            "gradwire.taken_up": False,
        }
        parts = traced.children(operation)
        assert names(parts) == PARTS
        # One behind the other, from the operation's beginning to its end.
        edges = [operation.start_time, *(part.end_time for part in parts)]
        assert edges == [*(part.start_time for part in parts), operation.end_time]


def test_a_custom_loss_and_the_users_spans_in_it_belong_to_its_call(traced: Traced, service: ServiceClient):
    client = service.create_training_client()
    rewards = traced.provider.get_tracer("loop")

    def loss(data: list[Any], logprobs: list[Any]) -> Any:
        with rewards.start_as_current_span("reward"):
            return logprobs[0].sum(), {}

    client.forward_backward_custom([DATUM], loss).result(30)
    call = traced.named("gradwire.forward_backward_custom")
    assert names(traced.children(call)) == ["forward", "gradwire.custom_loss", "backward"]
    assert names(traced.children(traced.named("gradwire.custom_loss"))) == ["reward"]


def test_what_fails_says_why_on_both_sides(traced: Traced, trainer: FrontEnd, service: ServiceClient):
    client = service.create_training_client()
    trainer.worker.failures[client.run_id, 1] = error("NON_FINITE", "The loss is NaN.")
    with pytest.raises(GradwireError):
        client.forward_backward([DATUM]).result(30)
    call, operation = traced.named("gradwire.forward_backward"), traced.named("forward_backward")
    assert [span.status.status_code.name for span in (call, operation)] == ["ERROR", "ERROR"]
    assert attributes(operation)["error.type"] == "NON_FINITE"
    assert operation.status.description == "The loss is NaN."


def test_unary_calls_and_samples_are_traced_too(traced: Traced, service: ServiceClient):
    client = service.create_training_client()
    [served] = traced.children(traced.named("gradwire.CreateRun"))
    assert served.name == "gradwire.v1.TrainerService/CreateRun"
    assert attributes(served)["rpc.method"] == "CreateRun"
    sampling = client.save_weights_and_get_sampling_client()
    sampling.sample([1, 2], sampling_params=SamplingParams(max_tokens=3)).result(30)
    # Whoever has seen enough has not failed.
    for _ in sampling.stream([1, 2], sampling_params=SamplingParams(max_tokens=3)):
        break
    [served] = traced.children(traced.named("gradwire.sample"))
    assert served.name == "gradwire.v1.SamplingService/Sample"
    assert traced.named("gradwire.sample").status.is_unset


async def test_an_operation_typed_by_hand_takes_its_context_from_the_calls_metadata(traced: Traced):
    async with front_end(tracer=traced.tracer) as trainer:
        run_id = await trainer.create_run()
        request = ops.OptimStepRequest(run_id=run_id)
        await trainer.stub.OptimStep(request, metadata=[("traceparent", TRACEPARENT), ("tracestate", "vendor=1")])
        served = traced.named("gradwire.v1.TrainerService/OptimStep")
        assert served.parent is not None
        assert (served.parent.trace_id, served.parent.span_id) == (TRACE_ID, SPAN_ID)
        assert context(served).trace_state.get("vendor") == "1"
        [operation] = traced.children(served)
        assert (operation.name, names(traced.children(operation))) == ("optim_step", PARTS)


@pytest.mark.parametrize(
    "traceparent", ["nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01", "\N{SNOWMAN}", "f" * 4096]
)
async def test_a_context_that_is_none_begins_a_trace(traced: Traced, traceparent: str):
    async with front_end(tracer=traced.tracer) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.call.write(TrainRequest(seq_id=1, optim_step={}, traceparent=traceparent, tracestate="=,="))
        assert (await stream.receive()).WhichOneof("result") == "optim_step"
        assert traced.named("optim_step").parent is None


async def test_a_context_that_is_too_long_is_refused():
    async with front_end() as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.call.write(TrainRequest(seq_id=1, optim_step={}, tracestate="x" * 5000))
        refused = await stream.receive()
        assert "tracestate has" in refused.error.message


# ── through the gateway ───────────────────────────────────────────────────────────────────────────────────────────────


def headers_of(number: int) -> dict[str, str]:
    """Those of a caller who is in a trace of that number."""
    return {"traceparent": f"00-{number:032x}-{SPAN_ID:016x}-01", "tracestate": f"vendor={number}"}


async def ask(gateway: HttpGateway, path: str, headers: Any, **body: Any) -> Any:
    """What a request with further headers answers."""
    response = await gateway.http.post(f"/api/v1/{path}", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def came_from(span: ReadableSpan) -> int:
    """The number of the trace that the caller was in."""
    assert span.parent is not None
    assert span.parent.span_id == SPAN_ID
    assert context(span).trace_state.get("vendor") == str(span.parent.trace_id)
    return span.parent.trace_id


async def test_what_is_asked_of_the_gateway_continues_the_trace_of_whoever_asks(traced: Traced, tmp_path: Path):
    async with (
        front_end(tracer=traced.tracer) as trainer,
        http_gateway(trainer.address, tmp_path) as gateway,
    ):
        session_id = await gateway.session()
        asked = {"session_id": session_id, "model_seq_id": 0, "base_model": "fake", "lora_config": {"rank": 4}}
        model = await ask(gateway, "create_model", headers_of(1), **asked)
        await gateway.result(model["request_id"])
        model_id = model["model_id"]
        # A step, which comes before the passes that it follows, and a pass that is too large to be kept in memory.
        step = {"model_id": model_id, "adam_params": {"learning_rate": 0.1}}
        last = await ask(gateway, "optim_step", headers_of(4), seq_id=3, **step)
        for number, tokens in ((1, 3), (2, 6000)):
            headers = headers_of(number + 1) | {
                "content-type": "application/x-protobuf",
                "x-sdk-method": "TrainingClient.forward_backward",
            }
            body = one_pass(model_id, number, tokens=tokens)
            assert (await gateway.http.post("/api/v1/forward_backward", content=body, headers=headers)).is_success
        await gateway.result(last["request_id"])
        assert came_from(traced.named("gradwire.v1.TrainerService/CreateRun")) == 1
        operations = [span for span in traced.spans() if span.name in ("forward_backward", "optim_step")]
        assert [(span.name, came_from(span)) for span in operations] == [
            ("forward_backward", 2),
            ("forward_backward", 3),
            ("optim_step", 4),
        ]
        assert all(names(traced.children(span)) == PARTS for span in operations)


async def test_a_sample_through_the_gateway_continues_its_trace_and_one_for_several_the_firsts(
    traced: Traced, tmp_path: Path
):
    async with (
        front_end(tracer=traced.tracer) as trainer,
        http_gateway(trainer.address, tmp_path) as gateway,
    ):
        made = await gateway.post(
            "create_sampling_session", session_id=await gateway.session(), sampling_session_seq_id=0, base_model="fake"
        )
        sample = {
            "sampling_session_id": made["sampling_session_id"],
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
        }
        asked = [
            await ask(gateway, "asample", headers_of(number), seq_id=number, sampling_params=params, **sample)
            for number, params in ((1, {"max_tokens": 2}), (2, {"max_tokens": 2}), (3, {"max_tokens": 2, "seed": 1}))
        ]
        for one in asked:
            await gateway.result(one["request_id"])
        served = [span for span in traced.spans() if span.name == "gradwire.v1.SamplingService/Sample"]
        assert sorted(map(came_from, served)) == [1, 3]


@pytest.mark.parametrize("traceparent", ["nonsense", "\N{SNOWMAN}".encode(), "f" * 4096, f"{TRACEPARENT}-more"])
async def test_a_context_that_is_none_is_not_passed_on(traced: Traced, traceparent: Any, tmp_path: Path):
    async with (
        front_end(tracer=traced.tracer) as trainer,
        http_gateway(trainer.address, tmp_path) as gateway,
    ):
        model_id = await gateway.model(await gateway.session())
        headers = {"traceparent": traceparent, "tracestate": "x" * 5000}
        step = {"model_id": model_id, "seq_id": 1, "adam_params": {"learning_rate": 0.1}}
        stepped = await ask(gateway, "optim_step", headers, **step)
        assert (await gateway.result(stepped["request_id"])).json()["type"] == "optim_step"
        assert traced.named("optim_step").parent is None


# ── deaths ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110  (a span's end has no event)
            await asyncio.sleep(0.005)


async def test_a_worker_that_dies_leaves_one_whole_trace_and_one_restoration_linked_to_it(traced: Traced):
    async with front_end(tracer=traced.tracer) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        for seq_id in (1, 2):
            await stream.send(seq_id, optim_step={})
            await stream.receive()
        trainer.worker.gate.clear()
        await stream.call.write(TrainRequest(seq_id=3, optim_step={}, traceparent=TRACEPARENT))
        await trainer.worker.has_waiting(1)
        trainer.worker.die()
        trainer.worker.gate.set()
        trainer.worker.become_ready()
        await stream.receive()
        await until(lambda: len([span for span in traced.spans() if span.name == "optim_step"]) == 3)
        # Each once, whatever was executed again.
        *_, operation = [span for span in traced.spans() if span.name == "optim_step"]
        assert context(operation).trace_id == TRACE_ID
        assert (attributes(operation)["gradwire.seq_id"], attributes(operation)["gradwire.attempts"]) == (3, 2)
        assert [event.name for event in operation.events] == ["worker died"]
        assert names(traced.children(operation)) == PARTS
        restore = traced.named("restore")
        assert context(restore).trace_id != TRACE_ID
        assert attributes(restore)["gradwire.replayed"] == 2
        assert names(traced.children(restore)) == ["load", "replay"]
        assert [link.context.span_id for link in operation.links] == [context(restore).span_id]
        assert [(link.context.trace_id, link.context.span_id) for link in restore.links] == [(TRACE_ID, SPAN_ID)]


async def test_what_an_earlier_trainer_received_is_told_by_the_one_that_answers(traced: Traced, tmp_path: Path):
    settings: dict[str, Any] = {"tracer": traced.tracer, "data_dir": tmp_path, "drain_timeout_s": 0.05}
    worker = FakeWorker()
    async with front_end(worker=worker, **settings) as trainer:
        stream = await trainer.attach(await trainer.create_run())
        await stream.send(1, optim_step={})
        await stream.receive()
        worker.gate.clear()
        await stream.call.write(TrainRequest(seq_id=2, optim_step={}, traceparent=TRACEPARENT))
        await worker.has_waiting(1)
        # Nothing more is executed here.
        worker.die()
    assert len([span for span in traced.spans() if span.name == "optim_step"]) == 1
    async with front_end(**settings):
        await until(lambda: len([span for span in traced.spans() if span.name == "optim_step"]) == 2)
    *_, operation = [span for span in traced.spans() if span.name == "optim_step"]
    assert operation.parent is not None
    assert (operation.parent.trace_id, operation.parent.span_id) == (TRACE_ID, SPAN_ID)
    assert attributes(operation)["gradwire.taken_up"] is True
    assert names(traced.children(operation)) == ["queue", "execute", "answer"]


# ── where nobody traces ───────────────────────────────────────────────────────────────────────────────────────────────


def test_without_opentelemetry_nothing_is_noted_or_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    with start_span("CreateRun", run_id="run") as span:
        assert span.headers == {}
        with span.inside("custom_loss"):
            pass
    assert "opentelemetry.trace" not in sys.modules


async def test_a_trainer_that_does_not_trace_takes_a_callers_context_all_the_same():
    async with front_end() as trainer:
        metadata = [("traceparent", TRACEPARENT)]
        run_id = (await trainer.stub.CreateRun(CreateRunRequest(), metadata=metadata)).run.run_id
        stream = await trainer.attach(run_id)
        await stream.call.write(TrainRequest(seq_id=1, optim_step={}, traceparent=TRACEPARENT))
        assert (await stream.receive()).optim_step.step == 1
