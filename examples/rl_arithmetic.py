"""Reinforcement learning with a reward in your own Python: GRPO on sums, from a model that gets few of them right.

    python examples/rl_arithmetic.py                     three minutes on two cores; no model to fetch
    python examples/rl_arithmetic.py --loss ppo

Every step samples eight answers to each of 32 sums from the parameters as they are, scores them (1 for right, 0 for
wrong), and trains on how much better than its group's mean each answer was. Sums never trained on say whether it learns
to add.
"""

import random
import statistics
import time

import gradwire
from sums import (
    NUM_ANSWER_TOKENS,
    Problem,
    accuracy,
    answer,
    parser,
    prompt,
    save_plot,
    split_problems,
    supervised,
    tiny_service,
)


def to_datum(problem: Problem, sampled: gradwire.SampledSequence, advantage: float) -> gradwire.Datum:
    """What importance_sampling and ppo read: the sampler's logprobs and the advantage, on the answer's tokens."""
    question = prompt(problem)
    tokens = [*question, *sampled.tokens]
    before = [0.0] * (len(question) - 1)
    return gradwire.Datum(
        gradwire.ModelInput.from_ints(tokens[:-1]),
        {
            "target_tokens": tokens[1:],
            "logprobs": [*before, *sampled.logprobs],
            "advantages": [*before, *[advantage] * len(sampled.tokens)],
        },
    )


def advantages(rewards: list[float]) -> list[float]:
    """How far each reward is above its group's mean, in standard deviations; none where all are equal."""
    spread = statistics.pstdev(rewards)
    return [(reward - statistics.mean(rewards)) / spread if spread else 0.0 for reward in rewards]


def main() -> None:
    options = parser(__doc__, steps=150, plot="rl_arithmetic.png")
    options.add_argument("--loss", default="importance_sampling", choices=["importance_sampling", "ppo"])
    options.add_argument("--sums", type=int, default=32, help="a step")
    options.add_argument("--group", type=int, default=8, help="answers to each")
    options.add_argument("--learning-rate", type=float, default=3e-4)
    args = options.parse_args()
    problems, held_out = split_problems(held_out=args.held_out)
    rng = random.Random(2)  # noqa: S311
    params = gradwire.SamplingParams(max_tokens=NUM_ANSWER_TOKENS, temperature=1.0, stop=[])
    rewards_by_step: list[tuple[float, float]] = []

    with tiny_service(args.base_url) as service, service.create_training_client() as client:
        supervised(client, problems, steps=args.supervised_steps)
        checked = [(0.0, accuracy(client.save_weights_and_get_sampling_client(), held_out))]
        print(f"Right on {len(held_out)} sums never trained on, before: {checked[0][1]:.1%}", flush=True)
        start_s = time.monotonic()
        for step in range(1, args.steps + 1):
            # The weights are frozen after the optimizer step before it, which costs nothing until the next step.
            sampler = client.save_weights_and_get_sampling_client()
            batch = rng.sample(problems, args.sums)
            futures = [sampler.sample(prompt(problem), args.group, params) for problem in batch]
            data: list[gradwire.Datum] = []
            rewards: list[float] = []
            for problem, future in zip(batch, futures, strict=True):
                group = future.result().sequences
                scores = [float(sampled.tokens == answer(problem)) for sampled in group]
                rewards += scores
                data += [
                    to_datum(problem, sampled, advantage)
                    for sampled, advantage in zip(group, advantages(scores), strict=True)
                    if advantage
                ]
            if data:
                client.forward_backward(data, args.loss)
                rate = args.learning_rate * (1 - 0.9 * step / args.steps)
                adam_params = gradwire.AdamParams(rate, grad_clip_norm=1.0)
                client.optim_step(adam_params, grad_accumulation_normalization="num_loss_tokens")
            rewards_by_step.append((step, statistics.mean(rewards)))
            if step % 25 == 0 or step == args.steps:
                checked.append((step, accuracy(client.save_weights_and_get_sampling_client(), held_out)))
                text = f"step {step}: reward {rewards_by_step[-1][1]:.3f}, held-out {checked[-1][1]:.1%}"
                print(f"{text}, {time.monotonic() - start_s:.0f} s", flush=True)
    first, last = rewards_by_step[:10], rewards_by_step[-10:]
    print(f"Mean reward, first and last steps: {_mean(first):.3f} {_mean(last):.3f}")
    curves = {"mean reward of the step's samples": rewards_by_step, "held-out sums right, greedy": checked}
    save_plot(args.plot, f"GRPO with {args.loss} on sums of two-digit numbers", curves, ylabel="share right")


def _mean(points: list[tuple[float, float]]) -> float:
    return statistics.mean(value for _, value in points)


if __name__ == "__main__":
    main()
