"""One step of training, and what is sampled greedily after it."""

import gradwire
from gradwire import AdamParams, SamplingClient, SamplingParams, TrainingClient

PROMPT = [40, 41, 42, 43]
DATA = [gradwire.datum_from_tokens_weights([5, 6, 7, 8, 9], [1.0] * 5, 64)]
GREEDY = SamplingParams(max_tokens=6, temperature=0, stop=[])


def greedy(client: SamplingClient) -> list[int]:
    return client.sample(PROMPT, 1, GREEDY).result(30).sequences[0].tokens


def train(client: TrainingClient, steps: int = 1) -> None:
    for _ in range(steps):
        client.forward_backward(DATA, "cross_entropy")
        client.optim_step(AdamParams(learning_rate=0.1))
