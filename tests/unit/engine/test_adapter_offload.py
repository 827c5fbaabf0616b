"""Adapters wait in host memory while others are in use, and the answers do not show it.

On the CPU, where the device's memory and the host's are the same: what is away is another copy, and the parameter is
empty.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.errors import FailedPreconditionError, ResourceExhaustedError
from gradwire.types import AdamParams

from tests.engines import CPU, CROSS_ENTROPY, make_batch
from tests.loras import ALL, BODY
from trainer_service.config import Limits
from trainer_service.engine import adapter_offload
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.sampling.samplers import frozen_copy
from trainer_service.worker_config import EngineSettings

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
RUNS = {"a": ALL, "b": BODY, "c": LoraSettings(rank=2, seed=3, train_unembed=False)}
BATCHES = [make_batch(7, 12, 4, seed=1), make_batch(20, 3, seed=2)]
STEP = AdamParams(learning_rate=1e-2)
ONE_AT_A_TIME, NO_LIMIT = 1, 0


def engine_with(folder: Path, checkpoint_dir: Path, max_device_adapter_bytes: int) -> Engine:
    settings = EngineSettings(max_device_adapter_bytes=max_device_adapter_bytes)
    engine = Engine(str(folder), device=CPU, checkpoint_dir=checkpoint_dir, limits=Limits(), settings=settings)
    for run_id, lora in RUNS.items():
        engine.create_run(run_id, lora=lora)
    return engine


def away(engine: Engine, run_id: str) -> bool:
    """Whether a run's parameters are away. This asks past the engine, which would bring them back."""
    sizes = {parameter.numel() for parameter in engine._runs[run_id].trained_parameters().values()}
    assert 0 not in sizes or sizes == {0}
    return sizes == {0}


def step(engine: Engine, run_id: str, seq_id: int) -> np.ndarray:
    found = engine.forward_backward(run_id, seq_id, engine.stage(BATCHES[0], CROSS_ENTROPY)).logprobs_TK
    engine.optim_step(run_id, seq_id + 1, STEP)
    return found


def play(engine: Engine) -> list[Any]:
    """What runs answer that take turns in everything a run can do, in the middle of a step too; then what they hold."""
    answers: list[Any] = []
    gradients = np.random.default_rng(0).normal(size=BATCHES[1].num_tokens).astype(np.float32)
    for seq_id in (1, 3):
        answers += [step(engine, run_id, seq_id) for run_id in RUNS]
    for run_id in RUNS:
        answers.append(engine.forward_backward(run_id, 5, engine.stage(BATCHES[1], CROSS_ENTROPY)).logprobs_TK)
    for run_id in RUNS:
        answers.append(engine.forward(run_id, 6, engine.stage(BATCHES[1]), keep_graph=True).logprobs_TK)
    for run_id in RUNS:
        engine.backward(run_id, 7, forward_seq_id=6, gradients_TK=gradients)
    for run_id in RUNS:
        engine.save_state(run_id, "halfway")
        answers.append(engine.optim_step(run_id, 8, STEP).metrics)
    for run_id in RUNS:
        engine.load_state(run_id, f"gradwire://{run_id}/state/halfway", with_optimizer=True)
        answers.append(step(engine, run_id, 9))
    for run_id in RUNS:
        run = engine.run_state(run_id)
        for parameter in run.trained_parameters().values():
            answers += [parameter.detach().numpy(), *(t.numpy() for t in run.optimizer.state_of(parameter).values())]
    return answers


def test_runs_that_wait_in_host_memory_compute_the_same_bits(tiny_llama: Path, tmp_path: Path) -> None:
    wanted = play(engine_with(tiny_llama, tmp_path / "all", NO_LIMIT))
    engine = engine_with(tiny_llama, tmp_path / "one", ONE_AT_A_TIME)
    found = play(engine)
    assert engine.counters.adapters_in_host_memory == len(RUNS) - 1
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_equal(one, other)


def test_the_adapter_unused_longest_makes_room_and_comes_back(tiny_llama: Path, tmp_path: Path) -> None:
    engine = engine_with(tiny_llama, tmp_path / "measured", NO_LIMIT)
    held = {run_id: adapter_offload._full_bytes(engine.run_state(run_id)) for run_id in RUNS}
    # Between steps there is no gradient, which is a quarter; counters of steps are a few bytes more.
    engine = engine_with(tiny_llama, tmp_path, held["a"] * 3 // 4 + held["b"] + 1000)
    for run_id in ("a", "b"):
        step(engine, run_id, 1)
    assert not away(engine, "a")
    step(engine, "c", 1)
    assert [away(engine, run_id) for run_id in RUNS] == [True, False, False]
    optimizer = engine._runs["a"].optimizer
    assert not any(optimizer.state_of(parameter) for parameter in engine._runs["a"].trained_parameters().values())
    step(engine, "a", 3)
    assert [away(engine, run_id) for run_id in RUNS] == [False, True, False]
    engine.delete_run("b")
    assert engine.counters.adapters_in_host_memory == 0


def test_parameters_that_a_sampler_reads_stay_until_they_change(tiny_llama: Path, tmp_path: Path) -> None:
    engine = engine_with(tiny_llama, tmp_path, ONE_AT_A_TIME)
    step(engine, "a", 1)
    model = engine.live_model("a")
    read = [parameter.clone() for parameter in frozen_copy(model).parameters()]
    step(engine, "b", 1)
    assert not away(engine, "a")
    assert all(map(torch.equal, model.parameters(), read))
    step(engine, "a", 3)
    step(engine, "b", 3)
    assert away(engine, "a")


def test_a_held_graph_keeps_its_adapter_where_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    engine = engine_with(tiny_llama, tmp_path, ONE_AT_A_TIME)
    engine.forward("a", 1, engine.stage(BATCHES[0]), keep_graph=True)
    step(engine, "b", 1)
    assert not away(engine, "a")
    engine.cancel("a", [1])
    step(engine, "b", 3)
    assert away(engine, "a")


def test_an_adapter_that_finds_no_room_fails_the_pass_and_waits_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = engine_with(tiny_llama, tmp_path / "all", NO_LIMIT)
    engine = engine_with(tiny_llama, tmp_path / "one", ONE_AT_A_TIME)
    for one in (wanted, engine):
        step(one, "a", 1)
        step(one, "b", 1)
    on_device, calls = adapter_offload._on_device, iter(range(100))

    def full(tensor: torch.Tensor | None, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        # Half of it is back by then.
        if next(calls) > 10:
            raise torch.OutOfMemoryError("no memory left")
        return on_device(tensor, parameter)

    with monkeypatch.context() as patched:
        patched.setattr(adapter_offload, "_on_device", full)
        with pytest.raises(ResourceExhaustedError, match="an adapter that was in host memory"):
            engine.forward_backward("a", 3, engine.stage(BATCHES[0], CROSS_ENTROPY))
    with pytest.raises(FailedPreconditionError, match="Operation 3 failed"):
        engine.optim_step("a", 4, STEP)
    np.testing.assert_array_equal(step(engine, "a", 5), step(wanted, "a", 5))
    np.testing.assert_array_equal(step(engine, "a", 7), step(wanted, "a", 7))
