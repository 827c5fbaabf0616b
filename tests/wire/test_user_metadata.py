"""What users say of runs and checkpoints: kept, listed, bounded, through the SDK and the command line."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from gradwire import Datum, ServiceClient
from gradwire.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from gradwire.types import SavedState

from tests.cli import gradwire
from tests.front_end import FrontEnd, front_end_on_a_thread
from trainer_service.paths import STATE, CheckpointPath


@pytest.fixture(scope="module")
def trainer() -> Iterator[FrontEnd]:
    with front_end_on_a_thread() as running:
        yield running


@pytest.fixture
def service(trainer: FrontEnd) -> Iterator[ServiceClient]:
    with ServiceClient(f"http://{trainer.address}", timeout_s=20, user_metadata={"team": "a", "recipe": "x"}) as made:
        yield made


def test_a_runs_metadata_is_the_clients_and_its_own_and_stays_with_forks(service: ServiceClient):
    client = service.create_training_client(user_metadata={"recipe": "sft", "renderer_name": "plain"})
    said = {"team": "a", "recipe": "sft", "renderer_name": "plain"}
    assert client.get_info().user_metadata == said
    found = {run.run_id: run.user_metadata for run in service.list_runs()}
    assert found[client.run_id] == said
    assert service.training_client(client.run_id).get_info().user_metadata == said
    assert service.create_rest_client().get_training_run(client.run_id).result(60).user_metadata == said
    client.forward_backward([Datum([1, 2], {"target_tokens": [2, 3], "weights": [1.0, 1.0]})])
    client.optim_step().result(60)
    forked = client.fork()
    assert forked.get_info().user_metadata == said
    for each in (client, forked):
        each.delete_run()


def test_a_display_name_of_the_client_is_that_of_runs_without_one(trainer: FrontEnd):
    with ServiceClient(f"http://{trainer.address}", timeout_s=20, display_name="mine") as service:
        unnamed, named = service.create_training_client(), service.create_training_client(display_name="yours")
        assert [each.get_info().display_name for each in (unnamed, named)] == ["mine", "yours"]
        for client in (unnamed, named):
            client.delete_run()


def test_what_is_said_of_a_checkpoint_is_listed_everywhere(trainer: FrontEnd, service: ServiceClient):
    client = service.create_training_client()
    state = client.save_state("s", 3600, False, {"step": "1", "note": "ä"}).result(60)
    sampler = client.save_weights_for_sampler("w", 7200, {"step": "2"}).result(60)
    assert isinstance(state, SavedState)
    assert (state.path, str(state)) == (state, f"gradwire://{client.run_id}/state/s")
    found = {each.path: each for each in service.checkpoints.list(run_id=client.run_id)}
    assert found[state.path].user_metadata == {"step": "1", "note": "ä"}
    assert found[sampler.path].user_metadata == {"step": "2"}
    for path, seconds in ((state.path, 3600), (sampler.path, 7200)):
        expires_at = found[path].expires_at
        assert expires_at is not None
        assert timedelta(0) < expires_at - datetime.now(UTC) <= timedelta(seconds=seconds)
        assert service.checkpoints.set_ttl(path, None).user_metadata == found[path].user_metadata
    assert service.checkpoints.get(state).user_metadata == {"step": "1", "note": "ä"}
    rest = service.create_rest_client()
    listed = rest.list_checkpoints(client.run_id).result(60).checkpoints
    assert {each.tinker_path: (each.checkpoint_id, each.checkpoint_type, each.user_metadata) for each in listed} == {
        state.path: ("state/s", "training", {"step": "1", "note": "ä"}),
        sampler.path: ("sampler_weights/w", "sampler", {"step": "2"}),
    }
    table = gradwire(f"http://{trainer.address}", "checkpoints", "list", "--run", client.run_id).stdout
    (line,) = [line for line in table.splitlines() if state.path in line]
    assert line.endswith("note=ä, step=1")
    shown = gradwire(f"http://{trainer.address}", "checkpoints", "show", state.path).stdout
    assert [row.split() for row in shown.splitlines() if "user_metadata" in row] == [
        ["user_metadata.note", "ä"],
        ["user_metadata.step", "1"],
    ]
    client.delete_run()


def test_metadata_cannot_steer_a_terminal_or_fill_it(trainer: FrontEnd):
    path = CheckpointPath("run-t", STATE, "a")
    trainer.worker.save(path, 10, user_metadata={"a": "\x1b[2J\n" + "x" * 4000})
    for command in (["list"], ["show", path]):
        shown = gradwire(f"http://{trainer.address}", "checkpoints", *command).stdout
        assert "\x1b" not in shown
    (line,) = [
        line
        for line in gradwire(f"http://{trainer.address}", "checkpoints", "list").stdout.splitlines()
        if str(path) in line
    ]
    assert len(line) < 250


@pytest.mark.parametrize("damaged", ["text", ["a"], {"a": 1}, {"a": {"b": "c"}}, {"a": "\ud800"}, {"a": "x" * 10_000}])
def test_a_manifest_that_says_what_none_may_hides_nothing(trainer: FrontEnd, service: ServiceClient, damaged: Any):
    path = trainer.worker.save(CheckpointPath("run-d", STATE, "a"), 10, user_metadata=damaged)
    other = trainer.worker.save(CheckpointPath("run-e", STATE, "a"), 10, user_metadata={"a": "b"})
    found = {each.path: each.user_metadata for each in service.checkpoints.list()}
    assert found[other] == {"a": "b"}
    assert found.get(path, {}) == {}


def test_more_than_may_be_said_of_a_run_is_refused(service: ServiceClient):
    limits = service.get_server_info().limits
    assert (limits.max_user_metadata_entries, limits.max_user_metadata_bytes) == (64, 16_384)
    with pytest.raises(ResourceExhaustedError, match="user_metadata has 67 entries, but at most 64"):
        service.create_training_client(user_metadata={str(number): "" for number in range(65)})
    with pytest.raises(ResourceExhaustedError, match=r'user_metadata\["a"\] has 5000 bytes, but at most 4096'):
        service.create_training_client(user_metadata={"a": "x" * 5000})
    with pytest.raises(ResourceExhaustedError, match="may have 16384 together"):
        service.create_training_client(user_metadata={str(number): "x" * 4000 for number in range(5)})
    client = service.create_training_client()
    with pytest.raises(InvalidArgumentError, match=r"user_metadata\['step'\] is 3; keys and values"):
        client.save_state("a", user_metadata={"step": 3})  # type: ignore[dict-item]
    client.delete_run()


# ── names of tinker's RestClient ──────────────────────────────────────────────────────────────────────────────────────


def test_the_rest_client_lists_runs_and_checkpoints_in_parts_and_keeps_and_deletes_them(service: ServiceClient):
    rest = service.create_rest_client()
    clients = [service.create_training_client() for _ in range(3)]
    paths = [client.save_state("s").result(60).path for client in clients]
    runs = rest.list_training_runs(limit=2, offset=1).result(60)
    assert [run.training_run_id for run in runs.training_runs] == [clients[1].run_id, clients[0].run_id]
    assert (runs.cursor.offset, runs.cursor.limit, runs.cursor.total_count) == (1, 2, 3)
    assert [run.last_checkpoint and run.last_checkpoint.path for run in runs.training_runs] == [paths[1], paths[0]]
    assert [run.last_sampler_checkpoint for run in runs.training_runs] == [None, None]
    everything = rest.list_user_checkpoints().result(60)
    assert everything.cursor is not None
    assert everything.cursor.total_count == len(everything.checkpoints) >= 3
    rest.set_checkpoint_ttl_from_tinker_path(paths[0], 60).result(60)
    assert rest.list_checkpoints(clients[0].run_id).result(60).checkpoints[0].expires_at is not None
    rest.delete_checkpoint(clients[0].run_id, "state/s").result(60)
    assert rest.list_checkpoints(clients[0].run_id).result(60).checkpoints == []
    with pytest.raises(NotFoundError):
        rest.delete_checkpoint_from_tinker_path(paths[0]).result(60)
    with pytest.raises(InvalidArgumentError, match="limit is -1; it must be a whole number"):
        rest.list_user_checkpoints(-1).result(60)
    with pytest.raises(InvalidArgumentError, match="tinker_path is 'tinker://a/weights/b'; it must"):
        rest.get_training_run_by_tinker_path("tinker://a/weights/b")
    for client in clients:
        client.delete_run()


def test_twins_of_calls_that_block_leave_the_event_loop_to_others(trainer: FrontEnd):
    async def both() -> list[str]:
        service = ServiceClient(f"http://{trainer.address}", timeout_s=20)
        ticks: list[str] = []

        async def tick() -> None:
            while True:
                ticks.append("tick")
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        info = await service.get_server_info_async()
        client = await service.create_training_client_async()
        run_id = (await client.get_info_async(timeout_s=20)).run_id
        ticking.cancel()
        assert len(ticks) > 3
        await client.delete_run_async()
        service.close()
        return [info.models[0].base_model, run_id]

    assert asyncio.run(both())[0] == "fake"


def test_arguments_of_tinkers_that_mean_nothing_here_are_refused_by_name(service: ServiceClient):
    client = service.create_training_client()

    class Dimuon:
        type, learning_rate = "dimuon", 0.1

    for call, message in (
        (lambda: client.optim_step(Dimuon()), "optim_params is of the optimizer 'dimuon'; runs are trained with AdamW"),
        (lambda: client.optim_step(Dimuon, adam_params=Dimuon), "optim_params is .* under its older name"),
        (lambda: client.load_state("p", weights_access_token="t"), "weights_access_token is 't'; leave it out"),
        (lambda: client.forward_backward_custom([], print, loss_type_input="logits"), "loss_type_input is 'logits'"),  # type: ignore[arg-type]
        (lambda: client.save_weights_and_get_sampling_client(record_stability_info=True), "record_stability_info is"),
        (lambda: client.save_weights_and_get_sampling_client(kind="inflight"), "kind is 'inflight'; it must be"),  # type: ignore[arg-type]
        (lambda: service.create_lora_training_client(optimizer=Dimuon()), "optimizer is of the optimizer 'dimuon'"),
        (lambda: service.create_sampling_client(retry_config=object()), "retry_config is .*; leave it out"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            call()
    with service.create_sampling_client() as sampler:
        with pytest.raises(InvalidArgumentError, match="prompt_alt_tokens_k is 3; leave it out"):
            sampler.sample([1, 2], 1, prompt_alt_tokens_k=3)
        assert sampler.get_base_model() == "fake"
    client.delete_run()
