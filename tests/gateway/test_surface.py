"""The whole public surface of tinker's SDK, by reflection. `GRADWIRE_WRITE_DOCS=1` writes what it finds down."""

import json
import os
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import pytest
import tinker

from tests.gateway.conftest import KEY
from tests.gateway.data import make_data
from tests.gateway.surface import ADAM, ELSEWHERE, PROBES, World, attempt, public_calls, table
from tests.gateway_process import GatewayProcess

DOCS = Path(__file__).parents[2] / "docs" / "compatibility.md"
_HEADER = "| tinker 0.38 |"


@pytest.fixture
def world(gateway: GatewayProcess) -> World:
    """Something of everything."""
    service = tinker.ServiceClient(base_url=gateway.base_url, api_key=KEY)
    rest = tinker.RestClient(base_url=gateway.base_url, api_key=KEY)
    # The SDK loads tokenizers by the model's name, which must be one that the client can read.
    base_model = rest.get_server_capabilities().result().supported_models[-1].model_name or ""
    client = service.create_lora_training_client(base_model, rank=4).result()
    client.forward_backward(make_data(), "cross_entropy")
    client.optim_step(ADAM).result()
    state = client.save_state("state").result().path
    return World(
        service=service,
        client=client,
        sampler=client.save_weights_and_get_sampling_client().result(),
        rest=rest,
        admin=tinker.AdminClient(base_url=gateway.base_url, api_key=KEY),
        base_model=base_model,
        session_id=service.holder.get_session_id(),
        run_id=state.removeprefix("tinker://").partition("/")[0],
        state=state,
        weights=client.save_weights_for_sampler("weights").result().path,
    )


def test_every_public_call_is_served_or_says_what_to_do_instead(world: World, monkeypatch: pytest.MonkeyPatch):
    calls = public_calls()
    assert sorted(calls) == sorted([*PROBES, *ELSEWHERE]), "calls came or went: probe them in surface.py"
    # Copies want a project, which means nothing here.
    monkeypatch.setenv("TINKER_PROJECT_ID", "p")
    results: dict[str, str] = {}
    failed: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        for name in calls:
            if name in ELSEWHERE:
                probe, why = ELSEWHERE[name]
                with pytest.raises(Exception, match="."):
                    probe(world)
                results[name] = why
            else:
                try:
                    results[name] = attempt(PROBES[name], world)
                except Exception as exc:
                    failed[name] = repr(exc)
    world.service.close("success")
    assert failed == {}
    prose, _, _ = DOCS.read_text().partition(_HEADER)
    found = prose + table(results)
    if os.environ.get("GRADWIRE_WRITE_DOCS"):
        DOCS.write_text(found)
    assert DOCS.read_text() == found, "run this test with GRADWIRE_WRITE_DOCS=1"


def test_the_command_line_lists_and_downloads(world: World, gateway: GatewayProcess, tmp_path: Path):
    env = {**os.environ, "TINKER_BASE_URL": gateway.base_url, "TINKER_API_KEY": KEY, "HOME": str(tmp_path)}

    def told(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "tinker.cli", "--format", "json", *words],
            env=env,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    assert world.run_id in json.dumps(json.loads(told("run", "list")))
    assert world.state in json.dumps(json.loads(told("checkpoint", "list")))
    # It loads the state into a model of its own, exports that, and deletes the export.
    told("checkpoint", "download", world.state, "--output", str(tmp_path))
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert names <= {path.name for path in folder.iterdir()}
    whole = world.client.save_weights_external("whole").result().path
    urls = world.rest.get_external_weights_urls(whole).result().urls
    with urllib.request.urlopen(urls["adapter_model.safetensors"]) as response:
        assert response.read() == (folder / "adapter_model.safetensors").read_bytes()
    kinds = {
        one.checkpoint_id: one.checkpoint_type for one in world.rest.list_checkpoints(world.run_id).result().checkpoints
    }
    assert kinds["external_weights/whole"] == "external"
    world.service.close("success")
