"""Watching a run: a table while it trains, a CSV file beside it, and a plot of its journal's curves at the end.

    python examples/curves.py                      half a minute on two cores; no model to fetch
    python examples/curves.py --tensorboard runs/sums

The live page shows the same as it happens: `gradwire serve --page 127.0.0.1:8080 …` and --base-url.
"""

import contextlib
import random
from pathlib import Path

import gradwire
from gradwire import loggers
from sums import answer, datum, parser, save_plot, split_problems, tiny_service


def main() -> None:
    arguments = parser(__doc__, steps=60, plot="curves.png")
    arguments.add_argument("--csv", type=Path, default=Path("curves.csv"))
    arguments.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="an event file there too")
    args = arguments.parse_args()
    problems, held_out = split_problems(held_out=args.held_out)
    rng = random.Random(0)  # noqa: S311  (an order, not a secret)
    with tiny_service(args.base_url) as service, contextlib.ExitStack() as stack:
        client = service.create_training_client(display_name="curves")
        logs = [loggers.TerminalLogger(args.steps), loggers.CsvLogger(args.csv)]
        if args.tensorboard:
            logs.append(loggers.TensorBoardLogger(args.tensorboard))
        for log in logs:
            stack.enter_context(log)
        test = [datum(problem, answer(problem)) for problem in held_out]
        for step in range(1, args.steps + 1):
            batch = [datum(problem, answer(problem)) for problem in rng.sample(problems, 64)]
            if step % 10 == 0:
                client.forward(test, "cross_entropy")
            passed = client.forward_backward(batch, "cross_entropy")
            stepped = client.optim_step(gradwire.AdamParams(learning_rate=1e-3)).result()
            for log in logs:
                log(passed.result().metrics | stepped.metrics, step=step)
        # The journal has more than the loop logged: what was evaluated, and what every step took.
        found = service.metrics(client.run_id)
    per_token = found["loss:sum"] / found["num_loss_tokens:sum"]
    held_out_per_token = found["forward/loss:sum"] / found["forward/num_loss_tokens:sum"]
    curves = {
        "training": list(zip(found.step, per_token, strict=True)),
        "held out": [point for point in zip(found.step, held_out_per_token, strict=True) if point[1] == point[1]],
    }
    save_plot(args.plot, "Sums", curves, ylabel="nats a token")
    print(f"{len(found)} steps, {per_token[0]:.2f} to {per_token[-1]:.2f} nats a token")


if __name__ == "__main__":
    main()
