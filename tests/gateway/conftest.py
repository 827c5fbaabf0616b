"""One trainer on a tiny model, a gateway before it, and the official SDKs as clients, for tests that break none."""

import gc
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

# Before the SDK reads them.
os.environ.update(TINKER_TELEMETRY="0")
os.environ.pop("TINKER_API_KEY", None)

import pytest
import tinker

from tests.gateway_process import GatewayProcess, running_gateway
from tests.trainer_process import TrainerProcess, running_trainer

KEY = "tml-of-a-test"


@pytest.fixture(scope="package")
def trainer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """A ready trainer process."""
    with running_trainer(tiny_llama, tmp_path_factory.mktemp("trainer"), "--max-runs", "32", forked=True) as running:
        running.wait_ready()
        yield running


@pytest.fixture(scope="package")
def gateway(trainer: TrainerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway before it, which calls the model "tiny" as well."""
    with running_gateway(trainer.base_url, tmp_path_factory.mktemp("gateway"), "--alias", "tiny") as running:
        yield running


@pytest.fixture(scope="package", autouse=True)
def sdk_leftovers() -> Iterator[None]:
    """What the SDKs leave to the garbage collector is collected here, where nobody is warned of it."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        for _ in range(5):
            gc.collect()


@pytest.fixture
def service(gateway: GatewayProcess) -> Iterator[tinker.ServiceClient]:
    """The SDK's client, whose session ends with the test."""
    with tinker.ServiceClient(base_url=gateway.base_url, api_key=KEY) as connected:
        yield connected


@pytest.fixture
def client(service: tinker.ServiceClient) -> tinker.TrainingClient:
    """A LoRA model of its own."""
    return service.create_lora_training_client("tiny", rank=4, seed=1).result()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Connections that the official SDKs leave to the garbage collector are theirs."""
    ours = Path(__file__).parent
    for item in items:
        if ours in item.path.parents:
            for ignored in ("ResourceWarning", "pytest.PytestUnraisableExceptionWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{ignored}"))
