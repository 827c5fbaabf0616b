"""A training loop on tinker's SDK, as a process that may be killed: it writes down every answer, and begun again it
goes on from the last state it saved. Started by tests/gateway/chaos.py, from a process that read its packages before.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

os.environ["TINKER_TELEMETRY"] = "0"

import numpy as np
import tinker
import torch
from tinker import types

KEY = "tml-of-chaos"


def make_data(seed: int) -> list[types.Datum]:
    """A few short sequences."""
    rng = np.random.default_rng(seed)
    made: list[types.Datum] = []
    for length in rng.integers(3, 30, rng.integers(1, 5)):
        tokens = rng.integers(3, 127, length + 1)
        inputs: dict[str, Any] = {"target_tokens": tokens[1:], "weights": rng.uniform(0, 1, length).astype(np.float32)}
        made.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return made


def margin_loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that couples its datums."""
    return torch.logsumexp(-0.01 * torch.stack([one.sum() for one in logprobs]), 0), {}


def told(answer: Any) -> str:
    """An answer with every digit; but for how many forwards it took, which a fault may change."""
    digest = hashlib.sha256()
    for output in getattr(answer, "loss_fn_outputs", []):
        digest.update(output["logprobs"].to_numpy().tobytes())
    metrics = {name: value for name, value in (answer.metrics or {}).items() if name != "forward_passes:sum"}
    return f"{digest.hexdigest()} {sorted(metrics.items())!r}"


def step(client: tinker.TrainingClient, number: int) -> list[str]:
    """One step; what was answered."""
    passes = [client.forward_backward(make_data(number * 10), "cross_entropy")]
    if number % 2:
        passes.append(client.forward_backward_custom(make_data(number * 10 + 1), margin_loss))
    params = types.AdamParams(learning_rate=1e-2 / (1 + number), weight_decay=0.01, grad_clip_norm=1.0)
    stepped = client.optim_step(params)
    return [told(one.result()) for one in (*passes, stepped)]


def sample(sampler: tinker.SamplingClient) -> list[int]:
    """Tokens that its parameters choose."""
    params = types.SamplingParams(max_tokens=8, temperature=0.0)
    return list(sampler.sample(types.ModelInput.from_ints([40, 41, 42]), 1, params).result().sequences[0].tokens)


def run(url: str, record: Path, steps: int) -> None:
    """The loop, to its end.

    Args:
        url: Of the gateway.
        record: Gets a line of JSON for each answer, and each state saved.
        steps: Optimizer steps.
    """
    with record.with_suffix(".log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    known = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    saved = [one for one in known if "saved" in one]
    with record.open("a") as out, tinker.ServiceClient(base_url=url, api_key=KEY) as service:

        def write(**fields: Any) -> None:
            out.write(json.dumps(fields) + "\n")
            out.flush()

        if saved:
            first = saved[-1]["step"] + 1
            client = service.create_training_client_from_state_with_optimizer(saved[-1]["saved"]).result()
            # Of the same parameters as the one of the client before.
            sampler = client.save_weights_and_get_sampling_client().result()
        else:
            first, sampler = 0, None
            client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
        for number in range(first, steps):
            write(step=number, told=step(client, number))
            if number % 2:
                # Frozen in the worker's memory, and used until the next.
                sampler = client.save_weights_and_get_sampling_client().result()
            if sampler is not None:
                write(step=number, sampled=sample(sampler))
            if number % 2:
                write(step=number, saved=client.save_state(f"at-{number}", overwrite=True).result().path)
        write(step=steps, told=[told(client.forward(make_data(1), "cross_entropy").result())])
