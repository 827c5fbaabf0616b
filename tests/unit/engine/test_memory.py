"""How memory is divided where a model lies in parts."""

import pytest
import torch

from trainer_service.engine.device import Device
from trainer_service.engine.memory import MemoryPlan, gathered_bytes, plan_memory
from trainer_service.engine.models.runner import Traits
from trainer_service.worker_config import EngineSettings, Resharding

GIB = 1 << 30
NUM_PARAMETERS = 128 << 20
"""A GiB of them and their gradients."""


class Sized(Device):
    """A device of so many bytes."""

    def total_bytes(self) -> int:
        return int(self.name)


def plan(total: int, reshard: Resharding, *, in_parts: bool = True) -> MemoryPlan:
    device = Sized(torch.device("cpu"), str(total), torch.float32)
    gathered = gathered_bytes(NUM_PARAMETERS) if in_parts else 0
    settings = EngineSettings(fsdp_reshard_after_forward=reshard)
    return plan_memory(device, Traits(""), settings, model_bytes=GIB, gathered_bytes=gathered)


@pytest.mark.parametrize(
    ("total", "reshard", "keeps"),
    [
        (5 * GIB, "auto", True),
        (5 * GIB - 1, "auto", False),
        (5 * GIB, "always", False),
        (3 * GIB, "never", True),
    ],
)
def test_a_batch_keeps_what_it_gathers_where_that_takes_a_quarter_at_most(total: int, reshard: Resharding, keeps: bool):
    assert plan(total, reshard).keeps_gathered == keeps


def test_what_is_kept_is_no_room_for_activations():
    kept, anew = (plan(9 * GIB, reshard) for reshard in ("auto", "always"))
    assert kept.pass_bytes + kept.max_held_graph_bytes == 7 * GIB // 2
    assert anew.pass_bytes + anew.max_held_graph_bytes == 8 * GIB // 2


def test_a_whole_model_has_nothing_to_keep():
    assert not plan(100 * GIB, "auto", in_parts=False).keeps_gathered


@pytest.mark.parametrize(
    ("total", "reshard", "in_parts"),
    [
        # Half a GiB is half of what is left.
        (2 * GIB, "auto", False),
        (2 * GIB - 2, "auto", True),
        (100 * GIB, "always", True),
        (GIB, "never", False),
    ],
)
def test_a_whole_model_to_sample_from_takes_half_of_what_training_leaves_at_most(
    total: int, reshard: Resharding, in_parts: bool
):
    settings = EngineSettings(sampling_reshard_after_forward=reshard)
    device = Sized(torch.device("cpu"), str(total), torch.float32)
    sizes = {"model_bytes": GIB, "gathered_bytes": GIB}
    found = plan_memory(device, Traits(""), settings, **sizes, sampled_bytes=GIB // 2)
    assert found.samples_in_parts == in_parts
    # One that is whole anyway is sampled from as it is.
    assert not plan_memory(device, Traits(""), settings, **sizes).samples_in_parts
