"""Requests through the generation loop to the end, here, and what plain transformers finds of the same tokens."""

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import PreTrainedModel

from tests.engines import CPU
from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.decoding_plan import DecodingPlan
from trainer_service.engine.sampling.generation_loop import GenerationLoop
from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.picking import Choice
from trainer_service.engine.sampling.request import Request
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.trial import find_decoding

MAX_CONTEXT_LENGTH = 640
_FOUND: WeakKeyDictionary[PreTrainedModel, dict[Device, DecodingPlan]] = WeakKeyDictionary()


def make_request(prompt: list[int], max_tokens: int = 12, **fields: Any) -> Request:
    defaults: dict[str, Any] = {
        "num_samples": 1,
        "choice": Choice(),
        "seed": 1,
        "stop_tokens": frozenset(),
        "stop_strings": None,
        "prompt_logprobs": False,
        "topk": 0,
        "with_text": False,
        "text": None,
    }
    return Request(prompt=prompt, max_tokens=max_tokens, **defaults | fields)


def decoding_of(
    model: PreTrainedModel, device: Device = CPU, max_context_length: int = MAX_CONTEXT_LENGTH
) -> DecodingPlan:
    attention = str(model.config._attn_implementation)
    return find_decoding(model, device, attention=attention, max_context_length=max_context_length)


@dataclass
class Bench:
    """A generation loop over one model, and the jobs it was given."""

    sampler: Sampler
    generation: GenerationLoop

    @classmethod
    def of(cls, model: PreTrainedModel, device: Device = CPU) -> "Bench":
        # Each model is tried once.
        decoding = _FOUND.setdefault(model, {}).get(device) or decoding_of(model, device)
        _FOUND[model][device] = decoding
        sampler = Sampler(None, Decoder(model, device, decoding))
        return cls(sampler, GenerationLoop(device, Counters(), lambda event: None, max_cache_bytes=1 << 30))

    def start(self, *requests: Request) -> list[Job]:
        jobs = [Job(number, str(number), request, self.sampler) for number, request in enumerate(requests)]
        for job in jobs:
            self.generation.start(job)
        return jobs

    def run(self, *requests: Request) -> list[Job]:
        """Runs requests side by side to their end."""
        jobs = self.start(*requests)
        while self.generation.busy:
            self.generation.step()
        return jobs


def own_logprobs(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """log_softmax behind each token of a sequence, by one plain forward, in the model's own dtype."""
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0], -1)
