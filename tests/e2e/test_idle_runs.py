"""Runs that nobody uses leave a real worker's memory, and come back as if they had never left."""

import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from gradwire import AdamParams, ServiceClient, TrainingClient

from tests.chaos import make_data, margin_loss, state_digests
from tests.trainer_process import TrainerProcess, running_trainer

LORA_RANKS = (0, 4)


def begin(client: TrainingClient) -> None:
    """Two steps, and half of what the third is of."""
    for number in range(2):
        client.forward_backward(make_data(number), "cross_entropy")
        client.optim_step(AdamParams(learning_rate=1e-2))
    client.forward_backward_custom(make_data(2), margin_loss).result(60)


def go_on(client: TrainingClient) -> list[float]:
    """The rest of the third step and a fourth; losses."""
    futures = []
    for number in (3, 4):
        futures.append(client.forward_backward(make_data(number), "cross_entropy"))
        step = client.optim_step(AdamParams(learning_rate=5e-3), grad_accumulation_normalization="num_loss_tokens")
    assert step.result(60).step == 4
    return [future.result(60).metrics["loss:sum"] for future in futures]


def test_idle_runs_are_unloaded_after_their_lease_and_go_on_bit_for_bit(tiny_llama: Path, tmp_path: Path):
    with (
        running_trainer(tiny_llama, tmp_path, "--idle-lease-s", "0.5", forked=True) as trainer,
        ServiceClient(trainer.base_url, timeout_s=90) as service,
    ):
        trainer.wait_ready()
        busy = service.create_training_client()
        busy.zero_grad().result(60)
        wanted: list[tuple[list[float], dict[str, str]]] = []
        for lora_rank in LORA_RANKS:
            with service.create_training_client(lora_rank=lora_rank) as undisturbed:
                begin(undisturbed)
                wanted.append((go_on(undisturbed), state_digests(tmp_path / "data", undisturbed, "final")))
                undisturbed.delete_run()
        idle: list[str] = []
        for lora_rank in LORA_RANKS:
            with service.create_training_client(lora_rank=lora_rank) as client:
                begin(client)
                idle.append(client.run_id)
        assert counted(trainer, "gradwire_runs") == 3
        # The run in use stays; what the worker says of itself comes with its answers.
        wait_until(lambda: busy.zero_grad().result(60) or counted(trainer, "gradwire_worker_runs") == 1)
        for run_id, (losses, digests) in zip(idle, wanted, strict=True):
            back = service.training_client(run_id)
            assert go_on(back) == losses
            assert state_digests(tmp_path / "data", back, "final") == digests
        assert counted(trainer, "gradwire_worker_runs") == 3
        log = trainer.log.read_text()
        unloaded = [f"Unloaded an idle run. run_id={run_id}" in log for run_id in (*idle, busy.run_id)]
        assert unloaded == [True, True, False]


def counted(trainer: TrainerProcess, name: str) -> float:
    """A metric of the trainer."""
    with urllib.request.urlopen(f"http://{trainer.metrics_address}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


def wait_until(done: Callable[[], bool], timeout_s: float = 30) -> None:
    """Until it is true."""
    deadline = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.05)
