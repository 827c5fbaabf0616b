"""Policy gradient with one importance ratio a sequence."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from gradwire._wire.codec import Batch
from gradwire.errors import invalid_field

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput
from trainer_service.engine.losses.ratio import check_thresholds, clipped_terms, ratio_metrics

if TYPE_CHECKING:
    from torch import Tensor


def gspo(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ min(s · advantage, clamp(s) · advantage), where all tokens of a datum have one value of s.

    That value is exp of the mean of target_logprob − sampling_logprob over the datum's mask; each token's s has it, and
    the gradient of its own logprob (the paper's token-level variant): s = exp(mean + target_logprob − its value).

    Args:
        inputs: Reads "logprobs", the sampler's, "advantages", of any sign, where 0 ignores a token, and
            "sequence_ratio_mask", 1 for the tokens that the mean is over and 0 for others.
        config: "clip_low_threshold" and "clip_high_threshold" bound s. Means over a sequence vary far less than single
            tokens, so bounds are far closer to 1 than ppo's (the paper: 1 − 3e-4 and 1 + 4e-4).

    Returns:
        The loss; its loss tokens are those whose advantage is not zero, and "ratio" in its metrics is s.

    Source: Zheng et al. 2025, eq. 7 and 13, https://arxiv.org/abs/2507.18071
    """
    advantages_T = inputs.inputs["advantages"]
    counts_T = advantages_T != 0
    target_logprobs_T = inputs.target_logprobs_TK
    # Always 0; it is there for its gradient.
    own_T = (target_logprobs_T - target_logprobs_T.detach()).where(counts_T & target_logprobs_T.isfinite(), 0.0)
    sequence_log_ratio_T = (_datum_mean(inputs) + own_T).where(counts_T, 0.0)
    terms_T, clipped_T = clipped_terms(sequence_log_ratio_T, advantages_T, config)
    return LossOutput(
        loss=-terms_T.sum(),
        num_loss_tokens=counts_T.sum(),
        metrics=ratio_metrics(inputs, counts_T, log_ratio_T=sequence_log_ratio_T, clipped_T=clipped_T),
    )


def _datum_mean(inputs: LossInputs) -> "Tensor":
    """Mean of lp − q over the mask of each token's datum, without grad, [T]; 0 where the mask is empty."""
    import torch

    mask_T = inputs.inputs["sequence_ratio_mask"]
    log_T = (inputs.target_logprobs_TK.detach() - inputs.inputs["logprobs"]).where(mask_T != 0, 0.0)
    lengths_N = inputs.cu_seqlens.diff()
    # In float64: a long datum's sum would otherwise lose digits that the bounds, so near 1, are about.
    total_N = torch.segment_reduce(log_T.double(), "sum", lengths=lengths_N)
    size_N = torch.segment_reduce(mask_T.double(), "sum", lengths=lengths_N)
    mean_N = (total_N / size_N.clamp(min=1)).float()
    return mean_N.repeat_interleave(lengths_N, output_size=len(mask_T))


def _check_inputs(batch: Batch) -> None:
    mask_T, advantages_T = batch.loss_fn_inputs["sequence_ratio_mask"], batch.loss_fn_inputs["advantages"]
    other_T = (mask_T != 0) & (mask_T != 1)
    starts_N = batch.cu_seqlens[:-1]
    if other_T.any():
        row = int(other_T.argmax())
        number, place = batch.place(row)
        raise invalid_field(
            f"{batch.input_path(number, 'sequence_ratio_mask')}[{place}]",
            f"is {mask_T[row]:g}; it must be 1, for a token that the mean ratio is over, or 0.",
        )
    empty_N = (np.add.reduceat(mask_T, starts_N) == 0) & (np.add.reduceat(advantages_T != 0, starts_N) != 0)
    if empty_N.any():
        raise invalid_field(
            batch.input_path(int(empty_N.argmax()), "sequence_ratio_mask"),
            "is 0 everywhere, but the datum has advantages; at least one token must be 1.",
        )


GSPO = Loss(
    name="gspo",
    inputs=("logprobs", "advantages", "sequence_ratio_mask"),
    fn=gspo,
    config={"clip_low_threshold": None, "clip_high_threshold": None},
    check_config=check_thresholds,
    check_inputs=_check_inputs,
)
