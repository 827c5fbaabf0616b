"""Saving a run as a checkpoint and loading one, in the local folder that worker and trainer share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from gradwire.errors import GradwireError, error, invalid_field
from transformers import PreTrainedModel

from trainer_service.atomic_folders import read_manifest, settle
from trainer_service.engine.models.adapter_files import write_adapter
from trainer_service.engine.models.export import EXPORT_DTYPES, stored_dtype, write_model
from trainer_service.engine.models.load import ModelDescription
from trainer_service.engine.models.lora import MergedParts
from trainer_service.engine.parallel.tensor_parallel import whole_shape
from trainer_service.engine.rank_channels import Channel
from trainer_service.engine.run_state import RunState
from trainer_service.engine.storage.deltas import dtype_of_base, save_delta
from trainer_service.engine.storage.state_files import capture, open_state, write_state
from trainer_service.engine.storage.together import write_together
from trainer_service.paths import SAMPLER_WEIGHTS, STATE, CheckpointPath

_LAYOUT = ("alpha", "train_mlp", "train_attn", "train_unembed")
"""LoRA settings, beside the rank, that a run must share to load the state of another."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """Where a checkpoint is: gradwire:// path, file:// URI, and the size of all files."""

    path: str
    uri: str
    size_bytes: int


@dataclass(frozen=True)
class Label:
    """What the caller attaches to a checkpoint."""

    ttl_seconds: int | None = None
    """How long the checkpoint is kept; None for ever."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    """The caller's own texts, by name; see trainer_service/user_metadata.py."""


class Checkpoints:
    """The checkpoints of a worker's runs.

    Args:
        root: Folder that holds them, at `<run_id>/<kind>/<name>`; other trainers may share it.
        model: The base model of its runs.
        source: Folder of that model.
        channel: To the other ranks, which make the same calls.
    """

    def __init__(self, root: Path, model: ModelDescription, source: Path, channel: Channel) -> None:
        self._channel = channel
        self._root = root
        self._model = model
        self._source = source
        self._dtype = stored_dtype(source)
        for kind in (STATE, SAMPLER_WEIGHTS) if channel.leads else ():
            for parent in root.glob(f"*/{kind}/"):
                settle(parent)

    def save_state(
        self, run: RunState, name: str, label: Label | None = None, *, overwrite: bool = False
    ) -> SavedCheckpoint:
        """Saves parameters, optimizer and counters, without gradients accumulated since the last step.

        Raises:
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED.
        """
        place = CheckpointPath(run.run_id, STATE, name)
        folder = place.folder(self._root)
        about = self._about(run, place, label or Label())
        if (size_bytes := self._channel.tell(_saved_before(folder, about))) is not None:
            return _saved(place, folder, size_bytes)
        state = capture(run, gradients=False, channel=self._channel)
        size_bytes = write_state(state, folder, about=about, channel=self._channel, overwrite=overwrite)
        return _saved(place, folder, size_bytes)

    def load_state(self, run: RunState, path: str, *, with_optimizer: bool) -> int:
        """Loads a state, of this run or another, after reading all of it once to verify it.

        Gradients and held graphs are dropped. An error leaves the run unchanged.

        Returns:
            Optimizer steps in the state.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is not a path of a checkpoint.
            NotFoundError: CHECKPOINT_NOT_FOUND.
            FailedPreconditionError: CHECKPOINT_MISMATCH: it holds sampler weights, or is of another model.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        place = CheckpointPath.parse(path)
        if place.kind != STATE:
            raise error(
                "CHECKPOINT_MISMATCH",
                f"{path} holds sampler weights, from which training cannot resume; load a state that save_state saved.",
                path=path,
            )
        folder = place.folder(self._root)
        if not self._channel.tell(folder.is_dir()):
            raise error("CHECKPOINT_NOT_FOUND", f"There is no checkpoint {path}.", path=path)
        files = open_state(folder, self._channel)
        files.restore(run, optimizer=with_optimizer)
        return files.step

    def save_weights_for_sampler(
        self,
        run: RunState,
        name: str,
        label: Label | None = None,
        *,
        merged: PreTrainedModel | MergedParts | None = None,
        delta: bool = False,
        overwrite: bool = False,
        dtype: str = "",
    ) -> SavedCheckpoint:
        """Saves the parameters as a Hugging Face folder, or an adapter as a peft folder.

        Args:
            run: The run to save.
            name: The checkpoint's.
            label: What the caller attaches to it; None for nothing.
            merged: For a LoRA run, the merged model to write in place of its adapter.
            delta: Save only what changed since the run's newest base.
            overwrite: Replace what is there.
            dtype: The dtype of a Hugging Face folder's parameters: "float32", as they train, or that of the base
                model's files; "" is the latter, or for a delta its base's. An adapter is always written in float32.

        Raises:
            InvalidArgumentError: INVALID_FIELD: no such dtype, or one in which a parameter is infinite.
            AlreadyExistsError: CHECKPOINT_EXISTS.
            FailedPreconditionError: STORAGE_FAILED. DELTA_BASE_UNUSABLE: there is no base, or it has changed.
        """
        place = CheckpointPath(run.run_id, SAMPLER_WEIGHTS, name)
        folder = place.folder(self._root)
        adapter = run.adapter if merged is None else None
        only = self._channel.alike(lambda: "float32" if adapter is not None else dtype_of_base(folder) if delta else "")
        written = self._export_dtype(dtype, only)
        about = {**self._about(run, place, label or Label()), "dtype": written}
        if (size_bytes := self._channel.tell(_saved_before(folder, about))) is not None:
            return _saved(place, folder, size_bytes)

        def write(whole: Path | None) -> None:
            if adapter is None:
                write_model(merged or run.model, self._source, whole, dtype=EXPORT_DTYPES[written])
            else:
                write_adapter(adapter, whole)

        if delta:
            size_bytes = save_delta(write, folder, about=about, overwrite=overwrite, channel=self._channel)
        else:
            size_bytes = write_together(
                self._channel,
                lambda files: write(files.path if self._channel.leads else None),
                folder,
                about=about,
                overwrite=overwrite,
                needed_bytes=_needed_bytes(run, merged, EXPORT_DTYPES[written]) if self._channel.leads else 0,
            )
        return _saved(place, folder, size_bytes)

    def _export_dtype(self, asked: str, only: str) -> str:
        """The dtype to write, given the one asked for ("" for none) and the only one possible ("" for any)."""
        allowed = [only] if only else ["float32", self._dtype]
        if asked and asked not in allowed:
            why = "that of its base" if only else "as it trains, or as in the base model's files"
            names = " or ".join(f'"{name}"' for name in dict.fromkeys(allowed))
            raise invalid_field("dtype", f'is "{asked[:200]}"; it must be {names}, {why}.')
        return asked or allowed[-1]

    def _about(self, run: RunState, place: CheckpointPath, label: Label) -> dict[str, Any]:
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
            "lora": _layout(run),
            "created_at": now.isoformat(timespec="milliseconds"),
            "expires_at": None
            if label.ttl_seconds is None
            else (now + timedelta(seconds=label.ttl_seconds)).isoformat(timespec="milliseconds"),
            "user_metadata": dict(label.user_metadata),
        }


def _layout(run: RunState) -> dict[str, Any] | None:
    """How a run's adapter is laid out; None where all parameters train, or no settings make such an adapter."""
    if run.lora is None:
        return None
    settings = {name: getattr(run.lora, name) for name in _LAYOUT}
    # Manifests hold no lists; names of parameters hold no spaces.
    return {**settings, "adapted": " ".join(run.adapted), "left_out": " ".join(run.left_out)}


def _needed_bytes(run: RunState, merged: PreTrainedModel | MergedParts | None, dtype: torch.dtype) -> int:
    """What an export's parameters take."""
    if run.adapter is not None and merged is None:
        return sum(whole_shape(p).numel() * p.itemsize for p in run.trained_parameters().values())
    model = merged.hollow if isinstance(merged, MergedParts) else merged or run.model
    return sum(whole_shape(p).numel() * dtype.itemsize for p in model.parameters())


def _saved_before(folder: Path, about: dict[str, Any]) -> int | None:
    """Size of the checkpoint, if this very operation already wrote it before its worker died and it was sent again."""
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
