"""A trainer's other machines in the chart: how they join, who reaches them, and what they are given."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kubernetes import custom_kinds
from tests.kubernetes.chart import CHART, NODES, VALUE_SETS, one, rendered
from trainer_service.__main__ import _parser
from trainer_service.command_lines import read_options
from trainer_service.config import NodeConfig, TrainerConfig
from trainer_service.fleet import node_health

WITH_TLS = "two nodes of 8 GPUs, with TLS"
TRAIN_JOB = "many nodes of a TrainJob, with mutual TLS"


def trainer_pod(objects: list[Any]) -> Any:
    return one(objects, "StatefulSet", "gradwire")["spec"]["template"]


def node_job(objects: list[Any], kind: str = "JobSet") -> Any:
    (job,) = custom_kinds.replicated_jobs(one(objects, kind))
    return job["template"]["spec"]


def node_pod(objects: list[Any], kind: str = "JobSet") -> Any:
    return node_job(objects, kind)["template"]


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADWIRE_HOME", "/data")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")


def test_a_node_joins_where_its_trainer_listens(helm: Path):
    objects = rendered(helm, VALUE_SETS[WITH_TLS])
    trainer = trainer_pod(objects)["spec"]["containers"][0]
    serve = read_options(TrainerConfig, _parser().parse_args(trainer["args"]))
    (node,) = node_pod(objects)["spec"]["containers"]
    join = read_options(NodeConfig, _parser().parse_args(node["args"]))
    assert serve.nodes.nnodes == 2
    assert join.node_rank == 1
    assert serve.ranks.nproc_per_node == 8
    # The pod's own address, and its name in the headless Service, which tells it before the pod is ready.
    assert serve.nodes.rdzv_endpoint == "[$(POD_IP)]:29400"
    assert {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}} in trainer["env"]
    assert join.join == "https://gradwire-0.gradwire-headless.training.svc:29400"
    headless = one(objects, "Service", "gradwire-headless")["spec"]
    assert headless["clusterIP"] == "None"
    assert headless["publishNotReadyAddresses"]
    assert {"name": "rendezvous", "port": 29400, "targetPort": "rendezvous"} in headless["ports"]
    assert {"name": "rendezvous", "containerPort": 29400} in trainer["ports"]
    assert 29400 not in {port["port"] for port in one(objects, "Service", "gradwire")["spec"]["ports"]}
    assert serve.nodes.join_token_file == join.join_token_file
    assert node["readinessProbe"]["grpc"] == {"port": 7776, "service": node_health.SERVICE}
    assert join.health_listen == "0.0.0.0:7776"


def test_nodes_have_the_trainers_machines_and_folder_but_not_its_keys(helm: Path):
    objects = rendered(helm, VALUE_SETS[WITH_TLS])
    trainer, node = trainer_pod(objects)["spec"], node_pod(objects)["spec"]
    for same in ("resources", "image", "securityContext"):
        assert node["containers"][0][same] == trainer["containers"][0][same]
    assert node["containers"][0]["resources"]["limits"]["vpc.amazonaws.com/efa"] == 8
    for same in ("tolerations", "runtimeClassName", "securityContext"):
        assert node[same] == trainer[same]
    volumes = {volume["name"]: volume for volume in node["volumes"]}
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "data-gradwire-0"}
    assert volumes["tls"]["secret"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]
    assert "keys" not in volumes
    (claim,) = one(objects, "StatefulSet", "gradwire")["spec"]["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]


def test_ranks_reach_one_another_and_nobody_else_does(helm: Path):
    objects = rendered(helm, NODES)
    trainer, node = (pod["metadata"]["labels"] for pod in (trainer_pod(objects), node_pod(objects)))
    selectors = [{"podSelector": {"matchLabels": labels}} for labels in (trainer, node)]
    policy = one(objects, "NetworkPolicy", "gradwire-node")["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= node.items()
    assert policy["ingress"] == [{"from": selectors}]
    clients, nodes = one(objects, "NetworkPolicy", "gradwire-trainer")["spec"]["ingress"]
    assert clients["ports"] == [{"port": "grpc"}], "the port where nodes join is not theirs"
    assert nodes == {"from": selectors[1:]}


def test_a_pod_that_was_evicted_or_stopped_is_replaced_and_counts_for_nothing(helm: Path):
    job = node_job(rendered(helm, NODES))
    (container,) = job["template"]["spec"]["containers"]
    evicted, stopped = job["podFailurePolicy"]["rules"]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "Kubernetes asks for it with a podFailurePolicy"
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert (evicted["action"], stopped["action"]) == ("Ignore", "Ignore")
    # With 0 the Job would take a pod that was told to stop for one that is done, and start no other.
    config = read_options(NodeConfig, _parser().parse_args(container["args"]))
    assert stopped["onExitCodes"] == {"containerName": "node", "operator": "In", "values": [config.stop_exit_code]}
    assert config.stop_exit_code != 0


def test_what_would_change_a_job_set_makes_another(helm: Path):
    """Its spec cannot be changed; helm then removes the old one."""
    changes: list[dict[str, Any]] = [
        {},
        {"image": {"tag": "2"}},
        {"tls": {"secretName": "gradwire-tls"}},
        {"trainer": {**NODES["trainer"], "nodes": {"count": 3}}},
        {"trainer": {**NODES["trainer"], "nodes": {"count": 2, "kind": "TrainJob"}}},
    ]
    names = {
        item["metadata"]["name"]
        for change in changes
        for item in rendered(helm, {**NODES, **change})
        if item["kind"] in ("JobSet", "TrainJob")
    }
    assert len(names) == len(changes)
    (same,) = {
        one(rendered(helm, {**NODES, **change}), "JobSet")["metadata"]["name"]
        for change in ({}, {"service": {"port": 1}}, {"metrics": {"enabled": False}})
    }
    assert same in names


def test_a_train_job_has_as_many_nodes_as_its_runtime_makes(helm: Path):
    objects = rendered(helm, VALUE_SETS[TRAIN_JOB])
    job, runtime = one(objects, "TrainJob"), one(objects, "TrainingRuntime")
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["trainer"]["numNodes"] == runtime["spec"]["mlPolicy"]["numNodes"] == 1023
    assert node_job(objects, "TrainingRuntime")["completions"] == 1023
    node = node_pod(objects, "TrainingRuntime")["spec"]
    config = read_options(NodeConfig, _parser().parse_args(node["containers"][0]["args"]))
    assert config.tls is not None
    assert str(config.tls.cert_file) == "/etc/gradwire/node-tls/tls.crt"
    volumes = {volume["name"]: volume for volume in node["volumes"]}
    assert volumes["node-tls"]["secret"]["secretName"] == "gradwire-node-tls"
    assert volumes["data"]["persistentVolumeClaim"] == {"claimName": "mine"}


def test_jobs_beside_a_trainer_on_several_nodes_are_on_one(helm: Path):
    objects = rendered(helm, VALUE_SETS[WITH_TLS])
    assert "--nnodes" not in one(objects, "ConfigMap")["data"]["trainer.yaml"]
    assert "join-token" not in one(objects, "ConfigMap")["data"]["trainer.yaml"]


def test_the_values_that_the_documents_show_are_two_nodes_of_8_gpus(helm: Path):
    page = (CHART.parents[2] / "docs" / "kubernetes.md").read_text()
    (shown,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    objects = rendered(helm, yaml.safe_load(shown))
    trainer = trainer_pod(objects)["spec"]["containers"][0]
    assert {"--nnodes=2", "--nproc-per-node=8", "--base-model=Qwen/Qwen3-8B"} <= set(trainer["args"])
    assert node_pod(objects)["spec"]["containers"][0]["resources"] == trainer["resources"]
    # The names that the page says.
    assert {"gradwire-headless", "gradwire"} <= {item["metadata"]["name"] for item in objects}
    assert one(objects, "Secret")["metadata"]["name"] == "gradwire-join-token"
