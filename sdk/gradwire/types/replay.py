"""What ServiceClient.replay_run gives back."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplayDifference:
    """The first answer of a replayed run that did not come out as it did."""

    seq_id: int
    """The operation."""
    kind: str
    """Its kind, such as "optim_step"."""
    step: int
    """Optimizer steps applied before it."""
    recorded_digest: str
    """SHA-256 of its answer in the journal, hex."""
    replayed_digest: str
    """SHA-256 of its answer now, hex."""


@dataclass(frozen=True)
class ReplayReport:
    """What replaying a run's journal found."""

    after_seq_id: int
    """The replay began behind this operation; 0: at the base model, or where a forked run began."""
    compared: int
    """Operations whose answers were compared."""
    not_compared: int
    """Operations that failed the first time, or that only save: not executed again."""
    difference: ReplayDifference | None
    """None: every answer came out as it did."""
