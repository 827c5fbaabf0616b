"""What the cluster refuses, or never gives, reaches whoever asked in a sentence; nothing is left behind."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from gradwire import TrainerJobConfig, TrainerJobManager
from gradwire.errors import FailedPreconditionError, NotFoundError, ResourceExhaustedError

from tests.kubernetes.cluster import Cluster, eventually
from tests.kubernetes.control_plane import IMAGE, KEYS, Release, install, running_control_plane
from tests.kubernetes.kubelet import FakeKubelet, none_of_its_own

NODE_PORT = {"service": {"type": "NodePort"}}


@dataclass
class World:
    """A namespace with the chart's rights in it."""

    cluster: Cluster
    namespace: str
    release: Release
    folder: Path
    before: set[str]

    @contextlib.contextmanager
    def manager(self, *arguments: str, key: str = "ops") -> Iterator[TrainerJobManager]:
        """Of a control plane in it."""
        with (
            running_control_plane(self.release, self.folder, *arguments) as base_url,
            TrainerJobManager(KEYS[key], base_url=base_url) as manager,
        ):
            yield manager

    def create(self, api: str, plural: str, body: Any) -> Any:
        return self.cluster.create(api, plural, body, self.namespace)

    def nothing_is_left(self) -> None:
        """Waits for the garbage collector."""
        eventually(lambda: self.cluster.everything(self.namespace) == self.before)

    def change_template(self, change: Callable[[Any], None]) -> None:
        """Changes the StatefulSet that jobs are made from."""
        stateful_set, service = yaml.safe_load_all(self.release.template.read_text())
        change(stateful_set)
        self.release.template.write_text(yaml.safe_dump_all([stateful_set, service]))


@pytest.fixture
def world(cluster: Cluster, namespace: str, helm: Path, tmp_path: Path) -> World:
    none_of_its_own(cluster)
    release = install(cluster, helm, namespace, tmp_path, NODE_PORT)
    return World(cluster, namespace, release, tmp_path, cluster.everything(namespace))


@pytest.fixture
def kubelet(world: World) -> Iterator[FakeKubelet]:
    kubelet = FakeKubelet(world.cluster, world.namespace, world.folder, images={IMAGE})
    yield kubelet
    kubelet.close()


def refused(manager: TrainerJobManager, **changes: Any) -> str:
    """What create_and_wait says of a job that will not be."""
    with pytest.raises(FailedPreconditionError) as refusal:
        manager.create_and_wait(TrainerJobConfig(changes.pop("base_model", "a-model"), **changes), timeout_s=60)
    assert refusal.value.reason == "TRAINER_JOB_FAILED"
    assert manager.list() == []
    return str(refusal.value)


def quota(world: World, hard: dict[str, str]) -> None:
    quota = world.create("v1", "resourcequotas", {"metadata": {"name": "quota"}, "spec": {"hard": hard}})
    # It counts once the controller has seen it.
    name = quota["metadata"]["name"]
    eventually(lambda: world.cluster.get("v1", "resourcequotas", name, world.namespace).get("status", {}).get("hard"))


def test_a_quota_that_leaves_no_room_for_the_job_or_for_its_pod(world: World):
    with world.manager() as manager:
        quota(world, {"count/statefulsets.apps": "0"})
        said = refused(manager)
        assert f"The namespace {world.namespace} has no room for another trainer" in said
        assert "exceeded quota: quota" in said
        world.nothing_is_left()
        world.cluster.delete("v1", "resourcequotas", "quota", world.namespace)
        quota(world, {"pods": "0"})
        said = refused(manager)
        assert "Kubernetes does not create its pod" in said
        assert "exceeded quota: quota" in said
        world.nothing_is_left()


def test_admission_that_takes_no_such_pod(world: World):
    limits = [{"type": "Container", "max": {"memory": "1Gi"}}]
    world.create("v1", "limitranges", {"metadata": {"name": "small"}, "spec": {"limits": limits}})
    with world.manager() as manager:
        assert "maximum memory usage per Container is 1Gi" in refused(manager)
    world.nothing_is_left()


def test_rights_that_the_control_plane_was_not_given(world: World):
    role = world.cluster.get("rbac.authorization.k8s.io/v1", "roles", "gradwire-jobs", world.namespace)
    for rule in role["rules"]:
        if rule["resources"] == ["statefulsets"]:
            rule["verbs"].remove("create")
    api = "rbac.authorization.k8s.io/v1"
    world.cluster.patch(api, "roles", "gradwire-jobs", {"rules": role["rules"]}, world.namespace)
    with world.manager() as manager:
        said = refused(manager)
    assert f"may not make the job's StatefulSet in the namespace {world.namespace}; its owner must allow it" in said
    world.nothing_is_left()


def test_a_quantity_that_does_not_parse(world: World):
    def change(stateful_set: Any) -> None:
        stateful_set["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "lots"}}

    world.change_template(change)
    with world.manager() as manager:
        said = refused(manager)
    assert "The cluster refused to make the job's StatefulSet" in said
    assert "quantities must match the regular expression" in said
    world.nothing_is_left()


def test_a_storage_class_that_there_is_not(world: World):
    def change(stateful_set: Any) -> None:
        stateful_set["spec"]["volumeClaimTemplates"][0]["spec"]["storageClassName"] = "no-such-class"

    world.change_template(change)
    with world.manager() as manager:
        said = refused(manager)
    assert 'Its volume cannot be created: storageclass.storage.k8s.io "no-such-class" not found' in said
    world.nothing_is_left()


def test_an_image_that_never_comes(world: World, kubelet: FakeKubelet):
    def change(stateful_set: Any) -> None:
        stateful_set["spec"]["template"]["spec"]["containers"][0]["image"] = "registry.example.org/none:1"

    world.change_template(change)
    with world.manager("--pending-timeout-s=1") as manager:
        said = refused(manager)
    assert 'Given up after 1 s: its image "registry.example.org/none:1" is not pulled yet (ImagePullBackOff)' in said
    world.nothing_is_left()


def test_a_trainer_that_ends_is_told_of_in_its_own_last_words(world: World, kubelet: FakeKubelet):
    with world.manager() as manager:
        said = refused(manager, base_model="/no/such/folder")
    assert "failed: --base-model /no/such/folder does not exist or is not a folder" in said
    assert "The last lines of its log:\ngradwire: --base-model" in said
    world.nothing_is_left()


def test_what_a_pod_waits_for_is_told_and_what_was_asked_for_is_mapped(world: World):
    """The generation is this test."""
    config = TrainerJobConfig(
        "a-model", max_context_length=512, accelerator_type="NVIDIA-H200", accelerator_count=1, display_name="big"
    )
    with world.manager() as manager:
        job = manager.create(config)
        pod = eventually(lambda: world.cluster.list("v1", "pods", world.namespace))[0]
        assert pod["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
        (container,) = pod["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert {"--base-model=a-model", "--max-context-length=512"} <= set(container["args"])
        message = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
        status = {"status": {"conditions": [condition]}}
        world.cluster.patch("v1", "pods", pod["metadata"]["name"], status, world.namespace, status=True)
        eventually(lambda: manager.get(job.job_id).status_message == f"waiting for a node: {message}")
        assert manager.get(job.job_id).state == "starting"
        (service,) = world.cluster.list("v1", "services", world.namespace)
        (stateful_set,) = world.cluster.list("apps/v1", "statefulsets", world.namespace)
        (owner,) = stateful_set["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("Service", service["metadata"]["uid"])
        manager.delete(job.job_id)
    world.nothing_is_left()


def test_a_job_whose_objects_somebody_deletes_has_failed_and_says_so(world: World):
    with world.manager() as manager:
        job = manager.create(TrainerJobConfig("a-model"))
        world.cluster.delete("v1", "services", job.job_id, world.namespace)
        failed = eventually(lambda: (now := manager.get(job.job_id)).state == "failed" and now)
        assert failed.status_message == "Its StatefulSet was deleted in the cluster."
        manager.delete(job.job_id)
    world.nothing_is_left()


def test_jobs_have_owners_and_limits_as_on_one_machine(world: World):
    arguments = ("--max-jobs=2", "--max-jobs-per-key=1")
    with running_control_plane(world.release, world.folder, *arguments) as base_url:
        with TrainerJobManager(KEYS["alice"], base_url=base_url) as alice:
            job = alice.create(TrainerJobConfig("a-model"))
            with pytest.raises(ResourceExhaustedError, match="This API key has 1 trainer jobs"):
                alice.create(TrainerJobConfig("a-model"))
        with TrainerJobManager(KEYS["bob"], base_url=base_url) as bob:
            assert bob.list() == []
            with pytest.raises(NotFoundError):
                bob.get(job.job_id)
            with pytest.raises(NotFoundError):
                bob.delete(job.job_id)
    # And they hold in the control plane after it.
    with running_control_plane(world.release, world.folder, *arguments) as base_url:
        with TrainerJobManager(KEYS["bob"], base_url=base_url) as bob, pytest.raises(NotFoundError):
            bob.delete(job.job_id)
        with TrainerJobManager(KEYS["alice"], base_url=base_url) as alice:
            assert [one.job_id for one in alice.list()] == [job.job_id]
            alice.delete(job.job_id)
    world.nothing_is_left()
