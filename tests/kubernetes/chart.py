"""What the Helm chart renders."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "gradwire"


def rendered(
    helm: Path, values: dict[str, Any], *, namespace: str = "training", release: str = "gradwire"
) -> list[Any]:
    """The objects that a release with these values is made of.

    Raises:
        AssertionError: Helm refused, with what it said.
    """
    command = [str(helm), "template", release, str(CHART), f"--namespace={namespace}", "--values=-"]
    run = subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [one for one in yaml.safe_load_all(run.stdout) if one]


def one(objects: list[Any], kind: str, name: str = "") -> Any:
    """The only object of a kind, or of a kind and name."""
    (found,) = (item for item in objects if item["kind"] == kind and name in ("", item["metadata"]["name"]))
    return found


GPU = {"trainer": {"gpu": {"count": 1}, "sharedMemory": "16Gi", "runtimeClassName": "nvidia"}}
TLS = {"tls": {"secretName": "gradwire-tls"}}
JOBS = {"jobs": {"enabled": True}}
NODES = {"trainer": {"nodes": {"count": 2}, "persistence": {"accessMode": "ReadWriteMany"}}}
VALUE_SETS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gpu": GPU,
    "several GPUs": {"trainer": {"gpu": {"count": 8}}, **JOBS},
    "two nodes": NODES,
    "two nodes of 8 GPUs, with TLS": {
        **TLS,
        **JOBS,
        "trainer": {
            "nodes": {"count": 2, "maxRestarts": 3, "joinToken": {"secretName": "join"}},
            "gpu": {"count": 8},
            "rdma": {"count": 8, "resourceName": "vpc.amazonaws.com/efa"},
            "persistence": {"accessMode": "ReadWriteMany", "storageClass": "shared"},
            "runtimeClassName": "nvidia",
            "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
            "podLabels": {"team": "one"},
            "podAnnotations": {"example.org/why": "a test"},
        },
    },
    "many nodes of a TrainJob, with mutual TLS": {
        "tls": {"secretName": "gradwire-tls", "clientCa": True},
        "auth": {"secretName": ""},
        "imagePullSecrets": [{"name": "registry"}],
        "trainer": {
            "nodes": {"count": 1024, "kind": "TrainJob", "tls": {"secretName": "gradwire-node-tls"}},
            "persistence": {"existingClaim": "mine"},
            "envFrom": [{"secretRef": {"name": "hub-token"}}],
            "podDisruptionBudget": {"enabled": False},
        },
        "fullnameOverride": "a" * 45,
    },
    "tls": TLS,
    "mutual tls": {"tls": {"secretName": "gradwire-tls", "clientCa": True}, "auth": {"secretName": ""}},
    "no key": {"auth": {"secretName": "", "allowNoApiKey": True}},
    "object store": {"trainer": {"storage": {"url": "s3://bucket/runs", "secretName": "s3"}}},
    "claim of one's own": {"trainer": {"persistence": {"existingClaim": "mine"}}},
    "storage class": {"trainer": {"persistence": {"storageClass": "fast", "accessMode": "ReadWriteOncePod"}}},
    "placement": {
        "trainer": {
            "nodeSelector": {"topology.kubernetes.io/zone": "a"},
            "tolerations": [{"key": "training", "operator": "Exists"}],
            "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "priorityClassName": "high",
            "podLabels": {"team": "one"},
            "podAnnotations": {"example.org/why": "a test"},
        },
        "imagePullSecrets": [{"name": "registry"}],
    },
    "environment": {
        "trainer": {
            "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
            "envFrom": [{"secretRef": {"name": "hub-token"}}],
            "extraArgs": ["--max-runs=4"],
            "maxContextLength": 4096,
        }
    },
    "other resources": {
        "trainer": {"resources": {"limits": {"rdma/hca": 1, "memory": "1.5Ti"}, "requests": {"cpu": 0.5}}}
    },
    "digest": {"image": {"repository": "registry.example.org/gradwire", "digest": "sha256:" + "0" * 64}},
    "load balancer": {
        "service": {"type": "LoadBalancer", "port": 443, "annotations": {"example.org/internal": "true"}}
    },
    "no metrics": {"metrics": {"enabled": False}},
    "prometheus operator": {"metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}}},
    "gateway api": {
        "grpcRoute": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["train.example.org"]}
    },
    "open network": {"networkPolicy": {"enabled": False}},
    "narrow network": {
        "networkPolicy": {
            "clients": [{"namespaceSelector": {"matchLabels": {"team": "one"}}}],
            "metricsFrom": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "prometheus"}}}],
        }
    },
    "no budget": {"trainer": {"podDisruptionBudget": {"enabled": False}}},
    "jobs": JOBS,
    "jobs alone, on GPUs, with TLS": {
        **TLS,
        "trainer": {"enabled": False},
        "jobs": {
            "enabled": True,
            "trainer": {"gpu": {"count": 1}, "persistence": {"size": "1Ti"}},
            "trainerAddress": "{name}.example.org:443",
            "nodeSelector": {"pool": "small"},
            "tolerations": [{"operator": "Exists"}],
        },
    },
    "page": {"page": {"enabled": True}},
    "gateway": {"gateway": {"enabled": True}},
    "gateway beyond the cluster": {
        **TLS,
        "gateway": {
            "enabled": True,
            "serviceType": "LoadBalancer",
            "trainers": ["https://one.example.org:443", "https://two.example.org:443"],
            "servedModelNames": ["small=HuggingFaceTB/SmolLM2-135M-Instruct"],
            "persistence": {"storageClass": "fast"},
            "nodeSelector": {"pool": "small"},
            "tolerations": [{"operator": "Exists"}],
            "httpRoute": {"enabled": True, "parentRefs": [{"name": "edge"}], "hostnames": ["api.example.org"]},
        },
        "networkPolicy": {"clients": [{"namespaceSelector": {"matchLabels": {"team": "one"}}}]},
    },
    "long names": {"fullnameOverride": "a" * 45, "gateway": {"enabled": True}, **JOBS},
}
"""What the chart is rendered with; every value that switches something stands in one of them."""


OF_OTHERS = {"ServiceMonitor", "GRPCRoute", "HTTPRoute"}
"""Kinds whose schemas are not here."""
