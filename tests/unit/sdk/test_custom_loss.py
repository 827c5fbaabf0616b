"""A user's loss over logprobs."""

import numpy as np
import pytest
import torch
from gradwire._client.custom_loss import reported_metrics, run_custom_loss
from gradwire.errors import GradwireError

LOGPROBS = np.array([-1.0, -2.0, -3.0, -0.5, -0.25], dtype=np.float32)
CU_SEQLENS = np.array([0, 3, 5])


def run(fn):
    return run_custom_loss(fn, ["first", "second"], LOGPROBS, CU_SEQLENS)


def test_gradients_of_a_loss_that_couples_datums():
    def fn(data, logprobs_list):
        assert data == ["first", "second"]
        assert all(leaf.requires_grad and leaf.is_leaf for leaf in logprobs_list)
        assert [leaf.shape for leaf in logprobs_list] == [(3,), (2,)]
        margin = logprobs_list[0].sum() - logprobs_list[1].sum()
        return -torch.nn.functional.logsigmoid(margin), {"margin": margin.item()}

    gradients, loss, metrics = run(fn)
    whole = torch.tensor(LOGPROBS, requires_grad=True)
    expected = -torch.nn.functional.logsigmoid(whole[:3].sum() - whole[3:].sum())
    expected.backward()
    assert whole.grad is not None
    np.testing.assert_array_equal(gradients, whole.grad.numpy())
    assert loss == expected.item()
    assert metrics == {"margin": -5.25}


def test_a_datum_the_loss_ignores_gets_zero_gradient():
    gradients, _, _ = run(lambda _, logprobs: (-logprobs[1].sum(), {}))
    np.testing.assert_array_equal(gradients, [0, 0, 0, -1, -1])


def test_soft_targets_keep_their_shape():
    gradients, _, _ = run_custom_loss(
        lambda _, logprobs: (logprobs[0].square().sum(), {}),
        [0],
        np.ones((3, 2), np.float32),
        np.array([0, 3]),
    )
    np.testing.assert_array_equal(gradients, np.full((3, 2), 2.0))


def test_a_loss_without_grad_sends_zeros_and_says_so(caplog: pytest.LogCaptureFixture):
    gradients, loss, _ = run(lambda _, logprobs: (torch.tensor(2.5), {}))
    assert loss == 2.5
    assert not gradients.any()
    assert "does not depend on the logprobs" in caplog.text


def test_a_gradient_that_is_not_finite_is_refused_by_datum():
    with pytest.raises(GradwireError, match=r"data\[1\]") as caught:
        # A square root at zero: the loss is 0, its slope is not.
        run(lambda _, logprobs: ((logprobs[1] - logprobs[1].detach()).abs().sqrt().sum(), {}))
    assert caught.value.reason == "NON_FINITE"


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(GradwireError, match="is nan") as caught:
        run(lambda _, logprobs: (torch.log(logprobs[0].sum()), {}))
    assert caught.value.reason == "NON_FINITE"


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.tensor(1.0), r"must return \(loss, metrics\)"),
        ((1.0, {}), "scalar tensor as loss; got float"),
        ((torch.ones(2), {}), r"got shape \[2\]"),
        ((torch.tensor(1.0), None), "dict of metrics; got NoneType"),
    ],
)
def test_a_loss_that_returns_something_else_is_told_what_to_return(returned: object, message: str):
    with pytest.raises(TypeError, match=message):
        run(lambda _, __: returned)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (torch.ones(3), r"a Tensor of shape \[3\]"),
        (np.ones((2, 2)), r"a ndarray of shape \[2, 2\]"),
        ([1.0, 2.0], "a list"),
        ({"a": 1.0}, "a dict"),
        ("0.5", "a str"),
        (None, "a NoneType"),
        (1j, "a complex"),
        (10**400, "a int"),
    ],
)
def test_a_metric_that_is_no_number_is_named(value: object, got: str):
    with pytest.raises(TypeError, match=rf'the metric "rewards" as {got}; a metric must be one number'):
        run(lambda _, logprobs: (logprobs[0].sum(), {"margin": 1.0, "rewards": value}))


def test_metrics_are_numbers_of_any_kind():
    values = {"a": 1, "b": True, "c": np.float32(0.5), "d": torch.ones(1, 1), "e": np.array([2.0]), "f": float("inf")}
    _, _, metrics = run(lambda _, logprobs: (logprobs[0].sum(), values))
    assert metrics == {"a": 1, "b": 1, "c": 0.5, "d": 1, "e": 2, "f": float("inf")}


def test_leaves_kept_by_the_loss_show_their_gradients():
    kept = []

    def fn(_, logprobs):
        kept.extend(logprobs)
        return sum(x.sum() for x in logprobs), {}

    gradients, _, _ = run(fn)
    assert [leaf.grad.tolist() for leaf in kept] == [[1, 1, 1], [1, 1]]
    assert gradients.tolist() == [1] * 5


def test_a_loss_may_train_parameters_of_its_own():
    scale = torch.tensor(2.0, requires_grad=True)
    gradients, _, _ = run(lambda _, logprobs: (sum(scale * x.sum() for x in logprobs), {}))
    assert gradients.tolist() == [2] * 5
    assert scale.grad is not None
    assert scale.grad.item() == LOGPROBS.sum()


def test_gradients_whose_sum_overflows_are_finite_all_the_same():
    gradients, _, _ = run(lambda _, logprobs: (sum(((x - x.detach()) * 3e38).sum() for x in logprobs), {}))
    np.testing.assert_allclose(gradients, 3e38)


def test_what_a_loss_reports_is_bounded_and_keeps_its_value(caplog: pytest.LogCaptureFixture):
    assert reported_metrics({"reward": 1.0}, 2.0) == {"reward": 1.0, "loss:sum": 2.0}
    assert not caplog.records
    many = {f"m{n}": float(n) for n in range(400)} | {"\ud800": 1.0, "n" * 5000: 1.0}
    reported = reported_metrics(many, 2.0)
    assert (len(reported), reported["loss:sum"], reported["m0"]) == (256, 2.0, 0.0)
    assert "get no curve" in caplog.text
