"""Writes a model as a Hugging Face folder, whole or not at all."""

import contextlib
import copy
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gradwire._wire.tokenizer_files import CHAT_TEMPLATE_FOLDER, TOKENIZER_FILES
from gradwire.errors import invalid_field
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from trainer_service.engine.tensor_files import read_tensors
from trainer_service.folders import whole_folder

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What parameters may be written in, by name."""


def stored_dtype(folder: Path) -> str:
    """What most of a model's parameters are in, in its files; "float32" where that is none of EXPORT_DTYPES."""
    found: Counter[torch.dtype] = Counter()
    for file in folder.glob("*.safetensors"):
        # What cannot be read is for the loader to complain of.
        with contextlib.suppress(OSError, ValueError):
            for tensor in read_tensors(file).values():
                found[tensor.dtype] += tensor.numel()
    most = found.most_common(1)
    return next((name for name, dtype in EXPORT_DTYPES.items() if most and most[0][0] == dtype), "float32")


def export(
    model: PreTrainedModel,
    *,
    source: Path,
    folder: Path,
    about: Mapping[str, Any],
    overwrite: bool,
    dtype: torch.dtype = torch.float32,
) -> int:
    """Writes parameters, config and tokenizer, so that `from_pretrained(folder)` loads them.

    Args:
        model: It.
        source: Folder the model was loaded from, for the tokenizer's files.
        folder: Where the export goes, whole or not at all.
        about: For its manifest.
        overwrite: Replace what is there.
        dtype: What parameters are written in. In float32, as they train, nothing is lost.

    Returns:
        Size of all files, bytes.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a parameter is infinite in that dtype.
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder is there and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    needed_bytes = sum(p.numel() * dtype.itemsize for p in model.parameters())
    with whole_folder(folder, about=about, overwrite=overwrite, needed_bytes=needed_bytes) as writer:
        write_model(model, source, writer.path, dtype=dtype)
    return writer.size_bytes


def write_model(model: PreTrainedModel, source: Path, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the files of an export; see there. Raises OSError where that fails."""
    try:
        _in_dtype(model, dtype).save_pretrained(folder)
    except SafetensorError as exc:
        # What it makes of a failed write.
        raise OSError(str(exc)) from exc
    _copy_tokenizer(source, folder)


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters in another dtype, in the host's memory; tied ones stay tied.

    What transformers keeps in float32 when it loads a model in that dtype stays in it.
    """
    if dtype == torch.float32:
        return model
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}
    exact = re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, sorted(kept)))})(?:\.|$)") if kept else None
    cast: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        if exact is not None and exact.search(name):
            cast[id(parameter)] = parameter
            continue
        tensor = parameter.detach().to("cpu", dtype)
        if not torch.isfinite(tensor).all() and torch.isfinite(parameter).all():
            raise invalid_field(
                "dtype", f'is "{str(dtype).removeprefix("torch.")}", in which {name} is infinite; pass "float32".'
            )
        cast[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(model, cast)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            # The hub's cache holds links; the export holds files.
            shutil.copyfile(source / name, folder / name)
