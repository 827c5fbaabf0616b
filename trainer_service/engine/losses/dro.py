"""Direct reward optimisation: off-policy, held near the sampler by a quadratic penalty in place of a clip."""

from collections.abc import Mapping

from gradwire.errors import invalid_field

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput
from trainer_service.engine.losses.ratio import ratio_metrics


def dro(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
    """−Σ (target_logprob · advantage − ½ · beta · (target_logprob − sampling_logprob)²).

    Args:
        inputs: Reads "logprobs", the sampler's, and "advantages", of any sign. A token of advantage 0 is still held
            near its sampling_logprob, so give prompts' tokens the logprobs that `forward` found.
        config: "beta", strength of the penalty; there is no usual value.

    Returns:
        The loss; every token is a loss token.

    Source: Richemond et al. 2024, Offline Regularised Reinforcement Learning, https://arxiv.org/abs/2405.19107
    """
    target_logprobs_T, advantages_T = inputs.target_logprobs_TK, inputs.inputs["advantages"]
    difference_T = target_logprobs_T - inputs.inputs["logprobs"]
    counts_T = advantages_T.isfinite()  # All of them are: that was checked.
    return LossOutput(
        loss=-(target_logprobs_T * advantages_T - 0.5 * config["beta"] * difference_T**2).sum(),
        num_loss_tokens=counts_T.sum(),
        metrics=ratio_metrics(inputs, counts_T),
    )


def _check_config(config: Mapping[str, float]) -> None:
    if config["beta"] < 0:
        raise invalid_field(
            'loss_fn_config["beta"]', f"is {config['beta']:g}; it must be at least 0, or the penalty would be a reward."
        )


DRO = Loss(
    name="dro",
    inputs=("logprobs", "advantages"),
    fn=dro,
    config={"beta": None},
    advice='pass for example {"beta": 0.05}, and more to stay closer to the sampler',
    check_config=_check_config,
)
