"""How samples of a model are decoded: what was found out about its architecture when it was loaded (trial.py)."""

import enum
from dataclasses import dataclass

from trainer_service.engine.sampling.cache import CacheShape


class Way(enum.IntEnum):
    """The fastest first."""

    TOGETHER = 0
    """All samples of a step in one row, over caches of our own."""
    ROWS = 1
    """Each sample in a row of its own, all of a step together, by the model's own attention over caches of our own."""
    ALONE = 2
    """Each sample by itself, over transformers' own cache."""
    RECOMPUTED_ROWS = 3
    """All samples in rows padded on the right and without a cache: every token computes all before it again."""
    RECOMPUTED = 4
    """The same with each sample by itself."""

    @property
    def described(self) -> str:
        """In a few words."""
        again = "every token computes all before it again"
        return ("together", "together, a row each", "one by one", f"together, {again}", again)[self]

    @property
    def recomputed(self) -> bool:
        """Whether it does without a cache."""
        return self >= Way.RECOMPUTED_ROWS


@dataclass(frozen=True)
class DecodingPlan:
    """Attributes:
    near: How sequences of at most `boundary` tokens are decoded.
    far: How longer ones are; one that passes the boundary is computed again, whole.
    boundary: Tokens; None where all sequences are decoded alike.
    attention: What the model's own attention is called, with which it computes what is right.
    shape: Of a token that TOGETHER caches; None where that is not done.
    row_shape: Of one that ROWS does.
    placed: A model that counts the places of tokens by what it believes was cached is told them so.
    whole: Prompts are taken in whole: a cache that holds a part of one does not go on with more tokens than one.
    cache_argument: Under which name the model takes its own cache; "" where it is of no use.
    why_near: Why `near` is not the fastest way; "" where it is.
    why_far: Why `far` is not `near`; "" where it is.
    """

    near: Way
    far: Way
    attention: str
    boundary: int | None = None
    shape: CacheShape | None = None
    row_shape: CacheShape | None = None
    placed: bool = False
    whole: bool = False
    cache_argument: str = ""
    why_near: str = ""
    why_far: str = ""

    def is_beyond(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens has passed the boundary."""
        return self.boundary is not None and num_tokens > self.boundary

    @property
    def described(self) -> str:
        """In a few words, for GetServerInfo."""
        near = self.near.described
        if self.near in (Way.TOGETHER, Way.ROWS) and self.whole:
            near += ", prompts one by one and whole"
        if self.why_near:
            near += f": {self.why_near}"
        if self.boundary is None:
            return near
        return f"{near}; beyond {self.boundary} tokens {self.far.described}: {self.why_far}"
