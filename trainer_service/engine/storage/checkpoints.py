"""Saving a run as a checkpoint and loading one, in the local folder that worker and trainer share."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from gradwire.errors import GradwireError, error
from transformers import PreTrainedModel

from trainer_service.checkpoint_path import SAMPLER_WEIGHTS, STATE, CheckpointPath
from trainer_service.engine.models.adapter_files import save_adapter, write_adapter
from trainer_service.engine.models.export import export, write_model
from trainer_service.engine.models.load import ModelDescription
from trainer_service.engine.run_state import RunState
from trainer_service.engine.storage.deltas import save_delta
from trainer_service.engine.storage.state_files import capture, open_state, write_state
from trainer_service.folders import read_manifest, settle

_LAYOUT = ("alpha", "train_mlp", "train_attn", "train_unembed")
"""Of LoRA settings: what a run must be made with to load the state of another, beside the rank."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a checkpoint is: gradwire:// path, file:// URI, and the size of all files."""

    path: str
    uri: str
    size_bytes: int


class Checkpoints:
    """The checkpoints of a worker's runs.

    Args:
        root: Folder that holds them, at `<run_id>/<kind>/<name>`; other trainers may share it.
        model: What its runs start from.
        source: Folder of that model.
    """

    def __init__(self, root: Path, model: ModelDescription, source: Path) -> None:
        self._root = root
        self._model = model
        self._source = source
        for kind in (STATE, SAMPLER_WEIGHTS):
            for parent in root.glob(f"*/{kind}/"):
                settle(parent)

    def save_state(
        self, run: RunState, name: str, *, overwrite: bool = False, ttl_seconds: int | None = None
    ) -> SavedCheckpoint:
        """Parameters, optimizer and counters; what has been accumulated since the last step is left out.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED.
        """
        place = CheckpointPath(run.run_id, STATE, name)
        folder = place.folder(self._root)
        about = self._about(run, place, ttl_seconds)
        if (size_bytes := _saved_before(folder, about)) is not None:
            return _saved(place, folder, size_bytes)
        size_bytes = write_state(capture(run, gradients=False), folder, about=about, overwrite=overwrite)
        return _saved(place, folder, size_bytes)

    def load_state(self, run: RunState, path: str, *, with_optimizer: bool) -> int:
        """Loads a state, of this run or another, after reading all of it once to verify it.

        Gradients and held graphs are dropped. Whatever can be refused is refused before the run is changed.

        Returns:
            Optimizer steps in the state.

        Raises:
            InvalidArgumentError: INVALID_FIELD: the path is none, or one of sampler weights.
            NotFoundError: CHECKPOINT_NOT_FOUND.
            FailedPreconditionError: CHECKPOINT_MISMATCH: of another model.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        place = CheckpointPath.parse(path)
        if place.kind != STATE:
            raise error(
                "CHECKPOINT_MISMATCH",
                f"{path} holds weights for sampling, which training cannot go on from; load one that save_state made.",
                path=path,
            )
        folder = place.folder(self._root)
        if not folder.is_dir():
            raise error("CHECKPOINT_NOT_FOUND", f"There is no checkpoint {path}.", path=path)
        files = open_state(folder)
        files.restore(run, optimizer=with_optimizer)
        return files.step

    def save_weights_for_sampler(
        self,
        run: RunState,
        name: str,
        *,
        merged: PreTrainedModel | None = None,
        delta: bool = False,
        overwrite: bool = False,
        ttl_seconds: int | None = None,
    ) -> SavedCheckpoint:
        """The parameters as a Hugging Face folder, or an adapter as a peft folder.

        Args:
            run: It.
            name: Of the checkpoint.
            merged: Of a LoRA run: the model to write in place of its adapter.
            delta: Only what changed since the run's newest base.
            overwrite: Replace what is there.
            ttl_seconds: How long it is kept; None for ever.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED. DELTA_BASE_UNUSABLE: there is no base, or not as it was saved.
        """
        place = CheckpointPath(run.run_id, SAMPLER_WEIGHTS, name)
        folder = place.folder(self._root)
        about = self._about(run, place, ttl_seconds)
        if (size_bytes := _saved_before(folder, about)) is not None:
            return _saved(place, folder, size_bytes)
        if delta:

            def write(full: Path) -> None:
                if run.adapter is not None and merged is None:
                    write_adapter(run.adapter, full)
                else:
                    write_model(merged or run.model, self._source, full)

            size_bytes = save_delta(write, folder, about=about, overwrite=overwrite)
        elif run.adapter is not None and merged is None:
            size_bytes = save_adapter(run.adapter, folder, about=about, overwrite=overwrite)
        else:
            model = merged or run.model
            size_bytes = export(model, source=self._source, folder=folder, about=about, overwrite=overwrite)
        return _saved(place, folder, size_bytes)

    def _about(self, run: RunState, place: CheckpointPath, ttl_seconds: int | None) -> dict[str, Any]:
        now = datetime.now(UTC)
        return {
            "run_id": place.run_id,
            "kind": place.kind,
            "name": place.name,
            "step": run.step,
            "seq_id": run.saving_seq_id,
            "base_model": self._model.base_model,
            "architecture": self._model.architecture,
            "lora_rank": run.lora_rank,
            "lora": None if run.lora is None else {name: getattr(run.lora, name) for name in _LAYOUT},
            "created_at": now.isoformat(timespec="milliseconds"),
            "expires_at": None
            if ttl_seconds is None
            else (now + timedelta(seconds=ttl_seconds)).isoformat(timespec="milliseconds"),
        }


def _saved_before(folder: Path, about: dict[str, Any]) -> int | None:
    """Size of the checkpoint that this very operation wrote before its worker died and it was sent again, if it did."""
    if not about["seq_id"] or not folder.is_dir():
        return None
    try:
        manifest = read_manifest(folder)
    except GradwireError:
        return None
    same = all(manifest.about.get(key) == about[key] for key in ("run_id", "seq_id"))
    return manifest.size_bytes if same else None


def _saved(place: CheckpointPath, folder: Path, size_bytes: int) -> SavedCheckpoint:
    return SavedCheckpoint(path=str(place), uri=folder.resolve().as_uri(), size_bytes=size_bytes)
