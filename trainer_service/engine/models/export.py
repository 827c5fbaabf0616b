"""Writes a model as a Hugging Face folder, whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradwire.tokenizer_files import CHAT_TEMPLATE_FOLDER, TOKENIZER_FILES
from safetensors import SafetensorError
from transformers import PreTrainedModel

from trainer_service.folders import whole_folder


def export(model: PreTrainedModel, *, source: Path, folder: Path, about: Mapping[str, Any], overwrite: bool) -> int:
    """Writes parameters (float32, as trained), config and tokenizer, so that `from_pretrained(folder)` loads them.

    Args:
        model: Its parameters are saved in the dtype they train in: nothing is lost, and a reader casts as it likes.
        source: Folder the model was loaded from, for the tokenizer's files.
        folder: Where the export goes, whole or not at all.
        about: For its manifest.
        overwrite: Replace what is there.

    Returns:
        Size of all files, bytes.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder is there and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    needed_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    with whole_folder(folder, about=about, overwrite=overwrite, needed_bytes=needed_bytes) as writer:
        write_model(model, source, writer.path)
    return writer.size_bytes


def write_model(model: PreTrainedModel, source: Path, folder: Path) -> None:
    """Writes the files of an export; see there. Raises OSError where that fails."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as exc:
        # What it makes of a failed write.
        raise OSError(str(exc)) from exc
    _copy_tokenizer(source, folder)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            # The hub's cache holds links; the export holds files.
            shutil.copyfile(source / name, folder / name)
