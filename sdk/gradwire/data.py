"""From tokens and text to Datum."""

from typing import Any

from gradwire._wire.arguments import check_array
from gradwire.types import Datum, ModelInput, TensorData
from gradwire.types.data import to_array


def datum_from_tokens_weights(tokens: Any, weights: Any, max_length: int | None = None) -> Datum:
    """A Datum for next-token prediction: the model reads tokens[:-1] and is scored on tokens[1:].

    Args:
        tokens: Token ids [N], N ≥ 2, as ModelInput.from_ints takes them.
        weights: Loss weight of each token [N], or [1, N]; weights[i] belongs to predicting tokens[i], so weights[0] is
            not used.
        max_length: Longest sequence kept, in tokens; the rest is cut off at the end. None keeps all.

    Returns:
        Datum with loss_fn_inputs "target_tokens" (int64 [N - 1]) and "weights" (float32 [N - 1]).

    Raises:
        ValueError: What from_ints refuses, lengths that differ, or fewer than two tokens are left.
    """
    token_array = ModelInput.from_ints(tokens).to_numpy()
    weight_array = to_array(weights)
    if weight_array.ndim == 2 and len(weight_array) == 1:
        weight_array = weight_array[0]
    if token_array.shape != weight_array.shape:
        raise ValueError(f"weights has shape {list(weight_array.shape)}, but tokens has {list(token_array.shape)}.")
    if max_length is not None:
        token_array, weight_array = token_array[:max_length], weight_array[:max_length]
    if len(token_array) < 2:
        raise ValueError(
            f"tokens has {len(token_array)} after max_length; at least 2 are needed to predict one from another."
        )
    # Named here: behind the shift a place would be another's.
    weight_array = check_array("weights", weight_array, "float32")
    return Datum(
        model_input=ModelInput.from_ints(token_array[:-1]),
        loss_fn_inputs={
            "target_tokens": TensorData(token_array[1:], dtype="int64"),
            "weights": TensorData(weight_array[1:]),
        },
    )
