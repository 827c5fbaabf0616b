"""LoRA runs in this process, and what plain peft makes of the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gradwire.types import AdamParams
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.engines import CPU, CROSS_ENTROPY, make_batch
from tests.numerics.plain import PlainSequence, load_plain, to_batch
from trainer_service.config import Limits
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.worker_config import EngineSettings

BODY = LoraSettings(rank=4, alpha=8.0, seed=1, train_unembed=False)
ALL = LoraSettings(rank=4, alpha=8.0, seed=1)


def lora_engine(folder: Path, checkpoint_dir: Path, **runs: LoraSettings) -> Engine:
    """An engine with these LoRA runs."""
    engine = Engine(
        str(folder), device=CPU, checkpoint_dir=checkpoint_dir, limits=Limits(max_runs=8), settings=EngineSettings()
    )
    for run_id, settings in runs.items():
        engine.create_run(run_id, lora=settings)
    return engine


def adapter(engine: Engine, run_id: str) -> Mapping[str, nn.Parameter]:
    """What trains of a run, by peft's names."""
    return engine.run_state(run_id).trained_parameters()


def randomize(engine: Engine, run_id: str, *, seed: int = 0) -> None:
    """Gives an adapter random values: it starts as zero, which many mistakes do not show on."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter(engine, run_id).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def plain_peft(folder: Path, settings: LoraSettings, dtype: torch.dtype = torch.float32, **config: Any) -> PeftModel:
    """The model with peft's own LoRA layers, as a script would make it; all of it in one dtype."""
    names = [
        name
        for name, module in load_plain(folder).named_modules()
        if isinstance(module, nn.Linear) and (settings.train_unembed or name != "lm_head")
    ]
    defaults = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": names, "task_type": "CAUSAL_LM"}
    model = get_peft_model(load_plain(folder), LoraConfig(**{**defaults, **config}))  # pyright: ignore[reportArgumentType]
    assert isinstance(model, PeftModel)
    return model.eval().to(dtype)


def same_adapter(model: PeftModel, engine: Engine, run_id: str) -> dict[str, nn.Parameter]:
    """Copies a run's adapter into plain peft's; its parameters by the same names."""
    wrapped: Any = model.get_base_model()
    theirs = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    ours = adapter(engine, run_id)
    assert theirs.keys() == ours.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    return theirs


def gradient(parameter: nn.Parameter) -> torch.Tensor:
    """Its gradient, which is there."""
    assert parameter.grad is not None
    return parameter.grad


def train(engine: Engine, run_id: str, seeds: range) -> None:
    """A pass and a step for each seed; operations are numbered by them."""
    for seed in seeds:
        engine.forward_backward(run_id, 2 * seed, engine.stage(make_batch(5, 9, seed=seed), CROSS_ENTROPY))
        engine.optim_step(run_id, 2 * seed + 1, AdamParams(learning_rate=1e-2))


def check_comes_back(engine: Engine, sequences: Sequence[PlainSequence]) -> np.ndarray:
    """Saves run "lora", randomized, as an adapter, merged and as a state; starts "next" from the one and resumes
    "resumed" from the last: both compute its bits and are laid out as it is. Returns its logprobs."""
    randomize(engine, "lora")
    wanted = engine.forward("lora", 1, engine.stage(to_batch(sequences))).logprobs_TK
    adapter_folder = engine.save_weights_for_sampler("lora", "adapter").uri.removeprefix("file://")
    engine.save_weights_for_sampler("lora", "merged", merged=True)
    engine.create_run("next", adapter=adapter_folder)
    engine.load_state("resumed", engine.save_state("lora", "half").path, with_optimizer=True)
    for run_id in ("next", "resumed"):
        np.testing.assert_array_equal(engine.forward(run_id, 1, engine.stage(to_batch(sequences))).logprobs_TK, wanted)
        assert engine.run_state(run_id).lora == engine.run_state("lora").lora is not None
        assert engine.run_state(run_id).adapted == engine.run_state("lora").adapted
    return wanted
