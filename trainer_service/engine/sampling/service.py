"""Sampling as the worker's commands see it: requests in, tokens out, samplers made and let go."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from gradwire.errors import GradwireError, InvalidArgumentError, error
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.worker_service_pb2 import WorkerEvent, WorkerSample
from transformers import GenerationConfig, PreTrainedModel

from trainer_service.adapter_folders import CONFIG as ADAPTER_CONFIG
from trainer_service.atomic_folders import read_manifest
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.load import load_model
from trainer_service.engine.parallel.tensor_parallel import whole_shape
from trainer_service.engine.sampling.cache import CacheShape, StateShape
from trainer_service.engine.sampling.decoding_plan import DecodingPlan, Way
from trainer_service.engine.sampling.generation_loop import GenerationLoop
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.request import Request, read_request
from trainer_service.engine.sampling.samplers import Samplers
from trainer_service.engine.sampling.text import Text
from trainer_service.engine.sampling.trial import find_decoding
from trainer_service.engine.storage.deltas import whole_weights

logger = logging.getLogger(__name__)

_CACHE_SHARE = 0.1
"""Part of the device's memory that caches may take."""


class Sampling:
    """Sampling beside an engine's runs. All but `read` is for the device thread.

    Args:
        engine: Whose models.
        checkpoint_dir: Where checkpoints are, in a folder a run.
        send: Takes events for the trainer.
    """

    def __init__(self, engine: Engine, *, checkpoint_dir: Path, send: Callable[[WorkerEvent], object]) -> None:
        self._engine = engine
        self._text: Text | None = None
        self.takes_next = True
        """Whether the next request is for this rank; every rank is told of each."""
        base = engine.source.hollow or engine.base_model()
        self._eos_tokens = _eos_tokens(engine.folder, base)
        self._shapes = _shapes(base)
        self.decoding = _find_decoding(engine)
        """How samples are decoded."""
        self.samplers = Samplers(
            engine.device,
            decoding=self.decoding,
            checkpoint_dir=checkpoint_dir,
            base=engine.base_model,
            live_model=engine.live_model,
            load=self._load,
            max_frozen_weights=engine.limits.max_frozen_weights,
            in_use=lambda sampler: self.generation.uses(sampler),
            in_parts=engine.memory.samples_in_parts,
            channel=engine.ranks.execution,
        )
        engine.before_change = self.samplers.before_change
        in_parts = self.samplers.in_parts
        self.generation = GenerationLoop(
            engine.device,
            engine.counters,
            send,
            max_cache_bytes=int(engine.device.total_bytes() * _CACHE_SHARE),
            torn=lambda: in_parts is not None and in_parts.within_forward,
        )
        if in_parts is not None and engine.ranks.leads:
            fields = {"parameters": engine.model.num_parameters, "ranks": engine.ranks.fsdp_size}
            logger.warning(
                "Layers are gathered anew for each token that is sampled, which is slow.", extra={"fields": fields}
            )

    @property
    def described(self) -> str:
        """How samples are decoded, for GetServerInfo."""
        found = self.decoding.described
        return found if self.samplers.in_parts is None else f"{found}; layers are gathered anew for each token"

    @property
    def one_schedule(self) -> bool:
        """Whether all requests are rank 0's."""
        return self.samplers.in_parts is not None

    def run_for(self, seconds: float) -> None:
        """A slice of sampling, of about so long; every rank calls this."""
        generation, in_parts, leads = self.generation, self.samplers.in_parts, self._engine.ranks.leads
        if in_parts is not None and not leads:
            in_parts.follow()
        elif in_parts is not None:
            in_parts.lead(lambda: generation.run_for(seconds))
        elif generation.busy:
            generation.run_for(seconds)

    def read(self, message: pb.SampleRequest) -> Request:
        """Checks a request, and tokenizes what is text; on a thread of its own, always the same.

        Raises:
            GradwireError: What is wrong with it; see read_request.
        """
        model = self._engine.model
        return read_request(
            message,
            vocab_size=model.vocab_size,
            max_context_length=model.max_context_length,
            limits=self._engine.limits,
            eos_tokens=self._eos_tokens,
            text=self._tokenizer,
        )

    def start(self, command_id: int, command: WorkerSample, request: Request) -> None:
        """Lets a request join, if it is for this rank; what is generated is sent as it comes.

        Raises:
            GradwireError: Its sampler is not there.
        """
        sampler = self.samplers.find(command.request.sampler.model_path)
        if self.takes_next:
            self.generation.start(Job(command_id, command.sample_id, request, sampler, command.owner))

    def open(self, model_path: str, *, lease_ms: int = 0) -> None:
        """Loads a sampler; frozen weights stay for lease_ms at least.

        Raises:
            GradwireError: It is not there.
        """
        self.samplers.find(model_path).lease(lease_ms / 1000)

    def _tokenizer(self) -> Text:
        if self._text is None:
            self._text = Text(self._engine.folder)
        return self._text

    def _load(self, folder: Path) -> PreTrainedModel:
        self._check_architecture(folder)
        with whole_weights(folder) as whole:
            if (whole / ADAPTER_CONFIG).is_file():
                return self._adapted(folder, whole)
            if self.one_schedule:
                model = self._engine.source.read_parts(str(folder), whole)
            else:
                model = load_model(str(folder), whole, self._engine.device)
        # It may have more: the head of merged weights, which the base model shares with its embedding.
        if not self._shapes.items() <= _shapes(model).items():
            raise _mismatch(folder, "is of a model with other parameters")
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return model

    def _adapted(self, folder: Path, whole: Path) -> PreTrainedModel:
        try:
            return self._engine.adapted_model(whole)
        except InvalidArgumentError as exc:
            # Said of a field that a request to sample does not have.
            raise _mismatch(folder, exc.field_violations[0][1]) from exc

    def _check_architecture(self, folder: Path) -> None:
        """Refuses another model's checkpoint, which a store may well have, before it takes memory."""
        architecture = read_manifest(folder).about.get("architecture")
        if architecture != self._engine.model.architecture:
            raise _mismatch(
                folder, f"is of a {architecture}, and this trainer serves a {self._engine.model.architecture}"
            )


def _find_decoding(engine: Engine) -> DecodingPlan:
    """How the engine's models are decoded; tried on a few layers where a model is not whole."""
    whole = engine.source.hollow is None
    model, num_layers = (engine.base_model(), 0) if whole else engine.source.sibling()

    def find() -> DecodingPlan:
        return find_decoding(
            model,
            engine.device,
            attention=engine.traits.attention,
            max_context_length=engine.model.max_context_length,
        )

    if whole:
        made_of = DecodingPlan, Way, CacheShape, StateShape, torch.Size, torch.device
        return engine.source.findings.recall("decoding", find, made_of=made_of)
    found = find()
    shapes = {"shape": found.shape, "row_shape": found.row_shape}
    return dataclasses.replace(
        found, **{name: dataclasses.replace(one, num_layers=num_layers) for name, one in shapes.items() if one}
    )


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: whole_shape(parameter) for name, parameter in model.named_parameters()}


def _mismatch(folder: Path, what: str) -> GradwireError:
    text = f'The checkpoint "{folder.name}" {what.rstrip(".")}; sample from it on a trainer of its own base model.'
    return error("CHECKPOINT_MISMATCH", text, name=folder.name)


def _eos_tokens(folder: Path, model: PreTrainedModel) -> frozenset[int]:
    """What ends a sequence of this model: its generation_config says, or else its config."""
    found = model.config.get_text_config().eos_token_id
    if (folder / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(folder).eos_token_id or found
    if found is None:
        return frozenset()
    return frozenset(found if isinstance(found, list | tuple) else [found])
