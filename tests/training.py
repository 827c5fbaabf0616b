"""Small data and numbers that most tests of training share."""

import numpy as np
import torch
from gradwire import AdamParams, Datum, TrainingClient, datum_from_tokens_weights

ADAM = AdamParams(learning_rate=1e-2)


def data(*lengths: int, seed: int = 0) -> list[Datum]:
    """Random datums with weights."""
    rng = np.random.default_rng(seed)
    return [
        datum_from_tokens_weights(rng.integers(3, 127, n + 1), rng.uniform(0, 1, n + 1).astype(np.float32))
        for n in lengths
    ]


def negative_log_likelihood(batch: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
    """cross_entropy, written as a user would."""
    pairs = zip(batch, logprobs_list, strict=True)
    loss = -torch.stack([torch.dot(lp, datum.loss_fn_inputs["weights"].to_torch()) for datum, lp in pairs]).sum()
    return loss, {"mine": loss.item()}


def all_logprobs(client: TrainingClient, batch: list[Datum]) -> np.ndarray:
    """The model's logprobs now, all datums end to end."""
    outputs = client.forward(batch).result(60).loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy() for output in outputs])
