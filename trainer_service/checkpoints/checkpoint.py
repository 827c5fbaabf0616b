"""One checkpoint as the catalog knows it: where it is, what it holds, whose it is, until when."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from trainer_service.access import current_caller
from trainer_service.atomic_folders import Manifest
from trainer_service.checkpoints import manifests
from trainer_service.paths import CheckpointPath


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        path: Where it is.
        manifest: What it holds.
        owner: Whose it is, see access.Caller; None if that is unknown, and then only admins see it.
    """

    path: CheckpointPath
    manifest: Manifest
    owner: str | None

    @property
    def created_at(self) -> datetime:
        """When it was saved."""
        return manifests.time_of(self.manifest.about, "created_at") or datetime.fromtimestamp(0, UTC)

    @property
    def expires_at(self) -> datetime | None:
        """When it is deleted; None for never."""
        return manifests.time_of(self.manifest.about, "expires_at")

    @property
    def expired(self) -> bool:
        """Whether expires_at is past."""
        return self.expires_at is not None and self.expires_at <= datetime.now(UTC)

    @property
    def base_path(self) -> str:
        """For a delta, the path of the base it builds on; "" for anything else."""
        return str(self.manifest.about.get("base_path") or "")


def bases(checkpoints: Iterable[Checkpoint]) -> set[str]:
    """Paths of the bases that unexpired deltas build on. A base stays as long as its deltas."""
    return {checkpoint.base_path for checkpoint in checkpoints if not checkpoint.expired}


def may_see(owner: str | None) -> bool:
    """Whether the current caller may see the checkpoints of an owner."""
    caller = current_caller.get()
    return caller.admin if owner is None else caller.may_see(owner)
