"""The objects of a trainer job in a cluster, made from the template that the Helm chart renders.

A job is a Service. It owns a Secret and a StatefulSet, which go when it is deleted, whoever deletes it. The Service's
labels and annotations hold what the control plane must know about the job, so that the next control plane finds it.
"""

import copy
import datetime
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from trainer_service.command_lines import SettingsError
from trainer_service.config import KubernetesSettings
from trainer_service.jobs.trainer_job import TrainerJobSpec

Object = dict[str, Any]
CONTROL_PLANE_LABEL = "gradwire.v1/control-plane"
JOB_LABEL = "gradwire.v1/job"
CREATION_LABEL = "gradwire.v1/creation"
"""Label of a Service, to find it if the API server's answer, which has its name, is lost."""
LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_ANNOTATION = "gradwire.v1/"
_TLS_FOLDER = "/etc/gradwire/job-tls"
_SHARED_MEMORY = "/dev/shm"  # noqa: S108  (of the pod)
DATA_VOLUME = "data"
"""The volumeClaimTemplate that a job's volume is made from."""
_FORBIDDEN_ARGS = ("--base-model", "--max-context-length")


@dataclass(frozen=True)
class Template:
    """What jobs are made from.

    Attributes:
        stateful_set: A StatefulSet of one pod with one container; the job fills in names.
        service: A Service with a port named "grpc".
    """

    stateful_set: Object
    service: Object

    @staticmethod
    def read(settings: KubernetesSettings) -> "Template":
        """Reads the template file.

        Raises:
            SettingsError: It is not a template.
            OSError: It cannot be read.
        """
        where = f"--kubernetes-template {settings.template}"
        try:
            objects = [one for one in yaml.safe_load_all(settings.template.read_text()) if one]
            by_kind = {one["kind"]: one for one in objects}
            template = Template(by_kind["StatefulSet"], by_kind["Service"])
            (container,) = template.stateful_set["spec"]["template"]["spec"]["containers"]
            container["args"] = list(container.get("args", []))
            template.port  # noqa: B018  (must exist)
        except (yaml.YAMLError, KeyError, TypeError, ValueError, StopIteration) as exc:
            raise SettingsError(
                f'{where} must hold a StatefulSet with one container, and a Service with a port "grpc": {exc!r}'
            ) from exc
        for arg in container["args"]:
            if arg.partition("=")[0] in _FORBIDDEN_ARGS:
                raise SettingsError(f"{where} sets {arg}, which each job sets itself; remove it.")
        return template

    @property
    def port(self) -> int:
        """The port that clients connect to."""
        return next(one["port"] for one in self.service["spec"]["ports"] if one.get("name") == "grpc")

    @property
    def image(self) -> str:
        """The trainer's container."""
        return self.stateful_set["spec"]["template"]["spec"]["containers"][0]["image"]


@dataclass(frozen=True)
class JobRecord:
    """What a job's Service says about it."""

    name: str
    uid: str
    owner: str
    request_id: str
    spec: TrainerJobSpec
    created_at: datetime.datetime
    address: str
    ca_certificate: str
    tls: bool

    @staticmethod
    def of(service: Object, address: Callable[[Object], str]) -> "JobRecord":
        """Reads a Service that `service_of` made.

        Raises:
            ValueError: Something is missing or invalid.
        """
        metadata = service["metadata"]
        said = {
            name.removeprefix(_ANNOTATION): text
            for name, text in metadata.get("annotations", {}).items()
            if name.startswith(_ANNOTATION)
        }
        try:
            return JobRecord(
                name=metadata["name"],
                uid=metadata["uid"],
                owner=said["owner"],
                request_id=said["request-id"],
                spec=TrainerJobSpec(
                    base_model=said["base-model"],
                    display_name=said["display-name"],
                    max_context_length=int(said["max-context-length"]),
                ),
                created_at=datetime.datetime.fromisoformat(metadata["creationTimestamp"]),
                address=address(service),
                ca_certificate=said.get("ca-certificate", ""),
                tls=said.get("tls", "") == "true",
            )
        except KeyError as exc:
            raise ValueError(f"it has no {exc}") from exc


def selector(settings: KubernetesSettings) -> str:
    """Label selector of all objects of a control plane's jobs."""
    return f"{CONTROL_PLANE_LABEL}={settings.name}"


def service_of(
    template: Template,
    settings: KubernetesSettings,
    spec: TrainerJobSpec,
    *,
    owner: str,
    request_id: str,
    tls: bool,
) -> Object:
    """The Service to create for a job; the API server chooses its name, which becomes the job's."""
    service = copy.deepcopy(template.service)
    metadata = service.setdefault("metadata", {})
    metadata.pop("name", None)
    metadata.pop("namespace", None)
    metadata["generateName"] = "job-"
    metadata.setdefault("labels", {}).update({CONTROL_PLANE_LABEL: settings.name, CREATION_LABEL: secrets.token_hex(8)})
    said = {
        "owner": owner,
        "request-id": request_id,
        "base-model": spec.base_model,
        "display-name": spec.display_name,
        "max-context-length": str(spec.max_context_length),
        "tls": str(tls).lower(),
    }
    metadata.setdefault("annotations", {}).update({_ANNOTATION + name: text for name, text in said.items()})
    # Selects no pods until the name is known.
    service["spec"]["selector"] = {JOB_LABEL: "none"}
    return service


def patch_of(service: Object, *, ca_certificate: str) -> Object:
    """The patch for a Service once its name is known: which pods belong to it."""
    name = service["metadata"]["name"]
    patch: Object = {"metadata": {"labels": {JOB_LABEL: name}}, "spec": {"selector": {JOB_LABEL: name}}}
    if ca_certificate:
        patch["metadata"]["annotations"] = {f"{_ANNOTATION}ca-certificate": ca_certificate}
    return patch


def secret_of(
    record: JobRecord, settings: KubernetesSettings, *, api_keys: Sequence[str], tls_pair: tuple[bytes, bytes] | None
) -> Object | None:
    """A job's Secret: keys from the control plane's environment and the job's certificate; None without either."""
    data: dict[str, str] = {}
    if api_keys:
        data["GRADWIRE_API_KEY"] = ",".join(api_keys)
    if tls_pair is not None:
        data |= {"tls.crt": tls_pair[0].decode(), "tls.key": tls_pair[1].decode()}
    if not data:
        return None
    return {"apiVersion": "v1", "kind": "Secret", "metadata": _metadata(record, settings), "stringData": data}


def stateful_set_of(
    template: Template, record: JobRecord, settings: KubernetesSettings, spec: TrainerJobSpec, *, secret: Object | None
) -> Object:
    """The StatefulSet of a job.

    Args:
        template: What it is made from.
        record: The job.
        settings: The control plane's.
        spec: The trainer to run.
        secret: The job's Secret, or None.
    """
    made = copy.deepcopy(template.stateful_set)
    labels = made.get("metadata", {}).get("labels", {})
    made["metadata"] = _metadata(record, settings)
    made["metadata"]["labels"] = labels | made["metadata"]["labels"]
    own = {JOB_LABEL: record.name, CONTROL_PLANE_LABEL: settings.name}
    made["spec"]["serviceName"] = record.name
    made["spec"]["replicas"] = 1
    made["spec"]["selector"] = {"matchLabels": {JOB_LABEL: record.name}}
    pod = made["spec"]["template"]
    pod.setdefault("metadata", {}).setdefault("labels", {}).update(own)
    for claim in made["spec"].get("volumeClaimTemplates", []):
        claim["metadata"].setdefault("labels", {}).update(own)
    (container,) = pod["spec"]["containers"]
    # The kubelet substitutes $(NAME) with variables, including keys; a caller's text must not name any.
    container["args"].append(f"--base-model={spec.base_model.replace('$', '$$')}")
    if spec.max_context_length:
        container["args"].append(f"--max-context-length={spec.max_context_length}")
    if spec.accelerator_type:
        pod["spec"].setdefault("nodeSelector", {})[settings.accelerator_label] = spec.accelerator_type
    if spec.accelerator_count:
        limits = container.setdefault("resources", {}).setdefault("limits", {})
        limits[settings.accelerator_resource] = spec.accelerator_count
        # The last one counts; the template has its own where its trainers have several.
        container["args"].append(f"--nproc-per-node={spec.accelerator_count}")
    if spec.accelerator_count > 1:
        _give_shared_memory(pod["spec"], container)
    if secret is not None:
        _mount(secret, pod["spec"], container)
    return made


def claim_name(record_name: str) -> str:
    """Name of the volume claim that the StatefulSet's controller creates for the job's only pod."""
    return f"{DATA_VOLUME}-{record_name}-0"


def _give_shared_memory(pod: Object, container: Object) -> None:
    """Makes /dev/shm as large as the pod's memory: NCCL's ranks talk through it, and a runtime gives 64 MiB."""
    mounts = container.setdefault("volumeMounts", [])
    if any(mount["mountPath"] == _SHARED_MEMORY for mount in mounts):
        return
    mounts.append({"name": "shared-memory", "mountPath": _SHARED_MEMORY})
    pod.setdefault("volumes", []).append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})


def _mount(secret: Object, pod: Object, container: Object) -> None:
    name = secret["metadata"]["name"]
    if "GRADWIRE_API_KEY" in secret["stringData"]:
        reference = {"secretKeyRef": {"name": name, "key": "GRADWIRE_API_KEY"}}
        container.setdefault("env", []).append({"name": "GRADWIRE_API_KEY", "valueFrom": reference})
    if "tls.key" not in secret["stringData"]:
        return
    items = [{"key": file, "path": file} for file in ("tls.crt", "tls.key")]
    pod.setdefault("volumes", []).append(
        {"name": "job-tls", "secret": {"secretName": name, "items": items, "defaultMode": 0o440}}
    )
    container.setdefault("volumeMounts", []).append({"name": "job-tls", "mountPath": _TLS_FOLDER, "readOnly": True})
    container["args"] += [f"--tls-cert-file={_TLS_FOLDER}/tls.crt", f"--tls-key-file={_TLS_FOLDER}/tls.key"]


def _metadata(record: JobRecord, settings: KubernetesSettings) -> Object:
    return {
        "name": record.name,
        "labels": {JOB_LABEL: record.name, CONTROL_PLANE_LABEL: settings.name},
        "ownerReferences": [{"apiVersion": "v1", "kind": "Service", "name": record.name, "uid": record.uid}],
    }
