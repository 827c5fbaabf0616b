"""The driver of a small model."""

from pathlib import Path

import pytest

from tests.driver import Driver, never
from tests.engines import make_engine
from trainer_service.engine.worker.commands import Commands


@pytest.fixture
def driver(tiny_llama: Path, tmp_path: Path) -> Driver:
    return Driver(Commands(make_engine(tiny_llama, tmp_path), never))
