"""Writes a sharded model's parameters as a Hugging Face folder has them, one whole tensor at a time.

All ranks gather each tensor together, and the leader writes it. transformers converts names and shapes back to those of
the files the model came from; where it needs several tensors at once for that, they are gathered at once.
"""

import contextlib
import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from trainer_service.engine.parallel.sharding import whole_parameter
from trainer_service.engine.parallel.tensor_parallel import whole_shape
from trainer_service.engine.tensor_files import write_header, write_values

_MAX_FILE_SIZE = "50GB"
"""As transformers writes them."""
Cast = Callable[[str, Tensor], Tensor]


def write_sharded_model(
    hollow: PreTrainedModel, tensors: Mapping[str, Tensor], folder: Path | None, *, dtype: torch.dtype, cast: Cast
) -> None:
    """Writes parameters and configuration. Every rank calls this.

    Args:
        hollow: The model, whose own parameters are not read.
        tensors: What they are, by name; in parts.
        folder: Where the files go; None on ranks that only help.
        dtype: For the configuration.
        cast: Makes of a whole parameter, by its name in the model, what is written; also of one on "meta".

    Raises:
        OSError: They could not be written; all ranks have gathered everything all the same.
    """
    shapes = {name: whole_shape(tensor) for name, tensor in tensors.items()}
    on_meta = {name: cast(name, torch.empty(shapes[name], dtype=p.dtype, device="meta")) for name, p in tensors.items()}
    wanted = revert_weight_conversion(hollow, dict(on_meta))
    groups = [[name] for name in on_meta]
    singly: dict[str, Tensor] = {}
    for (name,) in groups:
        singly |= revert_weight_conversion(hollow, {name: on_meta[name]})
    if _shapes(singly) != _shapes(wanted):
        groups, singly = [[*on_meta]], wanted
    failure: OSError | None = None
    with contextlib.ExitStack() as stack:
        write: Callable[[str, Tensor], object] = lambda name, tensor: None  # noqa: E731
        if folder is not None:
            try:
                write = stack.enter_context(_files(folder, singly))
                _write_config(hollow, folder, dtype)
            except OSError as exc:
                failure = exc

        def gather(names: Sequence[str]) -> None:
            # Of its own, so that nothing of a tensor is left when the next is gathered.
            gathered = {name: cast(name, whole_parameter(tensors[name])) for name in names}
            if folder is not None and failure is None:
                for name, tensor in revert_weight_conversion(hollow, gathered).items():
                    write(name, tensor)

        for names in groups:
            try:
                gather(names)
            except OSError as exc:
                # The others gather on, and this rank with them.
                failure = exc
    if failure is not None:
        raise failure


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _files(folder: Path, tensors: Mapping[str, Tensor]) -> Iterator[Callable[[str, Tensor], object]]:
    """Files with headers for these tensors, and what takes each of them in that order."""
    split = split_torch_state_dict_into_shards(
        dict(tensors), filename_pattern="model{suffix}.safetensors", max_shard_size=_MAX_FILE_SIZE
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    with contextlib.ExitStack() as stack:
        file_of: dict[str, Any] = {}
        for file_name, names in split.filename_to_tensors.items():
            file = stack.enter_context((folder / file_name).open("xb"))
            within = {name: tensor for name, tensor in tensors.items() if name in {*names}}
            write_header(file, within, about={"format": "pt"})
            file_of |= dict.fromkeys(names, file)
        yield lambda name, tensor: write_values(file_of[name], tensor)


def _write_config(hollow: PreTrainedModel, folder: Path, dtype: torch.dtype) -> None:
    config: Any = copy.deepcopy(hollow.config)
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(hollow).__name__]
    config.save_pretrained(folder)
    if hollow.can_generate() and hollow.generation_config is not None:
        hollow.generation_config.save_pretrained(folder)
