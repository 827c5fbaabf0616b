"""Folders of LoRA adapters, as PEFT writes them: finding, reading and copying them. Ground floor.

Paths come from callers, and must not lead anywhere else.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradwire._wire.untrusted import parse_json
from gradwire.errors import error, invalid_field

from trainer_service.atomic_folders import sync
from trainer_service.paths import SAMPLER_WEIGHTS, SCHEME, CheckpointPath

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The two files of an adapter, as peft writes them."""
DEFAULT_ALPHA = 32.0
"""lora_alpha where a request says none."""
_MATRIX = re.compile(r"base_model\.model\.(.+)\.lora_[AB]\.weight")
_MAX_PATH = 4096
_MAX_CONFIG_BYTES = 1 << 20


def is_checkpoint(path: str) -> bool:
    """Whether an adapter_path names a checkpoint, rather than a folder."""
    return path.startswith(SCHEME)


def adapter_folder(path: str, *, checkpoint_dir: Path, adapter_dir: Path) -> Path:
    """The folder an adapter_path names.

    Args:
        path: gradwire://<run_id>/sampler_weights/<name>, as save_weights_for_sampler of a LoRA run returned it, or a
            folder below adapter_dir: relative to it, or absolute.
        checkpoint_dir: Where checkpoints are.
        adapter_dir: Where the trainer's owner puts adapters that runs may start from.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it is not such a path, leads elsewhere, or has no adapter.
        NotFoundError: CHECKPOINT_NOT_FOUND.
    """
    if is_checkpoint(path):
        place = CheckpointPath.parse(path, field="adapter_path")
        if place.kind != SAMPLER_WEIGHTS:
            raise invalid_field(
                "adapter_path", f"is {path}, a resumable state; load that into a LoRA run with load_state instead."
            )
        folder = place.folder(checkpoint_dir)
    else:
        root = adapter_dir.resolve()
        try:
            # resolve() follows links, so that one leading out of the folder is found out too.
            folder = (root / path).resolve() if len(path) < _MAX_PATH else root
            folder.is_dir()
        except (OSError, ValueError, RuntimeError):
            # A name that no file can have, or links that form a loop.
            folder = root
        if folder == root or not folder.is_relative_to(root):
            raise invalid_field(
                "adapter_path",
                f"is {path[:200]!r}; it must be gradwire://<run_id>/{SAMPLER_WEIGHTS}/<name>, or name a folder below "
                f"this trainer's --adapter-dir, {adapter_dir}.",
            )
    if not folder.is_dir():
        raise error("CHECKPOINT_NOT_FOUND", f"There is no adapter {path}: {folder} is no folder.", path=path)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise invalid_field(
                "adapter_path",
                f"is {path}, which has no {name}; it must be a folder that peft saved, with weights in safetensors.",
            )
    return folder


def adapter_rank(folder: Path, path: str) -> int:
    """The LoRA rank in an adapter's configuration.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it has none.
    """
    try:
        rank = read_adapter_config(folder)["r"]
        if type(rank) is not int or not 0 < rank < 1 << 31:
            raise ValueError(f"r is {rank!r:.200}")
    except (OSError, ValueError, KeyError) as exc:
        why = "says no rank r" if isinstance(exc, KeyError) else f"cannot be read: {exc}"
        raise invalid_field("adapter_path", f"is {path}, whose {CONFIG} {why}.") from exc
    return rank


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's configuration, as it is on disk.

    Raises:
        ValueError: It is not a JSON object, or too long for a configuration.
        OSError: It cannot be read.
    """
    with (folder / CONFIG).open("rb") as file:
        content = file.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise ValueError(f"it has more than {_MAX_CONFIG_BYTES} bytes")
    found = parse_json(content)
    if not isinstance(found, dict):
        raise ValueError(f"it is a {type(found).__name__}")
    return found


def adapted_modules(folder: Path) -> set[str]:
    """Names of the modules that an adapter has matrices for; of experts, the one that holds the weights of all.

    Raises:
        ValueError: Its weights are no safetensors.
        OSError: They cannot be read.
    """
    with (folder / WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    found = (_MATRIX.fullmatch(key) for key in header)
    return {one[1].replace(".base_layer", "") for one in found if one}


def starred(names: Iterable[str]) -> list[str]:
    """Names in a model with * for the numbers of layers, each once, sorted."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names})


def copy_adapter(folder: Path, to: Path) -> None:
    """Copies an adapter's two files, and forces them to the disk."""
    to.mkdir()
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(folder / name, to / name)
        sync(to / name)
    sync(to)
