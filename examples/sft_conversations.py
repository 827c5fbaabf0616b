"""Fine-tunes on a JSONL of chats, one {"messages": [{"role", "content"}, …]} a line: a whole loop, to copy and change.

    python examples/sft_conversations.py                                  a trainer on this machine
    python examples/sft_conversations.py --base-url http://host:7777      a trainer that runs already

Batches in parts (gradient accumulation), warmup and cosine decay, two steps in flight at any time, loss on held-out
chats before and after, a loss curve as PNG, a checkpoint.
"""

import argparse
import contextlib
import json
import math
import os
import random
import secrets
import sys
from collections import deque
from pathlib import Path

import gradwire
from tqdm import tqdm
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "conversations.jsonl")
    parser.add_argument("--base-model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--base-url", help="a running trainer; without it one is started on this machine")
    parser.add_argument("--api-key", default=os.environ.get("GRADWIRE_API_KEY"), help="default: $GRADWIRE_API_KEY")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="chats a step")
    parser.add_argument("--accumulate", type=int, default=2, help="parts a batch is sent in")
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="at its highest")
    parser.add_argument("--warmup-steps", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a chat; longer ones are cut")
    parser.add_argument("--held-out", type=int, default=16, help="chats never trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, default=Path("loss_curve.png"))
    parser.add_argument("--checkpoint", default="sft-conversations", help="name of the exported weights")
    return parser.parse_args()


def read_chats(path: Path) -> list[list[dict[str, str]]]:
    if not path.exists():
        sys.exit(f"{path} does not exist; fetch it with: python scripts/fetch_conversations.py")
    return [json.loads(line)["messages"] for line in path.read_text().splitlines() if line.strip()]


def learning_rate(step: int, *, num_steps: int, warmup_steps: int, highest: float) -> float:
    """Linear warmup, then half a cosine down to a tenth."""
    if step < warmup_steps:
        return highest * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return highest * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def mean_loss(outputs: list[gradwire.ForwardBackwardOutput]) -> float:
    """The loss per token trained on; the service's losses are sums."""
    return sum(o.metrics["loss:sum"] for o in outputs) / sum(o.metrics["num_loss_tokens:sum"] for o in outputs)


def train(
    client: gradwire.TrainingClient, data: list[gradwire.Datum], args: argparse.Namespace
) -> tuple[list[float], list[float]]:
    """Trains. Returns the loss and the learning rate of every step."""
    steps_per_epoch = math.ceil(len(data) / args.batch_size)
    num_steps = args.epochs * steps_per_epoch
    losses: list[float] = []
    rates: list[float] = []
    in_flight: deque[tuple[list[gradwire.APIFuture], gradwire.APIFuture]] = deque()
    # On a terminal the bar moves all the time; a log file gets a line now and then.
    bar = tqdm(total=num_steps, desc="Training", unit="step", mininterval=0.1 if sys.stderr.isatty() else 10)

    def finish_oldest() -> None:
        passes, optim_step = in_flight.popleft()
        losses.append(mean_loss([future.result() for future in passes]))
        optim_step.result()
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        bar.update()

    shuffler = random.Random(args.seed)  # noqa: S311  (an order, not a secret)
    with bar:
        for step in range(num_steps):
            start = step % steps_per_epoch * args.batch_size
            if start == 0:
                shuffler.shuffle(data)
            batch = data[start : start + args.batch_size]
            parts = [batch[i :: args.accumulate] for i in range(min(args.accumulate, len(batch)))]
            rates.append(
                learning_rate(step, num_steps=num_steps, warmup_steps=args.warmup_steps, highest=args.learning_rate)
            )
            # Nothing is waited for here: the trainer runs them in this order, and always has the next at hand.
            passes = [client.forward_backward(part, "cross_entropy") for part in parts]
            adam_params = gradwire.AdamParams(learning_rate=rates[-1], beta2=0.99, grad_clip_norm=1.0)
            in_flight.append(
                (passes, client.optim_step(adam_params, grad_accumulation_normalization="num_loss_tokens"))
            )
            if len(in_flight) == 2:
                finish_oldest()
        while in_flight:
            finish_oldest()
    return losses, rates


def plot(losses: list[float], rates: list[float], held_out: tuple[float, float], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses, label="training batch")
    axes.plot([0, len(losses)], held_out, "o--", label="held-out chats, before and after")
    axes.set(xlabel="step", ylabel="loss per token (nats)", ylim=(0, None), title="Supervised fine-tuning")
    right = axes.twinx()
    right.plot(range(1, len(rates) + 1), rates, color="gray", alpha=0.5, linewidth=1)
    right.set_ylabel("learning rate", color="gray")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    args = parse_args()
    chats = read_chats(args.data)
    if not 0 < args.held_out < len(chats):
        sys.exit(f"--held-out is {args.held_out}, but {args.data} has {len(chats)} chats; leave some to train on.")
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    data = [gradwire.datum_from_messages(tokenizer, chat, max_length=args.max_length) for chat in chats]
    held_out, data = data[: args.held_out], data[args.held_out :]

    with contextlib.ExitStack() as stack:
        base_url, api_key = args.base_url, args.api_key
        if not base_url:
            api_key = api_key or secrets.token_hex(16)
            jobs = stack.enter_context(gradwire.TrainerJobManager(api_key))
            config = gradwire.TrainerJobConfig(args.base_model, display_name="sft-conversations")
            base_url = jobs.create_and_wait(config).base_url
        service = stack.enter_context(gradwire.ServiceClient(base_url, api_key))
        # A trainer elsewhere may know the model by another name; it serves only one.
        client = stack.enter_context(service.create_training_client("" if args.base_url else args.base_model))
        before = mean_loss([client.forward(held_out, "cross_entropy").result()])
        print(f"Held-out loss before: {before:.4f} per token, {len(held_out)} chats", flush=True)
        losses, rates = train(client, data, args)
        after = mean_loss([client.forward(held_out, "cross_entropy").result()])
        print(f"Held-out loss after:  {after:.4f} per token ({len(losses)} steps)")
        saved = client.save_weights_for_sampler_ext(args.checkpoint, overwrite=True)
        print(f"Checkpoint: {saved.uri}")
    plot(losses, rates, (before, after), args.plot)
    print(f"Loss curve: {args.plot}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted; the trainer was stopped if this script started it.", file=sys.stderr)
        sys.exit(130)
