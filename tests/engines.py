"""Engines in this process, and batches for them."""

from pathlib import Path

import numpy as np
import torch
from gradwire._wire.codec import Batch

from tests.tiny import VOCAB_SIZE
from trainer_service.config import Limits
from trainer_service.engine.device import Device
from trainer_service.engine.engine import Engine, ForwardResult
from trainer_service.engine.losses import find_loss
from trainer_service.worker_config import EngineSettings

RUN = "run-1"
CPU = Device(torch.device("cpu"), "cpu", torch.float32)
CROSS_ENTROPY = find_loss("cross_entropy")


def make_engine(
    folder: Path,
    checkpoint_dir: Path,
    *,
    limits: Limits | None = None,
    device: Device = CPU,
    settings: EngineSettings | None = None,
) -> Engine:
    """An engine with one run, `RUN`."""
    engine = Engine(str(folder), device=device, checkpoint_dir=checkpoint_dir, limits=limits, settings=settings)
    engine.create_run(RUN)
    return engine


def make_batch(*lengths: int, seed: int = 0) -> Batch:
    """Random tokens, targets and weights from 0 to 1, for a tiny model."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    return Batch(
        tokens_T=rng.integers(0, VOCAB_SIZE, total).astype(np.int32),
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int64),
        loss_fn_inputs={
            "target_tokens": rng.integers(0, VOCAB_SIZE, total),
            "weights": rng.random(total).astype(np.float32),
        },
    )


BATCH = make_batch(5, 9, 3)


def forward_backward(engine: Engine, seq_id: int = 1, batch: Batch = BATCH, run_id: str = RUN) -> ForwardResult:
    """forward_backward with cross_entropy."""
    return engine.forward_backward(run_id, seq_id, engine.stage(batch, CROSS_ENTROPY))
