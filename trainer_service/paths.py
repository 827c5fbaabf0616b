"""gradwire:// paths of checkpoints and of samplers. Their parts become names of folders. Ground floor.

gradwire://<run_id>/state/<name>              a resumable state
gradwire://<run_id>/sampler_weights/<name>    an export for inference, which can also be sampled from
gradwire://<run_id>/frozen_weights/<seq_id>   a sampler in the worker's memory, made by that operation
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gradwire.errors import invalid_field

STATE = "state"
"""Kind of a resumable state."""
SAMPLER_WEIGHTS = "sampler_weights"
"""Kind of an export for inference: all parameters, or a delta."""
FROZEN_WEIGHTS = "frozen_weights"
"""Kind of a sampler in the worker's memory."""

SCHEME = "gradwire://"
"""Prefix of every such path."""
_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}"
_PATH = re.compile(
    rf"{SCHEME}(?P<run_id>[A-Za-z0-9][A-Za-z0-9_-]{{0,63}})/"
    rf"(?:(?P<kind>{STATE}|{SAMPLER_WEIGHTS})/(?P<name>{_NAME})|{FROZEN_WEIGHTS}/(?P<seq_id>[1-9][0-9]{{0,18}}))",
    re.ASCII,
)
_MAX_SHOWN = 200
"""Longest text that an error repeats in full, characters."""


@dataclass(frozen=True, order=True)
class _Path:
    run_id: str
    kind: str
    name: str

    def __str__(self) -> str:
        return f"{SCHEME}{self.key}"

    @property
    def key(self) -> str:
        """Its path below a folder or in a store."""
        return f"{self.run_id}/{self.kind}/{self.name}"

    def folder(self, root: Path) -> Path:
        """Its path below a folder."""
        return root / self.run_id / self.kind / self.name

    @classmethod
    def _matching(cls, path: str, *kinds: str) -> Self | None:
        """The path, if it is well formed and of one of these kinds."""
        found = _PATH.fullmatch(path)
        if found is None or (kind := found["kind"] or FROZEN_WEIGHTS) not in kinds:
            return None
        return cls(found["run_id"], kind, found["name"] or found["seq_id"])


@dataclass(frozen=True, order=True)
class CheckpointPath(_Path):
    """Names one checkpoint; what `parse` returns is confined to its folder."""

    @classmethod
    def parse(cls, path: str, *, field: str = "path") -> Self:
        """The checkpoint a path names; `field` is what the caller calls the path.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it does not have this form, or would lead elsewhere.
        """
        parsed = cls._matching(path, STATE, SAMPLER_WEIGHTS)
        if parsed is None:
            raise invalid_field(
                field,
                f"is {_shown(path)}; it must be {SCHEME}<run_id>/{STATE}/<name> or "
                f"{SCHEME}<run_id>/{SAMPLER_WEIGHTS}/<name>, as saving returned it.",
            )
        return parsed


@dataclass(frozen=True, order=True)
class SamplerPath(_Path):
    """Names one sampler of a run; what `parse` returns leads nowhere else."""

    @classmethod
    def parse(cls, path: str) -> Self:
        """The sampler a model_path names.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it does not have this form.
        """
        parsed = cls._matching(path, SAMPLER_WEIGHTS, FROZEN_WEIGHTS)
        if parsed is None:
            raise invalid_field(
                "model_path",
                f"is {_shown(path)}; it must be {SCHEME}<run_id>/{SAMPLER_WEIGHTS}/<name>, as save_weights_for_sampler "
                f"returned it, or {SCHEME}<run_id>/{FROZEN_WEIGHTS}/<seq_id>.",
            )
        return parsed

    @classmethod
    def frozen_weights(cls, run_id: str, seq_id: int) -> Self:
        """The frozen weights that an operation made."""
        return cls(run_id, FROZEN_WEIGHTS, str(seq_id))


def check_checkpoint_name(name: str) -> None:
    """Refuses a checkpoint name that cannot be a folder's.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if not re.fullmatch(_NAME, name, re.ASCII):
        raise invalid_field(
            "name",
            f"is {_shown(name)}; it must be 1 to 128 letters, digits, '.', '_' or '-', and not start with '.'.",
        )


def _shown(text: str) -> str:
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:40]!r}… of {len(text)} characters"
