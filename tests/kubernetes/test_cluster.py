"""The API server under test is a real one: it refuses, it runs controllers, it collects what has lost its owner."""

import pytest
from kubernetes.client.exceptions import ApiException

from tests.kubernetes.cluster import Cluster, eventually


def test_it_refuses_what_a_role_does_not_allow(cluster: Cluster, namespace: str):
    with pytest.raises(ApiException) as refused:
        cluster.request("GET", f"/api/v1/namespaces/{namespace}/secrets", user="nobody-in-particular")
    assert refused.value.status == 403


def test_it_collects_what_has_lost_its_owner(cluster: Cluster, namespace: str):
    owner = cluster.create("v1", "configmaps", {"metadata": {"generateName": "owner-"}}, namespace)["metadata"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["name"], "uid": owner["uid"]}
    cluster.create("v1", "secrets", {"metadata": {"name": "owned", "ownerReferences": [reference]}}, namespace)
    cluster.delete("v1", "configmaps", owner["name"], namespace)
    eventually(lambda: not cluster.everything(namespace))
