"""Policy gradient with clipped importance weights: every token keeps a gradient."""

from collections.abc import Mapping

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput
from trainer_service.engine.losses.ratio import check_thresholds, log_ratio, ratio_metrics


def cispo(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ clamp(r) · target_logprob · advantage, without a gradient through r = exp(target_logprob − sampling_logprob).

    Args:
        inputs: Reads "logprobs", the sampler's, and "advantages", of any sign; 0 ignores a token.
        config: "clip_low_threshold" and "clip_high_threshold" bound r; 0 leaves it open below, as the paper does.

    Returns:
        The loss; its loss tokens are those whose advantage is not zero, and "clipped_fraction:mean" is the part of
        them whose r was out of bounds.

    Source: MiniMax-M1 2025, eq. 4 and 5, https://arxiv.org/abs/2506.13585
    """
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    log_ratio_T, advantages_T, counts_T = log_ratio(inputs)
    ratio_T = log_ratio_T.detach().exp()
    target_logprobs_T = inputs.target_logprobs_TK.where(counts_T, 0.0)
    return LossOutput(
        loss=-(ratio_T.clamp(low, high) * target_logprobs_T * advantages_T).sum(),
        num_loss_tokens=counts_T.sum(),
        metrics=ratio_metrics(inputs, counts_T, clipped_T=(ratio_T < low) | (ratio_T > high)),
    )


CISPO = Loss(
    name="cispo",
    inputs=("logprobs", "advantages"),
    fn=cispo,
    config={"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    check_config=check_thresholds,
)
