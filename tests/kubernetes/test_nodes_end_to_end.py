"""A release on two nodes: everything that the chart renders is made in the API server, and its pods' commands run.

There is no JobSet controller, and an API server of 1.20 has no indexed Jobs: the test makes the pods that they would.
"""

from pathlib import Path
from typing import Any

import gradwire
import pytest
from gradwire import ClientTls, Mesh, ServiceClient

from tests.kubernetes import custom_kinds
from tests.kubernetes.chart import one
from tests.kubernetes.cluster import Cluster, eventually
from tests.kubernetes.control_plane import KEYS, older_probes
from tests.kubernetes.installing import install_all
from tests.kubernetes.kubelet import FakeKubelet
from tests.pem import make_pem

ADAM = gradwire.AdamParams(learning_rate=1e-2)
VALUES: dict[str, Any] = {
    "tls": {"secretName": "gradwire-tls"},
    "service": {"type": "NodePort"},
    "trainer": {
        "baseModel": "/models/tiny_llama",
        "nodes": {"count": 2},
        "persistence": {"accessMode": "ReadWriteMany"},
        "extraArgs": ["--spare-worker-after-s=0"],
    },
}


def make_pod(cluster: Cluster, namespace: str, job_set: str, index: int) -> str:
    """The pod that the JobSet's Job would make for an index; its name."""
    made = cluster.get("jobset.x-k8s.io/v1alpha2", "jobsets", job_set, namespace)
    (job,) = custom_kinds.replicated_jobs(made)
    assert index < job["template"]["spec"]["completions"]
    pod = job["template"]["spec"]["template"]
    pod["metadata"]["generateName"] = f"{job_set}-{job['name']}-0-{index}-"
    (container,) = pod["spec"]["containers"]
    container["env"].append({"name": "JOB_COMPLETION_INDEX", "value": str(index)})
    older_probes(pod)
    return cluster.create("v1", "pods", pod, namespace)["metadata"]["name"]


def phase(cluster: Cluster, namespace: str, pod: str) -> str:
    return cluster.get("v1", "pods", pod, namespace)["status"]["phase"]


def losses(client: gradwire.TrainingClient, *, between: Any = lambda: None) -> list[float]:
    """Of three steps, with something that happens while the second is under way."""
    datum = gradwire.datum_from_tokens_weights(list(range(1, 13)), [1.0] * 12)
    answers = []
    for step in range(3):
        futures = client.forward_backward([datum] * 2, "cross_entropy"), client.optim_step(ADAM)
        if step == 1:
            between()
        answers.append(futures[0].result(100).metrics["loss:sum"])
        futures[1].result(100)
    return answers


@pytest.mark.usefixtures("kinds_of_others")
@pytest.mark.timeout(300)
def test_two_nodes_train_and_lose_nothing_when_the_rank_pod_is_killed(
    cluster: Cluster, namespace: str, helm: Path, kubelet: FakeKubelet, tmp_path: Path
):
    pem = make_pem(tmp_path)
    files = {"tls.crt": pem.server[0], "tls.key": pem.server[1], "ca.crt": pem.ca}
    secrets = {
        "gradwire-api-keys": {"api-keys": KEYS["ops"]},
        "gradwire-tls": {name: path.read_text() for name, path in files.items()},
    }
    for name, data in secrets.items():
        cluster.create("v1", "secrets", {"metadata": {"name": name}, "stringData": data}, namespace)
    job_set = one(install_all(cluster, helm, namespace, VALUES), "JobSet")["metadata"]["name"]

    pod = make_pod(cluster, namespace, job_set, 0)
    trainers = eventually(lambda: cluster.get("apps/v1", "statefulsets", "gradwire", namespace)["status"])
    assert not trainers.get("readyReplicas"), "it is ready once its nodes have joined"
    eventually(
        lambda: cluster.get("apps/v1", "statefulsets", "gradwire", namespace)["status"].get("readyReplicas") == 1,
        timeout_s=100,
    )
    port = cluster.get("v1", "services", "gradwire", namespace)["spec"]["ports"][0]["nodePort"]
    with ServiceClient(f"https://127.0.0.1:{port}", KEYS["ops"], tls=ClientTls(ca_file=pem.ca)) as service:
        mesh = service.get_server_info().models[0].mesh
        assert mesh == Mesh(world_size=2, local_world_size=1, nnodes=2, fsdp_size=2)
        undisturbed = losses(service.create_training_client(lora_rank=4, seed=1))
        assert undisturbed[-1] < undisturbed[0]

        def kill() -> None:
            """As when its machine runs out of memory; a Job replaces a pod that has failed."""
            kubelet.kill(pod)
            eventually(lambda: phase(cluster, namespace, pod) == "Failed")
            make_pod(cluster, namespace, job_set, 0)

        client = service.create_training_client(lora_rank=4, seed=1)
        assert losses(client, between=kill) == undisturbed
        assert client.get_info().step == 3
    assert "A node is gone." in kubelet.log("gradwire-0")
