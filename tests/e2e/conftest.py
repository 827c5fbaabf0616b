"""One trainer on a tiny model, shared by the tests that do not break it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gradwire import ServiceClient, TrainingClient

from tests.trainer_process import TrainerProcess, running_trainer


@pytest.fixture(scope="package")
def trainer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """A ready trainer process."""
    with running_trainer(tiny_llama, tmp_path_factory.mktemp("trainer")) as running:
        running.wait_ready()
        yield running


@pytest.fixture
def service(trainer: TrainerProcess) -> Iterator[ServiceClient]:
    """A connection to it."""
    with ServiceClient(trainer.base_url, timeout_s=60) as connected:
        yield connected


@pytest.fixture
def client(service: ServiceClient) -> Iterator[TrainingClient]:
    """A run of its own, deleted at the end."""
    made = service.create_training_client()
    yield made
    made.delete_run()
