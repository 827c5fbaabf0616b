"""A loss module as a user writes one."""

FOCAL = """
from trainer_service.engine.losses.loss import Loss, LossOutput

def focal(inputs, config):
    logprobs, weights = inputs.target_logprobs_TK, inputs.inputs["weights"]
    hard = (1 - logprobs.exp()) ** config["gamma"]
    metrics = {"hardness:mean": hard.detach().mean()}
    return LossOutput(-(hard * logprobs * weights).sum(), weights.count_nonzero(), metrics)

LOSSES = [Loss(name="focal", inputs=("weights",), fn=focal, config={"gamma": 2.0})]
"""
