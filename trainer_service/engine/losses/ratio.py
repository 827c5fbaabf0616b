"""What the losses over probability ratios share.

The ratio r = exp(lp − q) of the learner's probability of a token to the sampler's is unbounded: exp overflows float32
beyond a difference of 88, and infinity times a gradient of zero is NaN. So a term that a clip, or an advantage of zero,
makes constant must not have the ratio in its graph.

Shape suffixes: T targets of one microbatch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from gradwire._wire.arguments import FLOAT32_MAX
from gradwire.errors import invalid_field

from trainer_service.engine.losses.loss import LossInputs

if TYPE_CHECKING:
    from torch import Tensor


def log_ratio(inputs: LossInputs) -> "tuple[Tensor, Tensor, Tensor]":
    """(lp − q with grad, advantages, where they count), [T] each.

    Tokens whose advantage is 0 count for nothing, and have 0 for their log ratio and no grad.
    """
    advantages_T = inputs.inputs["advantages"]
    counts_T = advantages_T != 0
    log_ratio_T = (inputs.target_logprobs_TK - inputs.inputs["logprobs"]).where(counts_T, 0.0)
    return log_ratio_T, advantages_T, counts_T


def clipped_terms(
    log_ratio_T: "Tensor", advantages_T: "Tensor", config: Mapping[str, float]
) -> "tuple[Tensor, Tensor]":
    """(min(r·A, clamp(r)·A) with grad, where the clamp is the smaller), [T] each.

    Args:
        log_ratio_T: log r, with grad.
        advantages_T: A.
        config: clip_low_threshold and clip_high_threshold, the bounds of r.
    """
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    ratio_T = log_ratio_T.detach().exp()
    clipped_T = ((advantages_T > 0) & (ratio_T > high)) | ((advantages_T < 0) & (ratio_T < low))
    kept_T = log_ratio_T.where(~clipped_T, 0.0).exp()
    return kept_T.where(~clipped_T, ratio_T.clamp(low, high)) * advantages_T, clipped_T


def ratio_metrics(
    inputs: LossInputs,
    counts_T: "Tensor",
    *,
    log_ratio_T: "Tensor | None" = None,
    clipped_T: "Tensor | None" = None,
) -> "dict[str, Tensor]":
    """How far the learner is from the sampler, over the loss tokens, in float64.

    Args:
        inputs: target_logprobs_TK and "logprobs".
        counts_T: The loss tokens.
        log_ratio_T: Log of the ratio the loss itself uses; None for lp − q.
        clipped_T: Where a bound took effect; None for a loss without bounds.

    Returns:
        "ratio:mean", "ratio:max", "kl:mean" (nats), and with bounds "clipped_fraction:mean". The KL divergence of the
        sampler from the learner is estimated by r − 1 − log r, which is never negative and right on average. A token
        whose ratio or KL is beyond float32 counts with float32's largest number, so that means stay numbers, and in
        "overflowed_tokens:sum".

    Source: John Schulman, Approximating KL Divergence, 2020, http://joschu.net/blog/kl-approx.html
    """
    log_T = (inputs.target_logprobs_TK.detach().double() - inputs.inputs["logprobs"]).where(counts_T, 0.0)
    ratio_T = (log_T if log_ratio_T is None else log_ratio_T.detach().double()).exp()
    kl_T = log_T.expm1() - log_T
    metrics = {
        "ratio:mean": token_mean(ratio_T.clamp(max=FLOAT32_MAX), counts_T),
        "ratio:max": ratio_T.clamp(max=FLOAT32_MAX).where(counts_T, float("-inf")).max(),
        "kl:mean": token_mean(kl_T.clamp(max=FLOAT32_MAX), counts_T),
        "overflowed_tokens:sum": (((ratio_T > FLOAT32_MAX) | (kl_T > FLOAT32_MAX)) & counts_T).sum(),
    }
    if clipped_T is not None:
        metrics["clipped_fraction:mean"] = token_mean(clipped_T.float(), counts_T)
    return metrics


def token_mean(values_T: "Tensor", counts_T: "Tensor") -> "Tensor":
    """Mean over the loss tokens; 0 where there are none."""
    return values_T.where(counts_T, 0.0).sum() / counts_T.sum().clamp(min=1)


def check_thresholds(config: Mapping[str, float]) -> None:
    """Refuses bounds that leave nothing between them.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    low, high = config["clip_low_threshold"], config["clip_high_threshold"]
    if low < 0:
        raise invalid_field(
            'loss_fn_config["clip_low_threshold"]', f"is {low:g}; thresholds bound a ratio, so it must be at least 0."
        )
    if high < low:
        raise invalid_field(
            'loss_fn_config["clip_high_threshold"]',
            f"is {high:g}, below clip_low_threshold, which is {low:g}. Both bound the ratio itself: "
            "for an epsilon of 0.2 they are 0.8 and 1.2.",
        )
