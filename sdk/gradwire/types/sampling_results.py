"""What sampling gives back."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

StopReason = Literal["length", "stop"]


@dataclass(frozen=True)
class SampledSequence:
    """One sample.

    Attributes:
        tokens: Token ids, the one that stopped it included.
        logprobs: Of each token, natural log, in the model's own distribution: before temperature, top_k and top_p.
        stop_reason: "stop" for a stop token or text, "length" for max_tokens or a full context.
        sequence_id: Unique identifier of the sample, made by the SDK.
    """

    tokens: list[int]
    logprobs: list[float]
    stop_reason: StopReason
    sequence_id: str = ""

    @property
    def tokens_np(self) -> npt.NDArray[np.int32]:
        """The tokens as int32 [num_tokens]."""
        return np.asarray(self.tokens, dtype=np.int32)

    @property
    def logprobs_np(self) -> npt.NDArray[np.float32]:
        """The logprobs as float32 [num_tokens]."""
        return np.asarray(self.logprobs, dtype=np.float32)


@dataclass(frozen=True)
class SampleResponse:
    """Result of SamplingClient.sample.

    Attributes:
        sequences: One entry a sample.
        prompt_logprobs: Logprobs of the prompt's tokens, None for the first; None if not asked for.
        topk_prompt_logprobs: At each position of the prompt the likeliest (token, logprob) pairs in falling order, None
            for the first position; None if not asked for.
        prompt_cache_hit_tokens: Always 0: a prompt is computed once for all its samples, and nothing is billed.
    """

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[list[tuple[int, float]] | None] | None = None
    prompt_cache_hit_tokens: int = 0

    @property
    def prompt_logprobs_np(self) -> npt.NDArray[np.float32] | None:
        """The prompt's logprobs as float32 [prompt_length], NaN for the first; None where they were not asked for."""
        if self.prompt_logprobs is None:
            return None
        return np.asarray([np.nan if each is None else each for each in self.prompt_logprobs], dtype=np.float32)


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
