"""LoRA beside what architectures do with their linear layers: outputs changed in place, routed experts, odd names."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire.errors import InvalidArgumentError
from safetensors.torch import load_file, save_file

from tests.engines import CROSS_ENTROPY
from tests.loras import ALL, adapter, gradient, lora_engine, randomize
from tests.numerics.plain import PlainSequence, cross_entropy_of, load_plain, random_sequences, relative_error, to_batch
from tests.numerics.test_architectures import make_model
from tests.numerics.test_sampled_numbers import make_request
from tests.tiny import VOCAB_SIZE
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.service import Sampling

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
ARCHITECTURES = ("Falcon", "Llama4", "Glm4Moe", "DeepseekV3", "Qwen3Moe")
EXPERTS = ("Glm4Moe", "DeepseekV3", "Qwen3Moe")
SEQUENCES = random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("architectures"), {}
    return lambda architecture: made.get(architecture) or made.setdefault(architecture, make_model(root, architecture))


def by_formula(folder: Path, values: dict[str, torch.Tensor]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Logprobs and the adapter's gradients of the plain model whose weights are W + alpha / rank · B · A."""
    plain: Any = load_plain(folder)
    theirs = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    weights = dict(plain.named_parameters(remove_duplicate=False))
    for name, a in theirs.items():
        layer, found, rest = name.partition(".lora_A.")
        if found:
            b = theirs[f"{layer}.lora_B.{rest}"]
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + ALL.alpha / ALL.rank * b @ a
    logprobs = []
    for sequence in SEQUENCES:
        tokens, targets = torch.tensor(sequence.tokens)[None], torch.tensor(sequence.targets)[:, None]
        output = torch.func.functional_call(plain, weights, (tokens,), {"use_cache": False}, tie_weights=False)
        logprobs.append(torch.log_softmax(output.logits[0].double(), -1).gather(-1, targets)[:, 0])
    cross_entropy_of(SEQUENCES)(logprobs).backward()
    return torch.cat(logprobs).detach().numpy(), {name: gradient(value) for name, value in theirs.items()}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_are_those_of_the_formula(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = lora_engine(folder, tmp_path, lora=ALL)
    randomize(engine, "lora")
    # The layers asked for, all of them, and no others: peft reads some of these names in a way of its own.
    linear = {name for name, module in load_plain(folder).named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {name for name in linear if name.endswith(("router", "gate"))}
    assert {name.partition(".lora_")[0] for name in adapter(engine, "lora")} == linear - routers
    found = engine.forward_backward("lora", 1, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))
    logprobs, gradients = by_formula(folder, dict(adapter(engine, "lora")))
    np.testing.assert_allclose(found.logprobs_TK, logprobs, rtol=0, atol=1e-4)
    for name, parameter in adapter(engine, "lora").items():
        assert relative_error(gradient(parameter), gradients[name]) < 1e-5, name


@pytest.mark.parametrize("architecture", EXPERTS)
def test_adapters_beside_experts_go_out_and_come_back_whole(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = lora_engine(folder, tmp_path, lora=ALL, resumed=ALL)
    randomize(engine, "lora")
    wanted = engine.forward("lora", 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK
    engine.save_weights_for_sampler("lora", "adapter")
    engine.save_weights_for_sampler("lora", "merged", merged=True)
    saved = tmp_path / "lora" / "sampler_weights"
    engine.create_run("next", adapter=str(saved / "adapter"))
    engine.load_state("resumed", engine.save_state("lora", "half").path, with_optimizer=True)
    for run_id in ("next", "resumed"):
        np.testing.assert_array_equal(engine.forward(run_id, 1, engine.stage(to_batch(SEQUENCES))).logprobs_TK, wanted)
        assert engine.run_state(run_id).lora == engine.run_state("lora").lora is not None
    merged: Any = load_plain(saved / "merged")
    with torch.no_grad():
        found = [
            torch.log_softmax(merged(torch.tensor(s.tokens)[None]).logits[0].double(), -1)[
                range(len(s.tokens)), s.targets
            ]
            for s in SEQUENCES
        ]
    np.testing.assert_allclose(torch.cat(found), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["Falcon", "Llama4", "Qwen3Moe"])
def test_what_a_run_samples_has_the_logprobs_of_its_own_forward(
    folder_of: Callable[[str], Path], architecture: str, tmp_path: Path
) -> None:
    """Past a chunk of Llama 4's, too."""
    engine = lora_engine(folder_of(architecture), tmp_path, lora=ALL)
    randomize(engine, "lora")
    sampling = Sampling(engine, checkpoint_dir=tmp_path, send=lambda event: None)
    sampler = sampling.samplers.find(str(sampling.samplers.freeze("lora", 1)))
    prompts = [[5, 17, 3, 88], list(range(12))]
    jobs = [Job(number, "", make_request(prompt, 14), sampler) for number, prompt in enumerate(prompts)]
    for job in jobs:
        sampling.scheduler.start(job)
    while sampling.scheduler.busy:
        sampling.scheduler.step()
    for job in jobs:
        (sample,) = job.samples
        tokens = np.array(job.request.prompt + sample.tokens)
        sequence = PlainSequence(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, dtype=np.float32))
        found = engine.forward("lora", 2, engine.stage(to_batch([sequence]))).logprobs_TK
        np.testing.assert_allclose(found[-len(sample.tokens) :], sample.logprobs, rtol=0, atol=2e-5)


def test_an_adapter_of_experts_is_refused_in_a_sentence(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As older transformers, in which every expert had layers of its own, would have saved it."""
    engine = lora_engine(folder_of("Qwen3Moe"), tmp_path, lora=ALL)
    engine.save_weights_for_sampler("lora", "a")
    folder = tmp_path / "lora" / "sampler_weights" / "a"
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors |= {
        f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}.lora_{side}.weight": torch.zeros(shape)
        for expert in range(4)
        for name, inputs, outputs in (("gate_proj", 32, 16), ("up_proj", 32, 16), ("down_proj", 16, 32))
        for side, shape in (("A", (4, inputs)), ("B", (outputs, 4)))
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    assert "gate_proj" in json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    with pytest.raises(InvalidArgumentError, match=r"adapts the experts in model\.layers\.1\.mlp\.experts") as caught:
        engine.create_run("next", adapter=str(folder))
    assert caught.value.metadata["field"] == "adapter_path"
