"""A jobs control plane outside of the cluster, with the rights that the chart gives it and no others."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes.chart import one, rendered
from tests.kubernetes.cluster import Cluster, eventually

KEYS = {"alice": "key-of-alice", "bob": "key-of-bob", "ops": "key-of-ops"}
IMAGE = "gradwire:0.1.0"


@dataclass(frozen=True)
class Release:
    """The chart's objects in a namespace, less those that would need a node."""

    namespace: str
    template: Path
    kubeconfig: Path
    account: str


def install(cluster: Cluster, helm: Path, namespace: str, folder: Path, values: dict[str, Any]) -> Release:
    """Makes what the control plane needs of the chart: accounts, rights, keys, and its template as a file."""
    objects = rendered(helm, {"trainer": {"enabled": False}, "jobs": {"enabled": True}, **values}, namespace=namespace)
    for item in objects:
        plural = {"ServiceAccount": "serviceaccounts", "Role": "roles", "RoleBinding": "rolebindings"}.get(item["kind"])
        if plural is not None:
            cluster.create(item["apiVersion"], plural, item, namespace)
    lines = "\n".join(f"{name} {key}{' admin' if name == 'ops' else ''}" for name, key in KEYS.items())
    data = {"api-keys": base64.b64encode(lines.encode()).decode()}
    cluster.create("v1", "secrets", {"metadata": {"name": "gradwire-api-keys"}, "data": data}, namespace)
    template = folder / "trainer.yaml"
    parts = yaml.safe_load_all(one(objects, "ConfigMap")["data"]["trainer.yaml"])
    template.write_text(yaml.safe_dump_all([older(part) for part in parts]))
    (folder / "api-keys").write_text(lines + "\n")
    account = "gradwire-jobs"
    kubeconfig = folder / "kubeconfig"
    kubeconfig.write_text(_kubeconfig(cluster, namespace, account))
    return Release(namespace, template, kubeconfig, f"system:serviceaccount:{namespace}:{account}")


def older(item: Any) -> Any:
    """An object for API servers before 1.24, which know no gRPC probes and refuse a probe they see no handler in."""
    if item["kind"] in ("StatefulSet", "Deployment"):
        older_probes(item["spec"]["template"])
    elif item["kind"] == "PodDisruptionBudget":
        item = {**item, "apiVersion": "policy/v1beta1"}
    return item


def older_probes(pod: Any) -> None:
    """Makes gRPC probes of a pod's only container look whether its port is open."""
    (container,) = pod["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        if "grpc" in container[probe]:
            container[probe]["tcpSocket"] = {"port": container[probe].pop("grpc")["port"]}


def _kubeconfig(cluster: Cluster, namespace: str, account: str) -> str:
    """The administrator's, as the ServiceAccount."""
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    answer = eventually(
        lambda: cluster.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", body)
    )
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    context = next(item for item in config["contexts"] if item["name"] == config["current-context"])["context"]
    context |= {"user": "jobs", "namespace": namespace}
    config["users"] = [{"name": "jobs", "user": {"token": answer["status"]["token"]}}]
    return yaml.safe_dump(config)


@contextlib.contextmanager
def running_control_plane(release: Release, folder: Path, *arguments: str) -> Iterator[str]:
    """Its base_url; it is stopped with SIGTERM, and its trainers go on."""
    ready_file, log = folder / "ready.json", folder / "jobs.log"
    ready_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "trainer_service", "jobs", "--backend=kubernetes", "--listen=127.0.0.1:0"]
    command += [f"--kubernetes-template={release.template}", "--kubernetes-address=127.0.0.1:{node_port}"]
    command += [f"--api-key-file={folder / 'api-keys'}", f"--ready-file={ready_file}", *arguments]
    environment = {**os.environ, "KUBECONFIG": str(release.kubeconfig)}
    with log.open("ab") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while not ready_file.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        yield f"http://{json.loads(ready_file.read_text())['address']}"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    assert code == 0, log.read_text()
