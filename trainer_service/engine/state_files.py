"""A run's resumable state on disk: what the worker reads and writes for checkpoints and snapshots.

A folder, whole or not at all, of safetensors and JSON and nothing else:

    parameters.safetensors   what trains, by name
    optimizer.safetensors    "step.<name>", "exp_avg.<name>", "exp_avg_sq.<name>"; no file before the first step
    gradients.safetensors    accumulated gradients by name; no file when there are none
    rng.safetensors          torch's generators: "cpu", "cuda"
    state.json               counters
    manifest.json            last: what it is, and size and digest of every file

Tensors stream: one is never held twice, and on the way from a device to the disk only a few MiB of it.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradwire.errors import GradwireError, error
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from trainer_service.engine.run_state import Accumulation, RunState
from trainer_service.folders import DigestedFile, Manifest, damaged, read_manifest, verify, whole_folder

_CHUNK_BYTES = 8 << 20
_COUNTERS = "state.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
"""As safetensors names them."""
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """What makes a run go on as if it had never stopped; held graphs are not part of it.

    Attributes:
        parameters: What trains, by name.
        optimizer: AdamW's, by "step.", "exp_avg." or "exp_avg_sq." and the parameter's name.
        gradients: Accumulated ones by name.
        rng: torch's generators, uint8, by device type.
        counters: For JSON.
    """

    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    rng: Mapping[str, Tensor]
    counters: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Size of all tensors."""
        return sum(
            tensor.numel() * tensor.element_size() for group in self._groups().values() for tensor in group.values()
        )

    def copied(self) -> "State":
        """A copy in the host's memory, which later operations do not touch: to be written while the run goes on."""
        groups = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in group.items()}
            for name, group in self._groups().items()
        }
        return State(**groups, counters=self.counters)

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Tensors by the file they go to."""
        return {name: getattr(self, name) for name in ("parameters", "optimizer", "gradients", "rng")}


def capture(run: RunState, *, gradients: bool) -> State:
    """A run's state: its live tensors, to be written or copied before the run's next operation.

    Args:
        run: It.
        gradients: With what was accumulated, and the mark of a failed pass. Without, the state is that after a step.
    """
    trained = run.trained_parameters()
    accumulation = run.accumulation if gradients else Accumulation()
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    return State(
        parameters=trained,
        optimizer={
            f"{moment}.{name}": tensor
            for name, parameter in trained.items()
            for moment, tensor in run.optimizer.state_of(parameter).items()
        },
        gradients={name: p.grad for name, p in trained.items() if p.grad is not None} if gradients else {},
        rng=rng,
        counters={"step": run.step, "accumulation": vars(accumulation).copy()},
    )


def write_state(state: State, folder: Path, *, about: Mapping[str, Any], overwrite: bool = False) -> int:
    """Writes a state, whole or not at all; may run on any thread.

    Args:
        state: Live (then nothing else may run meanwhile) or copied.
        folder: Where it goes.
        about: What the manifest says beside the files; `architecture` and `lora_rank` are compared when it is loaded.
        overwrite: Replace what is there.

    Returns:
        Size of all files, bytes.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder is there and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    with whole_folder(folder, about=about, overwrite=overwrite, needed_bytes=state.size_bytes) as writer:
        for name, tensors in state._groups().items():
            if tensors:
                with writer.create(f"{name}.safetensors") as file:
                    _write_tensors(file, tensors)
        with writer.create(_COUNTERS) as file:
            file.write(json.dumps(state.counters, indent=2).encode())
    return writer.size_bytes


@dataclass(frozen=True)
class StateFiles:
    """A state on disk whose digests were found right; made by `open_state`.

    Attributes:
        folder: Where it is.
        manifest: What it says of itself.
        step: Optimizer steps applied.
    """

    folder: Path
    manifest: Manifest
    counters: Mapping[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        """Optimizer steps in the state."""
        return self.counters["step"]

    def restore(self, run: RunState, *, optimizer: bool, gradients: bool = False, rng: bool = False) -> None:
        """Loads it into a run. Gradients and held graphs of the run go; without `optimizer`, AdamW starts afresh.

        Whatever can be refused is refused before anything of the run is changed.

        Args:
            run: Of the same architecture, training the same parameters.
            optimizer: With AdamW's state.
            gradients: With accumulated gradients and the mark of a failed pass.
            rng: With torch's generators, which all runs of the process share.

        Raises:
            FailedPreconditionError: CHECKPOINT_MISMATCH: it is not of such a run.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        trained = run.trained_parameters()
        with ExitStack() as stack:
            files = {name: self._open(name, stack) for name in ("parameters", "optimizer", "gradients", "rng")}
            self._check_parameters(files["parameters"], trained)
            for name in ("optimizer", "gradients"):
                self._check_like_parameters(name, files[name], trained)
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(files["parameters"].get_tensor(name))
            run.clear_gradients()
            run.drop_graphs("was dropped when a state was loaded")
            run.optimizer.clear_state()
            run.step = self.step
            if optimizer:
                for name, parameter in trained.items():
                    _load_moments(run, name, parameter, files["optimizer"])
            if gradients:
                for name in files["gradients"].keys():  # noqa: SIM118  (safetensors' reader is no mapping)
                    trained[name].grad = files["gradients"].get_tensor(name).to(trained[name].device, copy=True)
                run.accumulation = Accumulation(**self.counters["accumulation"])
            if rng:
                _load_rng(files["rng"])

    def _open(self, name: str, stack: ExitStack) -> Any:
        file = f"{name}.safetensors"
        if file not in self.manifest.files:
            return _NoTensors()
        try:
            return stack.enter_context(safe_open(self.folder / file, framework="pt"))  # pyright: ignore[reportArgumentType]
        except (OSError, SafetensorError) as exc:
            raise damaged(self.folder.name, file, f"cannot be read: {exc}") from exc

    def _check_parameters(self, file: Any, trained: Mapping[str, Tensor]) -> None:
        stored, wanted = set(file.keys()), set(trained)
        if missing := sorted(wanted - stored):
            raise self._mismatch(f"it lacks {len(missing)} of the parameters this run trains, {missing[0]} for one")
        if unknown := sorted(stored - wanted):
            raise self._mismatch(f"it has {len(unknown)} parameters this run does not train, {unknown[0]} for one")
        for name, parameter in trained.items():
            self._check_tensor("parameters", name, file.get_slice(name), parameter)

    def _check_like_parameters(self, group: str, file: Any, trained: Mapping[str, Tensor]) -> None:
        for key in file.keys():  # noqa: SIM118
            moment, name = key.split(".", 1) if group == "optimizer" else ("", key)
            if name not in trained or (group == "optimizer" and moment not in _MOMENTS):
                raise damaged(self.folder.name, f"{group}.safetensors", f"has an unknown tensor {key!r}")
            like = torch.empty(()) if moment == "step" else trained[name]
            self._check_tensor(group, key, file.get_slice(key), like)

    def _check_tensor(self, group: str, key: str, stored: Any, like: Tensor) -> None:
        got = stored.get_dtype(), list(stored.get_shape())
        wanted = _DTYPES[like.dtype], list(like.shape)
        if got != wanted:
            what = f"{key} of {group} is {got[0]} {got[1]}, and this run needs {wanted[0]} {wanted[1]}"
            raise self._mismatch(what)

    def _mismatch(self, why: str) -> GradwireError:
        architecture = self.manifest.about.get("architecture", "unknown")
        text = (
            f'The state "{self.folder.name}" does not fit this run: {why}. It is of a {architecture}; load it into a '
            "run of the same model and LoRA rank. The run is as before."
        )
        return error("CHECKPOINT_MISMATCH", text, name=self.folder.name, architecture=architecture)


def open_state(folder: Path) -> StateFiles:
    """A state on disk, after reading all of it and comparing every digest.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND.
        DataLossError: CHECKPOINT_DAMAGED: a file is missing, cut short or changed.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    try:
        counters = json.loads((folder / _COUNTERS).read_bytes())
        Accumulation(**counters["accumulation"])
        assert isinstance(counters["step"], int)
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as exc:
        raise damaged(folder.name, _COUNTERS, f"cannot be read: {exc!r}") from exc
    return StateFiles(folder, manifest, counters)


class _NoTensors:
    """Stands for a file that is not there because it would have been empty."""

    def keys(self) -> list[str]:
        return []


def _write_tensors(file: DigestedFile, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file; its own writer takes all tensors at once, on the host, in memory."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    # The format wants tensors to begin at a multiple of 8.
    encoded += b" " * (-len(encoded) % 8)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for tensor in tensors.values():
        for chunk in _chunks(tensor.detach()):
            file.write(chunk)


def _chunks(tensor: Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major and (as every machine torch runs on) little-endian."""
    flat = tensor.reshape(-1)
    length = max(1, _CHUNK_BYTES // tensor.element_size())
    for start in range(0, flat.numel(), length):
        chunk: Any = flat[start : start + length].cpu().view(torch.uint8).numpy()
        yield memoryview(chunk)


def _load_moments(run: RunState, name: str, parameter: Parameter, file: Any) -> None:
    stored = {moment: f"{moment}.{name}" for moment in _MOMENTS if f"{moment}.{name}" in file.keys()}  # noqa: SIM118
    if stored:
        # A copy: what safetensors returns is a view of the file.
        run.optimizer.load_state_of(
            parameter, {moment: file.get_tensor(key).to(parameter.device, copy=True) for moment, key in stored.items()}
        )


def _load_rng(file: Any) -> None:
    names = file.keys()
    if "cpu" in names:
        torch.set_rng_state(file.get_tensor("cpu").clone())
    if "cuda" in names and torch.cuda.is_available():
        torch.cuda.set_rng_state(file.get_tensor("cuda").clone())
