"""How tokens are chosen from logits, against the distributions they must follow."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer_service.engine.sampling.picking import Choice, generator, pick, place_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.0, 0.25])
NUM_DRAWS = 4_000


def expected(logits: Tensor, choice: Choice) -> np.ndarray:
    """The probabilities by the definition: temperature, then top_k, then the nucleus of what is left."""
    probs = torch.softmax(logits.double() / choice.temperature, 0)
    order = torch.argsort(probs, descending=True, stable=True)
    kept = order[: choice.top_k] if choice.top_k else order
    renormalised = probs[kept] / probs[kept].sum()
    before = torch.cumsum(renormalised, 0) - renormalised
    kept = kept[before < choice.top_p]
    result = torch.zeros_like(probs)
    result[kept] = probs[kept] / probs[kept].sum()
    return result.numpy()


def chi_square_p(counts: np.ndarray, probs: np.ndarray) -> float:
    """Probability of counts at least so far off, by simulation."""
    rng = np.random.default_rng(0)
    live = probs > 0

    def off(found: np.ndarray) -> np.ndarray:
        wanted = probs[live] * NUM_DRAWS
        return ((found[..., live] - wanted) ** 2 / wanted).sum(-1)

    return float((off(rng.multinomial(NUM_DRAWS, probs, 2000)) >= off(counts)).mean())


@pytest.mark.parametrize(
    "choice",
    [
        Choice(),
        Choice(temperature=0.5),
        Choice(temperature=2.0),
        Choice(top_k=3),
        Choice(temperature=1.5, top_k=5),
        Choice(top_p=0.6),
        Choice(top_p=0.95),
        Choice(temperature=0.7, top_k=6, top_p=0.8),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_of_temperature_top_k_and_top_p(choice: Choice):
    # A third token as likely as the second would make the nucleus and top_k ambiguous.
    logits = LOGITS + torch.linspace(0, 0.01, len(LOGITS))
    uniforms = generator(7, 0).random(NUM_DRAWS).tolist()
    tokens, logprobs = pick(logits.expand(NUM_DRAWS, -1), [choice] * NUM_DRAWS, uniforms)
    counts = np.bincount(tokens, minlength=len(logits))
    probs = expected(logits, choice)
    assert counts[probs == 0].sum() == 0
    assert chi_square_p(counts, probs) > 0.01
    assert np.allclose(logprobs, torch.log_softmax(logits, 0)[tokens], atol=1e-6)


def test_temperature_zero_takes_the_likeliest_and_a_tiny_one_too():
    for temperature in (0.0, 1e-30):
        tokens, logprobs = pick(LOGITS[None], [Choice(temperature=temperature)], [0.999])
        assert tokens == [0]
        assert logprobs == pytest.approx([float(torch.log_softmax(LOGITS, 0)[0])])


def test_the_nucleus_is_found_beyond_the_first_look():
    logits = torch.zeros(5000)
    tokens, _ = pick(logits.expand(200, -1), [Choice(top_p=0.9)] * 200, np.linspace(0, 0.999, 200).tolist())
    assert len(set(tokens)) == 200
    _, counts = np.unique([token // 1000 for token in tokens], return_counts=True)
    assert counts.max() <= 60


def test_a_choice_does_not_depend_on_the_rows_around_it():
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 4000, generator=rng) * 3
    choices = [Choice(), Choice(top_p=0.9), Choice(temperature=0.0), Choice(temperature=2.0, top_k=50)] * 3
    uniforms = generator(1, 1).random(12).tolist()
    together = pick(logits, choices, uniforms)
    alone = [pick(logits[row : row + 1], choices[row : row + 1], uniforms[row : row + 1]) for row in range(12)]
    assert together[0] == [tokens[0] for tokens, _ in alone]
    assert np.allclose(together[1], [logprobs[0] for _, logprobs in alone], atol=1e-6)


def test_samples_of_one_seed_have_random_numbers_of_their_own_and_again_the_same():
    first, again, other = generator(3, 0).random(5), generator(3, 0).random(5), generator(3, 1).random(5)
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    assert generator(-3, 0).random() != generator(3, 0).random()


def test_logits_that_are_not_finite_give_a_logprob_that_is_not():
    for bad in (float("nan"), float("inf")):
        logits = LOGITS.clone()
        logits[2] = bad
        for choice in (Choice(), Choice(temperature=0.0), Choice(top_p=0.5), Choice(top_k=2)):
            _, logprobs = pick(logits[None], [choice], [0.5])
            assert not np.isfinite(logprobs[0])


def test_a_prompts_logprobs_and_likeliest_tokens_are_those_of_log_softmax():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    found = place_logprobs(logits, [1, 4], topk=2)
    whole = torch.log_softmax(logits, -1)
    assert found.logprobs == pytest.approx([float(whole[0, 1]), float(whole[1, 4])])
    likeliest = torch.topk(whole, 2)
    assert found.topk_tokens == likeliest.indices.flatten().tolist()
    assert found.topk_logprobs == pytest.approx(likeliest.values.flatten().tolist())
