"""Chooses tokens from logits.

Every sample has a generator of its own, and takes one number from it a token: where that number falls among the
cumulated probabilities is the token. So what a sample chooses depends on its seed and its logits, on nothing else.

Shape suffixes: N rows, one a sample; V vocabulary; K likeliest tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer_service.engine.row_sums import logsumexp

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 2.0**-126, 2.0**127
"""Between them float32 holds a temperature with all its digits; one that becomes 0 or infinite would choose nothing."""
_FIRST_LOOK = 1024
"""Likeliest tokens looked at for top_p before all are sorted: nearly always enough."""


@dataclass(frozen=True)
class Choice:
    """How one sample's tokens are chosen; see SamplingParams in the protocol.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: 0 is off.
        top_p: 1 is off.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def generator(seed: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample of a request."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed % (1 << 64), sample])))


def pick(logits_NV: Tensor, choices: list[Choice], uniforms: list[float]) -> tuple[list[int], list[float]]:
    """One token a row.

    Args:
        logits_NV: float32.
        choices: One a row.
        uniforms: In [0, 1), one a row.

    Returns:
        Tokens, and their logprobs in the distribution of the logits as they are: before temperature, top_k and top_p.
        A row whose logits are not finite gets a logprob that is not, and token 0.
    """
    lse_N = logsumexp(logits_NV)
    tokens_N = logits_NV.argmax(dim=-1)
    whole = [row for row, choice in enumerate(choices) if _is_whole(choice)]
    if whole:
        temperatures = torch.tensor([choices[row].temperature for row in whole], device=logits_NV.device)
        drawn = torch.tensor([uniforms[row] for row in whole], dtype=torch.float64, device=logits_NV.device)
        logits = logits_NV if len(whole) == len(logits_NV) else logits_NV[whole]
        tokens_N[whole] = _inverse_cdf(_weights(logits, temperatures[:, None]), drawn)
    for row, choice in enumerate(choices):
        if choice.temperature > 0 and not _is_whole(choice):
            tokens_N[row] = _pick_among(logits_NV[row], choice, uniforms[row])
    logprobs_N = logits_NV.gather(-1, tokens_N[:, None])[:, 0] - lse_N
    return tokens_N.tolist(), logprobs_N.tolist()


def _is_whole(choice: Choice) -> bool:
    """Whether the whole vocabulary is chosen from, at random."""
    return choice.temperature > 0 and not choice.top_k and choice.top_p >= 1


def _weights(logits: Tensor, temperature: Tensor | float) -> Tensor:
    """exp of logits over temperature, the largest being 1."""
    highest = logits.amax(dim=-1, keepdim=True)
    # The difference first: logits over a tiny temperature would be infinite.
    return torch.exp((logits - highest) / temperature)


def _inverse_cdf(weights_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """The token at which the cumulated weights pass u of their sum; never one of weight 0."""
    # float64: in float32, sums over a large vocabulary lose the small weights.
    cumulated_NV = torch.cumsum(weights_NV, dim=-1, dtype=torch.float64)
    target_N1 = uniforms_N[:, None] * cumulated_NV[:, -1:]
    # Logits that are not finite can lead past the end; their logprob says so.
    found_N = torch.searchsorted(cumulated_NV, target_N1, right=True)[:, 0].clamp(max=weights_NV.shape[-1] - 1)
    return torch.where(torch.isnan(cumulated_NV[:, -1]), 0, found_N)


def _pick_among(logits_V: Tensor, choice: Choice, uniform: float) -> Tensor:
    """A token among the likeliest, as top_k and then top_p leave them."""
    size = len(logits_V)
    looked_at = min(size, choice.top_k or _FIRST_LOOK)
    while True:
        logits_K, tokens_K = torch.topk(logits_V, looked_at)
        weights_K = _weights(logits_K, choice.temperature).double()
        if choice.top_p >= 1:
            break
        cumulated_K = torch.cumsum(weights_K, dim=0)
        whole = cumulated_K[-1] if choice.top_k else _weights(logits_V, choice.temperature).sum(dtype=torch.float64)
        # Those before whom the sum has not been reached: the fewest that reach it.
        count = int((cumulated_K - weights_K < choice.top_p * whole).sum())
        if count < looked_at or looked_at == size or choice.top_k:
            weights_K, tokens_K = weights_K[: max(1, count)], tokens_K[: max(1, count)]
            break
        looked_at = size
    drawn = torch.tensor([uniform], dtype=torch.float64, device=logits_V.device)
    return tokens_K[_inverse_cdf(weights_K[None], drawn)[0]]


@dataclass(frozen=True)
class PlaceLogprobs:
    """What is known about some places of a prompt: logprobs of the tokens there, and of the K likeliest."""

    logprobs: list[float]
    topk_tokens: list[int]
    topk_logprobs: list[float]


def likeliest(logits_NV: Tensor, topk: int) -> tuple[list[list[int]], list[list[float]]]:
    """The `topk` likeliest tokens of each row in falling order, and their logprobs."""
    logits_NK, tokens_NK = torch.topk(logits_NV, topk, dim=-1)
    return tokens_NK.tolist(), (logits_NK - logsumexp(logits_NV)[:, None]).tolist()


def target_logprobs(logits_NV: Tensor, targets_NK: Tensor) -> list[float]:
    """Logprobs of targets behind logits, row-major; 0 for one below 0."""
    found_NK = logits_NV.gather(-1, targets_NK.clamp(min=0)) - logsumexp(logits_NV)[:, None]
    return torch.where(targets_NK < 0, 0.0, found_NK).flatten().tolist()


def place_logprobs(logits_NV: Tensor, targets: list[int], topk: int) -> PlaceLogprobs:
    """Logprobs of `targets` [N] behind logits, and of the `topk` likeliest, in falling order, row-major."""
    lse_N1 = logsumexp(logits_NV)[:, None]
    index_N1 = torch.tensor(targets, device=logits_NV.device)[:, None]
    logprobs_N = (logits_NV.gather(-1, index_N1) - lse_N1)[:, 0]
    if not topk:
        return PlaceLogprobs(logprobs_N.tolist(), [], [])
    logits_NK, tokens_NK = torch.topk(logits_NV, topk, dim=-1)
    return PlaceLogprobs(logprobs_N.tolist(), tokens_NK.flatten().tolist(), (logits_NK - lse_N1).flatten().tolist())
