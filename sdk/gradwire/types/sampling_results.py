"""What sampling gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from gradwire.types.data import TensorData

StopReason = Literal["length", "stop"]

_NOTHING_ASKED = -99999.0


@dataclass(frozen=True)
class TopkLogprobs:
    """The likeliest tokens of some places, in falling order.

    Attributes:
        token_ids: int32 [places, k]; 0 at a place of which nothing was asked.
        logprobs: float32 [places, k]; -99999 there.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]

    @classmethod
    def of(cls, rows: Sequence[list[tuple[int, float]] | None]) -> "TopkLogprobs":
        """The same of lists of pairs, None for a place of which nothing was asked."""
        k = max((len(row) for row in rows if row), default=0)
        nothing = [(0, _NOTHING_ASKED)] * k
        pairs = [row or nothing for row in rows]
        token_ids = np.array([[token for token, _ in row] for row in pairs], dtype=np.int32)
        logprobs = np.array([[logprob for _, logprob in row] for row in pairs], dtype=np.float32)
        return cls(token_ids.reshape(len(rows), k), logprobs.reshape(len(rows), k))


@dataclass(frozen=True)
class SampledSequence:
    """One sample.

    Attributes:
        tokens: Token ids, the one that stopped it included.
        logprobs: Of each token, natural log, in the model's own distribution: before temperature, top_k and top_p.
        stop_reason: "stop" for a stop token or text, "length" for max_tokens or a full context.
        sequence_id: Tells this sample from every other one; the trainer does not know it.
        topk_logprobs: At the place of each token the likeliest (token, logprob) pairs in falling order; None where they
            were not asked for.
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    sequence_id: str = ""
    topk_logprobs: list[list[tuple[int, float]]] | None = None

    @property
    def tokens_np(self) -> npt.NDArray[np.int32]:
        """The tokens as int32 [num_tokens]."""
        return np.asarray(self.tokens, dtype=np.int32)

    @property
    def logprobs_np(self) -> npt.NDArray[np.float32]:
        """The logprobs as float32 [num_tokens]."""
        return np.asarray(self.logprobs, dtype=np.float32)

    @property
    def topk_logprobs_np(self) -> "TopkLogprobs | None":
        """The likeliest as arrays [num_tokens, k]; None where they were not asked for."""
        return None if self.topk_logprobs is None else TopkLogprobs.of(self.topk_logprobs)


@dataclass(frozen=True)
class SampleResponse:
    """Result of SamplingClient.sample.

    Attributes:
        sequences: The samples.
        prompt_logprobs: Of the prompt's tokens, None for the first and for those of which none was asked for; None
            where none were.
        topk_prompt_logprobs: At each place of the prompt the likeliest (token, logprob) pairs in falling order, None
            for the first place and those not asked for; None where none were.
        prompt_cache_hit_tokens: Always 0: equal prompts are computed once, and nothing is billed.
        target_prompt_logprobs: Of the ids asked for, float32 in their shape, 0 where that had -1; None where none were.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0
    target_prompt_logprobs: "TensorData | None" = None

    @property
    def prompt_logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """The prompt's logprobs as float32 [prompt_length], NaN for the first; None where they were not asked for."""
        if self.prompt_logprobs is None:
            return None
        return np.asarray([np.nan if each is None else each for each in self.prompt_logprobs], dtype=np.float32)

    @property
    def topk_prompt_logprobs_np(self) -> TopkLogprobs | None:
        """The likeliest as arrays [prompt_length, k]; None where they were not asked for."""
        return None if self.topk_prompt_logprobs is None else TopkLogprobs.of(self.topk_prompt_logprobs)


@dataclass(frozen=True)
class SampledToken:
    """One token of SamplingClient.stream.

    Attributes:
        sample: Index of the sample, from 0.
        token: Token id.
        logprob: As in SampledSequence.
        stop_reason: With a sample's last token, as in SampledSequence; before it None.
    """

    sample: int
    token: int
    logprob: float
    stop_reason: StopReason | None = None
