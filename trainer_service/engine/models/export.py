"""Writes a model as a Hugging Face folder, whole or not at all."""

import errno
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from gradwire.errors import GradwireError, error
from safetensors import SafetensorError
from transformers import PreTrainedModel

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
_SPARE_BYTES = 16 << 20
"""Room left on the disk beyond the parameters, for tokenizer files and the file system's own."""


@dataclass(frozen=True)
class Export:
    """A folder written.

    Attributes:
        folder: Where it is.
        size_bytes: Size of all files.
    """

    folder: Path
    size_bytes: int


def export(model: PreTrainedModel, *, source: Path, folder: Path, overwrite: bool) -> Export:
    """Writes parameters (float32, as trained), config and tokenizer, so that `from_pretrained(folder)` loads them.

    Written aside, synced to disk and renamed: a reader sees the old folder or the new one, never half of one.

    Args:
        model: Its parameters are saved in the dtype they train in: nothing is lost, and a reader casts as it likes.
        source: Folder the model was loaded from, for the tokenizer's files.
        folder: Where the export goes.
        overwrite: Replace what is there.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder is there and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    if folder.exists() and not overwrite:
        raise error(
            "CHECKPOINT_EXISTS",
            f'A checkpoint named "{folder.name}" exists; choose another name, or pass overwrite=True to replace it.',
            name=folder.name,
        )
    partial = folder.with_name(f".partial-{folder.name}-{uuid.uuid4().hex[:8]}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(folder.parent)
        _check_space(model, folder.parent)
        model.save_pretrained(partial)
        _copy_tokenizer(source, partial)
        size_bytes = _sync(partial)
        _swap_in(partial, folder)
    except (OSError, SafetensorError) as exc:
        shutil.rmtree(partial, ignore_errors=True)
        raise _storage_failed(folder, str(exc)) from exc
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Export(folder=folder, size_bytes=size_bytes)


def _check_space(model: PreTrainedModel, where: Path) -> None:
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + _SPARE_BYTES
    free = shutil.disk_usage(where).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB are needed, and {free >> 20} MiB are free")


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            # The hub's cache holds links; the export holds files.
            shutil.copyfile(source / name, folder / name)


def _sync(folder: Path) -> int:
    """Forces every file below to the disk. Returns their size in bytes."""
    size_bytes = 0
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root, name)
            size_bytes += path.stat().st_size
            _fsync(path)
        _fsync(Path(root))
    return size_bytes


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _swap_in(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(f".replaced-{folder.name}")
    if folder.exists():
        folder.rename(replaced)
    partial.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _clear_leftovers(parent: Path) -> None:
    """Removes what a worker left that was killed while it wrote; a folder killed between its two renames comes back."""
    for left in parent.glob(".replaced-*"):
        original = left.with_name(left.name.removeprefix(".replaced-"))
        if original.exists():
            shutil.rmtree(left)
        else:
            left.rename(original)
    for left in parent.glob(".partial-*"):
        shutil.rmtree(left)


def _storage_failed(folder: Path, why: str) -> GradwireError:
    return error(
        "STORAGE_FAILED",
        f'The checkpoint "{folder.name}" could not be written to {folder.parent}: {why}. Nothing was left behind and '
        "the run is as before; free some space there and save again.",
        name=folder.name,
        folder=folder.parent,
    )
