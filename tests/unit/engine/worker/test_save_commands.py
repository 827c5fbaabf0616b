"""Saving and loading by command: states, sampler weights, what is said of them, names."""

import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from gradwire.errors import from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest

from tests.driver import Driver
from tests.engines import RUN
from trainer_service.atomic_folders import read_manifest

SAVES = {"save_state": "state", "save_weights_for_sampler": "sampler_weights"}
"""The kind of checkpoint that each operation makes."""


def test_states_are_saved_and_loaded(driver: Driver, tmp_path: Path) -> None:
    saved = driver.send(save_state=ops.SaveStateRequest(name="a", ttl_seconds=60)).save_state
    assert saved.path == f"gradwire://{RUN}/state/a"
    assert saved.size_bytes == sum(path.stat().st_size for path in (tmp_path / RUN / "state" / "a").iterdir())
    assert driver.send(load_state=ops.LoadStateRequest(path=saved.path)).load_state.step == 0
    assert driver.refused(save_state=ops.SaveStateRequest(name="a")).reason == "CHECKPOINT_EXISTS"
    missing = driver.refused(load_state=ops.LoadStateRequest(path=f"gradwire://{RUN}/state/b"))
    assert missing.reason == "CHECKPOINT_NOT_FOUND"


def test_a_save_executed_again_after_its_worker_died_is_not_refused_for_what_it_wrote_itself(driver: Driver) -> None:
    for kind, request in (
        ("save_state", TrainRequest(seq_id=7, save_state={"name": "a"})),
        ("save_weights_for_sampler", TrainRequest(seq_id=7, save_weights_for_sampler={"name": "a"})),
    ):
        command = driver.command(request=request)
        for _ in range(2):
            assert driver.execute(command).response.WhichOneof("result") == kind
        command.request.seq_id = 8
        assert from_status(driver.execute(command).response.error).reason == "CHECKPOINT_EXISTS"


@pytest.mark.parametrize("name", ["../escape", "/etc/x", "a\x01", "a\n", "x" * 10_000, "", ".a", "a/b"])
def test_states_stay_in_their_folder(driver: Driver, tmp_path: Path, name: str) -> None:
    assert driver.refused(save_state=ops.SaveStateRequest(name=name)).field_violations[0][0] == "name"
    for path in (f"gradwire://{RUN}/state/{name}", f"gradwire://{name}/state/a", f"gradwire://{RUN}/{name}/a", name):
        exc = driver.refused(load_state=ops.LoadStateRequest(path=path))
        assert exc.field_violations[0][0] == "path"
        assert len(exc.message) < 500
    assert not (tmp_path / RUN).exists()


@pytest.mark.parametrize("ttl_seconds", [0, 1 << 62])
def test_a_time_to_live_that_cannot_be_is_refused(driver: Driver, ttl_seconds: int) -> None:
    for save in SAVES:
        exc = driver.refused(**{save: {"name": "a", "ttl_seconds": ttl_seconds}})
        assert exc.field_violations[0][0] == "ttl_seconds"


def test_what_the_caller_says_of_a_checkpoint_is_in_its_manifest(driver: Driver, tmp_path: Path) -> None:
    for save, kind in SAVES.items():
        driver.send(**{save: {"name": "a", "ttl_seconds": 3600, "user_metadata": {"epoch": "3", "run": "ä"}}})
        about = read_manifest(tmp_path / RUN / kind / "a").about
        assert about["user_metadata"] == {"epoch": "3", "run": "ä"}
        kept = datetime.fromisoformat(about["expires_at"]) - datetime.fromisoformat(about["created_at"])
        assert kept == timedelta(hours=1)
        # Saved anew, it has the new label.
        driver.send(**{save: {"name": "a", "overwrite": True}})
        about = read_manifest(tmp_path / RUN / kind / "a").about
        assert (about["user_metadata"], about["expires_at"]) == ({}, None)


@pytest.mark.parametrize(
    ("user_metadata", "message"),
    [
        ({str(n): "" for n in range(65)}, "has 65 entries; it may have 64"),
        ({"": "x"}, "has a key of 0 bytes"),
        ({"x" * 129: "x"}, "has a key of 129 bytes, 'xxx"),
        ({"a": "x" * 4097}, r"user_metadata\['a'\] has 4097 bytes"),
        ({str(n): "ä" * 2040 for n in range(5)}, "has 20405 bytes; its keys and values may have 16384 together"),
    ],
)
def test_more_than_may_be_said_of_a_checkpoint_is_refused(
    driver: Driver, tmp_path: Path, user_metadata: dict[str, str], message: str
) -> None:
    for save in SAVES:
        exc = driver.refused(**{save: {"name": "a", "user_metadata": user_metadata}})
        assert re.search(message, exc.message)
        assert len(exc.message) < 300
    assert not (tmp_path / RUN).exists()


@pytest.mark.parametrize("said", [{"ttl_seconds": 60}, {"user_metadata": {"a": "b"}}])
def test_of_frozen_weights_nothing_can_be_said(driver: Driver, said: dict[str, Any]) -> None:
    exc = driver.refused(save_weights_for_sampler={"ephemeral": True, **said})
    assert "belong to checkpoints" in exc.message


def test_bad_checkpoint_name_is_refused(driver: Driver, tmp_path: Path) -> None:
    exc = driver.refused(save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(name="../escape"))
    assert exc.field_violations[0][0] == "name"
    assert not (tmp_path / RUN).exists()
    saved = driver.send(save_weights_for_sampler=ops.SaveWeightsForSamplerRequest(name="a")).save_weights_for_sampler
    assert saved.path == f"gradwire://{RUN}/sampler_weights/a"
    assert saved.size_bytes > 0
