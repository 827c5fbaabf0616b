"""Weighted negative log-likelihood."""

from collections.abc import Mapping

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput


def cross_entropy(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ weight · logprob over all targets: a sum, never a mean.

    Args:
        inputs: Reads "weights": float32, shaped as the targets; 0 ignores a target.
        config: Nothing.

    Returns:
        The loss in nats; its loss tokens are the targets whose weight is not zero.
    """
    del config
    weights_TK = inputs.inputs["weights"]
    return LossOutput(loss=-(inputs.target_logprobs_TK * weights_TK).sum(), num_loss_tokens=weights_TK.count_nonzero())


CROSS_ENTROPY = Loss(name="cross_entropy", inputs=("weights",), config_keys=(), fn=cross_entropy)
