"""Gateway, trainer, worker and client killed at random under a loop; for tests and benchmarks/gateway_chaos.py."""

import json
import multiprocessing
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos import Trainer
from tests.gateway import chaos_client
from tests.gateway_process import GatewayProcess

FAULTS = ("gateway", "trainer", "worker", "client")
_PATIENCE_S = 240.0
_CLIENTS = multiprocessing.get_context("forkserver")
_CLIENTS.set_forkserver_preload(["tests.gateway.chaos_client"])


@dataclass
class Trial:
    """One loop, and what is done to it.

    Attributes:
        trainer: What it trains on.
        gateway: What it talks to.
        record: What its client writes down.
        steps: Of the loop.
    """

    trainer: Trainer
    gateway: GatewayProcess
    record: Path
    steps: int
    done: list[str] = field(default_factory=list)

    def run(self, seed: int, faults: tuple[str, ...] = ()) -> dict[str, Any]:
        """Every answer by its place, with each of `faults` done once, in a random order at random moments.

        Args:
            seed: Of order and moments.
            faults: From FAULTS.
        """
        rng = random.Random(seed)
        self._start_client()
        deadline = time.monotonic() + _PATIENCE_S
        for fault in rng.sample(faults, len(faults)):
            self._wait_for_lines(self._lines() + rng.randint(0, 3), deadline)
            time.sleep(rng.uniform(0, 0.3))
            self._do(fault, rng)
        self._client.join(max(1.0, deadline - time.monotonic()))
        assert self._client.exitcode == 0, self._log.read_text()
        return self._answers()

    def _start_client(self) -> None:
        asked = (self.gateway.base_url, self.record, self.steps)
        self._client = _CLIENTS.Process(target=chaos_client.run, args=asked, daemon=True)
        self._client.start()

    @property
    def _log(self) -> Path:
        return self.record.with_suffix(".log")

    def _lines(self) -> int:
        return len(self.record.read_text().splitlines()) if self.record.exists() else 0

    def _wait_for_lines(self, count: int, deadline: float) -> None:
        while self._lines() < count and self._client.is_alive():
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.005)

    def _do(self, fault: str, rng: random.Random) -> None:
        if not self._client.is_alive():
            return
        self.done.append(fault)
        if fault == "gateway":
            self.gateway.kill()
            time.sleep(rng.uniform(0, 0.5))
            self.gateway.start()
        elif fault == "trainer":
            self.trainer.kill()
            time.sleep(rng.uniform(0, 0.5))
            self.trainer.start()
        elif fault == "worker":
            self.trainer.kill_worker()
        else:
            self._client.kill()
            self._client.join()
            self._drop_half_a_line()
            self._start_client()

    def _drop_half_a_line(self) -> None:
        if self.record.exists():
            whole, newline, _ = self.record.read_bytes().rpartition(b"\n")
            self.record.write_bytes(whole + newline)

    def _answers(self) -> dict[str, Any]:
        """By step and kind; what a client that was killed is told again has to be what it was told before."""
        answers: dict[str, Any] = {}
        for line in map(json.loads, self.record.read_text().splitlines()):
            for kind in ("told", "sampled"):
                if kind in line:
                    place = f"{kind} {line['step']}"
                    before = answers.setdefault(place, line[kind])
                    assert before == line[kind], f"{place}: {line[kind]}, but before: {before}"
        return answers
