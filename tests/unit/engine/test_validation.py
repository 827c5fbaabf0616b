"""Bad input is refused with the place as the caller wrote it. No torch in these tests, nor in what they test."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from gradwire._wire.codec import Batch
from gradwire.errors import GradwireError, InvalidArgumentError, ResourceExhaustedError
from hypothesis import given
from hypothesis import strategies as st

from trainer_service.config import Limits
from trainer_service.engine.losses import find_loss
from trainer_service.engine.validation import (
    check_batch,
    check_gradients,
    check_gradients_shape,
    check_loss_config,
)
from trainer_service.paths import check_checkpoint_name

CROSS_ENTROPY = find_loss("cross_entropy")


def make_batch(lengths: tuple[int, ...] = (3, 1, 4), *, k: int | None = None) -> Batch:
    total = sum(lengths)
    shape = (total,) if k is None else (total, k)
    return Batch(
        tokens_T=np.arange(total, dtype=np.int32) % 10,
        cu_seqlens=np.cumsum([0, *lengths]).astype(np.int64),
        loss_fn_inputs={
            "target_tokens": np.ones(shape, dtype=np.int64),
            "weights": np.ones(shape, dtype=np.float32),
        },
    )


def check(batch: Batch, *, limits: Limits | None = None, max_context_length: int = 4, loss: bool = True) -> None:
    check_batch(
        batch,
        vocab_size=10,
        max_context_length=max_context_length,
        limits=limits or Limits(),
        loss=CROSS_ENTROPY if loss else None,
    )


def refusal(batch: Batch, **settings: object) -> GradwireError:
    with pytest.raises(InvalidArgumentError) as caught:
        check(batch, **settings)  # pyright: ignore[reportArgumentType]
    ((field, description),) = caught.value.field_violations
    assert caught.value.message == f"{field} {description}"
    assert caught.value.metadata["field"] == field
    return caught.value


def field_of(exc: GradwireError) -> str:
    return exc.field_violations[0][0]


@pytest.mark.parametrize("k", [None, 2])
def test_good_batch_passes(k: int | None) -> None:
    check(make_batch(k=k))


def test_missing_targets_are_refused() -> None:
    batch = Batch(make_batch().tokens_T, make_batch().cu_seqlens, {})
    assert field_of(refusal(batch, loss=False)) == 'data[0].loss_fn_inputs["target_tokens"]'


def test_targets_of_no_column_are_refused() -> None:
    assert field_of(refusal(make_batch(k=0))) == 'data[0].loss_fn_inputs["target_tokens"]'


@pytest.mark.parametrize("token", [10, -1, 2_000_000_000])
def test_token_outside_the_vocabulary_is_refused(token: int) -> None:
    batch = make_batch()
    batch.tokens_T[6] = token
    exc = refusal(batch)
    assert field_of(exc) == "data[2].model_input.tokens[2]"
    assert f"is {token}," in exc.message
    assert "0 to 9" in exc.message


@pytest.mark.parametrize(("k", "place"), [(None, "[0]"), (2, "[0][1]")])
def test_target_outside_the_vocabulary_is_refused(k: int | None, place: str) -> None:
    batch = make_batch(k=k)
    batch.loss_fn_inputs["target_tokens"][3 if k is None else (3, 1)] = -100
    assert field_of(refusal(batch)) == f'data[1].loss_fn_inputs["target_tokens"]{place}'


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    batch = make_batch()
    batch.loss_fn_inputs["weights"][5] = value
    assert field_of(refusal(batch)) == 'data[2].loss_fn_inputs["weights"][1]'


def test_sequence_over_the_limit_is_refused() -> None:
    exc = refusal(make_batch((3, 6)), max_context_length=5)
    assert exc.reason == "SEQUENCE_TOO_LONG"
    assert field_of(exc) == "data[1].model_input"
    assert exc.metadata["limit"] == "5"


@pytest.mark.parametrize("limits", [Limits(max_datums=2), Limits(max_tokens=7)])
def test_operation_over_the_limit_is_refused(limits: Limits) -> None:
    with pytest.raises(ResourceExhaustedError) as caught:
        check(make_batch(), limits=limits)
    assert caught.value.reason == "LIMIT_EXCEEDED"


def test_missing_weights_are_refused_only_where_the_loss_reads_them() -> None:
    batch = make_batch()
    del batch.loss_fn_inputs["weights"]  # pyright: ignore[reportIndexIssue]
    assert field_of(refusal(batch)) == 'data[0].loss_fn_inputs["weights"]'
    check(batch, loss=False)


def test_misspelt_loss_input_is_refused_not_ignored() -> None:
    batch = make_batch()
    inputs = {**batch.loss_fn_inputs, "wieghts": batch.loss_fn_inputs["weights"]}
    exc = refusal(Batch(batch.tokens_T, batch.cu_seqlens, inputs))
    assert field_of(exc) == 'data[0].loss_fn_inputs["wieghts"]'
    assert "target_tokens, weights" in exc.message


def test_weights_shaped_unlike_targets_are_refused() -> None:
    batch = make_batch()
    inputs = {**batch.loss_fn_inputs, "weights": np.ones((8, 2), dtype=np.float32)}
    assert "must match" in refusal(Batch(batch.tokens_T, batch.cu_seqlens, inputs)).message


@pytest.mark.parametrize("name", ["cross_entrop", "", "PPO"])
def test_unknown_loss_lists_the_known_ones(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        find_loss(name)
    assert caught.value.reason == "UNKNOWN_LOSS"
    assert caught.value.metadata["known"] == "cross_entropy, importance_sampling, ppo, cispo, dro, gspo"
    assert "cross_entropy" in caught.value.message


def test_unknown_loss_setting_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r'loss_fn_config\["epsilon"\] is not a setting of cross_entropy'):
        check_loss_config(CROSS_ENTROPY, {"epsilon": 0.1})


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("ppo", {"clip_ratio": 0.2}, r"known: clip_low_threshold \(default 0.8\), clip_high_threshold \(default 1.2\)"),
        (
            "ppo",
            {"clip_high_threshold": 0.2},
            r'"clip_high_threshold"\] is 0.2, below clip_low_threshold, which is 0.8',
        ),
        ("cispo", {"clip_low_threshold": -0.2}, r'"clip_low_threshold"\] is -0.2; .* at least 0'),
        ("dro", {}, r'"beta"\] is missing; dro has no default for it. Its settings: beta \(required\)'),
        ("dro", {"beta": -1.0}, r'"beta"\] is -1'),
        ("gspo", {"clip_high_threshold": 1.1}, r'"clip_low_threshold"\] is missing'),
        ("dro", {"beta": float("nan")}, r'"beta"\] is nan; it must be a finite number'),
        ("ppo", {"clip_high_threshold": 1e39}, r'"clip_high_threshold"\] is 1e\+39, beyond float32'),
        ("cispo", {"clip_low_threshold": 1e-60}, r'"clip_low_threshold"\] is 1e-60, which float32 rounds to 0'),
        ("gspo", {}, r'pass for example {"clip_low_threshold": 0.9997, "clip_high_threshold": 1.0004}, the bounds'),
    ],
)
def test_settings_that_cannot_be_are_refused(name: str, config: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        check_loss_config(find_loss(name), config)


def rl_batch(**changed: object) -> Batch:
    """Inputs of gspo, which are those of every loss over ratios; None leaves one out."""
    batch = make_batch()
    inputs = {
        "target_tokens": batch.loss_fn_inputs["target_tokens"],
        "logprobs": np.full(8, -1, dtype=np.float32),
        "advantages": np.ones(8, dtype=np.float32),
        "sequence_ratio_mask": np.ones(8, dtype=np.float32),
        **changed,
    }
    kept = {name: array for name, array in inputs.items() if array is not None}
    return Batch(batch.tokens_T, batch.cu_seqlens, kept)  # pyright: ignore[reportArgumentType]


def rl_refusal(batch: Batch, name: str = "gspo") -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        check_batch(batch, vocab_size=10, max_context_length=4, limits=Limits(), loss=find_loss(name))
    return caught.value.message


def test_inputs_of_losses_over_ratios_are_checked() -> None:
    check_batch(rl_batch(), vocab_size=10, max_context_length=4, limits=Limits(), loss=find_loss("gspo"))
    for name in ("logprobs", "advantages", "sequence_ratio_mask"):
        assert rl_refusal(rl_batch(**{name: None})).startswith(f'data[0].loss_fn_inputs["{name}"] is missing')
        bad = np.ones(8, dtype=np.float32)
        bad[4] = np.nan
        assert rl_refusal(rl_batch(**{name: bad})).startswith(f'data[2].loss_fn_inputs["{name}"][0] is nan')
    assert "is not an input of ppo" in rl_refusal(rl_batch(), "ppo")


def test_gspo_refuses_a_mask_it_cannot_average_over() -> None:
    mask = np.ones(8, dtype=np.float32)
    mask[5] = 0.5
    message = rl_refusal(rl_batch(sequence_ratio_mask=mask))
    assert message.startswith('data[2].loss_fn_inputs["sequence_ratio_mask"][1] is 0.5')
    mask[:] = 1
    mask[3] = 0
    message = rl_refusal(rl_batch(sequence_ratio_mask=mask))
    assert message.startswith('data[1].loss_fn_inputs["sequence_ratio_mask"] is 0 everywhere')
    piece = replace(rl_batch(sequence_ratio_mask=mask), first_datum_index=150)
    assert rl_refusal(piece).startswith('data[151].loss_fn_inputs["sequence_ratio_mask"] is 0 everywhere')
    advantages = np.ones(8, dtype=np.float32)
    advantages[3] = 0
    batch = rl_batch(sequence_ratio_mask=mask, advantages=advantages)
    check_batch(batch, vocab_size=10, max_context_length=4, limits=Limits(), loss=find_loss("gspo"))


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
def test_losses_over_ratios_take_one_target_a_token(name: str) -> None:
    inputs = {key: np.ones((8, 2), dtype=np.float32) for key in find_loss(name).inputs}
    batch = make_batch(k=2)
    targets = batch.loss_fn_inputs["target_tokens"]
    message = rl_refusal(Batch(batch.tokens_T, batch.cu_seqlens, {"target_tokens": targets, **inputs}), name)
    assert message == (
        'data[0].loss_fn_inputs["target_tokens"] has 2 values per token (shape [N, 2]), '
        f"but {name} takes one target per token (shape [N])."
    )


def test_gradients_that_are_not_finite_are_refused_with_their_place() -> None:
    gradients = np.zeros((4, 2), dtype=np.float32)
    gradients[3, 1] = np.nan
    with pytest.raises(InvalidArgumentError, match=r"gradients\[3\]\[1\] is nan"):
        check_gradients(gradients)


def test_gradients_of_another_dtype_or_shape_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="dtype int64"):
        check_gradients(np.zeros(3, dtype=np.int64))
    with pytest.raises(InvalidArgumentError, match=r"shape \[3\].*forward 7.*\[4\]"):
        check_gradients_shape(np.zeros(3, dtype=np.float32), (4,), 7)


@pytest.mark.parametrize("name", ["step-10", "a", "A.b_c-9", "x" * 128])
def test_checkpoint_names_that_are_file_names_pass(name: str) -> None:
    check_checkpoint_name(name)


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a b", "x" * 129, "naïve", "a\n", "../../etc"])
def test_checkpoint_names_that_are_not_are_refused(name: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        check_checkpoint_name(name)
    assert field_of(caught.value) == "name"
    assert len(caught.value.message) < 300


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8), data=st.data())
def test_the_place_named_is_the_place_that_is_bad(lengths: list[int], data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(lengths) - 1))
    place = data.draw(st.integers(0, lengths[number] - 1))
    batch = make_batch(tuple(lengths))
    batch.loss_fn_inputs["weights"][int(batch.cu_seqlens[number]) + place] = np.nan
    exc = refusal(batch, max_context_length=6)
    assert field_of(exc) == f'data[{number}].loss_fn_inputs["weights"][{place}]'


def test_validation_needs_no_torch() -> None:
    modules = "trainer_service.engine.validation, trainer_service.engine.losses"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
