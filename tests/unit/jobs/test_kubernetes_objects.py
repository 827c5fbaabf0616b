"""What jobs are made from, and what of it cannot be."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainer_service.command_lines import SettingsError
from trainer_service.config import KubernetesSettings
from trainer_service.jobs.kubernetes_objects import JobRecord, Template, secret_of, service_of, stateful_set_of
from trainer_service.jobs.trainer_job import TrainerJobSpec

SPEC = TrainerJobSpec("a-model", display_name="mine", accelerator_type="NVIDIA-H200", accelerator_count=1)
SERVICE = {"kind": "Service", "metadata": {}, "spec": {"ports": [{"name": "grpc", "port": 7777}]}}


def stateful_set(**container: Any) -> dict[str, Any]:
    container = {"name": "trainer", "image": "gradwire:1", "args": ["serve"], **container}
    return {"kind": "StatefulSet", "metadata": {}, "spec": {"template": {"spec": {"containers": [container]}}}}


def settings(folder: Path, *objects: Any) -> KubernetesSettings:
    path = folder / "trainer.yaml"
    path.write_text(yaml.safe_dump_all(objects))
    return KubernetesSettings(template=path)


def made(service: dict[str, Any]) -> dict[str, Any]:
    """As the API server answers."""
    metadata = service["metadata"] | {"name": "job-abcde", "uid": "1", "creationTimestamp": "2026-01-02T03:04:05Z"}
    return service | {"metadata": metadata}


@pytest.mark.parametrize(
    "objects",
    [
        [],
        [SERVICE],
        [stateful_set()],
        [stateful_set(), {"kind": "Service", "spec": {"ports": [{"name": "web", "port": 1}]}}],
        [{"kind": "StatefulSet", "spec": {}}, SERVICE],
        ["only words"],
    ],
)
def test_a_file_that_is_no_template_is_refused(tmp_path: Path, objects: list[Any]):
    with pytest.raises(SettingsError, match=r"--kubernetes-template .* must hold a StatefulSet with one container"):
        Template.read(settings(tmp_path, *objects))


def test_a_template_says_nothing_that_a_job_says(tmp_path: Path):
    with pytest.raises(SettingsError, match="sets --base-model=x, which each job sets itself"):
        Template.read(settings(tmp_path, stateful_set(args=["serve", "--base-model=x"]), SERVICE))


def test_a_job_is_found_again_from_its_service(tmp_path: Path):
    where = settings(tmp_path, stateful_set(), SERVICE)
    template = Template.read(where)
    service = made(service_of(template, where, SPEC, owner="alice", request_id="r1", tls=True))
    record = JobRecord.of(service, lambda _: "there:1")
    assert (record.name, record.owner, record.request_id, record.tls) == ("job-abcde", "alice", "r1", True)
    assert (record.spec.base_model, record.spec.display_name) == ("a-model", "mine")
    del service["metadata"]["annotations"]["gradwire.v1/owner"]
    with pytest.raises(ValueError, match="owner"):
        JobRecord.of(service, lambda _: "there:1")


def test_keys_and_certificates_are_in_the_secret_and_nowhere_else(tmp_path: Path):
    where = settings(tmp_path, stateful_set(), SERVICE)
    template = Template.read(where)
    service = made(service_of(template, where, SPEC, owner="alice", request_id="", tls=True))
    record = JobRecord.of(service, lambda _: "there:1")
    secret = secret_of(record, where, api_keys=["alice key-of-alice"], tls_pair=(b"certificate", b"private"))
    assert secret is not None
    text = yaml.safe_dump([service, stateful_set_of(template, record, where, SPEC, secret=secret)])
    assert "key-of-alice" not in text
    assert "private" not in text
    assert secret_of(record, where, api_keys=[], tls_pair=None) is None


def test_a_base_model_names_no_variable_of_its_pod(tmp_path: Path):
    where = settings(tmp_path, stateful_set(), SERVICE)
    template = Template.read(where)
    spec = TrainerJobSpec("$(GRADWIRE_API_KEY)")
    service = made(service_of(template, where, spec, owner="a", request_id="", tls=False))
    job = stateful_set_of(template, JobRecord.of(service, lambda _: ""), where, spec, secret=None)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["args"] == ["serve", "--base-model=$$(GRADWIRE_API_KEY)"]


def test_making_one_job_leaves_the_template_for_the_next(tmp_path: Path):
    where = settings(tmp_path, stateful_set(), SERVICE)
    template = Template.read(where)
    before = yaml.safe_dump([template.stateful_set, template.service])
    service = made(service_of(template, where, SPEC, owner="a", request_id="", tls=False))
    stateful_set_of(template, JobRecord.of(service, lambda _: ""), where, SPEC, secret=None)
    assert yaml.safe_dump([template.stateful_set, template.service]) == before


@pytest.mark.parametrize(("count", "rendered"), [(1, 8), (8, 1)])
def test_a_job_has_a_rank_for_each_accelerator_it_asks_for(tmp_path: Path, count: int, rendered: int):
    where = settings(tmp_path, stateful_set(args=["serve", f"--nproc-per-node={rendered}"]), SERVICE)
    template = Template.read(where)
    spec = TrainerJobSpec("a-model", accelerator_count=count)
    service = made(service_of(template, where, spec, owner="a", request_id="", tls=False))
    job = stateful_set_of(template, JobRecord.of(service, lambda _: ""), where, spec, secret=None)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": count}
    assert container["args"][-1] == f"--nproc-per-node={count}", "the last one counts"
    # Ranks of one machine talk through it.
    shared = [{"name": "shared-memory", "emptyDir": {"medium": "Memory"}}] if count > 1 else []
    assert pod.get("volumes", []) == shared
    mounted = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    assert mounted == (["/dev/shm"] if shared else [])


def test_shared_memory_that_the_template_has_is_left_as_it_is(tmp_path: Path):
    mount = {"name": "mine", "mountPath": "/dev/shm"}
    where = settings(tmp_path, stateful_set(volumeMounts=[mount]), SERVICE)
    template = Template.read(where)
    spec = TrainerJobSpec("a-model", accelerator_count=2)
    service = made(service_of(template, where, spec, owner="a", request_id="", tls=False))
    job = stateful_set_of(template, JobRecord.of(service, lambda _: ""), where, spec, secret=None)
    assert job["spec"]["template"]["spec"]["containers"][0]["volumeMounts"] == [mount]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--backend kubernetes needs --kubernetes-template"),
        (["--kubernetes-template=/no/such"], "/no/such"),
        (["--kubernetes-template={template}", "--kubernetes-name=no label!"], "--kubernetes-name"),
        (["--kubernetes-template={template}", "--kubernetes-address={{nme}}:1"], "--kubernetes-address"),
        (["--kubernetes-template={template}", "--kubernetes-address=nowhere"], "--kubernetes-address"),
        (["--kubernetes-template={template}"], "The cluster's API server does not answer"),
    ],
)
def test_settings_that_cannot_be_end_the_control_plane_in_a_sentence(tmp_path: Path, options: list[str], said: str):
    where = settings(tmp_path, stateful_set(), SERVICE)
    config = tmp_path / "kubeconfig"
    config.write_text(
        "{apiVersion: v1, kind: Config, clusters: [{name: c, cluster: {server: 'http://127.0.0.1:9'}}], "
        "contexts: [{name: c, context: {cluster: c, user: c}}], users: [{name: c, user: {token: t}}], "
        "current-context: c}"
    )
    given = [option.format(template=where.template) for option in options]
    command = [sys.executable, "-m", "trainer_service", "jobs", "--backend=kubernetes", "--listen=127.0.0.1:0", *given]
    run = subprocess.run(
        command, env={"KUBECONFIG": str(config), **_environment()}, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("gradwire: ")
    assert said in run.stderr


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "KUBECONFIG"}
