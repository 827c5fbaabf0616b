"""What the chart renders, made in a cluster as helm makes it, less the release's own record."""

from pathlib import Path
from typing import Any

from tests.kubernetes import custom_kinds
from tests.kubernetes.chart import OF_OTHERS, rendered
from tests.kubernetes.cluster import Cluster, path_of
from tests.kubernetes.control_plane import older

_PLURALS = {
    "NetworkPolicy": "networkpolicies",
    **{
        kind: f"{kind.lower()}s"
        for kind in (
            *("ConfigMap", "Deployment", "PodDisruptionBudget", "Role", "RoleBinding", "Secret", "Service"),
            *("ServiceAccount", "StatefulSet"),
        )
    },
    **{kind: custom_kinds.plural(kind) for kind in custom_kinds.KINDS},
}


def path_of_kind(item: Any, namespace: str) -> str:
    """Where objects like it are."""
    return path_of(item["apiVersion"], _PLURALS[item["kind"]], namespace)


def fitted(cluster: Cluster, item: Any) -> Any:
    """The object as the cluster's version takes it."""
    minor = int(cluster.request("GET", "/version")["minor"].rstrip("+") or 20)
    return older(item) if minor < 24 else item


def install_all(cluster: Cluster, helm: Path, namespace: str, values: dict[str, Any]) -> list[Any]:
    """Makes everything that the chart renders, and returns it."""
    objects = rendered(helm, values, namespace=namespace)
    for item in objects:
        assert item["kind"] not in OF_OTHERS
        made = fitted(cluster, item)
        cluster.request("POST", path_of_kind(made, namespace), made)
    return objects
