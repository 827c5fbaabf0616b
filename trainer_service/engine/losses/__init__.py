"""Built-in losses: one file for each, and the only list of their names."""

from gradwire.errors import invalid_field

from trainer_service.engine.losses.cispo import CISPO
from trainer_service.engine.losses.cross_entropy import CROSS_ENTROPY
from trainer_service.engine.losses.dro import DRO
from trainer_service.engine.losses.gspo import GSPO
from trainer_service.engine.losses.importance_sampling import IMPORTANCE_SAMPLING
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.losses.ppo import PPO

LOSSES: dict[str, Loss] = {loss.name: loss for loss in (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO)}
"""By name. `--loss-module` adds to it before the first command comes (losses/module.py)."""


def find_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        InvalidArgumentError: UNKNOWN_LOSS, listing those there are.
    """
    if name in LOSSES:
        return LOSSES[name]
    known = ", ".join(LOSSES)
    got = f'is "{name}", which is no loss of this trainer' if name else "is missing"
    raise invalid_field(
        "loss_fn",
        f"{got}; known: {known}. For any other loss use forward_backward_custom.",
        reason="UNKNOWN_LOSS",
        known=known,
        got=name,
    )
