"""Data for Fireworks' own SDK (`pip install fireworks-ai`), which takes no other package's datums.

Its guides import `datum_from_tokens_weights` from a place that has it no more; take it from here instead.
"""

from typing import Any

from gradwire.data import datum_from_tokens_weights as _our_datum


def datum_from_tokens_weights(tokens: Any, weights: Any, max_length: int | None = None) -> Any:
    """As gradwire.datum_from_tokens_weights, but a `fireworks.training.sdk.types.Datum`.

    Args:
        tokens: Token ids [N], N ≥ 2.
        weights: Loss weight of each token [N]; weights[i] belongs to predicting tokens[i].
        max_length: Longest sequence kept, in tokens; None keeps all.

    Raises:
        ImportError: Fireworks' SDK is not installed.
        ValueError: As gradwire.datum_from_tokens_weights.
    """
    # No dependency of this package.
    from fireworks.training.sdk import types  # pyright: ignore[reportMissingImports]

    datum = _our_datum(tokens, weights, max_length)
    return types.Datum(
        model_input=types.ModelInput.from_ints(datum.model_input.to_ints()),
        loss_fn_inputs={name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()},
    )
