"""Data that all tests of the gateway train on, as tinker's SDK takes it."""

from tinker import types

TOKENS = [40, 41, 42, 43, 44, 45, 46, 47]


def make_data(count: int = 2, *, weights: list[float] | None = None) -> list[types.Datum]:
    """Datums of equal length and different tokens."""
    made = []
    for number in range(count):
        tokens = [*TOKENS, 50 + number % 40]
        made.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens[:-1]),
                loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights or [1.0] * (len(tokens) - 1)},
            )
        )
    return made
