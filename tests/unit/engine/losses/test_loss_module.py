"""A loss of the trainer's owner: registered from a module, refused with a reason, blamed for its own faults."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gradwire.errors import FailedPreconditionError, InvalidArgumentError

from tests.engines import BATCH, RUN, make_engine
from tests.focal import FOCAL
from trainer_service.engine.losses import LOSSES
from trainer_service.engine.losses.loss import Loss
from trainer_service.engine.losses.module import load_losses

BAD = {
    "nowhere": (None, "is no module here; it must lie in the folder the trainer is started in"),
    "broken": ("import nothing_of_that_name", "failed while it was imported: ModuleNotFoundError: No module named"),
    "syntax": ("def", "failed while it was imported: SyntaxError"),
    "empty": ("", "has no LOSSES"),
    "wrong": ("LOSSES = [print]", "has a builtin_function_or_method in LOSSES[0]; it must be a Loss"),
    "clash": (FOCAL.replace('"focal"', '"ppo"'), 'calls LOSSES[0] "ppo"; it must be a name of its own'),
    "twice": (FOCAL + "LOSSES = LOSSES * 2", 'calls LOSSES[1] "focal"'),
    "targets": (FOCAL.replace('("weights",)', '("target_tokens",)'), 'lists the inputs of "focal" as target_tokens'),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder from which modules are imported, and which is forgotten again."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("losses_"):
            del sys.modules[name]


def load(folder: Path, name: str, text: str | None) -> dict[str, Loss]:
    if text is not None:
        (folder / f"losses_{name}.py").write_text(text)
    return load_losses(f"losses_{name}", LOSSES)


def test_a_loss_of_a_module_trains(folder: Path, tiny_llama: Path, tmp_path: Path) -> None:
    (focal,) = load(folder, "focal", FOCAL).values()
    engine = make_engine(tiny_llama, tmp_path / "checkpoints")
    found = engine.forward_backward(RUN, 1, engine.stage(BATCH, focal))
    logprobs = torch.tensor(found.logprobs_TK)
    weights = torch.tensor(BATCH.loss_fn_inputs["weights"])
    hard = (1 - logprobs.exp()) ** 2
    assert found.metrics["loss:sum"] == pytest.approx(-(hard * logprobs * weights).sum().item(), rel=1e-5)
    assert found.metrics["hardness:mean"] == pytest.approx(hard.mean().item(), rel=1e-5)
    sharper = engine.forward_backward(RUN, 2, engine.stage(BATCH, focal, {"gamma": 5.0}))
    assert sharper.metrics["loss:sum"] < found.metrics["loss:sum"]


@pytest.mark.parametrize("name", list(BAD))
def test_a_module_that_cannot_be_used_is_refused_with_the_reason(folder: Path, name: str) -> None:
    text, why = BAD[name]
    with pytest.raises(InvalidArgumentError) as caught:
        load(folder, name, text)
    assert caught.value.message.startswith(f'--loss-module "losses_{name}" ')
    assert why in caught.value.message


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ('inputs.inputs["nothing"]', "raised KeyError: 'nothing'"),
        ("return inputs.target_logprobs_TK.sum()", "returned a Tensor; it must return a LossOutput"),
        ("return LossOutput(inputs.target_logprobs_TK, inputs.cu_seqlens[0])", "returned loss that is no scalar"),
        ("return LossOutput(inputs.target_logprobs_TK.detach().sum(), inputs.cu_seqlens[0])", "a loss without grad"),
        (
            'return LossOutput(inputs.target_logprobs_TK.sum(), inputs.cu_seqlens[0], {"x": inputs.cu_seqlens[0]})',
            'the metric "x"; its name must end in :sum, :mean, :min or :max',
        ),
    ],
)
def test_a_fault_of_the_loss_is_told_as_its_own_and_nothing_is_applied(
    folder: Path, tiny_llama: Path, body: str, why: str, request: pytest.FixtureRequest
) -> None:
    text = FOCAL.replace("    logprobs, weights", f"    {body}\n    logprobs, weights")
    (loss,) = load(folder, f"faulty_{request.node.callspec.indices['body']}", text).values()
    engine = make_engine(tiny_llama, folder / "checkpoints")
    with pytest.raises(FailedPreconditionError) as caught:
        engine.forward_backward(RUN, 1, engine.stage(BATCH, loss))
    assert caught.value.reason == "LOSS_FAILED"
    assert why in caught.value.message
    assert all(parameter.grad is None for parameter in engine.live_model(RUN).parameters())
