"""Samplers and adapters that one trainer saved into a store, used by another that has nothing but the store."""

from pathlib import Path

import numpy as np
from gradwire import AdamParams, ServiceClient, TrainingClient

from tests.sampled import DATA, greedy, train
from tests.trainer_process import running_trainer


def logprobs(client: TrainingClient) -> np.ndarray:
    return client.forward(DATA, "cross_entropy").result(60).loss_fn_outputs.arrays["logprobs"]


def test_another_trainer_samples_from_what_is_only_in_the_store_and_starts_a_run_from_it(
    tiny_llama: Path, tmp_path: Path
):
    store = ("--storage-url", (tmp_path / "store").as_uri())
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with (
        running_trainer(tiny_llama, tmp_path / "one", *store, forked=True) as one,
        ServiceClient(one.base_url) as service,
    ):
        full, lora = service.create_training_client(), service.create_training_client(lora_rank=4)
        train(full, 2)
        full.save_weights_for_sampler_ext("base", "base")
        # Enough that the delta says something else than its base.
        full.forward_backward(DATA)
        full.optim_step(AdamParams(learning_rate=1.0))
        train(lora, 3)
        paths = [
            full.save_weights_for_sampler_ext("delta", "delta").path,
            lora.save_weights_for_sampler("adapter").result(60).path,
        ]
        wanted = [greedy(service.create_sampling_client(path)) for path in paths]
        assert greedy(lora.save_weights_and_get_sampling_client()) == wanted[1]
        trained = logprobs(lora)
    assert wanted[0] != wanted[1]
    with (
        running_trainer(tiny_llama, tmp_path / "two", *store, forked=True) as two,
        ServiceClient(two.base_url) as service,
    ):
        assert [greedy(service.create_sampling_client(path)) for path in paths] == wanted
        started = service.create_training_client(adapter_path=paths[1])
        np.testing.assert_array_equal(logprobs(started), trained)
