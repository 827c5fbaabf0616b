"""A real API server takes what the chart renders: defaults, admission and cross-checks that no schema holds."""

import base64
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes.chart import CHART, NODES, OF_OTHERS, VALUE_SETS, one, rendered
from tests.kubernetes.cluster import Cluster
from tests.kubernetes.installing import fitted, path_of_kind


@pytest.mark.usefixtures("kinds_of_others")
@pytest.mark.parametrize("values", VALUE_SETS)
def test_the_api_server_takes_every_object(cluster: Cluster, namespace: str, helm: Path, values: str):
    for item in rendered(helm, VALUE_SETS[values], namespace=namespace):
        if item["kind"] in OF_OTHERS:
            continue
        item = fitted(cluster, item)
        made: Any = cluster.request("POST", f"{path_of_kind(item, namespace)}?dryRun=All", item)
        assert made["metadata"]["name"] == item["metadata"]["name"]


def test_an_upgrade_finds_the_join_token_that_was_made_first(
    cluster: Cluster, namespace: str, helm: Path, tmp_path: Path
):
    # An API server of 1.20 does not take the rest as it is, and the chart says so.
    others = [path.name for path in (CHART / "templates").iterdir() if path.suffix != ".tpl"]
    chart = shutil.copytree(CHART, tmp_path / "gradwire", ignore=lambda *_: set(others) - {"join-token.yaml"})
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    del about["kubeVersion"]
    (chart / "Chart.yaml").write_text(yaml.safe_dump(about))
    command = [str(helm), "upgrade", "--install", "gradwire", str(chart), f"--namespace={namespace}", "--values=-"]
    tokens: list[str] = []
    for _ in range(2):
        run = subprocess.run(
            [*command, f"--kubeconfig={cluster.kubeconfig}"],
            input=yaml.safe_dump(NODES),
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr
        tokens.append(cluster.get("v1", "secrets", "gradwire-join-token", namespace)["data"]["token"])
    assert len(base64.b64decode(tokens[0])) >= 32
    assert tokens[1] == tokens[0]
    made = [one(rendered(helm, NODES), "Secret")["data"]["token"] for _ in range(2)]
    assert len({*made, tokens[0]}) == 3, "none is anybody else's"
