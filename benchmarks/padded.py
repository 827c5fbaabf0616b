"""Rows beside a plain Hugging Face loop, padded as such loops are, and beside nothing but matrix products."""

from typing import Any

import numpy as np
import torch
from gradwire import Datum
from service import InProcess, built_in, make_data, trainer, vocab_size
from side_by_side import Row, Setting, interleave, ms, ratio
from torch import Tensor, nn

from trainer_service.engine import products
from trainer_service.worker_config import ComputeDtype, EngineSettings

RAGGED = (200, 100, 64, 44, 40, 32)
"""Lengths of sequences; padded to the longest, they have 2.5 times as many tokens."""


class PaddedLoop:
    """transformers and torch alone: pad, mask, logits, cross entropy, AdamW (fused, to be fair)."""

    def __init__(self, model: str, *, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.model: Any = loaded.to(self._device)
        self._dtype = dtype
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def forward_backward(self, data: list[Datum]) -> None:
        """Gradients of the summed negative log-likelihood."""
        longest = max(datum.model_input.length for datum in data)
        tokens = torch.zeros(len(data), longest, dtype=torch.int64)
        targets = torch.full((len(data), longest), -100)
        for number, datum in enumerate(data):
            length = datum.model_input.length
            tokens[number, :length] = torch.from_numpy(datum.model_input.to_numpy())
            targets[number, :length] = datum.loss_fn_inputs["target_tokens"].to_torch()
        mask = (targets != -100).long()
        tokens, targets, mask = (each.to(self._device) for each in (tokens, targets, mask))
        with torch.autocast(self._device, dtype=self._dtype, enabled=self._dtype != torch.float32):
            logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        loss.backward()

    def step(self, data: list[Datum]) -> None:
        """A whole step on these data."""
        self.forward_backward(data)
        self._optimizer.step()
        self._optimizer.zero_grad()


def ragged(setting: Setting, vocab: int) -> list[Datum]:
    """A ragged batch."""
    return make_data(vocab, ragged_lengths(setting.pick(1, 8)))


def ragged_lengths(scale: int = 1) -> list[int]:
    """Lengths of a ragged batch, divided by `scale`."""
    return [length // scale for length in RAGGED]


def over_padded_loop(setting: Setting) -> list[Row]:
    """Tokens a second on the same batch."""
    with (
        trainer(setting, "float32", "--compute-dtype", "float32") as float32,
        trainer(setting, "bfloat16", "--compute-dtype", "bfloat16") as bfloat16,
    ):
        one, other = float32.create_training_client(), bfloat16.create_training_client()
        data = ragged(setting, vocab_size(float32))
        loop, half_loop = (PaddedLoop(setting.model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        times = interleave(
            {
                "padded float32": lambda: loop.step(data),
                "service float32": lambda: built_in(one, data),
                "padded bfloat16": lambda: half_loop.step(data),
                "service bfloat16": lambda: built_in(other, data),
            },
            rounds=setting.rounds,
        )
    tokens = sum(datum.model_input.length for datum in data)
    padded = len(data) * max(datum.model_input.length for datum in data)

    def row(loop: str, service: str, goal: float) -> Row:
        rates = [tokens / float(np.median(times[name])) for name in (f"service {service}", f"padded {loop}")]
        return Row(
            f"tokens/s over a padded Hugging Face loop in {loop}, service in {service}, {tokens} of {padded} padded",
            f"{rates[0]:.0f} / {rates[1]:.0f} tokens/s",
            f"{ratio(times[f'padded {loop}'], times[f'service {service}']):.2f}",
            f"at least {goal}",
        )

    return [row("float32", "float32", 2.6), row("bfloat16", "bfloat16", 2.4), row("float32", "bfloat16", 4.3)]


class MatmulFloor:
    """The matrix products of a model's linear layers, forward and backward, and nothing else."""

    def __init__(self, model: nn.Module, num_tokens: int, dtype: torch.dtype) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._weights = [layer.weight.detach().to(dtype) for layer in layers]
        device = self._weights[0].device
        self._inputs = {
            size: torch.randn(num_tokens, size, dtype=dtype, device=device)
            for size in {size for weight in self._weights for size in weight.shape}
        }

    def run(self) -> None:
        """One forward and one backward, by the library that the engine asks."""
        for weight in self._weights:
            products.linear(self._inputs[weight.shape[1]], weight)
        for weight in reversed(self._weights):
            gradient: Tensor = self._inputs[weight.shape[0]]
            products.input_gradient(gradient, weight)
            products.weight_gradient(gradient, self._inputs[weight.shape[1]], weight)

    def run_by_torch(self) -> None:
        """The same, by the library that torch asks."""
        with torch.backends.mkldnn.flags(enabled=self._weights[0].dtype != torch.float32):
            self.run()


def over_matmul_floor(setting: Setting) -> list[Row]:
    """forward_backward on the engine, over its linear layers' products."""
    return [
        _floor_row(setting, torch.float32, "float32", 1.25),
        _floor_row(setting, torch.bfloat16, "bfloat16", 1.55),
    ]


def _floor_row(setting: Setting, dtype: torch.dtype, name: ComputeDtype, goal: float) -> Row:
    engine = InProcess(setting.model, setting.folder, EngineSettings(compute_dtype=name))
    data = ragged(setting, engine.engine.model.vocab_size)
    tokens = sum(datum.model_input.length for datum in data)
    floor = MatmulFloor(engine.engine._run("run").model, tokens, dtype)
    times = interleave(
        {"engine": lambda: engine.forward_backward(data), "floor": floor.run, "by torch": floor.run_by_torch},
        rounds=setting.rounds,
    )
    return Row(
        f"forward_backward over its matrix products alone, {tokens} tokens, {name}",
        f"{ms(times['engine'])} / {ms(times['floor'])}; as torch makes them {ms(times['by torch'])}",
        f"{ratio(times['engine'], times['floor']):.3f}",
        f"at most {goal}",
    )
