"""Whatever the batch, the engine computes what plain transformers does; and what half precision costs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from tests.engines import CROSS_ENTROPY, RUN, make_batch, make_engine
from tests.numerics.plain import (
    PlainSequence,
    cross_entropy_of,
    load_plain,
    plain_backward,
    random_sequences,
    relative_error,
    to_batch,
)
from tests.tiny import MAX_CONTEXT_LENGTH, VOCAB_SIZE
from trainer_service.config import EngineSettings
from trainer_service.engine.device import Device
from trainer_service.engine.engine import Engine
from trainer_service.engine.packed import logprobs as logprobs_module

GRADIENTS = 2e-5


@pytest.fixture(scope="module")
def tight(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Packs of few tokens, layers checkpointed."""
    settings = EngineSettings(max_pack_tokens=40, activation_checkpointing="on")
    return make_engine(tiny_llama, tmp_path_factory.mktemp("tight"), settings=settings)


@pytest.fixture(scope="module")
def roomy(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """All in one pack."""
    return make_engine(tiny_llama, tmp_path_factory.mktemp("roomy"))


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> PreTrainedModel:
    return load_plain(tiny_llama, dtype=torch.float64)


def check(engine: Engine, plain: PreTrainedModel, sequences: list[PlainSequence]) -> None:
    engine.zero_grad(RUN)
    plain.zero_grad()
    found = engine.forward_backward(RUN, 1, to_batch(sequences), CROSS_ENTROPY)
    _, logprobs = plain_backward(plain, sequences, cross_entropy_of(sequences))
    np.testing.assert_allclose(found.logprobs_TK, logprobs, rtol=0, atol=2e-5)
    theirs = [parameter.grad for parameter in plain.parameters()]
    scale = max(float(grad.norm()) for grad in theirs if grad is not None)
    for ours, their in zip(engine.live_model(RUN).parameters(), theirs, strict=True):
        assert ours.grad is not None
        assert their is not None
        # Against the largest: with weights of both signs a single gradient can be next to nothing.
        assert float((ours.grad.double() - their).norm()) <= GRADIENTS * scale


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 12), st.just(MAX_CONTEXT_LENGTH)), min_size=1, max_size=7),
    k=st.sampled_from([None, 1, 3]),
    weights=st.sampled_from(["both signs", "zero", "negative", "few"]),
    common=st.integers(0, 30),
    seed=st.integers(0, 2**16),
)
def test_ragged_batches_equal_plain_transformers(
    tight: Engine,
    roomy: Engine,
    plain: PreTrainedModel,
    lengths: list[int],
    k: int | None,
    weights: str,
    common: int,
    seed: int,
) -> None:
    sequences = random_sequences(lengths, vocab_size=VOCAB_SIZE, k=k, seed=seed)
    for sequence in sequences:
        shared = min(common, len(sequence.tokens), len(sequences[0].tokens))
        sequence.tokens[:shared] = sequences[0].tokens[:shared]
        if weights == "zero":
            sequence.weights[:] = 0
        elif weights == "negative":
            sequence.weights[:] = -np.abs(sequence.weights)
        elif weights == "few":
            sequence.weights[1:] = 0
    for engine in (tight, roomy):
        check(engine, plain, sequences)


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result has."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


def test_no_tensor_of_all_tokens_times_the_vocabulary_is_ever_made(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs_module, "_CHUNK_ELEMENTS", 8 * VOCAB_SIZE)
    monkeypatch.setattr("trainer_service.engine.microbatch.Forwards.keeps_logits", lambda *_: False)
    engine = make_engine(tiny_llama, tmp_path)
    batch = make_batch(60, 50, 64, 30)
    largest_parameter = max(parameter.numel() for parameter in engine.live_model(RUN).parameters())
    with LargestTensor() as seen:
        engine.forward_backward(RUN, 1, batch, CROSS_ENTROPY)
        engine.forward(RUN, 2, batch, keep_graph=True)
        engine.backward(RUN, 3, forward_seq_id=2, gradients_TK=np.ones(batch.num_tokens, np.float32))
    intermediate_size = 64
    assert seen.num_elements <= max(largest_parameter, batch.num_tokens * intermediate_size)
    assert seen.num_elements < batch.num_tokens * VOCAB_SIZE


def test_bfloat16_compute_stays_near_float32(tiny_llama: Path, tmp_path: Path, roomy: Engine) -> None:
    """Bounds are about three times what was seen: 0.012 nats on average, 2e-4 of the loss, 0.029 of a gradient."""
    half = make_engine(tiny_llama, tmp_path, device=Device(torch.device("cpu"), "cpu", torch.bfloat16))
    batch = make_batch(30, 12, 1, 44)
    roomy.zero_grad(RUN)
    exact = roomy.forward_backward(RUN, 1, batch, CROSS_ENTROPY)
    found = half.forward_backward(RUN, 1, batch, CROSS_ENTROPY)
    assert found.logprobs_TK.dtype == np.float32
    assert np.abs(found.logprobs_TK - exact.logprobs_TK).mean() < 0.036
    assert found.metrics["loss:sum"] == pytest.approx(exact.metrics["loss:sum"], rel=1e-3)
    pairs = zip(half.live_model(RUN).parameters(), roomy.live_model(RUN).parameters(), strict=True)
    for ours, wanted in pairs:
        assert ours.dtype == torch.float32
        assert ours.grad is not None
        assert wanted.grad is not None
        assert ours.grad.dtype == torch.float32
        assert relative_error(ours.grad, wanted.grad) < 0.09
