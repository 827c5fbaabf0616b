"""Eight LoRA runs side by side on one trainer and one copy of the base model, each learning a trick of its own.

    python examples/many_adapters.py                                  a trainer on this machine
    python examples/many_adapters.py --base-url http://host:7777      a trainer that runs already (--max-runs 8)

Every run sees made-up words, `bamiko ->`, and answers that follow one rule: in capitals, backwards, its vowels, … No
prompt says which rule it is, so only a run's own adapter can know. At the end every adapter is tried on words it never
saw: on the loss of all eight rules, and on what it answers. It must be good at its own and at no other.
"""

import argparse
import contextlib
import os
import random
import secrets
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import gradwire
import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

Clients = dict[str, gradwire.TrainingClient]
ROOT = Path(__file__).resolve().parent.parent
RULES: dict[str, Callable[[str], str]] = {
    "capitals": str.upper,
    "backwards": lambda word: word[::-1],
    "twice": lambda word: f"{word} {word}",
    "spelled": lambda word: "-".join(word),
    "first syllable": lambda word: word[:2],
    "last syllable": lambda word: word[-2:],
    "vowels": lambda word: "".join(letter for letter in word if letter in "aeiou"),
    "capital first": str.capitalize,
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    parser.add_argument("--base-url", help="a running trainer; without it one is started on this machine")
    parser.add_argument("--api-key", default=os.environ.get("GRADWIRE_API_KEY"), help="default: $GRADWIRE_API_KEY")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="words a step of a run")
    parser.add_argument("--lora-rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=12, help="words never trained on")
    parser.add_argument("--plot", type=Path, default=Path("many_adapters.png"))
    return parser.parse_args()


def make_words(count: int) -> list[str]:
    """Different words of two or three syllables."""
    rng = random.Random(0)  # noqa: S311  (words, not secrets)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(syllables, k=rng.choice((2, 3))))] = None
    return list(words)


def to_datum(tokenizer: PreTrainedTokenizerBase, word: str, answer: str) -> gradwire.Datum:
    prompt, completion = (tokenizer.encode(text, add_special_tokens=False) for text in (f"{word} ->", f" {answer}."))
    return gradwire.datum_from_tokens_weights(prompt + completion, [0.0] * len(prompt) + [1.0] * len(completion))


def mean_loss(output: gradwire.ForwardBackwardOutput) -> float:
    return output.metrics["loss:sum"] / output.metrics["num_loss_tokens:sum"]


def train(clients: Clients, data: dict[str, list[gradwire.Datum]], args: argparse.Namespace) -> None:
    """One step of every run after the other, all sent before the first is waited for."""
    for step in range(args.steps):
        adam = gradwire.AdamParams(args.learning_rate * (1 - step / args.steps), beta2=0.99, grad_clip_norm=1.0)
        part = slice(step * args.batch_size, (step + 1) * args.batch_size)
        passes = {rule: run.forward_backward(data[rule][part]) for rule, run in clients.items()}
        steps = [run.optim_step(adam, grad_accumulation_normalization="num_loss_tokens") for run in clients.values()]
        losses = [mean_loss(future.result()) for future in passes.values()]
        for future in steps:
            future.result()
        print(f"Step {step + 1:3d}: loss per token {min(losses):.3f} to {max(losses):.3f}", flush=True)


def try_out(clients: Iterable[gradwire.TrainingClient], data: dict[str, list[gradwire.Datum]]) -> np.ndarray:
    """Loss per token of every adapter (a row) under every rule (a column)."""
    futures = [[client.forward(data[rule], "cross_entropy") for rule in RULES] for client in clients]
    return np.array([[mean_loss(future.result()) for future in row] for row in futures])


def num_right(clients: Clients, words: list[str], tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """For how many words each adapter's likeliest answer is right."""
    greedy = gradwire.SamplingParams(max_tokens=16, temperature=0, stop=["."])
    samplers = {rule: client.save_weights_and_get_sampling_client() for rule, client in clients.items()}
    prompts = [tokenizer.encode(f"{word} ->", add_special_tokens=False) for word in words]
    futures = {rule: [sampler.sample(prompt, 1, greedy) for prompt in prompts] for rule, sampler in samplers.items()}
    right = dict.fromkeys(RULES, 0)
    for rule, answers in futures.items():
        texts = [str(tokenizer.decode(answer.result().sequences[0].tokens)) for answer in answers]
        right[rule] = sum(
            text.partition(".")[0].strip() == RULES[rule](word) for text, word in zip(texts, words, strict=True)
        )
    return right


def plot(before: np.ndarray, after: np.ndarray, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    table = np.vstack([before, after])
    axes.imshow(np.log(table), cmap="viridis_r")
    axes.axhline(0.5, color="white", linewidth=4)
    for (row, column), value in np.ndenumerate(table):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value > 1 else "black")
    axes.set_xticks(range(len(RULES)), list(RULES), rotation=30, ha="right")
    axes.set_yticks(range(len(table)), ["base model", *RULES])
    axes.set(xlabel="rule", ylabel="adapter", title="Held-out words: loss per token (nats)")
    figure.savefig(path, dpi=120)


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base_model)
    words = make_words(args.held_out + args.steps * args.batch_size)
    data = {rule: [to_datum(tokenizer, word, answer(word)) for word in words] for rule, answer in RULES.items()}
    held_out = {rule: datums[: args.held_out] for rule, datums in data.items()}
    training = {rule: datums[args.held_out :] for rule, datums in data.items()}
    with contextlib.ExitStack() as stack:
        base_url, api_key = args.base_url, args.api_key
        if not base_url:
            api_key = api_key or secrets.token_hex(16)
            jobs = stack.enter_context(gradwire.TrainerJobManager(api_key))
            config = gradwire.TrainerJobConfig(args.base_model, display_name="many-adapters", lora_rank=args.lora_rank)
            base_url = jobs.create_and_wait(config).base_url
        service = stack.enter_context(gradwire.ServiceClient(base_url, api_key))
        clients: Clients = {}
        for rule in RULES:
            run = service.create_training_client(lora_rank=args.lora_rank, train_unembed=False, display_name=rule)
            clients[rule] = stack.enter_context(run)
        # A new adapter changes nothing, so one run speaks for the base model.
        before = try_out([clients["capitals"]], held_out)
        train(clients, training, args)
        after = try_out(clients.values(), held_out)
        own, others = np.diag(after), after[~np.eye(len(RULES), dtype=bool)]
        print(f"Held-out loss per token before: {before.mean():.3f}")
        print(f"Held-out loss per token after, own rule: {own.mean():.3f}; others' rules: {others.mean():.3f}")
        right = num_right(clients, words[: args.held_out], tokenizer)
        print(f"Answers right, of {args.held_out} a rule: {', '.join(f'{rule} {right[rule]}' for rule in RULES)}")
        print(f"Answers right in all: {sum(right.values()) / args.held_out / len(RULES):.1%}")
        saved = [client.save_weights_for_sampler_ext("adapter", overwrite=True).uri for client in clients.values()]
        print(f"Adapters, for plain peft: {saved[0]} and {len(saved) - 1} more")
    plot(before, after, args.plot)
    print(f"Plot: {args.plot}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted; the trainer was stopped if this script started it.", file=sys.stderr)
        sys.exit(130)
