"""Gateway, trainer, worker and client killed under one loop; benchmarks/gateway_chaos.py does it many times."""

from pathlib import Path

import pytest

from tests.chaos import Trainer
from tests.gateway.chaos import FAULTS, Trial
from tests.gateway_process import running_gateway

STEPS = 6


@pytest.mark.slow
def test_a_loop_whose_everything_is_killed_has_the_bits_of_an_undisturbed_one(tiny_llama: Path, tmp_path: Path):
    folder = tmp_path / "gateway"
    folder.mkdir()
    with (
        Trainer(tiny_llama, tmp_path, "--snapshot-steps", "3", forked=True) as trainer,
        running_gateway(f"http://{trainer.address}", folder, "--alias", "tiny") as gateway,
    ):
        wanted = Trial(trainer, gateway, tmp_path / "undisturbed", STEPS).run(0)
        disturbed = Trial(trainer, gateway, tmp_path / "disturbed", STEPS)
        assert disturbed.run(3, FAULTS) == wanted
        assert disturbed.done
        trainer.stop()
