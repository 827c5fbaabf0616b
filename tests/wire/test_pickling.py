"""Clients in other processes: what pickles, what a pickle holds, and what is refused in a sentence."""

import copy
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from gradwire import SamplingClient, SamplingParams, ServiceClient, TrainerJobManager
from gradwire.errors import UnauthenticatedError

from tests.front_end_process import front_end_process

KEY = "the-key-of-alice"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with front_end_process(f"alice {KEY}") as running:
        yield running.address


@pytest.fixture
def service(address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceClient]:
    monkeypatch.delenv("GRADWIRE_API_KEY", raising=False)
    with ServiceClient(f"http://{address}", KEY, timeout_s=30) as service:
        yield service


def sampled(sampler: SamplingClient) -> list[int]:
    return sampler.sample([1, 2, 3], 1, SamplingParams(max_tokens=2)).result(60).sequences[0].tokens


def child(sampler: SamplingClient, queue: Any) -> None:
    queue.put((sampler.model_path, sampled(sampler)))


def test_a_started_process_samples_with_a_client_it_was_given(service: ServiceClient):
    sampler = service.create_training_client().save_weights_and_get_sampling_client()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=[sampler, queue])
    process.start()
    assert queue.get(timeout=60) == (sampler.model_path, [7, 7])
    process.join(60)
    assert process.exitcode == 0
    # The copy's end was not the frozen weights'.
    assert sampled(sampler) == [7, 7]


def test_a_pool_samples_with_the_key_of_its_environment(service: ServiceClient, monkeypatch: pytest.MonkeyPatch):
    sampler = service.create_sampling_client()
    monkeypatch.setenv("GRADWIRE_API_KEY", KEY)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(sampled, sampler).result(60) == [7, 7]


def test_no_pickle_that_could_be_kept_holds_the_key(service: ServiceClient, monkeypatch: pytest.MonkeyPatch):
    sampler = service.create_sampling_client()
    pickled = pickle.dumps(sampler)
    assert KEY.encode() not in pickled
    with pytest.raises(UnauthenticatedError, match="API key is missing"):
        sampled(pickle.loads(pickled))
    monkeypatch.setenv("GRADWIRE_API_KEY", KEY)
    assert sampled(pickle.loads(pickled)) == [7, 7]


def test_a_copy_is_the_client_itself(service: ServiceClient):
    sampler = service.create_sampling_client()
    assert copy.copy(sampler) is sampler
    assert copy.deepcopy({"sampler": sampler})["sampler"] is sampler


def test_what_belongs_to_one_process_says_so_and_names_the_way(service: ServiceClient):
    client = service.create_training_client()
    future = client.zero_grad()
    with pytest.raises(TypeError, match=r"TrainingClient cannot be pickled .*\.training_client\(run_id\)"):
        pickle.dumps(client)
    with pytest.raises(TypeError, match=r"future of zero_grad cannot be pickled .*\.result\(\)"):
        pickle.dumps(future)
    with pytest.raises(TypeError, match="ServiceClient cannot be pickled .* base_url"):
        pickle.dumps(service)
    with TrainerJobManager() as manager, pytest.raises(TypeError, match="TrainerJobManager cannot be pickled"):
        pickle.dumps(manager)
