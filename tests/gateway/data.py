"""Data that all tests of the gateway train on, as tinker's SDK takes it."""

from typing import Any

from tinker import types

TOKENS = [40, 41, 42, 43, 44, 45, 46, 47]


def make_data(count: int = 2, *, weights: list[float] | None = None) -> list[types.Datum]:
    """Datums of equal length and different tokens."""
    made = []
    for number in range(count):
        tokens = [*TOKENS, 50 + number % 40]
        # The SDK takes lists, though its types do not say so.
        inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": weights or [1.0] * (len(tokens) - 1)}
        made.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs))
    return made


def grad_norm(stepped: types.OptimStepResponse) -> float:
    """Of a step."""
    assert stepped.metrics is not None
    return stepped.metrics["grad_norm:mean"]
