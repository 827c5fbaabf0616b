"""Prompts computed lately: requests that begin with the same prompt compute it once."""

import weakref
from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from trainer_service.engine.sampling.job import Job
from trainer_service.engine.sampling.samplers import Sampler
from trainer_service.engine.sampling.sequences import Sequences

Key = tuple[int, str, tuple[int, ...]]


def key(job: Job) -> Key:
    """What requests have in common whose prompts are one: sampler, owner and tokens. Another owner's prompts do not
    count, or the time of an answer would tell what others asked."""
    return job.sampler.number, job.owner, tuple(job.request.prompt)


@dataclass(frozen=True)
class _Kept:
    sequences: Sequences
    logits_1V: Tensor
    num_bytes: int


class Prompts:
    """What the model remembers of prompts, for as long as there is room and their sampler is there.

    Args:
        max_bytes: Of all of them together; the one unused longest makes room.
    """

    def __init__(self, *, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()
        self._num_bytes = 0
        self._watched: set[int] = set()
        """Samplers by number."""

    def keep(self, job: Job, logits_1V: Tensor) -> None:
        """Keeps the prompt of a request, which has not branched, with the logits behind it."""
        shape = job.sampler.decoder.shape
        if shape is None or job.sequences.prompt is None:
            return  # Caches of the model's own go on from where they are, and cannot be shared.
        self._watch(job.sampler)
        sequences = Sequences(1)
        sequences.follow(job.sequences)
        logits_1V = logits_1V.clone()
        num_bytes = job.sequences.prompt.num_bytes + shape.state_bytes + logits_1V.nbytes
        self._forget(key(job))
        self._kept[key(job)] = _Kept(sequences, logits_1V, num_bytes)
        self._num_bytes += num_bytes
        while self._num_bytes > self._max_bytes:
            self._forget(next(iter(self._kept)))

    def find(self, job: Job) -> Tensor | None:
        """The logits behind a request's prompt, which its sequences then hold; None where it is not here."""
        kept = self._kept.get(key(job))
        if kept is None:
            return None
        self._kept.move_to_end(key(job))
        job.sequences.follow(kept.sequences)
        return kept.logits_1V

    def _watch(self, sampler: Sampler) -> None:
        number = sampler.number
        if number not in self._watched:
            self._watched.add(number)
            weakref.finalize(sampler, self._forget_sampler, number).atexit = False

    def _forget_sampler(self, number: int) -> None:
        self._watched.discard(number)
        for found in [found for found in self._kept if found[0] == number]:
            self._forget(found)

    def _forget(self, found: Key) -> None:
        if (kept := self._kept.pop(found, None)) is not None:
            self._num_bytes -= kept.num_bytes
