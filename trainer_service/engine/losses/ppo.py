"""Policy gradient, held near the sampler by a clip."""

from collections.abc import Mapping

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput
from trainer_service.engine.losses.ratio import check_thresholds, clipped_terms, log_ratio, ratio_metrics


def ppo(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ min(r · advantage, clamp(r) · advantage), r = exp(target_logprob − sampling_logprob).

    Args:
        inputs: Reads "logprobs", the sampler's, and "advantages", of any sign; 0 ignores a token.
        config: "clip_low_threshold" and "clip_high_threshold" bound r; 0.8 and 1.2 are the paper's epsilon of 0.2.

    Returns:
        The loss; its loss tokens are those whose advantage is not zero, and "clipped_fraction:mean" is the part of
        them where the clip won, so that they have no gradient.

    Source: Schulman et al. 2017, eq. 7, https://arxiv.org/abs/1707.06347
    """
    log_ratio_T, advantages_T, counts_T = log_ratio(inputs)
    terms_T, clipped_T = clipped_terms(log_ratio_T, advantages_T, config)
    return LossOutput(
        loss=-terms_T.sum(),
        num_loss_tokens=counts_T.sum(),
        metrics=ratio_metrics(inputs, counts_T, clipped_T=clipped_T),
    )


PPO = Loss(
    name="ppo",
    inputs=("logprobs", "advantages"),
    fn=ppo,
    config={"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    check_config=check_thresholds,
)
