"""Writes a model as a Hugging Face folder, whole or not at all."""

import contextlib
import copy
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gradwire._wire.tokenizer_files import CHAT_TEMPLATE_FOLDER, TOKENIZER_FILES
from gradwire.errors import invalid_field
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer_service.engine.models.lora import MergedParts
from trainer_service.engine.models.streamed_export import write_sharded_model
from trainer_service.engine.parallel.sharding import record_of, reshard
from trainer_service.engine.tensor_files import read_tensors

EXPORT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes that parameters may be written in, by name."""


def stored_dtype(folder: Path) -> str:
    """What most of a model's parameters are in, in its files; "float32" where that is none of EXPORT_DTYPES."""
    found: Counter[torch.dtype] = Counter()
    for file in folder.glob("*.safetensors"):
        # The loader complains about what cannot be read.
        with contextlib.suppress(OSError, ValueError):
            for tensor in read_tensors(file).values():
                found[tensor.dtype] += tensor.numel()
    most = found.most_common(1)
    return next((name for name, dtype in EXPORT_DTYPES.items() if most and most[0][0] == dtype), "float32")


def write_model(
    model: PreTrainedModel | MergedParts, source: Path, folder: Path | None, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes parameters, config and tokenizer, so that `from_pretrained(folder)` loads them. Every rank calls this.

    Args:
        model: The model to write; one in parts is made whole a tensor at a time.
        source: Folder the model was loaded from, for the tokenizer's files.
        folder: Where the files go; None on ranks that only help.
        dtype: Dtype of the parameters in the files. In float32, as they train, nothing is lost.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a parameter is infinite in that dtype.
        OSError: They cannot be written.
    """
    if isinstance(model, MergedParts):
        exact, add = _exact(model.hollow, dtype), model.merged

        def cast(name: str, tensor: Tensor) -> Tensor:
            return _cast(name, add(name, tensor) if folder is not None else tensor, dtype, exact)

        write_sharded_model(model.hollow, model.tensors, folder, dtype=dtype, cast=cast)
    elif (record := record_of(model)) is not None:
        exact = _exact(model, dtype)
        reshard(model)
        tensors = dict(model.named_parameters())
        write_sharded_model(
            record.hollow, tensors, folder, dtype=dtype, cast=lambda name, tensor: _cast(name, tensor, dtype, exact)
        )
    elif folder is not None:
        try:
            _in_dtype(model, dtype).save_pretrained(folder)
        except SafetensorError as exc:
            # What it makes of a failed write.
            raise OSError(str(exc)) from exc
    if folder is not None:
        _copy_tokenizer(source, folder)


def _in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model with its parameters in another dtype, in the host's memory; tied ones stay tied.

    What transformers keeps in float32 when it loads a model in that dtype stays in it.
    """
    if dtype == torch.float32:
        return model
    exact = _exact(model, dtype)
    cast: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        tensor = _cast(name, parameter.detach(), dtype, exact)
        cast[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(model, cast)


def _exact(model: PreTrainedModel, dtype: torch.dtype) -> "re.Pattern[str] | None":
    """Finds the names of parameters that stay in float32; None where none do."""
    kept = {*(model._keep_in_fp32_modules_strict or ())}
    if dtype == torch.float16:
        kept |= {*(model._keep_in_fp32_modules or ())}
    return re.compile(rf"(?:^|\.)(?:{'|'.join(map(re.escape, sorted(kept)))})(?:\.|$)") if kept else None


def _cast(name: str, parameter: Tensor, dtype: torch.dtype, exact: "re.Pattern[str] | None") -> Tensor:
    """A whole parameter as it is written, in the host's memory."""
    if dtype == torch.float32 or (exact is not None and exact.search(name)):
        return parameter.float()
    if parameter.is_meta:
        return parameter.to(dtype)
    tensor = parameter.to("cpu", dtype)
    if not torch.isfinite(tensor).all() and torch.isfinite(parameter).all():
        raise invalid_field(
            "dtype", f'is "{str(dtype).removeprefix("torch.")}", in which {name} is infinite; pass "float32".'
        )
    return tensor


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in (*TOKENIZER_FILES, CHAT_TEMPLATE_FOLDER):
        if (source / name).is_dir():
            shutil.copytree(source / name, folder / name)
        elif (source / name).exists():
            # The hub's cache holds links; the export holds files.
            shutil.copyfile(source / name, folder / name)
