"""The folder that a base model's files are in, and whether two machines have the same. Ground floor."""

import hashlib
from pathlib import Path

from gradwire.errors import GradwireError, invalid_field

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*")
_HUB_FILES_LEFT_OUT = ("consolidated*", "onnx/*", "original/*", "*/*.safetensors")
_PIECES = 64
_PIECE_BYTES = 64 * 1024
"""A file is known by its size and so many pieces of so many bytes: 4 MiB of it, read in milliseconds. Training changes
nearly all parameters, so a fine-tuned model differs in every piece."""


def fetch(base_model: str) -> Path:
    """The folder a model lies in; one on the hub is fetched into the hub's cache first.

    Raises:
        InvalidArgumentError: INVALID_FIELD: no such folder, no such model on the hub, or the hub is out of reach.
    """
    folder = Path(base_model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _refused(base_model, "is a folder without config.json; it must be a Hugging Face model folder.")
        return folder.resolve()
    if base_model.startswith((".", "/", "~")) or base_model.count("/") > 1:
        raise _refused(base_model, "does not exist; it must be a Hugging Face model folder or a hub id.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(base_model, allow_patterns=list(_HUB_FILES), ignore_patterns=list(_HUB_FILES_LEFT_OUT))
        )
    except LocalEntryNotFoundError as exc:
        why = "is no folder here, not in the hub's cache, and the hub cannot be reached; give a folder instead."
        raise _refused(base_model, why) from exc
    except (HfHubHTTPError, HFValidationError, OSError) as exc:
        raise _refused(base_model, f"is no folder here, and the hub refused it: {_first_line(exc)}") from exc


def digest(folder: Path) -> str:
    """SHA-256 over what computes: config.json, and of each safetensors file its name, its size and pieces of it."""
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        size_bytes = file.stat().st_size
        found.update(f"{file.name} {size_bytes} ".encode())
        with file.open("rb") as opened:
            # The first piece has the tensors' names, the last one ends with the file.
            last = max(0, size_bytes - _PIECE_BYTES)
            for start in sorted({last * piece // (_PIECES - 1) for piece in range(_PIECES)}):
                opened.seek(start)
                found.update(opened.read(_PIECE_BYTES))
    return found.hexdigest()


def _refused(base_model: str, why: str) -> GradwireError:
    return invalid_field("base_model", f'"{base_model}" {why}', base_model=base_model)


def _first_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[0] if lines else type(exc).__name__
