"""Where a sampler's parameters are: gradwire://<run_id>/sampler_weights/<name> or …/snapshots/<seq_id>. Ground."""

import re
from dataclasses import dataclass

from gradwire.errors import invalid_field

SAMPLER_WEIGHTS = "sampler_weights"
"""Kind of a saved checkpoint."""
SNAPSHOTS = "snapshots"
"""Kind of a snapshot in the worker's memory."""

_PATH = re.compile(
    r"gradwire://([A-Za-z0-9][A-Za-z0-9_-]{0,63})/"
    rf"(?:({SAMPLER_WEIGHTS})/([A-Za-z0-9_-][A-Za-z0-9._-]{{0,127}})|({SNAPSHOTS})/([1-9][0-9]{{0,18}}))",
    re.ASCII,
)
_MAX_SHOWN = 200
MAX_LEASE_MS = 600_000
"""A snapshot whose client is gone takes memory for so long at most."""


@dataclass(frozen=True)
class SamplerPath:
    """Names one sampler of a run; what `parse` returns leads nowhere else."""

    run_id: str
    kind: str
    name: str

    @classmethod
    def parse(cls, path: str) -> "SamplerPath":
        """The sampler a model_path names.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is not of this form.
        """
        found = _PATH.fullmatch(path)
        if found is None:
            shown = repr(path) if len(path) <= _MAX_SHOWN else f"{path[:40]!r}… of {len(path)} characters"
            raise invalid_field(
                "model_path",
                f"is {shown}; it must be gradwire://<run_id>/{SAMPLER_WEIGHTS}/<name>, as save_weights_for_sampler "
                f"returned it, or gradwire://<run_id>/{SNAPSHOTS}/<seq_id>.",
            )
        run_id, *rest = found.groups()
        kind, name = (part for part in rest if part is not None)
        return cls(run_id, kind, name)

    @classmethod
    def snapshot(cls, run_id: str, seq_id: int) -> "SamplerPath":
        """The snapshot that an operation made."""
        return cls(run_id, SNAPSHOTS, str(seq_id))

    def __str__(self) -> str:
        return f"gradwire://{self.key}"

    @property
    def key(self) -> str:
        """Its place below a folder."""
        return f"{self.run_id}/{self.kind}/{self.name}"


def check_lease_ms(lease_ms: int) -> None:
    """Refuses a lease that is longer than any may be.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if lease_ms > MAX_LEASE_MS:
        what = f"is {lease_ms}; it must be 0 to {MAX_LEASE_MS}. Ask again to renew it."
        raise invalid_field("lease_ms", what, limit=MAX_LEASE_MS, got=lease_ms)
