"""The samples of one request, as a decoder knows them, and how much of its caches they take."""

import copy
from typing import Any, TypeVar

from torch import Tensor

from trainer_service.engine.sampling.cache import Block, capacity
from trainer_service.engine.sampling.decoding_plan import Way
from trainer_service.engine.sampling.slots import Slot
from trainer_service.engine.sampling.states import StateRow

_MAX_COPIED = 4096
"""Tokens of a prompt that are copied for its samples, all together; beyond, they share it."""
Held = TypeVar("Held", Slot, StateRow)


class Sequences:
    """The samples of one request, and what the model remembers of them.

    Args:
        num_samples: How many will continue the prompt.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.prompt: Block | None = None
        """While the prompt is taken in, and where samples share it to the end."""
        self.own: Block | None = None
        """What each of the samples that share a prompt generated."""
        self.slots: list[Slot] = []
        """Of samples that do not."""
        self.states: list[Tensor] = []
        """What layers remember of the prompt beside keys and values, [1, …] each, while it is taken in."""
        self.rows: list[StateRow] = []
        """The same of each sample."""
        self.caches: list[Any] = []
        """Where samples are decoded by themselves: of the prompt at first, then one a sample."""
        self.tokens: list[list[int]] = [[]]
        """What each sample has been through, where it may have to be computed again; of the prompt at first."""
        self.way: Way | None = None
        """How they are decoded now; None before the first token."""
        self.beyond = False
        """Whether they have passed the decoding's boundary."""
        self.length = 0
        """Tokens each sample has been through."""

    def keep(self, samples: list[int]) -> None:
        """Lets go of all samples but these, by their present numbers."""
        self.num_samples = len(samples)
        self.tokens = [self.tokens[sample] for sample in samples]
        if self.own is not None:
            self.own.keep(samples)
        elif self.slots:
            self.slots = _kept(self.slots, samples)
        elif self.caches:
            self.caches = [self.caches[sample] for sample in samples]
        if self.rows:
            self.rows = _kept(self.rows, samples)

    def follow(self, prompt: "Sequences") -> None:
        """Goes on from a whole prompt that another request took in, and from which that one has not branched."""
        # A prompt's block is only read from then on.
        self.prompt, self.states = prompt.prompt, prompt.states
        self.caches = copy.deepcopy(prompt.caches)
        self.tokens = [list(prompt.tokens[0])]
        self.way, self.beyond, self.length = prompt.way, prompt.beyond, prompt.length

    def close(self) -> None:
        """Lets go of everything."""
        for held in (*self.slots, *self.rows):
            held.free()
        self.slots, self.rows, self.states, self.caches = [], [], [], []
        self.prompt = self.own = None

    def add(self, tokens: list[list[int]]) -> None:
        """Notes new tokens of each sample, or of the prompt."""
        for own, new in zip(self.tokens, tokens, strict=True):
            own += new


def _kept(held: list[Held], samples: list[int]) -> list[Held]:
    """Those of some samples; the others are freed."""
    kept = [held[sample] for sample in samples]
    for other in held:
        if other not in kept:
            other.free()
    return kept


def num_cached_tokens(
    num_samples: int, num_prompt: int, num_generated: int, *, num_alive: int, may_share: bool = True
) -> int:
    """Tokens that a request's caches have room for.

    Args:
        num_samples: That it began with.
        num_prompt: Tokens of its prompt.
        num_generated: Tokens of each sample behind it.
        num_alive: Samples that go on.
        may_share: Whether samples of a long prompt share it.
    """
    if may_share and shares_prompt(num_samples, num_prompt):
        return capacity(num_prompt) + num_alive * capacity(num_generated)
    return num_alive * capacity(num_prompt + num_generated)


def shares_prompt(num_samples: int, num_prompt: int) -> bool:
    return num_samples > 1 and num_samples * num_prompt > _MAX_COPIED
