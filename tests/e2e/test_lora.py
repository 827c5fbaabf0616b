"""LoRA runs over the wire: made, saved, sampled from, started from, brought back after a death."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import numpy as np
import pytest
from gradwire import AdamParams, Datum, LoraConfig, ModelInput, SamplingParams, ServiceClient, TrainingClient
from gradwire.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

from tests.trainer_process import TrainerProcess, running_trainer

ADAM = AdamParams(learning_rate=1e-2)
SETTINGS: dict[str, Any] = {"lora_rank": 4, "lora_alpha": 8, "seed": 1}
DATA = [
    Datum(
        ModelInput.from_ints([3 + n, 40, 50, 60]),
        {"target_tokens": [40, 50, 60, 70 + n], "weights": np.ones(4, dtype=np.float32)},
    )
    for n in range(3)
]


@pytest.fixture
def own_trainer(tiny_llama: Path, tmp_path: Path) -> Iterator[TrainerProcess]:
    """A ready trainer process that a test may break; its data are in `tmp_path`."""
    with running_trainer(tiny_llama, tmp_path, forked=True) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def own_service(own_trainer: TrainerProcess) -> Iterator[ServiceClient]:
    """A connection to it."""
    with ServiceClient(own_trainer.base_url, timeout_s=60) as connected:
        yield connected


def logprobs(client: TrainingClient) -> np.ndarray:
    outputs = client.forward(DATA).result(60).loss_fn_outputs
    return np.concatenate([output["logprobs"].to_numpy() for output in outputs])


def train(client: TrainingClient, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        losses.append(client.forward_backward(DATA, "cross_entropy").result(60).metrics["loss:sum"])
        client.optim_step(ADAM).result(60)
    return losses


def test_two_lora_runs_learn_side_by_side_and_are_what_they_say(service: ServiceClient):
    one = service.create_training_client(**SETTINGS)
    two = service.create_lora_training_client(**vars(LoraConfig(rank=2, train_mlp=False)))
    assert (one.get_info().lora_rank, two.get_info().lora_rank) == (4, 2)
    layout = two.get_info().lora
    assert layout is not None
    assert (layout.train_attn, layout.train_mlp, layout.train_unembed) == (True, False, True)
    assert layout.adapted == ("lm_head", *(f"model.layers.*.self_attn.{name}_proj" for name in "koqv"))
    assert layout.left_out == tuple(f"model.layers.*.mlp.{name}_proj" for name in ("down", "gate", "up"))
    start = logprobs(one)
    np.testing.assert_allclose(logprobs(two), start, atol=1e-5)
    for client in (one, two):
        losses = train(client, 3)
        assert losses == sorted(losses, reverse=True)
    assert not np.allclose(logprobs(one), logprobs(two))
    for client in (one, two):
        client.delete_run()


def test_adapters_of_a_whole_base_do_without_bitsandbytes(trainer: TrainerProcess, service: ServiceClient):
    """Its import is a quarter of a worker's start, wherever it is installed."""
    assert importlib.util.find_spec("bitsandbytes") is not None
    train(service.create_training_client(**SETTINGS), 1)
    assert "bitsandbytes" not in Path(f"/proc/{trainer.worker_pid()}/maps").read_text()


def test_a_saved_adapter_is_sampled_from_and_starts_another_run(service: ServiceClient):
    client = service.create_training_client(**SETTINGS)
    train(client, 3)
    saved = client.save_weights_for_sampler("a").result(60)
    assert (Path(unquote(urlparse(saved.uri).path)) / "adapter_config.json").is_file()
    wanted = logprobs(client)
    params = SamplingParams(max_tokens=5, temperature=0)
    prompt = ModelInput.from_ints([3, 40, 50])
    samples = [
        sampler.sample(prompt, 1, params).result(60).sequences[0].tokens
        for sampler in (
            service.create_sampling_client(saved.path),
            client.save_weights_and_get_sampling_client(),
            service.create_sampling_client(client.save_weights_for_sampler("m", merged=True).result(60).path),
        )
    ]
    assert samples[0] == samples[1] == samples[2]
    frozen = client.save_weights_and_get_sampling_client()
    train(client, 2)
    assert frozen.sample(prompt, 1, params).result(60).sequences[0].tokens == samples[0]
    again = service.create_training_client(adapter_path=saved.path)
    assert again.get_info().lora_rank == 4
    np.testing.assert_array_equal(logprobs(again), wanted)
    client.delete_run()
    again.delete_run()


GO_ON = """
import json, sys
from gradwire import ServiceClient
from tests.e2e.test_lora import train
with ServiceClient(sys.argv[1]) as service:
    make = getattr(service, "create_training_client_from_state" + sys.argv[3])
    with make(sys.argv[2], display_name="resumed") as client:
        print(json.dumps([client.run_id, client.get_info().lora_rank, train(client, 3)]))
"""


def gone_on(service: ServiceClient, path: str, how: str = "_with_optimizer") -> tuple[TrainingClient, int, list[float]]:
    """Resumes a state and trains three steps in another process: the client, its rank, the losses."""
    command = [sys.executable, "-c", GO_ON, service.base_url, path, how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert not done.returncode, done.stderr
    run_id, rank, losses = json.loads(done.stdout)
    return service.training_client(run_id), rank, losses


@pytest.mark.parametrize("settings", [SETTINGS, {"lora_rank": 2, "train_mlp": False, "train_unembed": False}])
def test_a_client_from_a_lora_state_goes_on_as_if_it_had_never_stopped(
    service: ServiceClient, settings: dict[str, Any]
):
    client = service.create_training_client(**settings)
    train(client, 3)
    path = client.save_state("s", overwrite=True).result(60)
    losses, wanted = train(client, 3), logprobs(client)
    client.delete_run()
    resumed, rank, again = gone_on(service, path)
    assert (rank, again) == (settings["lora_rank"], losses)
    np.testing.assert_array_equal(logprobs(resumed), wanted)
    resumed.delete_run()
    # Without its optimizer: the same parameters, and other ones after the next step.
    fresh, rank, again = gone_on(service, path, "")
    assert (rank, again[0]) == (settings["lora_rank"], losses[0])
    assert again[1:] != losses[1:]
    fresh.delete_run()


def test_a_run_started_from_an_adapter_leaves_states_that_make_its_like(service: ServiceClient):
    client = service.create_training_client(**SETTINGS, train_mlp=False)
    train(client, 2)
    started = service.create_training_client(adapter_path=client.save_weights_for_sampler("b").result(60).path)
    train(started, 2)
    resumed = service.create_training_client_from_state_with_optimizer(started.save_state("s").result(60))
    assert train(resumed, 2) == train(started, 2)
    for one in (client, started, resumed):
        one.delete_run()


def test_a_lora_state_that_does_not_say_its_layers_says_what_to_do(own_service: ServiceClient, tmp_path: Path):
    client = own_service.create_training_client(**SETTINGS)
    train(client, 1)
    path = client.save_state("s").result(60)
    # As versions before this wrote it.
    [file] = tmp_path.glob("data/checkpoints/*/state/s/manifest.json")
    manifest = json.loads(file.read_text())
    layout = manifest.pop("lora")
    assert layout.items() >= {"alpha": 8.0, "train_mlp": True, "train_attn": True, "train_unembed": True}.items()
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        FailedPreconditionError, match=r"run of rank 4 .* To go on, call create_training_client"
    ) as caught:
        own_service.create_training_client_from_state(path)
    assert caught.value.reason == "CHECKPOINT_MISMATCH"
    assert len(own_service.list_runs()) == 1
    same = own_service.create_training_client(**SETTINGS)
    same.load_state_with_optimizer(path).result(60)
    assert train(same, 1) == train(client, 1)


@pytest.mark.parametrize(
    ("arguments", "exception", "text"),
    [
        ({"lora_rank": 4, "lora_alpha": -1}, InvalidArgumentError, "lora_alpha is -1; it must be above 0"),
        ({"train_mlp": False}, InvalidArgumentError, "train_mlp is set, but lora_rank is 0"),
        ({"lora_rank": 1000}, InvalidArgumentError, "lora_rank is 1000; it must be 1 to 32"),
        ({"adapter_path": "../../etc"}, InvalidArgumentError, "below this trainer's --adapter-dir"),
        ({"adapter_path": "nobody"}, NotFoundError, "There is no adapter nobody"),
        (
            {"adapter_path": "gradwire://run-9/sampler_weights/a"},
            NotFoundError,
            "There is no checkpoint gradwire://run-9",
        ),
    ],
)
def test_what_cannot_be_is_refused(
    service: ServiceClient, arguments: dict[str, Any], exception: type[Exception], text: str
):
    with pytest.raises(exception, match=text):
        service.create_training_client(**arguments)


def kill_worker(trainer: TrainerProcess) -> None:
    os.kill(trainer.worker_pid(), signal.SIGKILL)


def test_lora_runs_come_back_after_a_death_as_they_were(
    own_trainer: TrainerProcess, own_service: ServiceClient, tmp_path: Path
):
    new = own_service.create_training_client(**SETTINGS)
    train(new, 2)
    place = Path(unquote(urlparse(new.save_weights_for_sampler("a").result(60).uri).path))
    (tmp_path / "data" / "adapters").mkdir()
    shutil.copytree(place, tmp_path / "data" / "adapters" / "mine")
    started = own_service.create_training_client(adapter_path="mine")
    train(started, 1)
    # What a run started from may go; it has a copy of its own.
    shutil.rmtree(tmp_path / "data" / "adapters" / "mine")
    before = [logprobs(client) for client in (new, started)]
    kill_worker(own_trainer)
    time.sleep(0.1)
    for client, wanted in zip((new, started), before, strict=True):
        np.testing.assert_array_equal(logprobs(client), wanted)
    assert train(started, 1)
