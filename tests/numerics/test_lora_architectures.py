"""LoRA beside what architectures do with their weights: outputs changed in place, stacked experts, odd names."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines import CROSS_ENTROPY
from tests.loras import ALL, adapter, check_comes_back, gradient, lora_engine, randomize
from tests.numerics.bench import make_request
from tests.numerics.plain import PlainSequence, cross_entropy_of, load_plain, random_sequences, relative_error, to_batch
from tests.tiny import VOCAB_SIZE
from trainer_service.engine import products
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.service import Sampling

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
]
ARCHITECTURES = ("Falcon", "Llama4", "Glm4Moe", "DeepseekV3", "Qwen3Moe")
LARGE = (("Falcon", True), ("Llama4", True))
EXPERTS = ("Glm4Moe", "DeepseekV3", "Qwen3Moe")
SEQUENCES = random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE)


def by_formula(folder: Path, values: dict[str, torch.Tensor]) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
    """Logprobs and the adapter's gradients of the plain model whose weights are W + alpha / rank · B · A."""
    plain: Any = load_plain(folder)
    theirs = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    weights = dict(plain.named_parameters(remove_duplicate=False))
    for name, a in theirs.items():
        layer, found, rest = name.partition(".lora_A.")
        if not found:
            continue
        b = theirs[f"{layer}.lora_B.{rest}"]
        experts, stacked, within = layer.partition(".experts")
        if stacked:
            weight = weights[f"{experts}.experts.{'gate_up_proj' if within else 'down_proj'}"]
            # Rows of A belong to one expert after the other, columns of B to all in turn.
            product = torch.stack(
                [b[:, expert :: len(weight)] @ part for expert, part in enumerate(a.chunk(len(weight)))]
            )
            weights[f"{experts}.experts.{'gate_up_proj' if within else 'down_proj'}"] = (
                weight.detach() + ALL.alpha / ALL.rank * product
            )
        else:
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"].detach() + ALL.alpha / ALL.rank * b @ a
    logprobs = []
    for sequence in SEQUENCES:
        tokens, targets = torch.tensor(sequence.tokens)[None], torch.tensor(sequence.targets)[:, None]
        output = torch.func.functional_call(plain, weights, (tokens,), {"use_cache": False}, tie_weights=False)
        logprobs.append(torch.log_softmax(output.logits[0].double(), -1).gather(-1, targets)[:, 0])
    cross_entropy_of(SEQUENCES)(logprobs).backward()
    return torch.cat(logprobs).detach().numpy(), {name: gradient(value) for name, value in theirs.items()}  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("architecture", "large"), [*((each, False) for each in ARCHITECTURES), *LARGE])
def test_logprobs_and_gradients_are_those_of_the_formula(
    folder_of: Callable[..., Path], architecture: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with products made as those of models as large as real ones."""
    if large:
        monkeypatch.setattr(products, "_SMALLEST", 1)
        monkeypatch.setattr(products, "_by_onednn", products._is_exact)
    folder = folder_of(architecture)
    engine = lora_engine(folder, tmp_path, lora=ALL)
    randomize(engine, "lora")
    # The layers asked for, all of them, and no others: peft reads some of these names in a way of its own.
    linear = {name for name, module in load_plain(folder).named_modules() if isinstance(module, torch.nn.Linear)}
    routers = {name for name in linear if name.endswith(("router", "gate"))}
    experts = {
        f"{name}{end}"
        for name, module in load_plain(folder).named_modules()
        if name.endswith("experts")
        for end in ("", ".base_layer")
        if list(module.parameters(recurse=False))
    }
    assert {name.partition(".lora_")[0] for name in adapter(engine, "lora")} == linear - routers | experts
    found = engine.forward_backward("lora", 1, engine.stage(to_batch(SEQUENCES), CROSS_ENTROPY))
    logprobs, gradients = by_formula(folder, dict(adapter(engine, "lora")))
    np.testing.assert_allclose(found.logprobs_TK, logprobs, rtol=0, atol=1e-4)
    for name, parameter in adapter(engine, "lora").items():
        assert relative_error(gradient(parameter), gradients[name]) < 1e-5, name


@pytest.mark.parametrize("architecture", EXPERTS)
def test_adapters_beside_experts_go_out_and_come_back_whole(
    folder_of: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    folder = folder_of(architecture)
    engine = lora_engine(folder, tmp_path, lora=ALL, resumed=ALL)
    wanted = check_comes_back(engine, SEQUENCES)
    saved = tmp_path / "lora" / "sampler_weights"
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
    folder_of: Callable[..., Path], architecture: str, tmp_path: Path
) -> None:
    """Past a chunk of Llama 4's, too."""
    engine = lora_engine(folder_of(architecture), tmp_path, lora=ALL)
    randomize(engine, "lora")
    sampling = Sampling(engine, checkpoint_dir=tmp_path, send=lambda event: None)
    sampler = sampling.samplers.find(str(sampling.samplers.freeze("lora", 1)))
    prompts = [[5, 17, 3, 88], list(range(12))]
    jobs = [Job(number, "", make_request(prompt, 14), sampler) for number, prompt in enumerate(prompts)]
    for job in jobs:
        sampling.generation.start(job)
    while sampling.generation.busy:
        sampling.generation.step()
    for job in jobs:
        (sample,) = job.samples
        tokens = np.array(job.request.prompt + sample.tokens)
        sequence = PlainSequence(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, dtype=np.float32))
        found = engine.forward("lora", 2, engine.stage(to_batch([sequence]))).logprobs_TK
        np.testing.assert_allclose(found[-len(sample.tokens) :], sample.logprobs, rtol=0, atol=2e-5)
