"""Loops of the official tinker SDK, unmodified, through the gateway; against the native client's bits."""

import itertools

import gradwire
import numpy as np
import pytest
import tinker
from tinker import types

from tests.gateway.data import TOKENS, grad_norm, make_data
from tests.trainer_process import TrainerProcess

ADAM = types.AdamParams(learning_rate=1e-2)
GREEDY = types.SamplingParams(max_tokens=6, temperature=0.0)
PROMPT = types.ModelInput.from_ints(TOKENS[:4])


def test_a_supervised_loop_learns_saves_and_samples(service: tinker.ServiceClient, client: tinker.TrainingClient):
    losses = []
    for _ in range(4):
        passed, stepped = client.forward_backward(make_data(), "cross_entropy"), client.optim_step(ADAM)
        losses.append(passed.result().metrics["loss:sum"])
        assert grad_norm(stepped.result()) > 0
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    state = client.save_state("state", user_metadata={"step": "4"}).result().path
    frozen = client.save_weights_and_get_sampling_client().result()
    before = frozen.sample(PROMPT, num_samples=1, sampling_params=GREEDY).result().sequences[0]
    saved = client.save_weights_for_sampler("sampler").result().path
    for _ in range(3):
        client.forward_backward(make_data(weights=[-1.0] * 8), "cross_entropy")
        client.optim_step(ADAM)
    again = frozen.sample(PROMPT, num_samples=1, sampling_params=GREEDY).result().sequences[0]
    loaded = service.create_sampling_client(model_path=saved).result()
    same = loaded.sample(PROMPT, num_samples=1, sampling_params=GREEDY).result().sequences[0]
    assert before.tokens == again.tokens == same.tokens
    assert before.stop_reason == "length"
    resumed = service.create_training_client_from_state_with_optimizer(state).result()
    assert resumed.get_info().lora_rank == 4
    first = resumed.forward(make_data(), "cross_entropy").result().metrics["loss:sum"]
    assert first < losses[-1]


def test_every_answer_is_the_native_clients_to_the_bit(client: tinker.TrainingClient, trainer: TrainerProcess):
    with gradwire.ServiceClient(trainer.base_url, timeout_s=60) as native:
        twin = native.create_training_client(lora_rank=4, seed=1)
        for weights in ([1.0] * 8, [0.5, -1.0, 0.0, 2.0, 1.0, 1.0, 0.25, 1.0]):
            data = make_data(weights=weights)
            ours = client.forward_backward(data, "cross_entropy")
            client.optim_step(ADAM).result()
            theirs = twin.forward_backward(data, "cross_entropy").result()
            twin.optim_step(gradwire.AdamParams(learning_rate=1e-2)).result()
            assert ours.result().metrics["loss:sum"] == theirs.metrics["loss:sum"]
            for one, other in zip(ours.result().loss_fn_outputs, theirs.loss_fn_outputs, strict=True):
                np.testing.assert_array_equal(one["logprobs"].to_numpy(), other["logprobs"].to_numpy())
        twin.delete_run()


def test_logprobs_of_a_prompt_are_those_of_forward(client: tinker.TrainingClient):
    sampler = client.save_weights_and_get_sampling_client().result()
    tokens = [*TOKENS, 50]
    got = sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result()
    found = client.forward(make_data(1), "cross_entropy").result().loss_fn_outputs[0]["logprobs"].to_numpy()
    assert got[0] is None
    np.testing.assert_allclose(np.array(got[1:], dtype=float), found, atol=1e-4)


def test_a_sample_has_what_was_asked_about_its_prompt(client: tinker.TrainingClient):
    sampler = client.save_weights_and_get_sampling_client().result()
    answer = sampler.sample(
        PROMPT, num_samples=3, sampling_params=GREEDY, include_prompt_logprobs=True, topk_prompt_logprobs=2
    ).result()
    assert len(answer.sequences) == 3
    assert len({tuple(one.tokens) for one in answer.sequences}) == 1
    assert len({one.sequence_id for one in answer.sequences}) == 3
    assert all(len(one.logprobs or []) == len(one.tokens) for one in answer.sequences)
    logprobs, likeliest = answer.prompt_logprobs, answer.topk_prompt_logprobs
    assert logprobs is not None
    assert likeliest is not None
    assert logprobs[0] is None
    assert len(logprobs) == len(likeliest) == 4
    assert not likeliest[0]
    assert all(place[0][1] >= place[1][1] for place in likeliest[1:] if place)


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_losses_of_reinforcement_learning_run(client: tinker.TrainingClient, loss: types.LossFnType):
    data = [
        types.Datum(
            model_input=datum.model_input,
            loss_fn_inputs={
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "logprobs": types.TensorData(data=[-1.0] * 8, dtype="float32", shape=[8]),
                "advantages": types.TensorData(data=[1.0, -1.0] * 4, dtype="float32", shape=[8]),
            },
        )
        for datum in make_data()
    ]
    answer = client.forward_backward(data, loss).result()
    client.optim_step(ADAM).result()
    assert np.isfinite(answer.metrics["loss:sum"])


def test_soft_targets_dense_and_sparse_give_the_same(client: tinker.TrainingClient):
    import torch

    targets = torch.tensor([[40 + i, 60 + i, 0] for i in range(8)])
    weights = torch.tensor([[0.7, 0.3, 0.0]] * 8)

    def make(sparse: bool) -> list[types.Datum]:
        read = types.TensorData.from_torch_sparse if sparse else types.TensorData.from_torch
        inputs = {"target_tokens": read(targets), "weights": read(weights)}
        return [types.Datum(model_input=types.ModelInput.from_ints(TOKENS), loss_fn_inputs=inputs)]

    dense, sparse = (client.forward(make(one), "cross_entropy").result() for one in (False, True))
    assert dense.metrics["loss:sum"] == sparse.metrics["loss:sum"]
    assert list(dense.loss_fn_outputs[0]["logprobs"].shape or []) == [8, 3]


def test_likeliest_tokens_of_a_sample_and_logprobs_of_chosen_ones(client: tinker.TrainingClient):
    sampler = client.save_weights_and_get_sampling_client().result()
    targets = types.TensorData(data=[TOKENS[1], 99, TOKENS[2], -1, TOKENS[3], 99], dtype="int64", shape=[3, 2])
    answer = sampler.sample(
        PROMPT,
        num_samples=1,
        sampling_params=GREEDY,
        include_prompt_logprobs=True,
        topk_sample_logprobs=3,
        target_prompt_logprobs=targets,
        prompt_logprobs_last_n=2,
    ).result()
    sequence = answer.sequences[0]
    likeliest = sequence.topk_logprobs
    assert likeliest is not None
    # Greedy: the likeliest is what was taken.
    assert [place[0][0] for place in likeliest if place] == sequence.tokens
    assert answer.prompt_logprobs is not None
    assert [one is None for one in answer.prompt_logprobs] == [True, True, False, False]
    assert answer.target_prompt_logprobs is not None
    found = answer.target_prompt_logprobs.to_numpy().reshape(3, 2)
    np.testing.assert_allclose(found[1:, 0], np.array(answer.prompt_logprobs[2:], dtype=float), atol=1e-5)
    assert np.isnan(found[1, 1])
