"""What a LoRA step on routed experts costs beside plain peft's. Prints one table.

    python benchmarks/expert_lora.py [--rounds 5] [--quick]

Both sides train the same adapter of the same model of 30M parameters in float32 on the same sequences, all of one
length, so that packing gains nothing; plain peft has transformers' grouped implementation of experts, its default. The
sides take turns, and the ratio is the median of the rounds' own ratios.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from as_the_worker import as_the_worker

if __name__ == "__main__":
    as_the_worker()

import torch
from gradwire._wire.codec import batch_from_data
from gradwire.types import AdamParams
from peft import PeftModel
from service import make_data
from side_by_side import Row, interleave, ms, print_table, ratio
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from trainer_service.engine.device import pick_device
from trainer_service.engine.engine import Engine
from trainer_service.engine.losses import find_loss
from trainer_service.engine.models.lora import LoraSettings

ADAM = AdamParams(learning_rate=1e-5)
EXPERTS = LoraSettings(rank=8, train_attn=False, train_unembed=False)


def make_model(folder: Path, *, quick: bool) -> int:
    """Saves a model with routed experts, random. Returns the size of its vocabulary.

    Eight experts a token and a head of a sixth of their work are as in Qwen3-30B-A3B.
    """
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "moe_intermediate_size": 16, "vocab_size": 128}
    if not quick:
        size = {"hidden_size": 384, "num_hidden_layers": 4, "moe_intermediate_size": 256, "vocab_size": 4096}
    experts: dict[str, Any] = {"num_experts": 20, "num_experts_per_tok": 8}
    heads: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    config = Qwen3MoeConfig(**size, **experts, **heads)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return config.vocab_size


def expert_rows(folder: Path, *, rounds: int, quick: bool) -> list[Row]:
    """A step of a LoRA run on experts over the same step of plain peft.

    Args:
        folder: For the model, and what is saved.
        rounds: Times each side runs.
        quick: A tiny model, so that a test can run this; the figures mean nothing.
    """
    vocab_size = make_model(folder / "model", quick=quick)
    data = make_data(vocab_size, [16 if quick else 256] * 4)
    engine = Engine(str(folder / "model"), device=pick_device(0, "float32"), checkpoint_dir=folder)
    engine.create_run("lora", lora=EXPERTS)
    saved = engine.save_weights_for_sampler("lora", "adapter")
    batch = batch_from_data(data)
    base: Any = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    peft = PeftModel.from_pretrained(base, saved.uri.removeprefix("file://"), is_trainable=True).eval()
    peft.to(engine.device.torch_device)
    trained = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=ADAM.learning_rate, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.eps)
    tokens = torch.tensor(batch.tokens_T).view(len(data), -1).to(engine.device.torch_device)
    targets = torch.tensor(batch.loss_fn_inputs["target_tokens"]).view(len(data), -1).to(tokens.device)
    weights = torch.tensor(batch.loss_fn_inputs["weights"]).view(len(data), -1).to(tokens.device)

    def ours() -> None:
        engine.forward_backward("lora", 1, engine.stage(batch, find_loss("cross_entropy")))
        engine.optim_step("lora", 2, ADAM)

    def theirs() -> None:
        logprobs = torch.log_softmax(peft(input_ids=tokens).logits.float(), -1)
        loss = -(logprobs.gather(-1, targets[..., None])[..., 0] * weights).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = interleave({"ours": ours, "peft": theirs}, rounds=rounds)
    measured = f"{ms(times['ours'])} / {ms(times['peft'])}"
    what = f"LoRA step on 20 experts, 8 a token, {batch.num_tokens} tokens, over plain peft's"
    return [Row(what, measured, f"{ratio(times['ours'], times['peft']):.3f}", "at most 0.7")]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a tiny model; the figures mean nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = expert_rows(Path(folder), rounds=arguments.rounds, quick=arguments.quick)
    print_table(("what", "measured", "ratio", "goal"), rows)


if __name__ == "__main__":
    main()
