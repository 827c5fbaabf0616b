"""A run's resumable state on disk: what the worker reads and writes for checkpoints and snapshots.

A folder, whole or not at all, of safetensors and JSON and nothing else:

    parameters.safetensors   what trains, by name
    optimizer.safetensors    "step.<name>", "exp_avg.<name>", "exp_avg_sq.<name>"; no file before the first step
    gradients.safetensors    accumulated gradients by name; no file when there are none
    state.json               counters, and how many ranks wrote it
    manifest.json            last: what it is, and size and digest of every file

Of several ranks each writes files of its own, such as parameters-00002-of-00004.safetensors, with its part of what is
shared out; what is the same on all of them is in the first one's, and what replicas share out alike in the first
replica's. What is cut for tensor parallel each rank of a group writes, and state.json says along which dim. Any number
of ranks reads them: parts.py.

Tensors stream: none is held twice, and only a few MiB of one at a time on the way from a device to the disk.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from gradwire._wire.untrusted import parse_json
from gradwire.errors import GradwireError, error
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from trainer_service.atomic_folders import FolderWriter, Manifest, damaged, read_manifest, verify
from trainer_service.engine.parallel.sharding import in_first_replica, is_part, part, part_of
from trainer_service.engine.parallel.tensor_parallel import Cut, cut_of, whole_shape
from trainer_service.engine.rank_channels import ALONE, Channel
from trainer_service.engine.run_state import Accumulation, RunState
from trainer_service.engine.storage.parts import Arrangement, Parts, file_name
from trainer_service.engine.storage.together import write_together
from trainer_service.engine.tensor_files import DTYPES, read_tensors, write_tensors

T = TypeVar("T")
_COUNTERS = "state.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_MAX_COUNT = (1 << 53) - 1
"""Largest count of steps, passes or tokens: exact in every JSON reader, with room to count on in 64 bits."""


@dataclass(frozen=True)
class State:
    """What a run needs to continue as if it had never stopped, as far as this rank writes it; held graphs are not part
    of it.

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
        """Size of this rank's tensors."""
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


def capture(run: RunState, *, gradients: bool, channel: Channel = ALONE) -> State:
    """A run's state: its live tensors, to be written or copied before the run's next operation.

    Args:
        run: The run, between two operations.
        gradients: Include accumulated gradients and the mark of a failed pass; if not, the state is as after a step.
        channel: To the other ranks, which each capture their part.
    """
    trained = run.trained_parameters()
    accumulation = run.accumulation if gradients else Accumulation()
    moments = {
        f"{moment}.{name}": tensor
        for name, parameter in trained.items()
        for moment, tensor in run.optimizer.state_of(parameter).items()
    }
    counters: dict[str, Any] = {"step": run.step, "accumulation": vars(accumulation).copy()}
    if channel.world_size > 1:
        counters |= Arrangement.of(trained, channel.world_size).written()
        counters["summands"] = not any(map(is_part, trained.values()))
    grads = {name: p.grad for name, p in trained.items() if p.grad is not None} if gradients else {}
    return State(
        parameters={name: part(p.detach()) for name, p in trained.items() if _writes(p, cut_of(p), channel)},
        optimizer={
            key: part(tensor)
            for key, tensor in moments.items()
            if _writes(tensor, cut_of(trained[key.partition(".")[2]]), channel)
        },
        gradients={
            name: part(grad)
            for name, grad in grads.items()
            # Where parameters are the same on every rank, each rank's gradients are a summand until the next step.
            if not is_part(grad) or _writes(grad, cut_of(trained[name]), channel)
        },
        counters=counters,
    )


def _writes(tensor: Tensor, cut: Cut | None, channel: Channel) -> bool:
    """Whether this rank writes what it has of a tensor, rather than another that has the same.

    Args:
        tensor: A parameter, or of its gradient or optimizer state.
        cut: How the parameter is cut for tensor parallel; None where it is not.
        channel: To the other ranks.
    """
    cut_here = cut is not None and cut.dim is not None and tensor.ndim > 0
    if isinstance(tensor, DTensor):
        return in_first_replica(tensor) and (cut is None or cut_here or cut.group.rank == 0)
    return channel.rank < cut.group.size if cut is not None and cut_here else channel.leads


def write_state(
    state: State, folder: Path, *, about: Mapping[str, Any], channel: Channel = ALONE, overwrite: bool = False
) -> int:
    """Writes a state, whole or not at all; may run on any thread.

    Args:
        state: This rank's: live, so that nothing else may run meanwhile, or copied.
        folder: Where it goes.
        channel: To the other ranks, which write theirs; of the thread this runs on.
        about: What the manifest says beside the files; `architecture` and `lora_rank` are compared when it is loaded.
        overwrite: Replace what is there.

    Returns:
        Size of all files, bytes.

    Raises:
        AlreadyExistsError: CHECKPOINT_EXISTS: the folder exists and overwrite is off.
        FailedPreconditionError: STORAGE_FAILED: the disk is full or cannot be written; nothing is left behind.
    """

    def write(files: FolderWriter) -> None:
        for name, tensors in state._groups().items():
            if tensors:
                with files.create(file_name(name, channel.rank, channel.world_size)) as file:
                    write_tensors(file, tensors)
        if channel.leads:
            with files.create(_COUNTERS) as file:
                file.write(json.dumps(state.counters, indent=2).encode())

    return write_together(channel, write, folder, about=about, overwrite=overwrite, needed_bytes=state.size_bytes)


@dataclass(frozen=True)
class StateFiles:
    """A state on disk whose digests were verified; made by `open_state`.

    Attributes:
        folder: Where it is.
        manifest: Its manifest.
        counters: The content of state.json.
        arrangement: The ranks that wrote it.
        channel: To the other ranks, which read the same state.
    """

    folder: Path
    manifest: Manifest
    counters: Mapping[str, Any] = field(repr=False)
    arrangement: Arrangement
    channel: Channel

    @property
    def step(self) -> int:
        """Optimizer steps in the state."""
        return self.counters["step"]

    def restore(self, run: RunState, *, optimizer: bool, gradients: bool = False) -> None:
        """Loads it into a run, whose gradients and held graphs are dropped; without `optimizer`, AdamW starts anew.

        An error leaves the run unchanged. Every rank reads its own part.

        Args:
            run: One of the same architecture that trains the same parameters.
            optimizer: Load AdamW's state.
            gradients: Load accumulated gradients and the mark of a failed pass.

        Raises:
            FailedPreconditionError: CHECKPOINT_MISMATCH: the run is another.
            DataLossError: CHECKPOINT_DAMAGED.
        """
        trained = run.trained_parameters()
        parameters, moments, accumulated = self.channel.alike(lambda: self._checked(trained))
        with torch.no_grad():
            # Allocations come first, so that a load that runs out of memory changes nothing. Moments that the run has
            # are overwritten in place, since old and new ones together would take two more floats per parameter.
            # Gradients are only loaded into runs that have none yet.
            places = {
                name: _places(run, name, parameter, moments if optimizer else {}) for name, parameter in trained.items()
            }
            made = self._gradients(accumulated, trained) if gradients else {}
            for name, parameter in trained.items():
                cut = cut_of(parameter)
                part(parameter).copy_(parameters[name].like(parameter, cut))
                for moment, place in places[name].items():
                    part(place).copy_(moments[f"{moment}.{name}"].like(place, cut))
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

    def _checked(
        self, trained: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Parts], Mapping[str, Parts], Mapping[str, Mapping[int, Parts]]]:
        """Parameters, moments and gradients, all of which fit."""
        parts, summands = self.arrangement.parts, self.arrangement.summands
        parameters = self._read("parameters", parts)
        moments = self._read("optimizer", lambda key, stored: parts(key.partition(".")[2], stored))
        accumulated = self._read("gradients", summands if self._summands else lambda *one: {0: parts(*one)})
        self._check_parameters(parameters, trained)
        self._check_like_parameters("optimizer", {key: [tensor] for key, tensor in moments.items()}, trained)
        self._check_like_parameters("gradients", {key: [*each.values()] for key, each in accumulated.items()}, trained)
        return parameters, moments, accumulated

    def _read(self, name: str, put_together: Callable[[str, dict[int, Tensor]], T]) -> dict[str, T]:
        """Tensors of a group, as views of its files; none where there is none since it would have been empty."""
        found: dict[str, dict[int, Tensor]] = {}
        for rank in range(self.arrangement.world_size):
            file = file_name(name, rank, self.arrangement.world_size)
            if file not in self.manifest.files:
                continue
            try:
                for key, tensor in read_tensors(self.folder / file).items():
                    found.setdefault(key, {})[rank] = tensor
            except OSError as exc:
                raise damaged(self.folder.name, file, f"cannot be read: {exc}") from exc
            except ValueError as exc:
                raise damaged(self.folder.name, file, str(exc)) from exc
        try:
            return {key: put_together(key, tensors) for key, tensors in found.items()}
        except ValueError as exc:
            raise damaged(self.folder.name, f"{name}.safetensors", str(exc)) from exc

    @property
    def _summands(self) -> bool:
        """Whether each rank's gradients are a summand, rather than a part."""
        return bool(self.counters.get("summands", False))

    def _gradients(
        self, stored: Mapping[str, Mapping[int, Parts]], trained: Mapping[str, Parameter]
    ) -> dict[str, Tensor]:
        """This rank's gradients, with room of their own."""
        made: dict[str, Tensor] = {}
        for name, summands in stored.items():
            parameter = trained[name]
            cut = cut_of(parameter)
            own = self._summand(summands, parameter, cut) if self._summands else summands[0].like(parameter, cut)
            if own is not None:
                made[name] = part_of(own.to(part(parameter).device, copy=True), parameter)
        return made

    def _summand(self, summands: Mapping[int, Parts], parameter: Tensor, cut: Cut | None) -> Tensor | None:
        """What this rank adds to gradients that are summed at the next step; None for nothing.

        Ranks arranged as those that wrote them go on with theirs, so that sums come out alike; others leave all to the
        first, or to the first of each part.
        """
        tp_size = 1 if cut is None else cut.group.size
        rank = self.channel.rank if cut is not None and cut.summand else self.channel.rank // tp_size
        if (self.channel.world_size, tp_size) == (self.arrangement.world_size, self.arrangement.tp_size):
            own = summands.get(rank)
            return None if own is None else own.like(parameter, cut)
        if rank:
            return None
        total = torch.stack([summand.whole() for summand in summands.values()]).sum(0)
        return Parts([[total]]).like(parameter, cut)

    def _check_parameters(self, tensors: Mapping[str, Parts], trained: Mapping[str, Tensor]) -> None:
        stored, wanted = set(tensors), set(trained)
        if missing := sorted(wanted - stored):
            raise self._mismatch(f"it lacks {len(missing)} of the parameters this run trains, for example {missing[0]}")
        if unknown := sorted(stored - wanted):
            raise self._mismatch(f"it has {len(unknown)} parameters this run does not train, for example {unknown[0]}")
        for name, parameter in trained.items():
            self._check_tensor("parameters", name, tensors[name], parameter)

    def _check_like_parameters(
        self, group: str, tensors: Mapping[str, Sequence[Parts]], trained: Mapping[str, Tensor]
    ) -> None:
        for key, stored in tensors.items():
            moment, _, name = key.partition(".") if group == "optimizer" else ("", "", key)
            if name not in trained or (group == "optimizer" and moment not in _MOMENTS):
                raise damaged(self.folder.name, f"{group}.safetensors", f"has an unknown tensor {key!r}")
            like = torch.empty(()) if moment == "step" else trained[name]
            for tensor in stored:
                self._check_tensor(group, key, tensor, like)
                if moment == "step" and not 0 <= (step := tensor.whole().item()) <= _MAX_COUNT:
                    raise damaged(self.folder.name, f"{group}.safetensors", f"has {step} for {key!r}")

    def _check_tensor(self, group: str, key: str, stored: Parts, like: Tensor) -> None:
        got, wanted = (DTYPES[stored.dtype], stored.shape), (DTYPES[like.dtype], list(whole_shape(like)))
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


def open_state(folder: Path, channel: Channel = ALONE) -> StateFiles:
    """A state on disk, after reading all of it and verifying every digest.

    Args:
        folder: Where it is.
        channel: To the other ranks, which read a share of it each, and all call this.

    Raises:
        NotFoundError: CHECKPOINT_NOT_FOUND.
        DataLossError: CHECKPOINT_DAMAGED: a file is missing, cut short or changed.
    """

    def opened() -> StateFiles:
        manifest = read_manifest(folder)
        own = sorted(manifest.files)[channel.rank :: channel.world_size]
        verify(folder, Manifest(manifest.about, {name: manifest.files[name] for name in own}))
        return _opened(folder, manifest, channel)

    return channel.alike(opened)


def _opened(folder: Path, manifest: Manifest, channel: Channel) -> StateFiles:
    try:
        if _COUNTERS not in manifest.files:
            raise ValueError("the manifest does not name it")
        counters = parse_json((folder / _COUNTERS).read_bytes())
        accumulation = vars(Accumulation(**counters["accumulation"]))
        for name, value in {"step": counters["step"], **accumulation}.items():
            if not _is_count(value) and (name, value) != ("failed_seq_id", None):
                raise ValueError(f"{name} is {value!r:.200}")
        arrangement = Arrangement.read(counters)
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise damaged(folder.name, _COUNTERS, f"cannot be read: {exc}") from exc
    return StateFiles(folder, manifest, counters, arrangement, channel)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _places(run: RunState, name: str, parameter: Parameter, stored: Mapping[str, Parts]) -> dict[str, Tensor]:
    """Where a parameter's stored moments go: over the run's own, or into new tensors."""
    own = run.optimizer.state_of(parameter)
    places: dict[str, Tensor] = {}
    for moment in _MOMENTS:
        if f"{moment}.{name}" in stored:
            like = torch.empty((), device=part(parameter).device) if moment == "step" else parameter.detach()
            places[moment] = own[moment] if moment in own else torch.empty_like(like)
    return places
