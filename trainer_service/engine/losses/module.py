"""Losses of the trainer's owner: a Python module named by `--loss-module`.

The module has LOSSES, any number of `Loss` (losses/loss.py says what one is); clients name them as they name the
built-in ones. It runs inside the worker, with all that the worker may do, so it is for the owner to choose.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gradwire.errors import GradwireError, error, invalid_field

from trainer_service.engine.losses.loss import Loss, LossInputs, LossOutput

_OPTION = "--loss-module"


def load_losses(module_name: str, known: Mapping[str, Loss]) -> dict[str, Loss]:
    """The losses of a module, by name.

    Args:
        module_name: As `import` takes it.
        known: Names that are taken.

    Raises:
        InvalidArgumentError: INVALID_FIELD: no such module, it fails, it has no LOSSES, or a name is taken.
    """
    try:
        module = importlib.import_module(module_name)
    except Exception as exc:
        missing = isinstance(exc, ModuleNotFoundError) and exc.name in (module_name, module_name.partition(".")[0])
        why = (
            "is no module here; it must lie in the folder the trainer is started in, on PYTHONPATH, or be installed."
            if missing
            else f"failed while it was imported: {type(exc).__name__}: {exc}"
        )
        raise _refused(module_name, why) from exc
    losses: Any = getattr(module, "LOSSES", None)
    if not isinstance(losses, Iterable) or isinstance(losses, str | Mapping):
        raise _refused(module_name, "has no LOSSES; it must be a list of trainer_service.engine.losses.loss.Loss.")
    found: dict[str, Loss] = {}
    for number, loss in enumerate(losses):
        if not isinstance(loss, Loss):
            got = type(loss).__name__
            raise _refused(module_name, f"has a {got} in LOSSES[{number}]; it must be a Loss.")
        if loss.name in known or loss.name in found or not loss.name:
            taken = ", ".join([*known, *found])
            raise _refused(
                module_name,
                f'calls LOSSES[{number}] "{loss.name}"; it must be a name of its own, and these are taken: {taken}.',
            )
        if "target_tokens" in loss.inputs or len(set(loss.inputs)) != len(loss.inputs):
            raise _refused(
                module_name,
                f'lists the inputs of "{loss.name}" as {", ".join(loss.inputs)}; each must be listed once, and '
                "target_tokens, which every loss has, must not be listed.",
            )
        found[loss.name] = replace(loss, fn=_guarded(loss, module_name))
    return found


def _guarded(loss: Loss, module_name: str) -> Callable[[LossInputs, Mapping[str, float]], LossOutput]:
    """The loss's function; what goes wrong in it is reported as its fault, not ours."""

    def fn(inputs: LossInputs, config: Mapping[str, float]) -> LossOutput:
        import torch

        from trainer_service.engine.device import broken, out_of_memory

        try:
            output = loss.fn(inputs, config)
        except GradwireError:
            raise
        except Exception as exc:
            if out_of_memory(exc) or broken(exc):
                raise
            raise _failed(loss.name, module_name, f"raised {type(exc).__name__}: {exc}") from exc
        if not isinstance(output, LossOutput):
            raise _failed(loss.name, module_name, f"returned a {type(output).__name__}; it must return a LossOutput")
        scalars = {"loss": output.loss, "num_loss_tokens": output.num_loss_tokens, **output.metrics}
        for name, value in scalars.items():
            if not isinstance(value, torch.Tensor) or value.ndim:
                raise _failed(loss.name, module_name, f"returned {name} that is no scalar tensor")
        for name in output.metrics:
            if name.rpartition(":")[2] not in ("sum", "mean", "min", "max"):
                raise _failed(
                    loss.name,
                    module_name,
                    f'returned the metric "{name}"; its name must end in :sum, :mean, :min or :max',
                )
        if inputs.target_logprobs_TK.requires_grad and not output.loss.requires_grad:
            raise _failed(loss.name, module_name, "returned a loss without grad; it must be computed from the logprobs")
        return output

    return fn


def _failed(name: str, module_name: str, what: str) -> GradwireError:
    text = f'The loss "{name}" of {_OPTION} {module_name} {what}. Nothing of this call is applied.'
    return error("LOSS_FAILED", text, loss=name, module=module_name)


def _refused(module_name: str, why: str) -> GradwireError:
    return invalid_field(_OPTION, f'"{module_name}" {why}', module=module_name)
