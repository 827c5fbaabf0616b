"""A worker of two ranks, as users have it: trained, sampled from, saved, killed, out of memory, hanging."""

import dataclasses
import os
import random
import signal
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gradwire import AdamParams, Mesh, ModelInput, SamplingParams, ServiceClient
from gradwire.errors import DeviceOutOfMemoryError, GradwireError

from tests.chaos import Adversary, Loop, Trainer, left_behind, state_digests, undisturbed
from tests.cut_proxy import cut_proxy
from tests.full_disk import FileLimit
from tests.numerics.architectures import make_model
from tests.trainer_process import TrainerProcess, running_trainer
from tests.training import data, negative_log_likelihood

ADAM = AdamParams(learning_rate=1e-2)

BROKEN = """
import os, pathlib, time
from trainer_service.engine.losses.loss import Loss, LossOutput

def out_of_memory(inputs, config):
    if os.environ["RANK"] == "1":
        raise MemoryError("as it were")
    return summed(inputs, config)

def hangs_once(inputs, config):
    mark = pathlib.Path(os.environ["HANGS_ONCE"])
    if os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        time.sleep(600)
    return summed(inputs, config)

def summed(inputs, config):
    logprobs = inputs.target_logprobs_TK
    return LossOutput(-logprobs.sum(), (logprobs != 0).sum(), {})

LOSSES = [
    Loss(name="out_of_memory", inputs=("weights",), fn=out_of_memory, config={}),
    Loss(name="hangs_once", inputs=("weights",), fn=hangs_once, config={}),
    Loss(name="summed", inputs=("weights",), fn=summed, config={}),
]
"""


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """Of two ranks, which wait 10 s for one another."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "broken_losses.py").write_text(BROKEN)
    arguments = ("--nproc-per-node", "2", "--collective-timeout-s", "10", "--loss-module", "broken_losses")
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    env = {"PYTHONPATH": path, "HANGS_ONCE": str(folder / "hung")}
    with running_trainer(tiny_llama, folder, *arguments, env=env, forked=True) as running:
        running.wait_ready()
        yield running


def metric(trainer: TrainerProcess, name: str) -> float:
    with urllib.request.urlopen(f"http://{trainer.metrics_address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(f"{name} ")))


def test_the_trainer_says_how_many_ranks_it_has(trainer: TrainerProcess, service: ServiceClient):
    (model,) = service.get_server_info().models
    assert model.mesh == Mesh(world_size=2, local_world_size=2, nnodes=1, fsdp_size=2)
    assert model.architecture == "LlamaForCausalLM"
    for name, value in dataclasses.asdict(model.mesh).items():
        assert metric(trainer, f"gradwire_worker_{name}") == value


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("how", "replicas"), [("never", 2), ("always", 1)])
def test_ranks_are_told_of_and_sample_again_after_a_death(how: str, replicas: int, tiny_llama: Path, tmp_path: Path):
    ranks = 2 * replicas
    arguments = ["--nproc-per-node", f"{ranks}", "--dp-replicate-size", f"{replicas}"]
    arguments += ["--sampling-reshard-after-forward", how]
    with running_trainer(tiny_llama, tmp_path, *arguments, forked=True) as running:
        running.wait_ready(150)
        with ServiceClient(running.base_url, timeout_s=60) as service:
            (model,) = service.get_server_info().models
            assert ("gathered anew" in model.sampling) == (how == "always")
            mesh = model.mesh
            assert mesh == Mesh(
                world_size=ranks, local_world_size=ranks, nnodes=1, fsdp_size=2, dp_replicate_size=replicas
            )
            assert metric(running, "gradwire_worker_dp_replicate_size") == replicas
            client = service.create_training_client()
            client.forward_backward(data(30, 20, 40), "cross_entropy").result(60)
            client.optim_step(ADAM).result(60)
            sampler = client.save_weights_and_get_sampling_client()
            # As many as ranks: each has one.
            params = SamplingParams(max_tokens=8, temperature=0.0)
            answers = [sampler.sample(ModelInput.from_ints([5, 6]), sampling_params=params) for _ in range(ranks)]
            sequences = [answer.result(60).sequences[0] for answer in answers]
            assert len({tuple(sequence.tokens) for sequence in sequences}) == 1
            told = sampler.compute_logprobs(ModelInput.from_ints([5, 6, *sequences[0].tokens])).result(60)
            for sequence in sequences:
                assert sequence.logprobs is not None
                np.testing.assert_allclose(sequence.logprobs, np.array(told[2:], dtype=float), atol=1e-4)
            # A rank that dies takes part in every forward, or has requests of its own: all begin again.
            params = SamplingParams(max_tokens=40, seed=7, stop=[])
            answer = sampler.sample(ModelInput.from_ints([5, 6]), 4, params)
            os.kill(running.rank_pid(ranks - 1), signal.SIGKILL)
            again = sampler.sample(ModelInput.from_ints([5, 6]), 4, params)
            one, other = ([each.tokens for each in found.result(150).sequences] for found in (answer, again))
            assert one == other


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_samples_of_two_ranks_have_the_trainer_s_logprobs(lora_rank: int, service: ServiceClient):
    client = service.create_training_client(lora_rank=lora_rank)
    for _ in range(2):
        client.forward_backward(data(30, 20, 40), "cross_entropy").result(60)
        client.optim_step(ADAM).result(60)
    sampler = client.save_weights_and_get_sampling_client()
    prompts = [ModelInput.from_ints([5, 6, 7 + number]) for number in range(6)]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=3)
    answers = [sampler.sample(prompt, num_samples=2, sampling_params=params) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        for sequence in answer.result(60).sequences:
            tokens = [*prompt.to_ints(), *sequence.tokens]
            assert sequence.logprobs is not None
            told = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result(60)
            np.testing.assert_allclose(np.array(told[3:], dtype=float), sequence.logprobs, atol=1e-4)
    # A checkpoint, which every rank loads whole, has the same numbers.
    path = client.save_weights_for_sampler("weights").result(60).path
    loaded = service.create_sampling_client(model_path=path)
    tokens = ModelInput.from_ints([5, 6, 7, 8, 9])
    told, wanted = (each.compute_logprobs(tokens).result(60)[1:] for each in (loaded, sampler))
    np.testing.assert_allclose(np.array(told, dtype=float), np.array(wanted, dtype=float), atol=1e-5)
    # What was frozen stays as it was while the run trains on.
    first = answers[0].result(60).sequences[0].tokens
    client.forward_backward(data(30, 20, 40), "cross_entropy").result(60)
    client.optim_step(ADAM).result(60)
    again = sampler.sample(prompts[0], num_samples=2, sampling_params=params).result(60)
    assert again.sequences[0].tokens == first
    client.delete_run()


def test_memory_that_runs_out_on_one_rank_fails_that_operation_alone(trainer: TrainerProcess, service: ServiceClient):
    client = service.create_training_client()
    client.forward_backward(data(30, 20), "summed")
    client.optim_step(ADAM).result(60)
    sampler, tokens = client.save_weights_and_get_sampling_client(), ModelInput.from_ints([5, 6, 7, 8, 9])
    told = sampler.compute_logprobs(tokens).result(60)
    before = metric(trainer, "gradwire_worker_restarts_total")
    failing = client.forward_backward(data(30, 20), "out_of_memory")
    step = client.optim_step(ADAM)
    with pytest.raises(DeviceOutOfMemoryError, match="has no memory left for the forward_backward of"):
        failing.result(120)
    refusal = step.exception(60)
    assert isinstance(refusal, GradwireError)
    assert refusal.reason == "PRIOR_OPERATION_FAILED"
    # Once, not three times: it is not tried again.
    client.forward_backward(data(30, 20), "summed").result(60)
    assert client.optim_step(ADAM).result(60).step == 2
    assert metric(trainer, "gradwire_worker_restarts_total") == before + 1
    # The ranks began again, and what was frozen is whole on each of them as before.
    assert sampler.compute_logprobs(tokens).result(60) == told
    client.delete_run()


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed_and_its_work_done_again(service: ServiceClient):
    client, calm = (service.create_training_client() for _ in range(2))
    client.forward_backward(data(30, 20), "hangs_once")
    calm.forward_backward(data(30, 20), "summed")
    norms = [each.optim_step(ADAM).result(180).metrics["grad_norm:mean"] for each in (client, calm)]
    assert norms[0] == norms[1]
    client.delete_run()
    calm.delete_run()


@pytest.mark.timeout(600)
def test_loops_on_two_ranks_whose_ranks_are_killed_are_bit_identical(tiny_llama: Path, tmp_path: Path):
    lora_ranks, seed, steps = (0, 4), 2, 10
    with (
        Trainer(tiny_llama, tmp_path, "--nproc-per-node", "2", "--snapshot-steps", "5", forked=True) as trainer,
        cut_proxy(trainer.address) as proxy,
        ServiceClient(proxy.base_url, reconnect_timeout_s=120) as service,
        ThreadPoolExecutor() as threads,
    ):
        wanted = [undisturbed(trainer, seed=seed, steps=steps, lora_rank=rank) for rank in lora_ranks]
        clients = [service.create_training_client(lora_rank=rank) for rank in lora_ranks]
        loops = [Loop(client, seed=seed, steps=steps) for client in clients]
        adversary = Adversary(
            trainer,
            FileLimit(trainer.pids),
            proxy,
            seed,
            ("worker", "trainer"),
            lambda: sum(loop.answered for loop in loops),
            at_most=2,
        )
        adversary.start()
        try:
            got = list(threads.map(lambda loop: loop.run(), loops))
        finally:
            adversary.stop()
        assert {fault for _, fault in adversary.done} == {"worker", "trainer"}
        for client, disturbed, (answers, digests) in zip(clients, got, wanted, strict=True):
            assert disturbed == answers
            assert state_digests(trainer.data_dir, client, "final") == digests
        trainer.stop()
        assert left_behind(trainer) == []


@pytest.mark.parametrize(("what", "sizes"), [("tp", {"fsdp_size": 1}), ("ep", {"fsdp_size": 2})])
def test_ranks_that_cut_layers_or_divide_experts_tell_of_it_sample_and_may_be_killed(
    what: str, sizes: dict[str, int], tiny_llama: Path, tmp_path: Path
):
    lora_ranks, seed, steps = (0, 4), 2, 5
    arguments = ("--nproc-per-node", "2", f"--{what}-size", "2", "--snapshot-steps", "2")
    folder = tiny_llama if what == "tp" else make_model(tmp_path / "model", "Qwen3Moe")
    with (
        Trainer(folder, tmp_path, *arguments, forked=True) as trainer,
        ServiceClient(f"http://{trainer.address}", reconnect_timeout_s=120) as service,
        ThreadPoolExecutor() as threads,
    ):
        wanted = [undisturbed(trainer, seed=seed, steps=steps, lora_rank=rank) for rank in lora_ranks]
        mesh = service.get_server_info().models[0].mesh
        assert mesh == Mesh(world_size=2, local_world_size=2, nnodes=1, **sizes, **{f"{what}_size": 2})
        clients = [service.create_training_client(lora_rank=rank) for rank in lora_ranks]
        loops = [Loop(client, seed=seed, steps=steps) for client in clients]
        running = [threads.submit(loop.run) for loop in loops]
        while sum(loop.answered for loop in loops) < 8 and not all(each.done() for each in running):
            time.sleep(0.01)
        assert trainer.kill_worker(random.Random(seed))
        for client, disturbed, (answers, digests) in zip(clients, running, wanted, strict=True):
            assert disturbed.result(120) == answers
            assert state_digests(trainer.data_dir, client, "final") == digests
            # What is gathered whole for samples is what the ranks train.
            batch = data(30, 20)
            trained = client.forward(batch, "cross_entropy").result(60).loss_fn_outputs[0]["logprobs"].to_numpy()
            sampler = client.save_weights_and_get_sampling_client()
            tokens = [*batch[0].model_input.to_ints(), int(batch[0].loss_fn_inputs["target_tokens"].to_numpy()[-1])]
            told = sampler.compute_logprobs(ModelInput.from_ints(tokens)).result(60)
            np.testing.assert_allclose(np.array(told[1:], dtype=float), trained, atol=1e-4)
        trainer.stop()


def test_a_loss_that_couples_datums_and_a_built_in_one_add_up_on_two_ranks(service: ServiceClient):
    client = service.create_training_client()
    batch = data(30, 20, 40)
    client.forward_backward(batch, "cross_entropy").result(60)
    both = client.forward_backward_custom(batch, negative_log_likelihood).result(60)
    twice = client.optim_step(ADAM).result(60).metrics["grad_norm:mean"]
    once = service.create_training_client()
    once.forward_backward(batch, "cross_entropy").result(60)
    assert twice == pytest.approx(2 * once.optim_step(ADAM).result(60).metrics["grad_norm:mean"], rel=1e-4)
    assert both.metrics["num_sequences:sum"] == 3
    client.delete_run()
    once.delete_run()
