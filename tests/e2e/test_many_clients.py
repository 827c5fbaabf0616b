"""Fifty clients with a key and a run each, at once: all finish, with their own numbers, and none sees another's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gradwire import AdamParams, Datum, ModelInput, ServiceClient
from gradwire.errors import NotFoundError, ResourceExhaustedError, UnauthenticatedError

from tests.trainer_process import running_trainer

NUM_CLIENTS = 50
NUM_KINDS = 5
"""Clients i and i + 5 train on the same data, and must come to the same numbers however they interleave."""


def batch(kind: int) -> list[Datum]:
    tokens = np.random.default_rng(kind).integers(3, 120, size=12).tolist()
    return [Datum(ModelInput.from_ints(tokens[:-1]), {"target_tokens": tokens[1:], "weights": [1.0] * 11})]


def train(service: ServiceClient, client_number: int, everybody: threading.Barrier) -> tuple[str, list[float]]:
    """A run's id and its losses."""
    client = service.create_training_client(display_name=f"client {client_number}")
    everybody.wait(120)
    losses = []
    for _ in range(3):
        future = client.forward_backward(batch(client_number % NUM_KINDS), "cross_entropy")
        stepped = client.optim_step(AdamParams(learning_rate=1e-2))
        losses.append(future.result(120).metrics["loss:sum"])
        stepped.result(120)
    everybody.wait(120)
    return client.run_id, losses


def test_fifty_clients_with_keys_train_at_once_and_see_only_their_own_runs(tiny_llama: Path, tmp_path: Path):
    file = tmp_path / "keys"
    keys = {f"user{i:02d}": f"key-of-user-{i:02d}" for i in range(NUM_CLIENTS)}
    file.write_text("".join(f"{name} {key}\n" for name, key in keys.items()) + "ops key-of-ops admin\n")
    arguments = ("--api-key-file", str(file), "--max-runs", str(NUM_CLIENTS), "--max-runs-per-key", "1")
    with (
        running_trainer(tiny_llama, tmp_path, *arguments, forked=True) as trainer,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        services = [ServiceClient(trainer.base_url, key, timeout_s=120) for key in keys.values()]
        everybody = threading.Barrier(NUM_CLIENTS)
        try:
            futures = [pool.submit(train, service, i, everybody) for i, service in enumerate(services)]
            results = [future.result(240) for future in futures]
            run_ids = [run_id for run_id, _ in results]
            assert len(set(run_ids)) == NUM_CLIENTS
            for kind in range(NUM_KINDS):
                same = [losses for _, losses in results[kind::NUM_KINDS]]
                assert all(losses == same[0] for losses in same)
                assert same[0][0] > same[0][1] > same[0][2]
            assert len({losses[0] for _, losses in results}) == NUM_KINDS

            for i, service in enumerate(services):
                assert [(run.run_id, run.step) for run in service.list_runs()] == [(run_ids[i], 3)]
                with pytest.raises(NotFoundError):
                    service.training_client(run_ids[i - 1])
            with pytest.raises(ResourceExhaustedError, match=r"This API key has|This trainer holds"):
                services[0].create_training_client()
            with ServiceClient(trainer.base_url, "key-of-ops") as ops:
                assert {run.run_id for run in ops.list_runs()} == set(run_ids)

            # As an editor does; a file that is written in place counts a second later.
            fresh = file.with_suffix(".new")
            fresh.write_text("ops key-of-ops admin\n")
            fresh.replace(file)
            with pytest.raises(UnauthenticatedError):
                services[0].list_runs()
        finally:
            everybody.abort()
            for service in services:
                service.close()
        log = trainer.log.read_text()
    assert "key=user07" in log
    assert "key-of-" not in log
