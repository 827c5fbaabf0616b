"""What rows about whole steps share: a trainer in processes of its own, the engine in this one, data, and the loops."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from gradwire import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from gradwire._wire.codec import batch_from_data
from side_by_side import Setting

from trainer_service.engine.device import pick_device, set_num_threads
from trainer_service.engine.engine import Engine
from trainer_service.engine.losses import find_loss
from trainer_service.worker_config import EngineSettings

ADAM = AdamParams(learning_rate=1e-6)
Step = Callable[[TrainingClient, list[Datum]], None]


def make_data(vocab_size: int, lengths: list[int], *, seed: int = 0) -> list[Datum]:
    """Random tokens with weight one."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        tokens = rng.integers(0, vocab_size, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, dtype=np.float32)}
        data.append(Datum(ModelInput.from_ints(tokens[:-1]), inputs))
    return data


def built_in(client: TrainingClient, data: list[Datum]) -> None:
    """A step with cross_entropy, as a user's loop makes it."""
    loss = client.forward_backward(data, "cross_entropy")
    client.optim_step(ADAM).result(600)
    loss.result(600)


def nll(data: list[Datum], logprobs_list: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """cross_entropy as a closure."""
    weights = [datum.loss_fn_inputs["weights"].to_torch() for datum in data]
    return -torch.stack([torch.dot(lp, w) for lp, w in zip(logprobs_list, weights, strict=True)]).sum(), {}


def custom(client: TrainingClient, data: list[Datum]) -> None:
    """The same step with the loss as a closure here."""
    loss = client.forward_backward_custom(data, nll)
    client.optim_step(ADAM).result(600)
    loss.result(600)


def two_pass(client: TrainingClient, data: list[Datum]) -> None:
    """The same step where no graph is kept: a forward for the logprobs, then a forward and backward."""
    client.forward(data).result(600)
    built_in(client, data)


class InProcess:
    """The engine without a service around it."""

    def __init__(self, model: str, folder: Path, settings: EngineSettings | None = None) -> None:
        set_num_threads()
        self.engine = Engine(
            model,
            device=pick_device(compute_dtype=(settings or EngineSettings()).compute_dtype),
            checkpoint_dir=folder,
            settings=settings,
        )
        self.engine.create_run("run")
        self._loss = find_loss("cross_entropy")
        self._seq_id = 0

    def forward_backward(self, data: list[Datum]) -> None:
        """Adds the gradients of these data to those already there."""
        self._seq_id += 1
        self.engine.forward_backward("run", self._seq_id, self.engine.stage(batch_from_data(data), self._loss))

    def step(self, data: list[Datum]) -> None:
        """A whole step on these data."""
        self.forward_backward(data)
        self._seq_id += 1
        self.engine.optim_step("run", self._seq_id, ADAM)

    def gradients(self) -> list[torch.Tensor]:
        """The gradients accumulated so far."""
        parameters = self.engine._run("run").model.parameters()
        return [parameter.grad for parameter in parameters if parameter.grad is not None]


@contextlib.contextmanager
def trainer(setting: Setting, name: str, *options: str, model: str | None = None) -> Iterator[ServiceClient]:
    """A trainer with a worker that has loaded its model; in a quick run always the same one, whatever the options."""
    if not setting.quick:
        with _trainer_process(model or setting.model, setting.folder / name, *options) as service:
            yield service
        return
    if not setting.kept:
        process = _trainer_process(setting.model, setting.folder / "quick", "--max-runs", "32")
        setting.kept.append(setting.stack.enter_context(process))
    yield setting.kept[0]


@contextlib.contextmanager
def _trainer_process(model: str, folder: Path, *options: str) -> Iterator[ServiceClient]:
    folder.mkdir()
    ready_file = folder / "ready.json"
    command = [sys.executable, "-m", "trainer_service", "serve", "--base-model", model, "--listen", "127.0.0.1:0"]
    command += ["--data-dir", str(folder), "--ready-file", str(ready_file), "--log-level", "WARNING"]
    command += ["--exit-with-parent", *options]
    # The worker takes every core and its own settings for memory, as in real use, whatever this process was told.
    told = {"OMP_NUM_THREADS", "GLIBC_TUNABLES"}
    env = {key: value for key, value in os.environ.items() if key not in told}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=env)
    try:
        while not ready_file.exists():
            if process.poll() is not None:
                sys.exit("The trainer did not start; its log is above.")
            time.sleep(0.02)
        with ServiceClient(f"http://{json.loads(ready_file.read_text())['address']}") as service:
            yield service
    finally:
        process.terminate()
        process.wait(60)


def vocab_size(service: ServiceClient) -> int:
    """Size of the vocabulary of the trainer's model."""
    return service.get_server_info().models[0].vocab_size


def tiny_model(folder: Path, vocab: int = 64) -> str:
    """A model so small that a step is all overhead."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1 << 20,
    )
    path = folder / f"tiny-{vocab}"
    if not path.exists():
        LlamaForCausalLM(config).save_pretrained(path)
    return str(path)
