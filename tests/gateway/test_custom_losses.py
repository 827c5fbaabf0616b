"""Custom losses of the official SDK: one forward where the second pass is recognised, exact and counted."""

from typing import Any

import gradwire
import httpx
import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.gateway.conftest import KEY
from tests.gateway.data import grad_norm, make_data
from tests.gateway_process import GatewayProcess
from tests.trainer_process import TrainerProcess

ADAM = types.AdamParams(learning_rate=1e-2)


def squares(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that no built-in one is, and that couples datums."""
    together = torch.cat(logprobs)
    return (together**2).sum() + together.mean() * 3, {"mine:mean": 1.0}


def test_a_custom_loss_costs_one_forward_and_has_the_native_bits(
    client: tinker.TrainingClient, trainer: TrainerProcess
):
    with gradwire.ServiceClient(trainer.base_url, timeout_s=60) as native:
        twin = native.create_training_client(lora_rank=4, seed=1)
        for _ in range(3):
            ours = client.forward_backward_custom(make_data(3), squares)
            stepped = client.optim_step(ADAM).result()
            theirs = twin.forward_backward_custom(make_data(3), squares).result()
            twin_step = twin.optim_step(gradwire.AdamParams(learning_rate=1e-2)).result()
            metrics = ours.result().metrics
            # The second pass did no forward of its own.
            assert metrics["forward_passes:sum"] == 0
            assert metrics["loss:sum"] == theirs.metrics["loss:sum"]
            assert metrics["mine:mean"] == 1.0
            assert grad_norm(stepped) == twin_step.metrics["grad_norm:mean"]
        after = client.forward(make_data(3), "cross_entropy").result()
        expected = twin.forward(make_data(3), "cross_entropy").result()
        for one, other in zip(after.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
            np.testing.assert_array_equal(one["logprobs"].to_numpy(), other["logprobs"].to_numpy())
        twin.delete_run()


def test_the_surrogate_loss_is_what_cross_entropy_of_these_weights_would_say(client: tinker.TrainingClient):
    metrics = client.forward_backward_custom(make_data(2), squares).result().metrics
    client.optim_step(ADAM).result()
    assert np.isfinite(metrics["surrogate_loss:sum"])


def test_second_passes_are_counted_by_what_they_cost(client: tinker.TrainingClient, gateway: GatewayProcess):
    def counted() -> list[float]:
        text = httpx.get(f"{gateway.base_url}/metrics", headers={"x-api-key": KEY}, trust_env=False).text
        found = [line for line in text.splitlines() if line.startswith("gradwire_gateway_custom_losses_total{")]
        return [float(line.rpartition(" ")[2]) for line in sorted(found)]

    before = counted()
    client.forward_backward_custom(make_data(2), squares).result()
    assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 0]


def test_a_second_pass_over_other_data_is_done_in_full(client: tinker.TrainingClient):
    """By hand, as an SDK would that changed its data between the passes."""
    kept = client._run_fwd_bwd(  # pyright: ignore[reportPrivateUsage]
        client._chunked_requests(make_data(1)),  # pyright: ignore[reportPrivateUsage]
        "cross_entropy",
        None,
        forward_only=True,
    )
    assert kept.result().metrics["loss:sum"] > 0
    other = client.forward_backward(make_data(2), "cross_entropy").result()
    assert other.metrics["forward_passes:sum"] > 0
    client.optim_step(ADAM).result()


def test_a_loss_over_several_chunks_costs_one_forward_each(
    service: tinker.ServiceClient, client: tinker.TrainingClient, monkeypatch: pytest.MonkeyPatch
):
    """Chunks arrive with the first one last, forwards and backwards alike."""
    holder: Any = service.holder
    chunks = holder._client_config.model_copy(update={"fwdbwd_max_chunk_len": 2})
    monkeypatch.setattr(holder, "_client_config", chunks)
    ours = client.forward_backward_custom(make_data(7), squares)
    stepped = client.optim_step(ADAM)
    assert ours.result().metrics["forward_passes:sum"] == 0
    metrics = stepped.result().metrics
    assert metrics is not None
    assert metrics["num_sequences:sum"] == 7
