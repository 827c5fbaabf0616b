"""Loops as they are written for tinker, with nothing but the import changed, on a tiny model.

One supervised, one of reinforcement learning, one of coroutines: each in the shape that the loops of tinker's cookbook
have, down to positional arguments, keywords, and where a future is waited for.
"""

import asyncio
from pathlib import Path
from typing import Any

import gradwire as tinker
import pytest
import torch
from gradwire import types
from gradwire.types import TensorData

from tests.tiny import MAX_CONTEXT_LENGTH
from tests.trainer_process import TrainerProcess

TEXTS = ["the cat sat on the mat", "the dog lay on the log", "a frog hid in the bog", "an owl sat in the oak"] * 2
ANSWER = "q"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_HOME", str(tmp_path))


def connect(trainer: TrainerProcess, loop: str) -> tinker.ServiceClient:
    return tinker.ServiceClient(
        base_url=trainer.base_url, user_metadata={"recipe": loop}, display_name=f"{loop} on a tiny model"
    )


def served(service_client: tinker.ServiceClient) -> str:
    """The model's name, as a loop that picks one finds it."""
    (model,) = service_client.get_server_capabilities().supported_models
    assert (model.trainable, model.sampleable, model.max_context_length) == (True, True, MAX_CONTEXT_LENGTH)
    return model.model_name


def next_token_datum(tokenizer: Any, text: str) -> types.Datum:
    tokens = tokenizer.encode(text)
    model_input = types.ModelInput.empty()
    for token in tokens[:-1]:
        model_input = model_input.append_int(token)
    weights = torch.ones(len(tokens) - 1)
    weights[:3] = 0
    return types.Datum(
        model_input=model_input,
        loss_fn_inputs={
            "target_tokens": TensorData.from_torch(torch.tensor(tokens[1:])),
            "weights": TensorData.from_torch(weights),
        },
    )


def mean_nll(logprobs: list[TensorData], weights: list[TensorData]) -> float:
    total, weight_sum = 0.0, 0.0
    for lp, w in zip(logprobs, weights, strict=True):
        total -= float(lp.to_torch().dot(w.to_torch()))
        weight_sum += float(w.to_torch().sum())
    return total / weight_sum


def test_a_supervised_loop_trains_saves_and_resumes(trainer: TrainerProcess):
    service_client = connect(trainer, "sl_loop")
    training_client = service_client.create_lora_training_client(base_model=served(service_client), rank=4).result()
    tokenizer = training_client.get_tokenizer()
    info = training_client.get_info()
    assert (info.model_data.model_name, info.model_data.arch, info.is_lora) == (
        info.model_name,
        "LlamaForCausalLM",
        True,
    )

    num_steps, batch_size = 6, 4
    nlls: list[float] = []
    saved: Any = None
    for step in range(num_steps):
        if step == 3:
            saved = training_client.save_state(
                f"{step:06d}", ttl_seconds=3600, user_metadata={"batch": str(step)}
            ).result()
        lr = 5e-2 * max(0.0, 1.0 - step / num_steps)
        adam_params = tinker.AdamParams(learning_rate=lr, beta1=0.9, beta2=0.95, eps=1e-8)
        texts = TEXTS[step % 2 * batch_size : (step % 2 + 1) * batch_size]
        batch = [next_token_datum(tokenizer, text) for text in texts]
        fwd_bwd_future = training_client.forward_backward(batch, loss_fn="cross_entropy")
        optim_step_future = training_client.optim_step(adam_params)
        fwd_bwd_result = fwd_bwd_future.result()
        optim_result = optim_step_future.result()
        assert optim_result.metrics
        train_logprobs = [x["logprobs"] for x in fwd_bwd_result.loss_fn_outputs]
        train_weights = [d.loss_fn_inputs["weights"] for d in batch]
        assert sum(d.model_input.length for d in batch) == sum(len(each.tolist()) for each in train_logprobs)
        nlls.append(mean_nll(train_logprobs, train_weights))
    assert nlls[-1] < nlls[0]
    sampler_path = (
        training_client.save_weights_for_sampler("final", user_metadata={"batch": str(num_steps)}).result().path
    )

    # A second script finds the run by its checkpoint, goes on from it, and samples from what the first one saved.
    service_client = connect(trainer, "sl_loop")
    rest_client = service_client.create_rest_client()
    training_run = rest_client.get_training_run_by_tinker_path(saved.path).result()
    assert training_run.user_metadata == {"recipe": "sl_loop"}
    assert (training_run.base_model, training_run.lora_rank) == (info.base_model, 4)
    assert training_run.last_checkpoint is not None
    assert training_run.last_checkpoint.user_metadata == {"batch": "3"}
    assert training_run.last_checkpoint.expires_at is not None
    resumed = service_client.create_training_client_from_state_with_optimizer(
        saved.path, user_metadata=dict(training_run.user_metadata)
    ).result()
    batch = [next_token_datum(tokenizer, text) for text in TEXTS[:batch_size]]
    result = resumed.forward(batch, "cross_entropy").result()
    nll = mean_nll([x["logprobs"] for x in result.loss_fn_outputs], [d.loss_fn_inputs["weights"] for d in batch])
    # As far as the first script was when it saved, to whose loss of these texts it comes back.
    assert nll == pytest.approx(nlls[3], rel=1e-4)
    sampling_client = service_client.create_sampling_client(model_path=sampler_path).result()
    prompt = types.ModelInput.from_ints(tokens=tokenizer.encode("the "))
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    (sequence,) = sampling_client.sample(prompt=prompt, num_samples=1, sampling_params=params).result().sequences
    assert len(tokenizer.decode(sequence.tokens)) > 0
    rest_client.delete_checkpoint_from_tinker_path(saved.path).result()
    listed = rest_client.list_checkpoints(training_client.get_info().model_id).result().checkpoints
    assert [(each.checkpoint_id, each.checkpoint_type) for each in listed] == [("sampler_weights/final", "sampler")]
    for client in (training_client, resumed):
        client.delete_run()
    service_client.close("success").result()


def test_a_loop_of_reinforcement_learning_raises_its_reward(trainer: TrainerProcess):
    service_client = connect(trainer, "rl_loop")
    training_client = service_client.create_lora_training_client(base_model=served(service_client), rank=4).result()
    tokenizer = training_client.get_tokenizer()
    sampling_params = tinker.types.SamplingParams(max_tokens=4, stop=["<|im_end|>"], seed=1)
    adam_params = types.AdamParams(learning_rate=5e-2, beta1=0.9, beta2=0.95, eps=1e-8)
    group_size, rewards_B = 24, []
    for _ in range(5):
        sampling_client = training_client.save_weights_and_get_sampling_client(record_stability_info=False).result()
        futures_P: list[tinker.APIFuture[types.SampleResponse]] = []
        prompts_P: list[types.ModelInput] = []
        for question in ("say it", "go on"):
            messages = [{"role": "user", "content": question}]
            # What a chat template returns is taken as it is.
            model_input = types.ModelInput.from_ints(
                tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            )
            futures_P.append(
                sampling_client.sample(prompt=model_input, num_samples=group_size, sampling_params=sampling_params)
            )
            prompts_P.append(model_input)
        datums_D: list[types.Datum] = []
        rewards_P: list[float] = []
        for future, prompt in zip(futures_P, prompts_P, strict=True):
            sequences = future.result().sequences
            assert len({sequence.sequence_id for sequence in sequences}) == group_size
            rewards_G = [tokenizer.decode(sequence.tokens).count(ANSWER) / 4 for sequence in sequences]
            mean_reward = sum(rewards_G) / len(rewards_G)
            rewards_P.append(mean_reward)
            for sequence, reward in zip(sequences, rewards_G, strict=True):
                ob_len = prompt.length - 1
                model_input = prompt.append(types.EncodedTextChunk(tokens=sequence.tokens[:-1]))
                target_tokens = [0] * ob_len + sequence.tokens
                padded_logprobs = [0.0] * ob_len + sequence.logprobs
                padded_advantages = [0.0] * ob_len + [reward - mean_reward] * (model_input.length - ob_len)
                assert model_input.length == len(target_tokens) == len(padded_logprobs) == len(padded_advantages)
                datums_D.append(
                    types.Datum(
                        model_input=model_input,
                        loss_fn_inputs={
                            "target_tokens": TensorData.from_torch(torch.tensor(target_tokens)),
                            "logprobs": TensorData.from_torch(torch.tensor(padded_logprobs)),
                            "advantages": TensorData.from_torch(torch.tensor(padded_advantages)),
                        },
                    )
                )
        fwd_bwd_future = training_client.forward_backward(datums_D, loss_fn="importance_sampling")
        optim_step_future = training_client.optim_step(adam_params)
        fwd_bwd_future.result()
        optim_step_future.result()
        rewards_B.append(sum(rewards_P) / len(rewards_P))
    assert rewards_B[-1] > rewards_B[0] + 0.2
    training_client.delete_run()


def test_a_loop_of_coroutines_awaits_the_twins(trainer: TrainerProcess):
    async def loop() -> None:
        service_client = connect(trainer, "async_loop")
        capabilities = await service_client.get_server_capabilities_async()
        training_client = await service_client.create_lora_training_client_async(
            capabilities.supported_models[0].model_name, rank=2, user_metadata={"renderer_name": "tiny"}
        )
        tokenizer = training_client.get_tokenizer()
        batch = [next_token_datum(tokenizer, text) for text in TEXTS[:2]]

        def loss_fn(data: Any, logprobs: Any) -> tuple[torch.Tensor, dict[str, float]]:
            return -torch.cat(logprobs).sum(), {"datums": float(len(data))}

        # Awaited once they are submitted, awaited again they are answered.
        custom_future = await training_client.forward_backward_custom_async(batch, loss_fn, loss_type_input="logprobs")
        fwd_bwd_future = await training_client.forward_backward_async(batch, loss_fn="cross_entropy")
        optim_future = await training_client.optim_step_async(adam_params=types.AdamParams(learning_rate=1e-3))
        assert (await custom_future).metrics["datums"] == 2
        assert (await fwd_bwd_future.result_async()).metrics["loss:sum"] > 0
        assert (await asyncio.create_task(optim_future.coroutine())).metrics
        state_future = await training_client.save_state_async("s", ttl_seconds=None)
        sampler_future = await training_client.save_weights_for_sampler_async("w", 3600, {"step": "1"})
        state, sampler = await state_future, await sampler_future
        await (await training_client.load_state_with_optimizer_async(state.path))
        params = types.SamplingParams(max_tokens=2)
        prompt = types.ModelInput.from_ints(tokenizer.encode("the "))
        frozen = await training_client.save_weights_and_get_sampling_client_async(name="s")
        saved = await service_client.create_sampling_client_async(model_path=sampler.path)
        both = await asyncio.gather(*(each.sample_async(prompt, 3, params) for each in (frozen, saved)))
        assert [len(each.sequences) for each in both] == [3, 3]
        logprobs = await saved.compute_logprobs_async(prompt)
        assert (logprobs[0], len(logprobs)) == (None, prompt.length)
        assert await saved.get_base_model_async() == training_client.get_info().model_data.model_name
        rest_client = service_client.create_rest_client()
        run_id = (await training_client.get_info_async()).model_id
        run = await rest_client.get_training_run_async(run_id)
        assert run.user_metadata == {"recipe": "async_loop", "renderer_name": "tiny"}
        info = await rest_client.get_weights_info_by_tinker_path(state.path)
        assert (info.base_model, info.is_lora, info.lora_rank, info.train_mlp) == (run.base_model, True, 2, True)
        resumed = await service_client.create_training_client_from_state_async(state.path)
        assert resumed.get_info().lora_rank == 2
        await resumed.delete_run_async()
        await rest_client.delete_checkpoint_async(run_id, "state/s")
        listed = (await rest_client.list_checkpoints_async(run_id)).checkpoints
        assert [(each.tinker_path, each.user_metadata) for each in listed] == [(sampler.path, {"step": "1"})]
        await training_client.delete_run_async()
        await service_client.close("success")

    asyncio.run(loop())
