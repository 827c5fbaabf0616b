"""The worker process: `python -m trainer_service.engine`, started by the trainer, once per rank.

Rank 0 dials the trainer's unix socket, says hello, loads the model, and then executes commands one after another. It
ends with exit code 0 when the trainer ends the stream. The other ranks do as it tells them (worker/device_loop.py).
"""

import argparse
import contextlib
import gc
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gradwire._wire.protocol_version import __version__
from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.trainer_service_pb2 import LossInfo, Mesh, ModelInfo
from gradwire.v1.worker_service_pb2 import LoraTargets, WorkerCommand, WorkerEvent, WorkerHello, WorkerReady

from trainer_service.adapter_folders import starred
from trainer_service.command_lines import add_options, read_options
from trainer_service.config import Limits
from trainer_service.engine.rank_channels import LeaderGoneError, RankFailedError, Ranks
from trainer_service.engine.worker.connection import TrainerConnection
from trainer_service.engine.worker.heartbeat import start_heartbeat
from trainer_service.engine.worker.inbox import Inbox
from trainer_service.engine.worker.progress import told_of_progress
from trainer_service.executing import Executing, leave_reason
from trainer_service.logs import configure_logging
from trainer_service.processes import die_a_second_after_parent, die_with_parent
from trainer_service.worker_config import SPARE_VARIABLE, RankSettings, WorkerConfig

if TYPE_CHECKING:
    from trainer_service.engine.engine import Engine
    from trainer_service.engine.sampling.service import Sampling
    from trainer_service.engine.worker.device_loop import DeviceLoop

Send = Callable[[WorkerEvent], object]
logger = logging.getLogger("trainer_service.engine")

_GOODBYE_S = 5.0
"""How long to wait for the trainer to end the stream after a failed load."""
_LIBRARIES = (
    "trainer_service.engine.engine",
    "trainer_service.engine.sampling.service",
    "trainer_service.engine.worker.commands",
    "transformers.models.auto.modeling_auto",
)
"""Their imports bring all others, but for the model's own."""
_LOWEST_PRIORITY = 19
_ABANDON_S = 1.0
"""How long an operation may continue after the stream has ended, when nobody waits for it."""
_ORPHAN_CHECK_S = 0.02
"""How often it is looked meanwhile whether the trainer is gone, after which nothing may continue."""


def main() -> int:
    """Runs the worker. Returns the exit code."""
    socket, config = _parse()
    # Whoever started us decides when we end: a Ctrl-C in the user's terminal is for the program in the foreground.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    follows = os.environ.get("RANK", "0") != "0"
    if follows:
        die_with_parent()
    else:
        die_a_second_after_parent()
    configure_logging(as_json=False)
    if os.environ.get(SPARE_VARIABLE) and not _wait_until_needed():
        return 0
    try:
        return _follow(socket, config) if follows else _lead(socket, config)
    except LeaderGoneError:
        logger.info("The first rank is gone.", extra={"fields": {"rank": os.environ["RANK"]}})
        return 1
    except Exception as exc:
        if isinstance(exc, RankFailedError):
            leave_reason(socket, exc.failure)
        # Ranks that wait for this one notice that it is gone.
        logger.exception("A rank ended.", extra={"fields": {"rank": os.environ.get("RANK", "0")}})
        return 1


def _lead(socket: str, config: WorkerConfig) -> int:
    parent = os.getppid()
    executing = Executing(socket)
    try:
        return _lead_for(socket, config, executing, parent)
    finally:
        if os.getppid() != parent:
            # The other ranks died with the trainer, and this one of that.
            executing.withdraw()


def _lead_for(socket: str, config: WorkerConfig, executing: Executing, parent: int) -> int:
    try:
        trainer = TrainerConnection(socket, max_message_bytes=Limits().max_message_bytes)
    except OSError as exc:
        logger.error(f"No trainer listens on {socket}: {exc}. Workers are started by the trainer.")
        return 1
    trainer.send(
        WorkerEvent(
            hello=WorkerHello(
                token=os.environ.get("GRADWIRE_WORKER_TOKEN", ""),
                pid=os.getpid(),
                mesh=_mesh(config.ranks),
                software_version=__version__,
            )
        )
    )
    arguments = (trainer, executing, parent)
    threading.Thread(target=_abandon, args=arguments, name="stream-end", daemon=True).start()
    try:
        ranks = _ranks(config, lambda text: trainer.send(WorkerEvent(loading=text)))
        with _nothing_collected():
            engine = _load(socket, config, ranks, trainer.send)
            sampling = _sampling(engine, config.checkpoint_dir, trainer.send, trainer.send)
    except Exception as exc:
        return _give_up(trainer, exc)
    trainer.send(_ready(engine, sampling, _mesh(config.ranks)))
    start_heartbeat(trainer.send, trainer.ended)
    logger.info("Ready.", extra={"fields": {"base_model": engine.model.base_model, "device": engine.model.device}})
    from trainer_service.engine.worker.device_loop import told_to_all

    loop = _device_loop(engine, sampling, trainer.send, told_to_all(trainer.commands(), ranks), executing=executing)
    loop.lead(trainer.send, trainer.ended.is_set)
    trainer.finish()
    logger.info("The trainer ended the stream.", extra={"fields": {"how": trainer.describe_end()}})
    return 0 if trainer.ended_cleanly() else 1


def _follow(socket: str, config: WorkerConfig) -> int:
    outbox: list[WorkerEvent] = []
    try:
        ranks = _ranks(config, _says_nothing)
        with _nothing_collected():
            engine = _load(socket, config, ranks, _says_nothing)
            # What its samples answer, the leader sends; what becomes of a snapshot, the leader knows.
            sampling = _sampling(engine, config.checkpoint_dir, _says_nothing, outbox.append)
    except GradwireError:
        # All ranks refuse it, and the leader tells the trainer why.
        time.sleep(_GOODBYE_S)
        return 1
    from trainer_service.engine.worker.device_loop import told_by_leader

    loop = _device_loop(engine, sampling, _says_nothing, told_by_leader(ranks), outbox=outbox)
    loop.follow()
    return 0


def _says_nothing(event: object) -> None:
    """Stands for the trainer on ranks that do not talk to it."""


def _parse() -> tuple[str, WorkerConfig]:
    """Path of the trainer's socket, and the settings."""
    parser = argparse.ArgumentParser(prog="python -m trainer_service.engine", description=__doc__)
    parser.add_argument("--socket", required=True, help="path of the trainer's unix socket")
    add_options(parser, WorkerConfig)
    arguments = parser.parse_args()
    return arguments.socket, read_options(WorkerConfig, arguments)


def _wait_until_needed() -> bool:
    """Imports all that loading a model will need, and waits. False if the trainer is gone instead."""

    def prepare() -> None:
        # Linux has a priority for each thread; the worker that trains comes first.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        with _nothing_collected():
            _import_peft()
            for name in _LIBRARIES:
                importlib.import_module(name)

    preparing = threading.Thread(target=prepare, name="imports", daemon=True)
    preparing.start()
    needed = bool(sys.stdin.buffer.read(1))
    if needed:
        preparing.join()
    return needed


def _mesh(settings: RankSettings) -> Mesh:
    """What this rank was told of the worker's processes."""
    world_size, local_world_size = (int(os.environ.get(name) or 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    return Mesh(
        world_size=world_size,
        local_world_size=local_world_size,
        nnodes=world_size // local_world_size,
        fsdp_size=world_size // (settings.dp_replicate_size * settings.tp_size),
        dp_replicate_size=settings.dp_replicate_size,
        tp_size=settings.tp_size,
        ep_size=settings.ep_size,
    )


def _ranks(config: WorkerConfig, say: Callable[[str], object]) -> Ranks:
    if os.environ.get("WORLD_SIZE", "1") != "1":
        say(f"waiting for {os.environ['WORLD_SIZE']} ranks to meet")
    settings = config.ranks
    return Ranks.from_environment(
        timeout_s=settings.collective_timeout_s,
        dp_replicate_size=settings.dp_replicate_size,
        tp_size=settings.tp_size,
        ep_size=settings.ep_size,
    )


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Importing and loading create a million objects that stay. Searching them for garbage took a tenth of the start,
    and would cost time again and again during training."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _load(socket: str, config: WorkerConfig, ranks: Ranks, send: Send) -> "Engine":
    if config.loss_module:
        from trainer_service.engine.losses import LOSSES
        from trainer_service.engine.losses.module import load_losses

        send(WorkerEvent(loading=f"importing {config.loss_module}"))
        LOSSES.update(load_losses(config.loss_module, LOSSES))
    send(WorkerEvent(loading="importing torch and transformers"))
    # Imported here, not at the top: these imports take seconds, and the trainer should hear from us first.
    _import_peft()
    import torch
    from transformers.utils import logging as transformers_logging

    from trainer_service.engine.device import pick_device, set_num_threads
    from trainer_service.engine.engine import Engine
    from trainer_service.engine.freed_memory import keep_while_working
    from trainer_service.engine.spinning import spin_when_alone

    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    num_threads = set_num_threads(ranks.local_world_size)
    spin_when_alone()
    send(WorkerEvent(loading="looking for a device"))
    device = pick_device(ranks.local_rank, config.engine.compute_dtype, ranks.local_world_size)
    if device.torch_device.type == "cpu":
        keep_while_working()
    loading = WorkerEvent(loading=f"loading {config.served_model_name or config.base_model} onto {device.name}")
    send(loading)
    logger.info("Loading.", extra={"fields": {"base_model": config.base_model, "num_threads": num_threads}})
    # A download or a large model may take hours, but the trainer gives up on a worker that is silent for minutes.
    with told_of_progress(lambda: send(loading)):
        return Engine(
            config.base_model,
            device=device,
            checkpoint_dir=config.checkpoint_dir,
            limits=Limits(max_runs=config.max_runs),
            settings=config.engine,
            max_context_length=config.max_context_length,
            served_model_name=config.served_model_name,
            ranks=ranks,
            findings_folder=Path(socket).parent,
        )


def _import_peft() -> None:
    """Imports peft without bitsandbytes, which is a quarter of all imports where it is installed.

    peft imports it for layers of its own. models/quantized.py calls its functions itself, and imports it when it does.
    """
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        found = importlib.import_module("peft.import_utils")
        # Remembered by peft, which asks again for every layer that it adapts.
        found.is_bnb_available()
        found.is_bnb_4bit_available()
    finally:
        del sys.modules["bitsandbytes"]


def _sampling(engine: "Engine", checkpoint_dir: Path, send: Send, answer: Send) -> "Sampling":
    from trainer_service.engine.sampling.service import Sampling

    trying = WorkerEvent(loading="finding out how the model's samples can be decoded")
    send(trying)
    with told_of_progress(lambda: send(trying)):
        return Sampling(engine, checkpoint_dir=checkpoint_dir, send=answer)


def _ready(engine: "Engine", sampling: "Sampling", mesh: Mesh) -> WorkerEvent:
    from trainer_service.engine.losses import LOSSES
    from trainer_service.engine.models.lora_targets import KINDS

    model = engine.model
    return WorkerEvent(
        counters=engine.counters.as_metrics(),
        ready=WorkerReady(
            model=ModelInfo(
                base_model=model.base_model,
                architecture=model.architecture,
                vocab_size=model.vocab_size,
                max_context_length=model.max_context_length,
                num_parameters=model.num_parameters,
                dtype=model.dtype,
                device=model.device,
                batching=engine.traits.batching,
                sampling=sampling.described,
                mesh=mesh,
            ),
            losses=[
                LossInfo(
                    name=loss.name,
                    loss_fn_inputs=loss.inputs,
                    loss_fn_config_keys=loss.config,
                    loss_fn_config_defaults=loss.settings({}),
                    soft_targets=loss.soft_targets,
                )
                for loss in LOSSES.values()
            ],
            lora_targets=LoraTargets(**{kind: starred(getattr(engine.lora_targets, kind)) for kind in KINDS}),
            model_folder=str(engine.folder),
        ),
    )


def _give_up(trainer: TrainerConnection, exc: Exception) -> int:
    """Tells the trainer why this worker cannot start, and waits until it has heard."""
    if isinstance(exc, GradwireError):
        logger.error(exc.message)
    else:
        logger.error("Cannot start.", exc_info=exc)
        exc = error("INTERNAL", f"The worker could not load the model: {type(exc).__name__}: {exc}")
    trainer.send(WorkerEvent(failed=to_status(exc)))
    trainer.finish()
    trainer.ended.wait(_GOODBYE_S)
    return 1


def _device_loop(
    engine: "Engine",
    sampling: "Sampling",
    send: Send,
    raw: Iterable[WorkerCommand],
    *,
    executing: Executing | None = None,
    outbox: list[WorkerEvent] | None = None,
) -> "DeviceLoop":
    """What executes commands on this rank, and the threads that read and prepare them."""
    from trainer_service.engine.worker.commands import Commands, overtakes, quickly_prepared
    from trainer_service.engine.worker.device_loop import DeviceLoop

    commands = Commands(engine, send, sampling, executing)
    inbox = Inbox(commands.prepare, overtakes, quick=quickly_prepared)

    def read() -> None:
        # Ranks that hear nothing more have ended too; main() says how.
        with contextlib.suppress(RuntimeError):
            inbox.read(raw)

    threading.Thread(target=read, name="commands", daemon=True).start()
    threading.Thread(target=inbox.prepare_operations, name="prepare-operations", daemon=True).start()
    threading.Thread(target=inbox.prepare_overtaking, name="prepare-sampling", daemon=True).start()
    return DeviceLoop(
        engine.ranks,
        inbox=inbox,
        commands=commands,
        sampling=sampling,
        executing=executing,
        outbox=[] if outbox is None else outbox,
    )


def _abandon(trainer: TrainerConnection, executing: Executing, parent: int) -> None:
    """Ends the process, even during an operation, once nobody is left to answer."""
    trainer.ended.wait()
    executing.withdraw()
    end_s = time.monotonic() + _ABANDON_S
    while time.monotonic() < end_s and os.getppid() == parent:
        time.sleep(_ORPHAN_CHECK_S)
    logger.info("The trainer is gone.", extra={"fields": {"how": trainer.describe_end()}})
    _exit(0 if trainer.ended_cleanly() else 1)


def _exit(code: int) -> None:
    """Exits at once: nothing is left to do, and an orderly teardown of torch and gRPC takes a second and can hang."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _exit(main())
