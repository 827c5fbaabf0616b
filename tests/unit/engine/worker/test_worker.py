"""The worker process over its socket, driven by a trainer that only writes down what it hears."""

import contextlib
import os
import queue
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradwire._wire.codec import batch_message, decode_tensor, tensor_message
from gradwire._wire.protocol_version import __version__
from gradwire.errors import error, from_status, to_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.datum_pb2 import ModelInput
from gradwire.v1.sampling_service_pb2 import SampleRequest, SamplingParams
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, Mesh, TrainRequest
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerCreateRun, WorkerEvent, WorkerSample

from tests.engines import BATCH, RUN, make_batch
from tests.tiny import VOCAB_SIZE
from tests.waiting import wait_until
from trainer_service.command_lines import command_line
from trainer_service.executing import executing_command, noted_operation
from trainer_service.worker_config import WorkerConfig
from trainer_service.worker_frames import Frames, frame

START_S = 60
ANSWER_S = 30


class RecordingTrainer:
    """Takes one worker. Commands go down as they are put; None ends the stream."""

    def __init__(self, path: Path, *, refuse: bool = False) -> None:
        self.events: queue.Queue[WorkerEvent | None] = queue.Queue()
        """Events received, without heartbeats."""
        self.heartbeat = threading.Event()
        """Set by each heartbeat."""
        self.commands: queue.Queue[WorkerCommand | None] = queue.Queue()
        self._refuse = refuse
        self._last_command_id = 0
        self._listener = sockets.socket(sockets.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._worker: sockets.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        # It is closed, or the worker is killed; that it ended is all there is to know.
        with contextlib.suppress(OSError):
            self._worker, _ = self._listener.accept()
            self._listener.close()
            if self._refuse:
                self._worker.recv(1)
                why = to_status(error("TRAINER_JOB_FAILED", "Not a worker this trainer started."))
                self._worker.sendall(frame(WorkerCommand(refused=why).SerializeToString()))
                self._worker.close()
                self.events.put(None)
                return
            threading.Thread(target=self._read, args=(self._worker,), daemon=True).start()
            while (command := self.commands.get()) is not None:
                self._worker.sendall(frame(command.SerializeToString()))
            self._worker.shutdown(sockets.SHUT_RDWR)

    def _read(self, worker: sockets.socket) -> None:
        frames = Frames(1 << 30)
        with contextlib.suppress(OSError), worker:
            while count := worker.recv_into(frames.room()):
                for message in frames.arrived(count):
                    event = WorkerEvent.FromString(bytes(message))
                    if event.HasField("heartbeat"):
                        self.heartbeat.set()
                    else:
                        self.events.put(event)
        self.events.put(None)

    def event(self, kind: str, timeout_s: float = ANSWER_S) -> WorkerEvent:
        """The next event, which must be of that kind."""
        event = self.events.get(timeout=timeout_s)
        assert event is not None, f"the worker's stream ended before {kind}"
        assert event.WhichOneof("event") == kind, event
        return event

    def ready(self, kind: str = "ready") -> WorkerEvent:
        """The event that ends the start, after all that comes before it."""
        while (event := self.events.get(timeout=START_S)) is not None:
            if event.WhichOneof("event") == kind:
                return event
            assert event.WhichOneof("event") in ("hello", "loading"), event
        raise AssertionError(f"the worker's stream ended before {kind}")

    def put(self, *, run_id: str = RUN, **fields: Any) -> int:
        """Sends a command; returns its number."""
        self._last_command_id += 1
        self.commands.put(WorkerCommand(command_id=self._last_command_id, run_id=run_id, **fields))
        return self._last_command_id

    def operation(self, seq_id: int, **operation: Any) -> int:
        """Sends an operation; returns its command's number."""
        return self.put(request=TrainRequest(seq_id=seq_id, **operation))

    def create_run(self, folder: Path | None = None) -> None:
        """Creates the run `RUN`, whose folder that is."""
        run_folder = str(folder) if folder is not None else ""
        command_id = self.put(create_run=WorkerCreateRun(request=CreateRunRequest(), run_folder=run_folder))
        event = self.event("done")
        assert event.command_id == command_id
        assert not event.done.HasField("error"), event

    def stop(self) -> None:
        """Goes away without waiting for anything."""
        self.commands.put(None)
        self._listener.close()
        if self._worker is not None:
            with contextlib.suppress(OSError):
                self._worker.shutdown(sockets.SHUT_RDWR)


def worker_command(socket: Path, model: Path, checkpoints: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "trainer_service.engine", "--socket", str(socket)),
        *command_line(
            WorkerConfig(base_model=str(model), checkpoint_dir=checkpoints, max_runs=8, max_context_length=32)
        ),
    ]


@pytest.fixture
def socket() -> Iterator[Path]:
    # Not under tmp_path: a unix socket's path may have 107 bytes.
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder, "s")


StartWorker = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_worker(socket: Path, tiny_llama: Path, tmp_path: Path) -> Iterator[StartWorker]:
    started: list[subprocess.Popen[str]] = []

    def start(model: Path = tiny_llama, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            worker_command(socket, model, tmp_path),
            env={**os.environ, "GRADWIRE_WORKER_TOKEN": "the-token", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def trainer(socket: Path) -> Iterator[RecordingTrainer]:
    made = RecordingTrainer(socket)
    yield made
    made.stop()


def ends(process: subprocess.Popen[str], timeout_s: float = 10) -> int:
    """The exit code of a process that ends by itself."""
    return process.wait(timeout_s)


def test_worker_from_hello_to_its_end(trainer: RecordingTrainer, start_worker: StartWorker, tiny_llama: Path) -> None:
    process = start_worker()
    hello = trainer.event("hello", START_S).hello
    assert hello.token == "the-token"
    assert hello.pid == process.pid
    sizes = {"fsdp_size": 1, "dp_replicate_size": 1, "tp_size": 1, "ep_size": 1}
    assert hello.mesh == Mesh(world_size=1, local_world_size=1, nnodes=1, **sizes)
    assert hello.software_version == __version__
    assert trainer.event("loading", START_S).loading == "importing torch and transformers"
    assert trainer.event("loading", START_S).loading == "looking for a device"
    assert str(tiny_llama) in trainer.event("loading", START_S).loading
    ready = trainer.ready().ready
    assert ready.model.base_model == str(tiny_llama)
    assert ready.model.architecture == "LlamaForCausalLM"
    assert ready.model.vocab_size == VOCAB_SIZE
    assert ready.model.max_context_length == 32
    assert ready.model.dtype == "float32"
    assert ready.model.batching == "packed, shared beginnings once"
    assert ready.model.sampling == "together"
    assert ("cross_entropy", ["weights"]) in [(loss.name, list(loss.loss_fn_inputs)) for loss in ready.losses]

    # Commands sent together are answered each once, in order.
    trainer.create_run()
    request = ops.ForwardBackwardRequest(batch=batch_message(BATCH), loss_fn="cross_entropy")
    bad = ops.ForwardBackwardRequest(batch=batch_message(BATCH), loss_fn="no such loss")
    garbage = TrainRequest(seq_id=5)
    sent = [
        trainer.operation(1, forward_backward=request),
        trainer.operation(2, optim_step=ops.OptimStepRequest(learning_rate=1e-2)),
        trainer.operation(3, forward_backward=bad),
        trainer.operation(4, optim_step=ops.OptimStepRequest()),
        trainer.put(request=garbage),
        trainer.operation(6, forward_backward=request),
    ]
    events = [trainer.event("response") for _ in sent]
    assert [event.command_id for event in events] == sent
    assert [event.response.seq_id for event in events] == [1, 2, 3, 4, 5, 6]
    reasons = {event.response.seq_id: from_status(event.response.error).reason for event in events}
    assert reasons[3] == "UNKNOWN_LOSS"
    assert reasons[4] == "PRIOR_OPERATION_FAILED"
    assert reasons[5] == "PROTOCOL_VIOLATION"
    assert (
        events[5].response.forward_backward.metrics["loss:sum"]
        < events[0].response.forward_backward.metrics["loss:sum"]
    )
    assert events[-1].counters["gradwire_worker_operations_total"] == 6
    assert events[-1].counters["gradwire_worker_failed_operations_total"] == 3
    assert events[0].counters["gradwire_worker_tokens_total"] == BATCH.num_tokens

    # A Ctrl-C at the terminal is the trainer's business.
    process.send_signal(signal.SIGINT)
    trainer.operation(7, zero_grad=ops.ZeroGradRequest())
    assert trainer.event("response").response.WhichOneof("result") == "zero_grad"

    # One message of a size the wire allows, both ways.
    large = make_batch(*[32] * 20_000)
    trainer.operation(8, forward=ops.ForwardRequest(batch=batch_message(large), loss_fn="no such loss"))
    assert trainer.event("response").response.seq_id == 8

    trainer.commands.put(None)
    assert ends(process) == 0
    assert trainer.events.get(timeout=ANSWER_S) is None


def test_worker_ends_in_the_middle_of_an_operation_when_the_trainer_goes(
    trainer: RecordingTrainer, start_worker: StartWorker
) -> None:
    process = start_worker()
    trainer.ready()
    trainer.create_run()
    # Minutes of work, during which heartbeats go on.
    trainer.operation(1, forward=ops.ForwardRequest(batch=batch_message(make_batch(*[32] * 60_000))))
    time.sleep(0.5)
    trainer.heartbeat.clear()
    assert trainer.heartbeat.wait(ANSWER_S)
    assert trainer.events.empty()
    assert process.poll() is None
    trainer.stop()
    assert ends(process, 5) == 0


def test_what_executes_is_told_beside_the_socket_and_nothing_while_it_samples(
    trainer: RecordingTrainer, socket: Path, start_worker: StartWorker
) -> None:
    start_worker()
    trainer.ready()
    trainer.create_run()
    seen = set[int]()
    batch = batch_message(make_batch(*[16] * 4000))
    operation = trainer.operation(1, forward=ops.ForwardRequest(batch=batch))
    while trainer.events.empty():
        seen.add(executing_command(str(socket)))
        time.sleep(0.001)
    trainer.event("response")
    assert seen == {0, operation}
    prompt, params = ModelInput(tokens=[1, 2]), SamplingParams(max_tokens=24)
    trainer.put(sample=WorkerSample(sample_id="s", request=SampleRequest(prompt=prompt, sampling_params=params)))
    trainer.event("sampled")
    seen.clear()
    while (event := trainer.events.get(timeout=ANSWER_S)) is not None and event.WhichOneof("event") == "sampled":
        seen.add(executing_command(str(socket)))
    assert seen == {0}


def test_an_operation_is_noted_in_its_run_s_folder_until_it_ends_or_its_trainer_is_gone(
    trainer: RecordingTrainer, socket: Path, tmp_path: Path, start_worker: StartWorker
) -> None:
    process = start_worker()
    trainer.ready()
    trainer.create_run(tmp_path)
    seen = set[int]()
    batch = batch_message(make_batch(*[16] * 4000))
    trainer.operation(7, forward=ops.ForwardRequest(batch=batch))
    while trainer.events.empty():
        seen.add(noted_operation(tmp_path))
        time.sleep(0.001)
    trainer.event("response")
    assert seen == {0, 7}
    trainer.operation(8, forward=ops.ForwardRequest(batch=batch))
    wait_until(lambda: noted_operation(tmp_path) == 8)
    trainer.stop()
    assert ends(process, 5) == 0
    assert noted_operation(tmp_path) == 0


def test_sigterm_ends_the_worker(trainer: RecordingTrainer, start_worker: StartWorker) -> None:
    process = start_worker()
    trainer.ready()
    process.terminate()
    assert ends(process) == -signal.SIGTERM


def test_worker_dies_with_its_parent(trainer: RecordingTrainer, socket: Path, tiny_llama: Path, tmp_path: Path) -> None:
    code = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    parent = subprocess.Popen([sys.executable, "-c", code, *worker_command(socket, tiny_llama, tmp_path)])
    trainer.event("hello", START_S)
    parent.kill()
    parent.wait()
    while (event := trainer.events.get(timeout=10)) is not None:
        assert event.WhichOneof("event") == "loading"


def test_model_that_cannot_be_loaded_is_said_in_a_sentence(
    trainer: RecordingTrainer, start_worker: StartWorker, tmp_path: Path
) -> None:
    process = start_worker(tmp_path / "no-model")
    exc = from_status(trainer.ready("failed").failed)
    assert exc.reason == "INVALID_FIELD"
    assert f'"{tmp_path / "no-model"}" does not exist' in exc.message
    trainer.commands.put(None)
    assert ends(process) == 1


def test_worker_that_the_trainer_turns_away_ends_with_an_error(socket: Path, start_worker: StartWorker) -> None:
    trainer = RecordingTrainer(socket, refuse=True)
    process = start_worker()
    assert ends(process, START_S) == 1
    assert process.stderr is not None
    assert "refused: Not a worker this trainer started." in process.stderr.read()
    trainer.stop()


def test_worker_without_a_trainer_says_so(start_worker: StartWorker) -> None:
    process = start_worker()
    assert ends(process, START_S) == 1
    assert process.stderr is not None
    log = process.stderr.read()
    assert "No trainer listens on" in log
    assert "Traceback" not in log


def test_hello_comes_before_torch_is_imported() -> None:
    code = "import sys, trainer_service.engine.__main__; assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gradients_flow_over_the_socket(trainer: RecordingTrainer, start_worker: StartWorker) -> None:
    start_worker()
    trainer.ready()
    trainer.create_run()
    trainer.operation(1, forward=ops.ForwardRequest(batch=batch_message(BATCH), keep_graph=True))
    outputs = trainer.event("response").response.forward.loss_fn_outputs
    logprobs = decode_tensor(outputs["logprobs"], "logprobs")
    gradients = tensor_message(np.full_like(logprobs, -1))
    trainer.operation(2, backward=ops.BackwardRequest(forward_seq_id=1, gradients=gradients))
    trainer.operation(3, optim_step=ops.OptimStepRequest(learning_rate=1e-2))
    trainer.operation(4, forward=ops.ForwardRequest(batch=batch_message(BATCH)))
    assert trainer.event("response").response.WhichOneof("result") == "backward"
    assert trainer.event("response").response.optim_step.step == 1
    after = decode_tensor(trainer.event("response").response.forward.loss_fn_outputs["logprobs"], "logprobs")
    assert after.sum() > logprobs.sum()
