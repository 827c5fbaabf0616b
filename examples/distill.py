"""Distillation: a student learns a teacher's whole distribution, by soft [N, K] targets from a sampler's top-k.

    python examples/distill.py                     about two minutes on two cores; no model to fetch

The teacher is trained on right answers. The student never sees one: at every place of the answers that the teacher
itself samples, it is told the teacher's K likeliest tokens and their probabilities. Teacher and student are two runs of
one trainer.
"""

import math
import random
import time

import gradwire
import numpy as np
from sums import (
    NUM_ANSWER_TOKENS,
    Problem,
    accuracy,
    parser,
    prompt,
    save_plot,
    split_problems,
    supervised,
    tiny_service,
)

AT_ONCE = 500
"""Requests sent before the first is waited for; a trainer takes 1024 at once."""
TopK = list[list[tuple[int, float]] | None]


def soft_datum(tokens: list[int], topk: TopK, k: int) -> gradwire.Datum:
    """Targets [N, K] and, as their weights, the teacher's probabilities; none on the question."""
    num_targets = len(tokens) - 1
    targets = np.zeros((num_targets, k), dtype=np.int64)
    weights = np.zeros((num_targets, k), dtype=np.float32)
    for place in range(num_targets - NUM_ANSWER_TOKENS, num_targets):
        for rank, (token, logprob) in enumerate(topk[place + 1] or ()):
            targets[place, rank], weights[place, rank] = token, math.exp(logprob)
    return gradwire.Datum(gradwire.ModelInput.from_ints(tokens[:-1]), {"target_tokens": targets, "weights": weights})


def ask(teacher: gradwire.SamplingClient, problems: list[Problem], k: int) -> list[gradwire.Datum]:
    """The teacher answers, and says at each place of its answer what else it would have said."""
    if len(problems) > AT_ONCE:
        return ask(teacher, problems[:AT_ONCE], k) + ask(teacher, problems[AT_ONCE:], k)
    params = gradwire.SamplingParams(max_tokens=NUM_ANSWER_TOKENS, temperature=1.0, stop=[])
    answers = [teacher.sample(prompt(problem), 1, params) for problem in problems]
    texts = [
        [*prompt(problem), *future.result().sequences[0].tokens]
        for problem, future in zip(problems, answers, strict=True)
    ]
    nothing = gradwire.SamplingParams(max_tokens=0)
    scored = [teacher.sample(tokens, 1, nothing, topk_prompt_logprobs=k) for tokens in texts]
    return [
        soft_datum(tokens, future.result().topk_prompt_logprobs or [], k)
        for tokens, future in zip(texts, scored, strict=True)
    ]


def divergence(data: list[gradwire.Datum], outputs: list[dict[str, gradwire.TensorData]]) -> float:
    """Mean over answer tokens of Σ p (log p − log q) over the K likeliest: how far the student is from the teacher."""
    total = 0.0
    for each, output in zip(data, outputs, strict=True):
        p = each.loss_fn_inputs["weights"].to_numpy()
        total += float((p * (np.log(np.maximum(p, 1e-30)) - output["logprobs"].to_numpy()))[p > 0].sum())
    return total / (len(data) * NUM_ANSWER_TOKENS)


def main() -> None:
    options = parser(__doc__, steps=300, plot="distill.png")
    options.add_argument("--sums", type=int, default=4000, help="that the teacher answers, once each")
    options.add_argument("--batch-size", type=int, default=64)
    options.add_argument("--topk", type=int, default=8)
    options.add_argument("--learning-rate", type=float, default=2e-3)
    options.set_defaults(supervised_steps=800)
    args = options.parse_args()
    problems, held_out = split_problems(held_out=args.held_out)
    rng = random.Random(4)  # noqa: S311

    with (
        tiny_service(args.base_url) as service,
        service.create_training_client() as teaching,
        service.create_training_client() as student,
    ):
        supervised(teaching, problems, steps=args.supervised_steps)
        teacher = teaching.save_weights_and_get_sampling_client()
        print(f"Teacher: {accuracy(teacher, held_out):.1%} of {len(held_out)} held-out sums right", flush=True)
        held_out_data = ask(teacher, held_out, args.topk)
        taught = ask(teacher, problems[: args.sums], args.topk)
        right: list[tuple[float, float]] = []
        distance: list[tuple[float, float]] = []
        start_s = time.monotonic()
        for step in range(args.steps + 1):
            if step % max(1, args.steps // 8) == 0 or step == args.steps:
                outputs = student.forward(held_out_data).result().loss_fn_outputs
                distance.append((step, divergence(held_out_data, [dict(output) for output in outputs])))
                right.append((step, accuracy(student.save_weights_and_get_sampling_client(), held_out)))
                text = f"step {step}: {distance[-1][1]:.3f} nats from the teacher, {right[-1][1]:.1%} right"
                print(f"{text}, {time.monotonic() - start_s:.0f} s", flush=True)
            if step == args.steps:
                break
            student.forward_backward(rng.sample(taught, args.batch_size), "cross_entropy")
            rate = args.learning_rate * min(1.0, (step + 1) / 20)
            adam_params = gradwire.AdamParams(rate, grad_clip_norm=1.0)
            student.optim_step(adam_params, grad_accumulation_normalization="num_sequences")
    curves = {"held-out: nats a token from the teacher": distance, "held-out sums right": right}
    save_plot(args.plot, f"Distillation from a teacher's {args.topk} likeliest tokens", curves, ylabel="nats, share")


if __name__ == "__main__":
    main()
