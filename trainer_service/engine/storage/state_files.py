"""A run's resumable state on disk: what the worker reads and writes for checkpoints and snapshots.

A folder, whole or not at all, of safetensors and JSON and nothing else:

    parameters.safetensors   what trains, by name
    optimizer.safetensors    "step.<name>", "exp_avg.<name>", "exp_avg_sq.<name>"; no file before the first step
    gradients.safetensors    accumulated gradients by name; no file when there are none
    state.json               counters
    manifest.json            last: what it is, and size and digest of every file

Tensors stream: none is held twice, and only a few MiB of one at a time on the way from a device to the disk.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gradwire._wire.untrusted import parse_json
from gradwire.errors import GradwireError, error
from torch import Tensor
from torch.nn import Parameter

from trainer_service.engine.run_state import Accumulation, RunState
from trainer_service.engine.tensor_files import DTYPES, read_tensors, write_tensors
from trainer_service.folders import Manifest, damaged, read_manifest, verify, whole_folder

_COUNTERS = "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MAX_COUNT = (1 << 53) - 1
"""Largest count of steps, passes or tokens: exact in every JSON reader, with room to count on in 64 bits."""


@dataclass(frozen=True)
class State:
    """What a run needs to continue as if it had never stopped; held graphs are not part of it.

    Nor are torch's generators, since no operation draws from them: dropout is off, and new adapters and samples have
    seeds of their own.

    Attributes:
        parameters: The parameters that train, by name.
        optimizer: AdamW's state, by "step.", "exp_avg." or "exp_avg_sq." and the parameter's name.
        gradients: Accumulated gradients, by parameter name.
        counters: Values for state.json.
    """

    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    gradients: Mapping[str, Tensor]
    counters: Mapping[str, Any]

    @property
    def size_bytes(self) -> int:
        """Size of all tensors."""
        return sum(
            tensor.numel() * tensor.element_size() for group in self._groups().values() for tensor in group.values()
        )

    def copied(self) -> "State":
        """A copy in host memory that later operations do not touch, to be written while the run continues."""
        groups = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in group.items()}
            for name, group in self._groups().items()
        }
        return State(**groups, counters=self.counters)

    def _groups(self) -> dict[str, Mapping[str, Tensor]]:
        """The tensors, grouped by the file they go to."""
        return {name: getattr(self, name) for name in ("parameters", "optimizer", "gradients")}


def capture(run: RunState, *, gradients: bool) -> State:
    """A run's state: its live tensors, to be written or copied before the run's next operation.

    Args:
        run: The run, between two operations.
        gradients: Include accumulated gradients and the mark of a failed pass; if not, the state is as after a step.
    """
    trained = run.trained_parameters()
    accumulation = run.accumulation if gradients else Accumulation()
    return State(
        parameters=trained,
        optimizer={
            f"{moment}.{name}": tensor
            for name, parameter in trained.items()
            for moment, tensor in run.optimizer.state_of(parameter).items()
        },
        gradients={name: p.grad for name, p in trained.items() if p.grad is not None} if gradients else {},
        counters={"step": run.step, "accumulation": vars(accumulation).copy()},
    )


def write_state(state: State, folder: Path, *, about: Mapping[str, Any], overwrite: bool = False) -> int:
    """Writes a state, whole or not at all; may run on any thread.

    Args:
        state: Live, so that nothing else may run meanwhile, or copied.
        folder: Where it goes.
        about: What the manifest says beside the files; `architecture` and `lora_rank` are compared when it is loaded.
        overwrite: Replace what is there.

    Returns:
        Size of all files, bytes.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder exists and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """
    with whole_folder(folder, about=about, overwrite=overwrite, needed_bytes=state.size_bytes) as writer:
        for name, tensors in state._groups().items():
            if tensors:
                with writer.create(f"{name}.safetensors") as file:
                    write_tensors(file, tensors)
        with writer.create(_COUNTERS) as file:
            file.write(json.dumps(state.counters, indent=2).encode())
    return writer.size_bytes


@dataclass(frozen=True)
class StateFiles:
    """A state on disk whose digests were verified; made by `open_state`.

    Attributes:
        folder: Where it is.
        manifest: Its manifest.
        counters: The content of state.json.
    """

    folder: Path
    manifest: Manifest
    counters: Mapping[str, Any] = field(repr=False)

    @property
    def step(self) -> int:
        """Optimizer steps in the state."""
        return self.counters["step"]

    def restore(self, run: RunState, *, optimizer: bool, gradients: bool = False) -> None:
        """Loads it into a run, whose gradients and held graphs are dropped; without `optimizer`, AdamW starts anew.

        An error leaves the run unchanged.

        Args:
            run: One of the same architecture that trains the same parameters.
            optimizer: Load AdamW's state.
            gradients: Load accumulated gradients and the mark of a failed pass.

        Raises:
            FailedPreconditionError: CHECKPOINT_MISMATCH: the run is another.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        trained = run.trained_parameters()
        parameters, moments, accumulated = (self._read(name) for name in ("parameters", "optimizer", "gradients"))
        self._check_parameters(parameters, trained)
        self._check_like_parameters("optimizer", moments, trained)
        self._check_like_parameters("gradients", accumulated, trained)
        with torch.no_grad():
            # Allocations come first, so that a load that runs out of memory changes nothing. Moments that the run has
            # are overwritten in place, since old and new ones together would take two more floats per parameter.
            # Gradients are only loaded into runs that have none yet.
            places = {
                name: _places(run, name, parameter, moments if optimizer else {}) for name, parameter in trained.items()
            }
            made = {
                name: tensor.to(trained[name].device, copy=True) for name, tensor in accumulated.items() if gradients
            }
            for name, parameter in trained.items():
                parameter.copy_(parameters[name])
                for moment, place in places[name].items():
                    place.copy_(moments[f"{moment}.{name}"])
        run.clear_gradients()
        run.drop_graphs("was dropped when a state was loaded")
        run.optimizer.clear_state()
        run.step = self.step
        for name, parameter in trained.items():
            if places[name]:
                run.optimizer.load_state_of(parameter, places[name])
            parameter.grad = made.get(name)
        if gradients:
            run.accumulation = Accumulation(**self.counters["accumulation"])

    def _read(self, name: str) -> dict[str, Tensor]:
        """Tensors of a group, as views of its file; none if there is no file, because it would have been empty."""
        file = f"{name}.safetensors"
        if file not in self.manifest.files:
            return {}
        try:
            return read_tensors(self.folder / file)
        except OSError as exc:
            raise damaged(self.folder.name, file, f"cannot be read: {exc}") from exc
        except ValueError as exc:
            raise damaged(self.folder.name, file, str(exc)) from exc

    def _check_parameters(self, tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
        stored, wanted = set(tensors), set(trained)
        if missing := sorted(wanted - stored):
            raise self._mismatch(f"it lacks {len(missing)} of the parameters this run trains, for example {missing[0]}")
        if unknown := sorted(stored - wanted):
            raise self._mismatch(f"it has {len(unknown)} parameters this run does not train, for example {unknown[0]}")
        for name, parameter in trained.items():
            self._check_tensor("parameters", name, tensors[name], parameter)

    def _check_like_parameters(self, group: str, tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            moment, _, name = key.partition(".") if group == "optimizer" else ("", "", key)
            if name not in trained or (group == "optimizer" and moment not in _MOMENTS):
                raise damaged(self.folder.name, f"{group}.safetensors", f"has an unknown tensor {key!r}")
            like = torch.empty(()) if moment == "step" else trained[name]
            self._check_tensor(group, key, tensor, like)
            if moment == "step" and not 0 <= tensor.item() <= _MAX_COUNT:
                raise damaged(self.folder.name, f"{group}.safetensors", f"has {tensor.item()} for {key!r}")

    def _check_tensor(self, group: str, key: str, stored: Tensor, like: Tensor) -> None:
        got, wanted = ((DTYPES[tensor.dtype], list(tensor.shape)) for tensor in (stored, like))
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
    """A state on disk, after reading all of it and verifying every digest.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND.
        DataLossError: CHECKPOINT_DAMAGED: a file is missing, cut short or changed.
    """
    manifest = read_manifest(folder)
    verify(folder, manifest)
    try:
        if _COUNTERS not in manifest.files:
            raise ValueError("the manifest does not name it")
        counters = parse_json((folder / _COUNTERS).read_bytes())
        accumulation = vars(Accumulation(**counters["accumulation"]))
        for name, value in {"step": counters["step"], **accumulation}.items():
            if not _is_count(value) and (name, value) != ("failed_seq_id", None):
                raise ValueError(f"{name} is {value!r:.200}")
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise damaged(folder.name, _COUNTERS, f"cannot be read: {exc}") from exc
    return StateFiles(folder, manifest, counters)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _places(run: RunState, name: str, parameter: Parameter, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Where a parameter's stored moments go: over the run's own, or into new tensors."""
    own = run.optimizer.state_of(parameter)
    return {
        moment: own[moment] if moment in own else torch.empty_like(stored[key], device=parameter.device)
        for moment in _MOMENTS
        if (key := f"{moment}.{name}") in stored
    }
