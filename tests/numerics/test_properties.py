"""Whatever the batch, the engine computes what plain transformers does; and what half precision costs."""

from dataclasses import dataclass, replace
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
    FACTOR,
    ROUNDING,
    PlainSequence,
    check_sum,
    cross_entropy_of,
    gradients_of,
    load_plain,
    plain_backward,
    random_sequences,
    to_batch,
)
from tests.tiny import MAX_CONTEXT_LENGTH, VOCAB_SIZE
from trainer_service.engine.device import Device
from trainer_service.engine.engine import Engine
from trainer_service.engine.packed import logprobs as logprobs_module
from trainer_service.worker_config import EngineSettings

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


@dataclass(frozen=True)
class Distance:
    """How far apart two models' answers are.

    Attributes:
        logprobs: Largest difference, nats.
        gradients: Largest norm of a parameter's difference, against the largest norm of a gradient: with weights of
            both signs a single gradient can be next to nothing.
    """

    logprobs: float
    gradients: float

    @classmethod
    def of(cls, logprobs: Any, model: PreTrainedModel, exact_logprobs: Any, exact: PreTrainedModel) -> "Distance":
        ours, theirs = gradients_of(model.named_parameters()), gradients_of(exact.named_parameters())
        scale = max(float(gradient.norm()) for gradient in theirs.values())
        apart = max(float((ours[name].double() - theirs[name]).norm()) for name in theirs)
        return cls(float(np.abs(logprobs - exact_logprobs).max()), apart / scale if apart else 0.0)


def plain_found(model: PreTrainedModel, sequences: list[PlainSequence]) -> Any:
    model.zero_grad()
    return plain_backward(model, sequences, cross_entropy_of(sequences))[1]


@pytest.fixture(scope="module")
def own(tiny_llama: Path, plain: PreTrainedModel) -> Distance:
    """Of plain float32 from float64 on this machine: the largest over batches long enough that none is so by luck."""
    model, found = load_plain(tiny_llama), []
    for seed in range(3):
        sequences = random_sequences((MAX_CONTEXT_LENGTH, 12, 1, MAX_CONTEXT_LENGTH), vocab_size=VOCAB_SIZE, seed=seed)
        logprobs, exact = plain_found(model, sequences), plain_found(plain, sequences)
        apart = Distance.of(logprobs, model, exact, plain)
        # Its log_softmax is float64's; what float32 would at least add is the rounding of its result.
        found.append(replace(apart, logprobs=apart.logprobs + ROUNDING * float(np.abs(exact).max())))
    return Distance(max(each.logprobs for each in found), max(each.gradients for each in found))


def check(engine: Engine, plain: PreTrainedModel, own: Distance, sequences: list[PlainSequence]) -> None:
    engine.zero_grad(RUN)
    found = engine.forward_backward(RUN, 1, engine.stage(to_batch(sequences), CROSS_ENTROPY))
    logprobs = plain_found(plain, sequences)
    apart = Distance.of(found.logprobs_TK, engine.live_model(RUN), logprobs, plain)
    assert apart.logprobs <= FACTOR * own.logprobs
    assert apart.gradients <= FACTOR * own.gradients


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
    own: Distance,
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
        check(engine, plain, own, sequences)


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
        engine.forward_backward(RUN, 1, engine.stage(batch, CROSS_ENTROPY))
        engine.forward(RUN, 2, engine.stage(batch), keep_graph=True)
        engine.backward(RUN, 3, forward_seq_id=2, gradients_TK=np.ones(batch.num_tokens, np.float32))
    intermediate_size = 64
    assert seen.num_elements <= max(largest_parameter, batch.num_tokens * intermediate_size)
    assert seen.num_elements < batch.num_tokens * VOCAB_SIZE


def test_bfloat16_compute_is_as_near_as_plain_autocast(
    tiny_llama: Path, tmp_path: Path, plain: PreTrainedModel
) -> None:
    half = make_engine(tiny_llama, tmp_path, device=Device(torch.device("cpu"), "cpu", torch.bfloat16))
    sequences = random_sequences((30, 12, 1, 44), vocab_size=VOCAB_SIZE)
    exact = plain_found(plain, sequences)
    autocast = load_plain(tiny_llama)
    with torch.autocast("cpu", torch.bfloat16):
        own = Distance.of(plain_found(autocast, sequences), autocast, exact, plain)
    found = half.forward_backward(RUN, 1, half.stage(to_batch(sequences), CROSS_ENTROPY))
    assert found.logprobs_TK.dtype == np.float32
    assert {parameter.dtype for parameter in half.live_model(RUN).parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in gradients_of(half.live_model(RUN).named_parameters()).values()} == {
        torch.float32
    }
    apart = Distance.of(found.logprobs_TK, half.live_model(RUN), exact, plain)
    # Half precision was really used.
    assert 2.0**-16 < apart.logprobs <= FACTOR * own.logprobs
    assert apart.gradients <= FACTOR * own.gradients
    weights = np.concatenate([sequence.weights for sequence in sequences])
    check_sum(found.metrics["loss:sum"], -weights * found.logprobs_TK)
