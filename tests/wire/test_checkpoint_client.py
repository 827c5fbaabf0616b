"""ServiceClient.checkpoints against a trainer with a fake worker."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from gradwire import ServiceClient
from gradwire.errors import FailedPreconditionError, InvalidArgumentError, NotFoundError

from tests.front_end import FrontEnd, front_end_on_a_thread
from trainer_service.paths import SAMPLER_WEIGHTS, STATE, CheckpointPath
from trainer_service.rpc import checkpoint_servicer


@pytest.fixture
def trainer() -> Iterator[FrontEnd]:
    with front_end_on_a_thread() as running:
        yield running


@pytest.fixture
def service(trainer: FrontEnd) -> Iterator[ServiceClient]:
    with ServiceClient(f"http://{trainer.address}", timeout_s=10) as connected:
        yield connected


def save(trainer: FrontEnd, run_id: str, kind: str, name: str, **about: Any) -> str:
    return trainer.worker.save(CheckpointPath(run_id, kind, name), 2_500_000, **about)


def test_checkpoints_are_listed_described_kept_and_deleted(trainer: FrontEnd, service: ServiceClient):
    base = save(trainer, "run-1", SAMPLER_WEIGHTS, "base", base_model="fake", lora_rank=4)
    delta = save(trainer, "run-1", SAMPLER_WEIGHTS, "delta", base_path=base, checkpoint_type="delta")
    state = save(trainer, "run-2", STATE, "a", created_at="2026-01-02T03:04:05+00:00")
    found = service.checkpoints.list()
    assert [each.path for each in found] == [delta, base, state]
    assert [each.path for each in service.checkpoints.list(run_id="run-2")] == [state]
    assert [each.path for each in service.checkpoints.list(kind="sampler_weights")] == [delta, base]
    assert [(each.kind, each.checkpoint_type, each.base_path) for each in found[:2]] == [
        ("sampler_weights", "delta", base),
        ("sampler_weights", "base", ""),
    ]
    assert (found[1].base_model, found[1].lora_rank, found[1].step, found[1].architecture) == ("fake", 4, 3, "Fake")
    assert found[2].created_at == datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    whole = service.checkpoints.get(state)
    assert (whole.run_id, whole.kind, whole.name, whole.expires_at) == ("run-2", "state", "a", None)
    assert [(file.name, file.size_bytes) for file in whole.files] == [("name", 1), ("zeros", 2_500_000)]
    assert whole.size_bytes > 2_500_001  # The manifest is counted too.

    kept = service.checkpoints.set_ttl(state, 3600)
    assert kept.expires_at is not None
    assert timedelta(minutes=59) < kept.expires_at - datetime.now(UTC) <= timedelta(hours=1)
    assert service.checkpoints.set_ttl(state, None).expires_at is None
    service.checkpoints.delete(state)
    with pytest.raises(FailedPreconditionError, match=delta):
        service.checkpoints.delete(base)
    service.checkpoints.delete(delta)
    service.checkpoints.delete(base)
    assert service.checkpoints.list() == []


def test_a_checkpoint_is_fetched_with_its_progress(trainer: FrontEnd, service: ServiceClient, tmp_path: Path):
    path = save(trainer, "run-1", SAMPLER_WEIGHTS, "final")
    told: list[tuple[str, int, int]] = []
    found = service.checkpoints.download(path, tmp_path / "a", progress=lambda *at: told.append(at))
    assert found.path == path
    assert (tmp_path / "a" / "zeros").read_bytes() == bytes(2_500_000)
    of_zeros = [done for name, done, size in told if (name, size) == ("zeros", 2_500_000)]
    assert of_zeros == sorted(of_zeros)
    assert len(of_zeros) > 2
    assert of_zeros[-1] == 2_500_000
    assert service.checkpoints.export(path, str(tmp_path / "b")).name == "final"
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["name", "zeros"]
    with pytest.raises(FailedPreconditionError, match="resumable state"):
        service.checkpoints.export(save(trainer, "run-1", STATE, "a"), tmp_path / "c")


@pytest.mark.parametrize("ttl_seconds", [0, -1, 400_000_000, 1 << 64, 1.5, "1"])
def test_a_time_to_live_that_cannot_be_is_refused(trainer: FrontEnd, service: ServiceClient, ttl_seconds: Any):
    path = save(trainer, "run-1", STATE, "a")
    with pytest.raises(InvalidArgumentError, match="ttl_seconds is ") as caught:
        service.checkpoints.set_ttl(path, ttl_seconds)
    assert caught.value.field_violations[0][0] == "ttl_seconds"
    assert service.checkpoints.get(path).expires_at is None


def test_what_is_not_there_or_no_path_is_refused(service: ServiceClient, tmp_path: Path):
    calls = (
        service.checkpoints.get,
        service.checkpoints.delete,
        lambda path: service.checkpoints.set_ttl(path, 1),
        lambda path: service.checkpoints.download(path, tmp_path / "x"),
        lambda path: service.checkpoints.export(path, tmp_path / "x"),
    )
    for call in calls:
        with pytest.raises(NotFoundError, match="run-9"):
            call("gradwire://run-9/state/a")
        with pytest.raises(InvalidArgumentError, match="it must be gradwire://<run_id>/"):
            call("../a")
    with pytest.raises(InvalidArgumentError, match='must be "state" or "sampler_weights"'):
        service.checkpoints.list(kind="weights")  # pyright: ignore[reportArgumentType]
    assert not (tmp_path / "x").exists()


def test_a_kind_that_only_a_newer_trainer_knows_is_told_as_unknown(
    trainer: FrontEnd, service: ServiceClient, monkeypatch: pytest.MonkeyPatch
):
    save(trainer, "run-1", SAMPLER_WEIGHTS, "a")
    save(trainer, "run-1", STATE, "b")
    monkeypatch.setattr(checkpoint_servicer.messages, "CHECKPOINT_KIND_STATE", 77)
    assert sorted(each.kind for each in service.checkpoints.list()) == ["sampler_weights", "unknown"]


def test_progress_is_told_on_the_callers_thread_which_may_use_the_service(
    trainer: FrontEnd, service: ServiceClient, tmp_path: Path
):
    path = save(trainer, "run-1", STATE, "a")
    told: list[tuple[threading.Thread, int]] = []
    service.checkpoints.download(
        path, tmp_path, progress=lambda *_: told.append((threading.current_thread(), len(service.checkpoints.list())))
    )
    assert len(told) > 3
    assert set(told) == {(threading.current_thread(), 1)}


@pytest.mark.parametrize("exc", [ValueError("mine"), TimeoutError("mine"), OSError("mine"), KeyboardInterrupt("mine")])
def test_what_progress_raises_is_raised_and_another_download_goes_on(
    trainer: FrontEnd, service: ServiceClient, tmp_path: Path, exc: BaseException
):
    path = save(trainer, "run-1", STATE, "a")
    begun: list[int] = []

    def stop(name: str, here: int, size: int) -> None:
        if name == "zeros" and here > 1:
            raise exc

    with pytest.raises(type(exc)) as caught:
        service.checkpoints.download(path, tmp_path, progress=stop)
    assert caught.value is exc
    service.checkpoints.download(path, tmp_path, progress=lambda name, here, size: begun.append(here))
    assert 1 << 20 in begun
    assert 0 not in begun
    assert (tmp_path / "zeros").read_bytes() == bytes(2_500_000)
