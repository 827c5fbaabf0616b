"""What ServiceClient.replay_run gives back."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplayDifference:
    """The first answer of a replayed run that differs from the recorded one."""

    seq_id: int
    """seq_id of the operation."""
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
    """Result of replaying a run's journal."""

    after_seq_id: int
    """The replay began after this operation; 0: at the base model, or where a forked run began."""
    compared: int
    """Operations whose answers were compared."""
    not_compared: int
    """Operations not executed again: they failed the first time, or only save."""
    difference: ReplayDifference | None
    """The first answer that differs; None: every answer is as recorded."""
