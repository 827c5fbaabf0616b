"""Policy gradient, corrected for the sampler not being the learner."""

from collections.abc import Mapping

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput
from trainer_service.engine.losses.ratio import log_ratio, ratio_metrics


def importance_sampling(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ r · advantage, r = exp(target_logprob − sampling_logprob).

    Where the two are equal, r is 1 and its gradient is REINFORCE's.

    Args:
        inputs: Reads "logprobs", the sampler's, and "advantages", of any sign; 0 ignores a token.
        config: Nothing.

    Returns:
        The loss; its loss tokens are those whose advantage is not zero.

    Source: Owen 2013, Monte Carlo theory, ch. 9; Williams 1992 for r = 1.
    """
    del config
    log_ratio_T, advantages_T, counts_T = log_ratio(inputs)
    return LossOutput(
        loss=-(log_ratio_T.exp() * advantages_T).sum(),
        num_loss_tokens=counts_T.sum(),
        metrics=ratio_metrics(inputs, counts_T),
    )


IMPORTANCE_SAMPLING = Loss(name="importance_sampling", inputs=("logprobs", "advantages"), fn=importance_sampling)
