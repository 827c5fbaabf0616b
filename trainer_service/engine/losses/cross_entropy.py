"""Weighted negative log-likelihood."""

from collections.abc import Mapping

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput


def cross_entropy(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ weight · logprob over all targets: a sum, never a mean.

    Args:
        inputs: Reads "weights": of any sign, shaped as the targets; 0 ignores a target.
        config: Nothing.

    Returns:
        The loss in nats; its loss tokens are the targets whose weight is not zero.
    """
    del config
    weights_TK = inputs.inputs["weights"]
    counts_TK = weights_TK != 0
    # A target without weight counts for nothing, also where its logprob is −inf.
    target_logprobs_TK = inputs.target_logprobs_TK.where(counts_TK, 0.0)
    return LossOutput(loss=-(target_logprobs_TK * weights_TK).sum(), num_loss_tokens=counts_TK.sum())


CROSS_ENTROPY = Loss(name="cross_entropy", inputs=("weights",), fn=cross_entropy, soft_targets=True)
