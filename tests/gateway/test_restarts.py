"""Gateways that are killed: what was acknowledged is done once, and every future is answered."""

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
import torch
from tinker import types

from tests.gateway.conftest import KEY
from tests.gateway.data import TOKENS, grad_norm, make_data
from tests.gateway_process import GatewayProcess, running_gateway
from tests.trainer_process import TrainerProcess

ADAM = types.AdamParams(learning_rate=1e-2)


@pytest.fixture
def mortal(trainer: TrainerProcess, tmp_path: Path) -> Iterator[GatewayProcess]:
    """A gateway of the test's own."""
    with running_gateway(trainer.base_url, tmp_path, "--alias", "tiny") as running:
        yield running


def test_a_killed_gateway_changes_no_bit(mortal: GatewayProcess, client: tinker.TrainingClient):
    """`client` is undisturbed, on a gateway that lives."""
    with tinker.ServiceClient(base_url=mortal.base_url, api_key=KEY) as service:
        disturbed = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        for round_number in range(3):
            data = make_data(4)
            pairs = [(one.forward_backward(data, "cross_entropy"), one.optim_step(ADAM)) for one in (disturbed, client)]
            if round_number:
                mortal.kill()
                mortal.start()
            (ours, our_step), (theirs, their_step) = pairs
            assert grad_norm(our_step.result()) == grad_norm(their_step.result())
            for one, other in zip(ours.result().loss_fn_outputs, theirs.result().loss_fn_outputs, strict=True):
                np.testing.assert_array_equal(one["logprobs"].to_numpy(), other["logprobs"].to_numpy())


def test_a_gateway_killed_between_the_passes_of_a_custom_loss_changes_no_bit(
    mortal: GatewayProcess, client: tinker.TrainingClient
):
    """The graph of the first pass is forgotten with it, so the second is done in full."""

    def loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return torch.logsumexp(-0.1 * torch.stack([one.sum() for one in logprobs]), 0), {}

    def deadly(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        mortal.kill()
        mortal.start()
        return loss(data, logprobs)

    with tinker.ServiceClient(base_url=mortal.base_url, api_key=KEY) as service:
        disturbed = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        ours = disturbed.forward_backward_custom(make_data(3), deadly).result().metrics
        theirs = client.forward_backward_custom(make_data(3), loss).result().metrics
        assert ours.pop("forward_passes:sum") == 1 + theirs.pop("forward_passes:sum")
        assert ours == theirs
        assert disturbed.optim_step(ADAM).result().metrics == client.optim_step(ADAM).result().metrics


def test_two_gateways_before_one_trainer_share_what_is_saved(mortal: GatewayProcess, client: tinker.TrainingClient):
    client.forward_backward(make_data(), "cross_entropy")
    client.optim_step(ADAM).result()
    path = client.save_state("shared").result().path
    here = client.forward(make_data(), "cross_entropy").result()
    with tinker.ServiceClient(base_url=mortal.base_url, api_key=KEY) as service:
        loaded = service.create_training_client_from_state_with_optimizer(path).result()
        there = loaded.forward(make_data(), "cross_entropy").result()
        assert there.metrics["loss:sum"] == here.metrics["loss:sum"]


def test_futures_of_a_killed_gateway_are_answered_by_the_next(mortal: GatewayProcess):
    with tinker.ServiceClient(base_url=mortal.base_url, api_key=KEY) as service:
        client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        sampler = client.save_weights_and_get_sampling_client().result()
        passed = client.forward_backward(make_data(), "cross_entropy")
        saved = client.save_state("kept")
        samples = [
            sampler.sample(types.ModelInput.from_ints(TOKENS[:3]), 2, types.SamplingParams(max_tokens=4))
            for _ in range(4)
        ]
        concurrent.futures.wait([passed.future()], timeout=0.05)
        mortal.kill()
        mortal.start()
        assert passed.result().metrics["loss:sum"] > 0
        assert saved.result().path.endswith("/weights/kept")
        assert all(len(one.result().sequences) == 2 for one in samples)


def test_a_finished_sessions_runs_go_and_its_checkpoints_stay(trainer: TrainerProcess, tmp_path: Path):
    with running_gateway(trainer.base_url, tmp_path, "--alias", "tiny", "--session-grace-s", "12") as gateway:
        rest = tinker.RestClient(base_url=gateway.base_url, api_key=KEY)
        service = tinker.ServiceClient(base_url=gateway.base_url, api_key=KEY)
        client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        path = client.save_state("left").result().path
        run_id = path.removeprefix("tinker://").partition("/")[0]
        assert run_id in {one.training_run_id for one in rest.list_training_runs().result().training_runs}
        service.close("success")
        run = rest.get_training_run(run_id).result()
        # It answers from its checkpoint alone once it is gone.
        assert run.last_checkpoint is not None
        assert run.last_checkpoint.tinker_path == path
        resumed = tinker.ServiceClient(base_url=gateway.base_url, api_key=KEY)
        again = resumed.create_training_client_from_state(path).result()
        assert again.forward(make_data(), "cross_entropy").result().metrics["loss:sum"] > 0
        resumed.close("success")
