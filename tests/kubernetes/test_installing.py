"""A real API server takes what the chart renders: defaults, admission and cross-checks that no schema holds."""

from pathlib import Path
from typing import Any

import pytest

from tests.kubernetes.chart import OF_OTHERS, VALUE_SETS, rendered
from tests.kubernetes.cluster import Cluster, path_of
from tests.kubernetes.control_plane import older

PLURALS = {
    "NetworkPolicy": "networkpolicies",
    **{
        kind: f"{kind.lower()}s"
        for kind in (
            *("ConfigMap", "Deployment", "PodDisruptionBudget", "Role", "RoleBinding", "Secret", "Service"),
            *("ServiceAccount", "StatefulSet"),
        )
    },
}


@pytest.mark.parametrize("values", VALUE_SETS)
def test_the_api_server_takes_every_object(cluster: Cluster, namespace: str, helm: Path, values: str):
    minor = int(cluster.request("GET", "/version")["minor"].rstrip("+") or 20)
    for item in rendered(helm, VALUE_SETS[values], namespace=namespace):
        if item["kind"] in OF_OTHERS:
            continue
        if minor < 24:
            item = older(item)
        path = path_of(item["apiVersion"], PLURALS[item["kind"]], namespace)
        made: Any = cluster.request("POST", f"{path}?dryRun=All", item)
        assert made["metadata"]["name"] == item["metadata"]["name"]
