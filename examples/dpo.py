"""Direct preference optimisation as a custom loss: chosen and rejected answers, a frozen reference, a little torch.

    python examples/dpo.py                     about a minute on two cores; no model to fetch

The model has learnt to write sums in either of two ways, the last digit first or the first digit first, half of the
time each. Pairs are both ways of writing one right answer, and the preference is for the last digit first; sums never
trained on say whether it carries over.

Source: Rafailov et al. 2023, https://arxiv.org/abs/2305.18290
"""

import random
import time
from typing import Any

import gradwire
from sums import Problem, answer, datum, parser, save_plot, split_problems, supervised, tiny_service

Pair = tuple[Problem, list[int], list[int]]


def make_pairs(problems: list[Problem]) -> list[Pair]:
    """Sums whose answer is not the same both ways: the way that is preferred, and the other."""
    both = [(problem, answer(problem), answer(problem)[::-1]) for problem in problems]
    return [pair for pair in both if pair[1] != pair[2]]


def to_data(pairs: list[Pair]) -> list[gradwire.Datum]:
    """Chosen and rejected answers, alternating."""
    return [datum(problem, tokens) for problem, *answers in pairs for tokens in answers]


def answer_logprobs(sampler: gradwire.SamplingClient, data: list[gradwire.Datum]) -> list[float]:
    """Logprob of each answer under a frozen sampler: what DPO calls the reference."""
    futures = []
    for each in data:
        tokens = [*each.model_input.to_ints(), int(each.loss_fn_inputs["target_tokens"].to_numpy()[-1])]
        futures.append(sampler.compute_logprobs(tokens))
    return [sum(value for value in future.result()[-3:] if value is not None) for future in futures]


def dpo_loss(reference: list[float], beta: float) -> Any:
    """−Σ log sigmoid(beta · (how much more the model prefers the chosen answer than the reference does))."""

    def loss(data: list[gradwire.Datum], logprobs_list: list[Any]) -> tuple[Any, dict[str, float]]:
        import torch

        weights = [each.loss_fn_inputs["weights"].to_torch() for each in data]
        answers = torch.stack([(logprobs * w).sum() for logprobs, w in zip(logprobs_list, weights, strict=True)])
        gained = (answers - torch.tensor(reference)).view(-1, 2)
        margin = gained[:, 0] - gained[:, 1]
        return -torch.nn.functional.logsigmoid(beta * margin).sum(), {"margin": margin.mean().item()}

    return loss


def preference(client: gradwire.TrainingClient, pairs: list[Pair]) -> float:
    """In which part of the pairs the chosen answer is likelier than the rejected one."""
    outputs = client.forward(to_data(pairs)).result().loss_fn_outputs
    scores = [sum(output["logprobs"].tolist()[-3:]) for output in outputs]
    return sum(chosen > rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)) / len(pairs)


def main() -> None:
    options = parser(__doc__, steps=40, plot="dpo.png")
    options.add_argument("--pairs", type=int, default=32, help="a step")
    options.add_argument("--beta", type=float, default=0.3)
    options.add_argument("--learning-rate", type=float, default=3e-4)
    options.set_defaults(supervised_steps=200)
    args = options.parse_args()
    problems, unseen = split_problems(held_out=args.held_out)
    rng = random.Random(3)  # noqa: S311
    pairs, held_out = make_pairs(problems), make_pairs(unseen)

    with tiny_service(args.base_url) as service, service.create_training_client() as client:
        either = random.Random(5)  # noqa: S311
        supervised(
            client,
            problems,
            steps=args.supervised_steps,
            write=lambda problem: answer(problem)[:: either.choice((1, -1))],
        )
        reference = client.save_weights_and_get_sampling_client()
        preferred = [(0.0, preference(client, held_out))]
        print(
            f"Last digit first preferred in {len(held_out)} held-out pairs, before: {preferred[0][1]:.1%}", flush=True
        )
        start_s = time.monotonic()
        for step in range(1, args.steps + 1):
            data = to_data(rng.sample(pairs, args.pairs))
            loss = dpo_loss(answer_logprobs(reference, data), args.beta)
            output = client.forward_backward_custom(data, loss)
            adam_params = gradwire.AdamParams(args.learning_rate, grad_clip_norm=1.0)
            client.optim_step(adam_params, grad_accumulation_normalization="num_sequences")
            if step % 5 == 0 or step == args.steps:
                preferred.append((step, preference(client, held_out)))
                per_pair = output.result().metrics["loss:sum"] / args.pairs
                text = f"step {step}: loss a pair {per_pair:.3f}, held-out pairs {preferred[-1][1]:.1%}"
                print(f"{text}, {time.monotonic() - start_s:.0f} s", flush=True)
    save_plot(args.plot, "DPO on sums", {"held-out pairs, chosen answer likelier": preferred}, ylabel="share")


if __name__ == "__main__":
    main()
