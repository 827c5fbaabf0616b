"""Saving sampler weights as a delta to the run's last base, and expanding them to load them."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gradwire._wire import delta as deltas
from gradwire.errors import GradwireError, error

from trainer_service.atomic_folders import MANIFEST, FolderWriter, Manifest, damaged, read_manifest
from trainer_service.engine.models.export import EXPORT_DTYPES
from trainer_service.engine.rank_channels import Channel
from trainer_service.engine.storage.together import write_together
from trainer_service.paths import SAMPLER_WEIGHTS, CheckpointPath

_COPY_BYTES = 8 << 20


def save_delta(
    write: Callable[[Path | None], None], folder: Path, *, about: Mapping[str, Any], overwrite: bool, channel: Channel
) -> int:
    """Writes what changed since the newest base beside `folder`, whole or not at all.

    Args:
        write: Writes all the weights into an empty folder, as a base has them; None where another rank does.
        folder: Where the delta goes.
        about: Goes into the manifest, to which the base's path is added.
        overwrite: Replace what is there.
        channel: To the other ranks, all of which call this.

    Returns:
        Size of all files, bytes.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS.
        FailedPreconditionError: DELTA_BASE_UNUSABLE: the run has saved no base, or the base has changed.
            STORAGE_FAILED: nothing is left behind.
    """
    base, manifest = channel.alike(lambda: _newest_base(folder))
    base_path = str(CheckpointPath(about["run_id"], SAMPLER_WEIGHTS, base.name))

    def write_changes(files: FolderWriter) -> None:
        if not channel.leads:
            write(None)
            return
        full = files.path / ".full"
        full.mkdir()
        write(full)
        _write_delta(base, manifest, full, files.path, base_path)
        for path in full.iterdir():
            if path.suffix != ".safetensors":
                path.rename(files.path / path.name)
        shutil.rmtree(full)

    return write_together(
        channel,
        write_changes,
        folder,
        about={**about, "checkpoint_type": "delta", "base_path": base_path},
        overwrite=overwrite,
        needed_bytes=2 * manifest.size_bytes if channel.leads else 0,
    )


def dtype_of_base(folder: Path) -> str:
    """The dtype of the base that a delta in `folder` would build on.

    Raises:
        FailedPreconditionError: DELTA_BASE_UNUSABLE: the run has saved no base.
    """
    found = _newest_base(folder)[1].about.get("dtype")
    return found if found in EXPORT_DTYPES else "float32"


@contextlib.contextmanager
def whole_weights(folder: Path) -> Iterator[Path]:
    """A folder that holds all of a checkpoint's weights, during the block.

    Raises:
        DataLossError: CHECKPOINT_DAMAGED.
        FailedPreconditionError: DELTA_BASE_UNUSABLE: the base of a delta is gone, or was replaced.
    """
    description = deltas.describe(folder)
    if description is None:
        yield folder
        return
    try:
        base = folder.with_name(CheckpointPath.parse(description["base"]["path"]).name)
    except GradwireError as exc:
        raise damaged(folder.name, deltas.DESCRIPTION, "names no base") from exc
    with tempfile.TemporaryDirectory(prefix="gradwire-delta-") as made:
        deltas.expand_folder(folder, base, Path(made))
        yield Path(made)


def _newest_base(folder: Path) -> tuple[Path, Manifest]:
    found: list[tuple[str, Path, Manifest]] = []
    for file in folder.parent.glob(f"*/{MANIFEST}"):
        if file.parent != folder and not file.parent.name.startswith("."):
            with contextlib.suppress(GradwireError):
                manifest = read_manifest(file.parent)
                if not manifest.about.get("base_path"):
                    found.append((str(manifest.about.get("created_at")), file.parent, manifest))
    if not found:
        raise error(
            "DELTA_BASE_UNUSABLE",
            f'"{folder.name}" cannot be saved as a delta: this run has saved no base to build on. Save one with '
            'checkpoint_type "base" first.',
            name=folder.name,
        )
    _, base, manifest = max(found, key=lambda one: one[:2])
    return base, manifest


def _write_delta(base: Path, manifest: Manifest, full: Path, out: Path, base_path: str) -> None:
    names = sorted(path.name for path in full.glob("*.safetensors"))
    if names != sorted(name for name in manifest.files if name.endswith(".safetensors")):
        raise deltas.unusable_base(out.name, f"{base.name} has other files, since it was saved in another form")
    sizes: dict[str, list[int]] = {}
    files: dict[str, dict[str, Any]] = {}
    # Chunks are written aside first, since the header before them contains their lengths.
    with tempfile.TemporaryFile(dir=out) as chunks:
        for name in names:
            entry = manifest.files[name]
            if (full / name).stat().st_size != entry.size_bytes:
                raise deltas.unusable_base(
                    out.name, f"{name} of {base.name} has another size, since it has other tensors"
                )
            sizes[name], base_sha256, sha256 = deltas.write_chunks(base / name, full / name, chunks)
            if base_sha256 != entry.sha256:
                raise deltas.unusable_base(out.name, f"{name} of {base.name} is damaged")
            files[name] = {"size_bytes": entry.size_bytes, "sha256": sha256}
        chunks.seek(0)
        with (out / deltas.TENSORS).open("xb") as file:
            file.write(deltas.safetensors_header(sizes))
            shutil.copyfileobj(chunks, file, _COPY_BYTES)
    of_base = {"path": base_path, "files": {name: manifest.files[name].sha256 for name in names}}
    (out / deltas.DESCRIPTION).write_text(json.dumps({"base": of_base, "files": files}, indent=2))
