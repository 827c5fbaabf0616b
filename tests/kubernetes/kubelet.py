"""A kubelet and a kube-proxy in a thread: a pod is a process on this machine, a PersistentVolumeClaim a folder.

It does what the tests need of the real ones: binds pods to its node, gives containers their files and environment, asks
for health, tells the API server what becomes of them, starts again what ends, ends what is deleted, answers for logs.
A container's port is the nodePort of the Service that selects its pod, on loopback. All pods have one address,
127.0.0.1, which stands for their names too; the port where nodes join is one that is free here.
"""

import base64
import contextlib
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from kubernetes.client.exceptions import ApiException

from tests.kubernetes.cluster import Cluster
from tests.listening import free_port

_TURN_S = 0.15
_RESTART_S = 1.0
_SERVICES = {"trainer": "gradwire.v1.TrainerService", "node": "gradwire.v1.NodeService"}
"""Whose health makes a container ready; a probe of an old API server does not say it."""


@dataclass
class _Container:
    """One pod's only container."""

    uid: str
    folder: Path
    log: Path
    health_port: int
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    last_state: dict[str, Any] = field(default_factory=dict)
    ended_at: float = 0.0
    told: str = ""


class FakeKubelet:
    """Runs the pods of one namespace until closed.

    Args:
        cluster: Whose API server it asks.
        namespace: Its pods are run.
        folder: Volumes and logs are below it.
        images: Images that it has; others do not come.
        files: Folders of this machine that every image holds, by their path in it.
    """

    def __init__(
        self, cluster: Cluster, namespace: str, folder: Path, *, images: set[str], files: dict[str, Path] | None = None
    ) -> None:
        self._cluster = cluster
        self._namespace = namespace
        self._folder = folder
        self._images = images
        self._image_files = files or {}
        self._containers: dict[str, _Container] = {}
        self._rendezvous_port = free_port()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.failure: BaseException | None = None
        self._server = _log_server(self)
        self.node = f"node-{namespace}"
        cluster.create("v1", "nodes", {"metadata": {"name": self.node}})
        status = {
            "addresses": [{"type": "InternalIP", "address": "127.0.0.1"}],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._server.server_address[1]}},
            "conditions": [{"type": "Ready", "status": "True"}],
        }
        cluster.patch("v1", "nodes", self.node, {"status": status}, status=True)
        self._threads = [threading.Thread(target=self._run), threading.Thread(target=self._server.serve_forever)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Ends all processes and forgets the node."""
        self._stop.set()
        self._server.shutdown()
        for thread in self._threads:
            thread.join(60)
        self._server.server_close()
        for container in self._containers.values():
            _end(container, signal.SIGKILL)
        self._cluster.delete("v1", "nodes", self.node)
        if self.failure is not None:
            raise self.failure

    def kill(self, pod: str) -> None:
        """Kills a pod's process, as a node does that runs out of memory."""
        with self._lock:
            _end(self._containers[pod], signal.SIGKILL)

    def log(self, pod: str) -> str:
        """What its container has written."""
        return self._containers[pod].log.read_text()

    def _run(self) -> None:
        try:
            while not self._stop.wait(_TURN_S):
                with self._lock:
                    self._turn()
        except BaseException as exc:
            self.failure = exc

    def _turn(self) -> None:
        pods = {pod["metadata"]["name"]: pod for pod in self._cluster.list("v1", "pods", self._namespace)}
        for name, pod in pods.items():
            # A pod may go between two calls.
            try:
                self._look_after(name, pod)
            except ApiException as exc:
                if exc.status not in (404, 409):
                    raise
        for name in set(self._containers) - set(pods):
            _end(self._containers.pop(name), signal.SIGKILL)

    def _look_after(self, name: str, pod: dict[str, Any]) -> None:
        container = self._containers.get(name)
        if container is not None and container.uid != pod["metadata"]["uid"]:
            # Deleted with no grace, and there is another of its name.
            _end(self._containers.pop(name), signal.SIGKILL)
            container = None
        if pod["metadata"].get("deletionTimestamp"):
            self._leave(name, pod, container)
        elif not pod["spec"].get("nodeName"):
            target = {"apiVersion": "v1", "kind": "Node", "name": self.node}
            binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
            self._cluster.create("v1", f"pods/{name}/binding", binding, self._namespace)
        elif pod["spec"]["containers"][0]["image"] not in self._images:
            waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image: not found"}
            self._tell(name, pod, {"waiting": waiting}, ready=False, container=None)
        elif container is None:
            self._start(name, pod)
        else:
            self._keep(name, pod, container)

    def _start(self, name: str, pod: dict[str, Any]) -> None:
        log = self._folder / f"{name}.log"
        container = _Container(pod["metadata"]["uid"], self._folder / name, log, health_port=free_port())
        container.process = self._launch(pod, container)
        self._containers[name] = container

    def _keep(self, name: str, pod: dict[str, Any], container: _Container) -> None:
        assert container.process is not None
        code = container.process.poll()
        if code is None:
            ready = _healthy(container.health_port, _SERVICES[pod["spec"]["containers"][0]["name"]])
            self._tell(name, pod, {"running": {}}, ready=ready, container=container)
            return
        if not container.ended_at:
            container.ended_at = time.monotonic()
            container.last_state = {"terminated": {"exitCode": 128 - code if code < 0 else code, "reason": "Error"}}
            self._tell(name, pod, container.last_state, ready=False, container=container)
        elif time.monotonic() - container.ended_at > _RESTART_S and pod["spec"]["restartPolicy"] == "Always":
            container.restarts += 1
            container.ended_at = 0.0
            container.process = self._launch(pod, container)

    def _leave(self, name: str, pod: dict[str, Any], container: _Container | None) -> None:
        process = container.process if container is not None else None
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(pod["metadata"].get("deletionGracePeriodSeconds", 30))
        if container is not None:
            _end(self._containers.pop(name), signal.SIGKILL)
        self._cluster.delete("v1", "pods", name, self._namespace, grace_s=0)

    def _launch(self, pod: dict[str, Any], container: _Container) -> subprocess.Popen[bytes]:
        (spec,) = pod["spec"]["containers"]
        paths = self._mounts(pod, spec, container.folder)

        def local(text: str) -> str:
            for where, path in sorted(paths.items(), key=lambda item: -len(item[0])):
                if text == where or text.startswith(f"{where}/"):
                    return str(path) + text[len(where) :]
            return text

        args = []
        for arg in spec["args"]:
            # The only variable that ours name; $$ stands for $.
            option, equals, value = arg.replace("$(POD_IP)", "127.0.0.1").replace("$$", "$").partition("=")
            if option == "--listen":
                value = f"127.0.0.1:{self._node_port(pod)}"
            elif option == "--rdzv-endpoint":
                value = f"{value.rpartition(':')[0]}:{self._rendezvous_port}"
            elif option == "--join":
                scheme, slashes, _ = value.rpartition("//")
                value = f"{scheme}{slashes}127.0.0.1:{self._rendezvous_port}"
            elif option == "--health-listen":
                value = f"127.0.0.1:{container.health_port}"
            elif option == "--metrics-port":
                value = "0"
            args.append(f"{option}{equals}{local(value).replace('0.0.0.0', '127.0.0.1')}")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        for variable in spec.get("env", []):
            environment[variable["name"]] = local(variable.get("value", "")) or self._secret_key(variable)
        environment.pop("KUBECONFIG", None)
        with container.log.open("ab") as out:
            command = [sys.executable, "-m", "trainer_service", *args]
            return subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)

    def _mounts(self, pod: dict[str, Any], spec: dict[str, Any], folder: Path) -> dict[str, Path]:
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        paths: dict[str, Path] = dict(self._image_files)
        for mount in spec["volumeMounts"]:
            volume = volumes[mount["name"]]
            if "persistentVolumeClaim" in volume:
                path = self._folder / "volumes" / volume["persistentVolumeClaim"]["claimName"]
                self._cluster.get("v1", "persistentvolumeclaims", path.name, self._namespace)
                path.mkdir(parents=True, exist_ok=True)
            else:
                path = folder / mount["name"]
                path.mkdir(parents=True, exist_ok=True)
                for file, data in self._files(volume).items():
                    (path / file).write_bytes(base64.b64decode(data))
            paths[mount["mountPath"]] = path
        return paths

    def _files(self, volume: dict[str, Any]) -> dict[str, str]:
        if "secret" not in volume:
            return {}
        data = self._cluster.get("v1", "secrets", volume["secret"]["secretName"], self._namespace)["data"]
        wanted = [item["key"] for item in volume["secret"].get("items", [])] or list(data)
        return {key: data[key] for key in wanted}

    def _secret_key(self, variable: dict[str, Any]) -> str:
        reference = variable.get("valueFrom", {}).get("secretKeyRef")
        if reference is None:
            return "127.0.0.1" if "fieldRef" in variable.get("valueFrom", {}) else ""
        data = self._cluster.get("v1", "secrets", reference["name"], self._namespace)["data"]
        return base64.b64decode(data[reference["key"]]).decode()

    def _node_port(self, pod: dict[str, Any]) -> int:
        labels = pod["metadata"]["labels"].items()
        for service in self._cluster.list("v1", "services", self._namespace):
            selector = service["spec"].get("selector") or {}
            if selector and selector.items() <= labels and service["spec"]["ports"][0].get("nodePort"):
                return service["spec"]["ports"][0]["nodePort"]
        raise AssertionError(f"No Service of type NodePort leads to {pod['metadata']['name']}.")

    def _tell(
        self, name: str, pod: dict[str, Any], state: dict[str, Any], *, ready: bool, container: _Container | None
    ) -> None:
        phase = "Running" if container is not None else "Pending"
        if "terminated" in state and pod["spec"]["restartPolicy"] == "Never":
            phase = "Failed" if state["terminated"]["exitCode"] else "Succeeded"
        status = {
            "phase": phase,
            "podIP": "127.0.0.1",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": str(ready)},
            ],
            "containerStatuses": [
                {
                    "name": pod["spec"]["containers"][0]["name"],
                    "image": pod["spec"]["containers"][0]["image"],
                    "imageID": "",
                    "ready": ready,
                    "restartCount": container.restarts if container else 0,
                    "state": state,
                    "lastState": container.last_state if container and "terminated" not in state else {},
                }
            ],
        }
        told = json.dumps(status)
        if container is None or container.told != told:
            self._cluster.patch("v1", "pods", name, {"status": status}, self._namespace, status=True)
        if container is not None:
            container.told = told


def _healthy(port: int, service: str) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)]) as channel:
        asked = health_pb2.HealthCheckRequest(service=service)
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            return stub.Check(asked, timeout=2).status == health_pb2.HealthCheckResponse.SERVING
        except grpc.RpcError:
            return False


def _end(container: _Container, sig: signal.Signals) -> None:
    """Ends a container's processes, its worker's too: a cgroup's end is theirs."""
    process = container.process
    if process is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, sig)
    process.wait(30)


def _log_server(kubelet: FakeKubelet) -> ThreadingHTTPServer:
    """What the API server asks for a container's log: GET /containerLogs/NAMESPACE/POD/CONTAINER."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            pod = parts.path.split("/")[3]
            lines = kubelet.log(pod).splitlines(keepends=True)
            body = "".join(lines[-int(parse_qs(parts.query).get("tailLines", ["1000"])[0]) :]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile(suffix=".pem") as pem:
        # The API server verifies no kubelet unless it is told how.
        trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem.name)
        context.load_cert_chain(pem.name)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return server


def none_of_its_own(cluster: Cluster) -> None:
    """Skips the test where the cluster has nodes, whose kubelets would run the pods."""
    if any(not node["metadata"]["name"].startswith("node-") for node in cluster.list("v1", "nodes")):
        pytest.skip("The cluster has nodes of its own, whose kubelets would run the pods.")
