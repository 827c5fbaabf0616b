"""Rewrites tinker:// paths as gradwire:// paths and back; a model's id may stand for its run's.

What tinker calls external weights, for a download, is sampler weights here, under names of their own.
"""

from collections.abc import Callable

from trainer_service.gateway.outcomes import Refusal
from trainer_service.paths import SAMPLER_WEIGHTS, STATE

WEIGHTS = "weights"
"""What tinker calls a resumable state."""
EXTERNAL_WEIGHTS = "external_weights"
_EXTERNAL = "external-weights."
_TINKER, _GRADWIRE = "tinker://", "gradwire://"
_TO_GRADWIRE = {WEIGHTS: STATE, SAMPLER_WEIGHTS: SAMPLER_WEIGHTS}
_TO_TINKER = {kind: word for word, kind in _TO_GRADWIRE.items()}
_TO_GRADWIRE[EXTERNAL_WEIGHTS] = SAMPLER_WEIGHTS
_SHOWN = 200


def to_gradwire(path: str, run_of: Callable[[str], str], *, field: str = "path") -> str:
    """The checkpoint that a path names, in the trainer's words.

    Args:
        path: tinker://<run>/weights/<name>, …/sampler_weights/<name>, …/external_weights/<name>, or a gradwire:// path.
        run_of: The run id of a model's id; anything else comes back as it is.
        field: What the caller calls the path.

    Raises:
        Refusal: It is no such path, or names a model that does not exist.
    """
    if path.startswith(_GRADWIRE):
        return path
    run, kind, name = [*path.removeprefix(_TINKER).split("/"), "", ""][:3]
    if not path.startswith(_TINKER) or path.count("/") != 4 or kind not in _TO_GRADWIRE or not (run and name):
        raise Refusal(
            400,
            f"{field} is {path[:_SHOWN]!r}; it must be tinker://<run>/{WEIGHTS}/<name> or "
            f"tinker://<run>/{SAMPLER_WEIGHTS}/<name>, as saving returned it.",
        )
    run = run_of(run)
    if ":" in run:
        # The id of a model that does not exist, as far as the caller may know.
        raise Refusal(404, f"There is no checkpoint {path[:_SHOWN]!r}.", reason="CHECKPOINT_NOT_FOUND")
    name = external_name(name) if kind == EXTERNAL_WEIGHTS else name
    return f"{_GRADWIRE}{run}/{_TO_GRADWIRE[kind]}/{name}"


def external_name(name: str) -> str:
    """The name here of external weights."""
    return f"{_EXTERNAL}{name}"


def to_tinker(path: str) -> str:
    """A checkpoint's path in tinker's words. Frozen weights, which have none there, keep theirs."""
    run, kind, name = path.removeprefix(_GRADWIRE).split("/")
    if kind == SAMPLER_WEIGHTS and name.startswith(_EXTERNAL):
        return f"{_TINKER}{run}/{EXTERNAL_WEIGHTS}/{name.removeprefix(_EXTERNAL)}"
    return f"{_TINKER}{run}/{_TO_TINKER[kind]}/{name}" if kind in _TO_TINKER else path


def checkpoint_id(path: str) -> str:
    """What tinker calls a checkpoint of a run: the path behind the run."""
    return to_tinker(path).removeprefix(_TINKER).partition("/")[2]
