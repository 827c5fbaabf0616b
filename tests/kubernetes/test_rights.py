"""The Role of the jobs control plane: test_jobs_end_to_end.py does all it does with it, and nothing else is allowed."""

from pathlib import Path
from typing import Any

from tests.kubernetes.cluster import Cluster
from tests.kubernetes.control_plane import install

ALLOWED = {
    "services": {"create", "delete", "list", "patch"},
    "statefulsets": {"create", "delete", "list", "watch"},
    "secrets": {"create", "delete"},
    "persistentvolumeclaims": {"delete"},
    "pods": {"list", "watch"},
    "pods/log": {"get"},
    "events": {"list", "watch"},
}
"""What jobs/kubernetes.py calls."""
VERBS = ("create", "delete", "deletecollection", "get", "list", "patch", "update", "watch")
OTHERS = (
    *("pods/exec", "pods/portforward", "pods/attach", "pods/eviction", "services/proxy", "statefulsets/scale"),
    *("configmaps", "serviceaccounts", "serviceaccounts/token", "deployments", "daemonsets", "jobs", "ingresses"),
    *("roles", "rolebindings", "clusterroles", "clusterrolebindings", "nodes", "namespaces", "persistentvolumes"),
    *("storageclasses", "networkpolicies", "certificatesigningrequests", "customresourcedefinitions"),
)
GROUPS = {
    "statefulsets": "apps",
    "statefulsets/scale": "apps",
    "deployments": "apps",
    "daemonsets": "apps",
    "jobs": "batch",
    "ingresses": "networking.k8s.io",
    "networkpolicies": "networking.k8s.io",
    "storageclasses": "storage.k8s.io",
    "certificatesigningrequests": "certificates.k8s.io",
    "customresourcedefinitions": "apiextensions.k8s.io",
    **dict.fromkeys(("roles", "rolebindings", "clusterroles", "clusterrolebindings"), "rbac.authorization.k8s.io"),
}


def may(cluster: Cluster, user: str, namespace: str, resource: str, verb: str) -> bool:
    name, _, subresource = resource.partition("/")
    attributes: dict[str, Any] = {"verb": verb, "resource": name, "group": GROUPS.get(resource, "")}
    attributes |= {"subresource": subresource, "namespace": namespace}
    groups = ["system:authenticated", "system:serviceaccounts", f"system:serviceaccounts:{namespace}"]
    review = {"spec": {"user": user, "groups": groups, "resourceAttributes": attributes}}
    return cluster.create("authorization.k8s.io/v1", "subjectaccessreviews", review)["status"]["allowed"]


def test_the_control_plane_may_do_what_it_does_and_nothing_else(
    cluster: Cluster, namespace: str, helm: Path, tmp_path: Path
):
    user = install(cluster, helm, namespace, tmp_path, {}).account
    found = {
        resource: {verb for verb in VERBS if may(cluster, user, namespace, resource, verb)}
        for resource in (*ALLOWED, *OTHERS)
    }
    assert {resource: verbs for resource, verbs in found.items() if verbs} == ALLOWED
    elsewhere = {verb for resource in ALLOWED for verb in VERBS if may(cluster, user, "default", resource, verb)}
    assert elsewhere == set(), "its rights end with its namespace"


def test_a_trainer_may_do_nothing_in_the_cluster(cluster: Cluster, namespace: str, helm: Path, tmp_path: Path):
    install(cluster, helm, namespace, tmp_path, {})
    trainer = f"system:serviceaccount:{namespace}:gradwire-trainer"
    assert not any(may(cluster, trainer, namespace, resource, verb) for resource in ALLOWED for verb in VERBS)
