"""A worker process without torch, for the supervisor's tests: python -m tests.worker_process SOCKET BEHAVIOUR."""

import os
import sys
import threading
import time

from gradwire._wire.protocol_version import __version__
from gradwire.errors import error, to_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import Mesh, ModelInfo, TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDone, WorkerEvent, WorkerHello, WorkerReady

from trainer_service.config import Limits
from trainer_service.engine.worker.connection import TrainerConnection
from trainer_service.engine.worker.heartbeat import start_heartbeat
from trainer_service.executing import Executing, leave_reason
from trainer_service.worker_config import SPARE_VARIABLE


def main(socket: str, behaviour: str) -> None:
    """Behaves as told: "work" answers commands; the other names are spelt out below."""
    if os.environ.get(SPARE_VARIABLE) and not sys.stdin.buffer.read(1):
        return
    if behaviour == "fails-before-hello":
        sys.exit("no such device")
    if behaviour == "never-says-hello":
        time.sleep(600)
    trainer = TrainerConnection(socket, max_message_bytes=Limits.max_message_bytes)
    token = "wrong" if behaviour == "wrong-token" else os.environ["GRADWIRE_WORKER_TOKEN"]
    version = "0.0.0" if behaviour == "other-version" else __version__
    hello = WorkerHello(
        token=token,
        pid=os.getpid(),
        mesh=Mesh(world_size=2, local_world_size=1, nnodes=2, fsdp_size=1, dp_replicate_size=2, tp_size=1, ep_size=1),
        software_version=version,
    )
    executing = Executing(socket)
    trainer.send(WorkerEvent(hello=hello))
    trainer.send(WorkerEvent(loading="loading fake"))
    if behaviour == "hangs-while-loading":
        time.sleep(600)
    if behaviour == "loads-slowly":
        for _ in range(8):
            time.sleep(0.5)
            trainer.send(WorkerEvent(loading="loading fake"))
    if behaviour == "fails-to-load":
        trainer.send(WorkerEvent(failed=to_status(error("TRAINER_JOB_FAILED", "There is no model here."))))
        trainer.finish()
    else:
        model = ModelInfo(base_model="fake", architecture=str(os.getpid()))
        trainer.send(WorkerEvent(ready=WorkerReady(model=model), counters={"gradwire_worker_operations_total": 0}))
        start_heartbeat(trainer.send, threading.Event())
    if behaviour == "prints":
        # A progress bar, a line without end, bytes that are no text.
        sys.stdout.buffer.write(b"10%\r20%\r" + b"x" * 300_000 + b"\n\xff\xfe last words\n")
        sys.stdout.flush()
    for number, command in enumerate(trainer.commands(), start=1):
        if behaviour != "hangs-in-sampling":
            executing.begin(command.command_id, "", None)
        if behaviour.startswith("hangs"):
            trainer.send(WorkerEvent(counters={"gradwire_worker_operations_total": 1}))
            time.sleep(600)
        if behaviour == "leaves-a-reason":
            leave_reason(socket, error("DEVICE_OUT_OF_MEMORY", "There is no memory left here.", device="fake"))
            sys.exit("out of memory")
        if behaviour == "exits-at-first-command":
            sys.exit("out of luck")
        executing.end()
        trainer.send(answer(command, number))


def answer(command: WorkerCommand, number: int) -> WorkerEvent:
    """The event that answers a command."""
    counters = {"gradwire_worker_operations_total": float(number)}
    if command.WhichOneof("command") != "request":
        return WorkerEvent(command_id=command.command_id, done=WorkerDone(), counters=counters)
    response = TrainResponse(optim_step=ops.OptimStepResponse(step=number))
    return WorkerEvent(command_id=command.command_id, response=response, counters=counters)


if __name__ == "__main__":
    main(*sys.argv[1:])
