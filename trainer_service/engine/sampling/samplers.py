"""Whose parameters generate: the base model's, frozen weights', a checkpoint's.

Freezing weights copies nothing: a sampler reads the run's own parameters until they are about to change, and takes its
copy then. If they never change, or the sampler is no longer wanted by then, no copy is made.
"""

import itertools
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from gradwire.errors import GradwireError, error
from transformers import PreTrainedModel

from trainer_service.engine.device import Device, out_of_memory
from trainer_service.engine.models.lora import frozen_copy
from trainer_service.engine.rank_channels import Channel
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.decoding_plan import DecodingPlan
from trainer_service.engine.sampling.in_parts import InParts
from trainer_service.paths import FROZEN_WEIGHTS, SAMPLER_WEIGHTS, SamplerPath

logger = logging.getLogger(__name__)

_MAX_LOADED = 2
"""Checkpoints held loaded; the one unused longest makes room."""
_USES, _NUMBERS = itertools.count(), itertools.count()


@dataclass(eq=False)
class Sampler:
    """Frozen parameters that generate.

    Attributes:
        path: SamplerPath, or None for the base model.
        decoder: Runs them.
        version: Which folder a checkpoint was loaded from, so that one saved anew under its name is noticed.
        gone: Why it cannot be used any more, once that is so.
        number: Tells it from every other one, those gone included.
        leased_until_s: By time.monotonic; before it frozen weights make no room for others.
    """

    path: SamplerPath | None
    decoder: Decoder
    version: object = None
    gone: GradwireError | None = None
    last_used: int = field(default_factory=_USES.__next__)
    number: int = field(default_factory=_NUMBERS.__next__)
    leased_until_s: float = 0.0

    def lease(self, seconds: float) -> None:
        """It is wanted for so long from now on, at least."""
        self.leased_until_s = max(self.leased_until_s, time.monotonic() + seconds)


class Samplers:
    """The samplers of a worker.

    Args:
        device: Where models are.
        decoding: How samples of this architecture are decoded.
        checkpoint_dir: Where checkpoints are, in a folder a run.
        base: Gives the base model; parameters of it that may be trained are no harm.
        live_model: Gives a run's model.
        load: Loads a checkpoint's folder.
        max_frozen_weights: Of one run.
        in_use: Whether requests of a sampler are under way.
        in_parts: Whether what is sampled from is in parts.
        channel: To the other ranks, which hold the same samplers.
    """

    def __init__(
        self,
        device: Device,
        *,
        decoding: DecodingPlan,
        checkpoint_dir: Path,
        base: Callable[[], PreTrainedModel],
        live_model: Callable[[str], PreTrainedModel],
        load: Callable[[Path], PreTrainedModel],
        max_frozen_weights: int,
        in_use: Callable[[Sampler], bool],
        in_parts: bool,
        channel: Channel,
    ) -> None:
        self._channel = channel
        self._in_use = in_use
        self._device = device
        self._decoding = decoding
        self._checkpoint_dir = checkpoint_dir
        self._get_base = base
        self._live_model = live_model
        self._load = load
        self._max_frozen_weights = max_frozen_weights
        self._held: dict[SamplerPath | None, Sampler] = {}
        self._dropped: dict[SamplerPath, str] = {}
        self._alive: weakref.WeakSet[Sampler] = weakref.WeakSet()
        # Those held, and those let go that requests under way still use: they stay frozen all the same.
        self.in_parts = InParts(channel, lambda: [one.decoder for one in self._alive]) if in_parts else None
        """How all ranks run models in parts; None where what is sampled from is whole."""

    def find(self, model_path: str) -> Sampler:
        """The sampler of a model_path, loaded if need be; "" is the base model.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is no such path.
            NotFoundError: SAMPLER_NOT_FOUND.
        """
        path = SamplerPath.parse(model_path) if model_path else None
        held = self._held.get(path)
        if path is None:
            held = held or self._hold(Sampler(None, self._decoder(self._get_base())))
        elif path.kind == SAMPLER_WEIGHTS:
            held = self._checkpoint(path, held)
        elif held is None:
            why = self._dropped.get(path, "the worker has none of that number, and the run's journal tells of none")
            raise error(
                "SAMPLER_NOT_FOUND",
                f"There are no frozen weights {path}: {why}. Freeze them again with "
                "save_weights_and_get_sampling_client; save what must last with save_weights_for_sampler.",
                model_path=str(path),
            )
        held.last_used = next(_USES)
        return held

    def freeze(self, run_id: str, seq_id: int, *, lease_s: float = 0.0, of: str = "") -> SamplerPath:
        """Freezes a run's parameters as they are, or those of its copy `of`. Beyond max_frozen_weights of a run, those
        unused longest go that are without a lease and without requests under way.

        Raises:
            ResourceExhaustedError: LIMIT_EXCEEDED: there is none such.
        """
        path = SamplerPath.frozen_weights(run_id, seq_id)
        if path in self._held:
            return path  # The operation was executed before, and what it made is here still.
        own = [held for held in self._held.values() if _frozen_of(held.path, run_id)]
        now_s = time.monotonic()
        free = [held for held in own if held.leased_until_s <= now_s and not self._in_use(held)]
        # A request is one rank's, and clocks differ: free is what all find so.
        everywhere = set.intersection(*map(set, self._channel.gather([str(held.path) for held in free])))
        free = [held for held in free if str(held.path) in everywhere]
        surplus = max(0, len(own) + 1 - self._max_frozen_weights)
        if len(free) < surplus:
            raise error(
                "LIMIT_EXCEEDED",
                f"{run_id} has {len(own)} sets of frozen weights that clients hold open or sample from, as many as it "
                "may (max_frozen_weights of GetServerInfo). Close what is done with (SamplingClient.close), or save "
                "parameters that must last with save_weights_for_sampler.",
                limit=self._max_frozen_weights,
                got=len(own) + 1,
            )
        for held in sorted(free, key=lambda held: held.last_used)[:surplus]:
            self._drop(held, f"it made room for a newer one, since a run has {self._max_frozen_weights} at most")
        self._hold(Sampler(path, self._decoder(self._live_model(of or run_id)))).lease(lease_s)
        return path

    def close(self, model_path: str) -> None:
        """Frees frozen weights; anything else is passed over."""
        path = SamplerPath.parse(model_path) if model_path else None
        held = self._held.get(path)
        if path is not None and path.kind == FROZEN_WEIGHTS and held is not None:
            self._drop(held, "it was closed")

    def delete_run(self, run_id: str) -> None:
        """Frees the frozen weights of a run that is deleted."""
        for held in list(self._held.values()):
            if _frozen_of(held.path, run_id):
                self._drop(held, "its run was deleted")

    def before_change(self, model: PreTrainedModel) -> None:
        """The parameters of a model are about to change: who reads them takes a copy, or goes where none fits."""
        readers = [sampler for sampler in self._alive if sampler.decoder.model is model]
        if not readers:
            return
        try:
            frozen = frozen_copy(model)
        except Exception as exc:
            if not out_of_memory(exc):
                raise
            for sampler in readers:
                logger.warning("A sampler was dropped.", extra={"fields": {"sampler": str(sampler.path or "base")}})
                self._drop(sampler, "its run trained on, and there was no memory left for a copy of its parameters")
                sampler.gone = error(
                    "DEVICE_OUT_OF_MEMORY",
                    f"{self._device.name} has no memory left for a frozen copy of the parameters this sampled from.",
                    device=self._device.name,
                )
            return
        for sampler in readers:
            sampler.decoder = sampler.decoder.with_model(frozen)

    def _checkpoint(self, path: SamplerPath, held: Sampler | None) -> Sampler:
        folder = self._checkpoint_dir / path.key
        version = self._channel.tell(_version(folder))
        if version is None:
            if held is not None:
                self._drop(held, "")
            raise error(
                "SAMPLER_NOT_FOUND",
                f"There is no checkpoint {path}; save_weights_for_sampler makes one.",
                model_path=str(path),
            )
        if held is None or held.version != version:
            loaded = [one for one in self._held.values() if one.path is not None and one.path.kind == SAMPLER_WEIGHTS]
            for one in sorted(loaded, key=lambda one: one.last_used)[: max(0, len(loaded) + 1 - _MAX_LOADED)]:
                self._drop(one, "")
            held = self._hold(Sampler(path, self._decoder(self._load(folder)), version))
        return held

    def _decoder(self, model: PreTrainedModel) -> Decoder:
        decoder = Decoder(model, self._device, self._decoding)
        if self.in_parts is not None:
            self.in_parts.take_in(decoder)
        return decoder

    def _hold(self, sampler: Sampler) -> Sampler:
        self._held[sampler.path] = sampler
        self._alive.add(sampler)
        return sampler

    def _drop(self, sampler: Sampler, why: str) -> None:
        """Forgets a sampler. Requests under way finish with it, unless `gone` says they cannot."""
        if self._held.get(sampler.path) is sampler:
            del self._held[sampler.path]
        if sampler.path is not None and why:
            self._dropped[sampler.path] = why


def _version(folder: Path) -> list[int] | None:
    """Tells a checkpoint's folder from another under its name; None where there is none."""
    try:
        return [folder.stat().st_ino, folder.stat().st_mtime_ns]
    except OSError:
        return None


def _frozen_of(path: SamplerPath | None, run_id: str) -> bool:
    return path is not None and path.kind == FROZEN_WEIGHTS and path.run_id == run_id
