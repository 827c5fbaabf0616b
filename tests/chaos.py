"""A training loop, and an adversary that kills and cuts what it runs on; for tests and benchmarks/chaos.py."""

import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradwire import AdamParams, Datum, ServiceClient, TrainingClient, datum_from_tokens_weights
from gradwire.errors import GradwireError
from gradwire.futures import APIFuture

from tests.cut_proxy import CutProxy
from tests.full_disk import FileLimit, SmallDisk
from tests.trainer_process import descendants, rank_of, start_trainer, wait_gone

FAULTS = ("worker", "trainer", "both", "cut", "cut in a message", "stall", "full disk")
ANSWER_S = 180.0
"""How long one answer may take, faults included."""


def make_data(seed: int) -> list[Datum]:
    """A few short sequences."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 40, rng.integers(1, 5))
    return [
        datum_from_tokens_weights(rng.integers(3, 127, n + 1), rng.uniform(0, 1, n + 1).astype(np.float32))
        for n in lengths
    ]


def margin_loss(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that couples its datums."""
    sums = torch.stack([logprobs.sum() for logprobs in logprobs_list])
    loss = torch.logsumexp(-0.01 * sums, 0)
    return loss, {"spread": (sums.max() - sums.min()).item()}


class Loop:
    """A seeded training loop: built-in and custom losses, accumulation, failures, saves, calls far ahead.

    On a full disk calls are refused. The loop then does what a careful script does: it waits for all it called, since
    calls behind a refused one may have been taken once there was room, loads the last state it saved, and goes on from
    there. What it is told again must be what it was told the first time.

    Args:
        client: Of a fresh run.
        seed: Of its data.
        steps: Optimizer steps.
    """

    def __init__(self, client: TrainingClient, *, seed: int, steps: int) -> None:
        self._client = client
        self._seed = seed
        self._steps = steps
        self._calls: list[tuple[Place, APIFuture[Any]]] = []
        self._told: dict[Place, str] = {}
        self._saved = (-1, "")
        self.answered = 0
        """Answers so far, refusals among them."""
        self.refused = 0
        """Of them, those that a full disk refused; what had to be called again for it counts as an answer."""

    def run(self) -> dict["Place", str]:
        """Every answer, by its place, as text with every digit."""
        number = -1
        while number < self._steps or self._calls:
            if number < self._steps:
                self._step(number)
                number += 1
            # Up to three steps ahead of the answers.
            if not self._wait_for(12 if number < self._steps and self._saved[1] else 0):
                number = self._go_back()
        return self._told

    def _call(self, place: "Place", future: APIFuture[Any]) -> None:
        self._calls.append((place, future))

    def _wait_for(self, ahead: int) -> bool:
        """Waits until at most `ahead` calls are unanswered. Whether none was refused."""
        while len(self._calls) > ahead:
            place, future = self._calls[0]
            exc = future.exception(ANSWER_S)
            self.answered += 1
            if isinstance(exc, GradwireError) and exc.reason == "STORAGE_FAILED":
                self.refused += 1
                return False
            del self._calls[0]
            told = _told(future)
            assert self._told.setdefault(place, told) == told, f"{place}: {told}, but before: {self._told[place]}"
            if told == "saved":
                self._saved = place[0], future.result(0)
        return True

    def _go_back(self) -> int:
        """After a refusal: to the last state saved. The step to go on with."""
        for _, future in self._calls:
            future.exception(ANSWER_S)
            self.answered += 1
        self._calls.clear()
        number, path = self._saved
        while True:
            time.sleep(0.2)
            if not path:
                return number
            try:
                self._client.load_state_with_optimizer(path).result(ANSWER_S)
                return number + 1
            except GradwireError as exc:
                if exc.reason != "STORAGE_FAILED":
                    raise
                self.answered += 1
                self.refused += 1

    def _step(self, number: int) -> None:
        client = self._client
        if number < 0:
            # What to go back to.
            self._call((number, 0), client.save_state("start", overwrite=True))
            return
        places = itertools.count()

        def call(future: APIFuture[Any]) -> None:
            self._call((number, next(places)), future)

        seed = self._seed * 1000 + number * 10
        if number % 3 != 1:
            call(client.forward_backward(make_data(seed), "cross_entropy"))
        if number % 3 != 0:
            call(client.forward_backward_custom(make_data(seed + 1), margin_loss))
        if number % 5 == 4:
            # Refused, and with it the step: the gradients are gone, here as there.
            call(client.forward_backward(make_data(seed + 2), "no such loss"))
        if number % 4 == 3:
            call(client.forward(make_data(seed + 3)))
        params = AdamParams(learning_rate=1e-2 / (1 + number), weight_decay=0.01, grad_clip_norm=1.0)
        call(client.optim_step(params, grad_accumulation_normalization="num_loss_tokens"))
        if number % 6 == 5:
            call(client.save_state(f"at-{number}", overwrite=True))


Place = tuple[int, int]
"""Of a call: step, and number within the step."""


def _told(future: APIFuture[Any]) -> str:
    try:
        answer = future.result(0)
    except GradwireError as exc:
        # Sorted: a map has no order of its own on the wire. Numbers of operations shift when calls were refused.
        metadata = {name: value for name, value in exc.metadata.items() if not name.endswith("seq_id")}
        return f"{exc.reason}: {sorted(metadata.items())}"
    if hasattr(answer, "loss_fn_outputs"):
        logprobs = [output["logprobs"].to_numpy().tobytes() for output in answer.loss_fn_outputs]
        return f"{hashlib.sha256(b''.join(logprobs)).hexdigest()} {sorted(answer.metrics.items())!r}"
    if hasattr(answer, "metrics"):
        return f"step {answer.step} {sorted(answer.metrics.items())!r}"
    return "saved" if isinstance(answer, str) else repr(answer)


class Trainer:
    """A trainer at a fixed address that can be killed and started again.

    Args:
        model: Folder of its base model.
        folder: Its log and ready file.
        *arguments: More of its command line.
        data_dir: Its data; None keeps it in `folder`.
        threads: Of its worker.
        forked: As in running_trainer.

    Attributes:
        back_after_s: How long it may take to be there again that was killed.
    """

    def __init__(
        self,
        model: Path,
        folder: Path,
        *arguments: str,
        data_dir: Path | None = None,
        threads: str = "1",
        forked: bool = False,
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.address = f"127.0.0.1:{probe.getsockname()[1]}"
        self.log = folder / "trainer.log"
        self._threads = threads
        self.data_dir = data_dir or folder / "data"
        self._ready_file = folder / "ready.json"
        self._forked = forked
        self.back_after_s = 1.5 if forked else 4.0
        self._arguments = ["serve", "--base-model", str(model), "--listen", self.address]
        self._arguments += ["--data-dir", str(self.data_dir), "--ready-file", str(self._ready_file), *arguments]
        self._seen: set[int] = set()
        self.start()

    def start(self) -> None:
        """Starts it, and returns once it listens."""
        self._ready_file.unlink(missing_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": self._threads}
        self.process = start_trainer(self._arguments, env, self.log, forked=self._forked)
        deadline = time.monotonic() + 60
        while not self._ready_file.exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def worker_pids(self) -> list[int]:
        """The engine's processes; none while there is none."""
        below = descendants(self.process.pid)
        self._seen.update(below)
        return [pid for pid in below if rank_of(pid) is not None]

    def pids(self) -> list[int]:
        """Its process and those below it."""
        return [self.process.pid, *descendants(self.process.pid)]

    def kill(self) -> None:
        """SIGKILL."""
        self._seen.update(descendants(self.process.pid))
        self.process.kill()
        self.process.wait(10)

    def kill_worker(self, rng: random.Random | None = None) -> bool:
        """SIGKILL to the worker's processes, or to one of its ranks, drawn. Whether there was one."""
        pids = self.worker_pids()
        for pid in pids if rng is None or not pids else [rng.choice(pids)]:
            os.kill(pid, signal.SIGKILL)
        return bool(pids)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.kill()

    def stop(self) -> None:
        """SIGTERM; it must exit 0, and no process it ever had may be left."""
        self._seen.update(descendants(self.process.pid))
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        assert code == 0, self.log.read_text()
        assert wait_gone(sorted(self._seen)) == []


@dataclass
class Adversary:
    """Does one thing after the other to a trainer and the connections to it, at random instants, until told to stop.

    Attributes:
        trainer: Its victim.
        disk: What it fills, with the victim's data on it.
        proxy: Between client and trainer.
        seed: Of what it does and when.
        faults: What it may do, from FAULTS.
        progress: Answers its victim's client has; it often waits for more of them, and sometimes not.
        at_most: Faults in all.
        done: What it did.
    """

    trainer: Trainer
    disk: SmallDisk | FileLimit
    proxy: CutProxy
    seed: int
    faults: tuple[str, ...]
    progress: Callable[[], int]
    at_most: int
    done: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="adversary")

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def stop(self) -> None:
        """Ends, with the trainer running."""
        self._stop.set()
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _run(self) -> None:
        rng = random.Random(self.seed)
        self._order = rng.sample(self.faults, len(self.faults))
        try:
            while not self._stop.is_set() and len(self.done) < self.at_most:
                self._do(self._next(rng), rng)
                if rng.random() < 0.7:
                    self._wait_for_progress(rng.randint(1, 12))
                    self._stop.wait(rng.uniform(0, 0.05))
                else:
                    # During the recovery from the last one, as likely as not.
                    self._stop.wait(rng.uniform(0, self.trainer.back_after_s))
        except BaseException as exc:
            self.failure = exc

    def _next(self, rng: random.Random) -> str:
        """Each kind once before chance alone decides."""
        return self._order.pop() if self._order else rng.choice(self.faults)

    def _wait_for_progress(self, answers: int) -> None:
        wanted = self.progress() + answers
        while self.progress() < wanted and not self._stop.is_set():
            self._stop.wait(0.002)

    def _do(self, fault: str, rng: random.Random) -> None:
        self.done.append((time.time(), fault))
        if fault in ("trainer", "both"):
            if fault == "both" and rng.random() < 0.5:
                self.trainer.kill_worker(rng)
            self.trainer.kill()
            time.sleep(rng.uniform(0, 0.5))
            self.trainer.start()
        elif fault == "worker":
            self.trainer.kill_worker(rng)
        elif fault == "full disk":
            self._fill_disk(rng)
        elif fault == "cut":
            self.proxy.cut()
        elif fault == "cut in a message":
            self.proxy.cut_after_bytes = rng.randint(1, 3000)
        else:
            self.proxy.stall(rng.uniform(0, 1))

    def _fill_disk(self, rng: random.Random) -> None:
        """For a moment, or until what was killed meanwhile may be back."""
        self.disk.fill()
        try:
            self._stop.wait(rng.uniform(0, 1))
            if (fault := self._next(rng)) != "full disk":
                self._do(fault, rng)
                self._stop.wait(rng.choice([0.5, 4 * self.trainer.back_after_s]))
        finally:
            self.disk.free()


def state_digests(data_dir: Path, client: TrainingClient, name: str) -> dict[str, str]:
    """Digests of a run's parameters and optimizer state, through a checkpoint."""
    client.save_state(name, overwrite=True).result(ANSWER_S)
    manifest = data_dir / "checkpoints" / client.run_id / "state" / name / "manifest.json"
    files = json.loads(manifest.read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.startswith(("parameters", "optimizer"))}


def forget(data_dir: Path, client: TrainingClient) -> None:
    """Deletes a run and what it saved, which many trials would fill a small disk with."""
    client.delete_run()
    shutil.rmtree(data_dir / "checkpoints" / client.run_id, ignore_errors=True)


def left_behind(trainer: Trainer) -> list[str]:
    """What a trainer that has stopped should not have left: half-written folders, sockets."""
    partial = [str(path) for pattern in (".partial-*", ".replaced-*") for path in trainer.data_dir.rglob(pattern)]
    return partial + [str(path) for path in Path("/tmp").glob(f"gradwire-worker-{trainer.process.pid}-*")]


def undisturbed(
    trainer: Trainer, *, seed: int, steps: int, lora_rank: int = 0
) -> tuple[dict[Place, str], dict[str, str]]:
    """What the loop's answers, and its final state, are when nothing happens."""
    with (
        ServiceClient(f"http://{trainer.address}") as service,
        service.create_training_client(lora_rank=lora_rank) as client,
    ):
        answers = Loop(client, seed=seed, steps=steps).run()
        digests = state_digests(trainer.data_dir, client, "final")
        forget(trainer.data_dir, client)
    return answers, digests
