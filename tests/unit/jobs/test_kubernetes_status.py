"""What is told of a pod as Kubernetes describes it."""

from typing import Any

import pytest

from trainer_service.jobs.kubernetes_status import Condition, Observed, standing

READY, WORKING, PENDING = Condition.READY, Condition.WORKING, Condition.PENDING
ENDED, REFUSED = Condition.ENDED, Condition.REFUSED
SCHEDULED = {"type": "PodScheduled", "status": "True"}
IS_READY = {"type": "Ready", "status": "True"}


def pod(phase: str = "Pending", *conditions: Any, container: Any = None, **status: Any) -> Any:
    statuses = [] if container is None else [{"restartCount": 0, "state": {}, **container}]
    return {
        "metadata": {},
        "spec": {"containers": [{"image": "gradwire:1"}]},
        "status": {"phase": phase, "conditions": list(conditions), "containerStatuses": statuses, **status},
    }


def waiting(reason: str, message: str = "", **more: Any) -> Any:
    return pod("Pending", SCHEDULED, container={"state": {"waiting": {"reason": reason, "message": message}}, **more})


def ended(code: int, reason: str = "Error") -> Any:
    return {"terminated": {"exitCode": code, "reason": reason}}


UNSCHEDULABLE = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes: 3 Insufficient nvidia.com/gpu."}
LEAVING = {**pod("Running", IS_READY), "metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}
RUNNING = pod("Running", SCHEDULED, container={"state": {"running": {}}})
LOST_CLASS = 'storageclass.storage.k8s.io "x" not found'
CRASHED = pod("Running", SCHEDULED, container={"state": ended(2)})
LOOPING = pod(
    "Running", SCHEDULED, container={"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": ended(139)}
)
KILLED = pod("Running", SCHEDULED, container={"state": ended(137, "OOMKilled")})
AGAIN = pod("Running", SCHEDULED, container={"state": {"running": {}}, "lastState": ended(1)})


@pytest.mark.parametrize(
    ("observed", "condition", "message"),
    [
        (Observed(), PENDING, "waiting for Kubernetes to create its pod"),
        (Observed(stateful_set_gone=True), REFUSED, "Its StatefulSet was deleted in the cluster."),
        (
            Observed(said={"StatefulSet": ("FailedCreate", "pods is forbidden: exceeded quota: q")}),
            REFUSED,
            "Kubernetes does not create its pod: pods is forbidden: exceeded quota: q",
        ),
        (
            Observed(said={"StatefulSet": ("FailedCreate", "the server is busy")}),
            PENDING,
            "Kubernetes does not create its pod: the server is busy",
        ),
        (Observed(said={"StatefulSet": ("SuccessfulCreate", "created")}), PENDING, "waiting for Kubernetes to create"),
        (Observed(pod()), PENDING, "waiting for a node"),
        (
            Observed(pod("Pending", UNSCHEDULABLE)),
            PENDING,
            "waiting for a node: 0/3 nodes: 3 Insufficient nvidia.com/gpu.",
        ),
        (
            Observed(pod(), said={"PersistentVolumeClaim": ("ProvisioningFailed", LOST_CLASS)}),
            REFUSED,
            f"Its volume cannot be created: {LOST_CLASS}",
        ),
        (
            Observed(pod(), said={"PersistentVolumeClaim": ("ProvisioningFailed", "the store is full")}),
            PENDING,
            "its volume cannot be created: the store is full",
        ),
        (
            Observed(pod(), said={"PersistentVolumeClaim": ("FailedBinding", "no persistent volumes available")}),
            PENDING,
            "waiting for its volume: no persistent volumes available",
        ),
        (Observed(pod("Pending", SCHEDULED)), PENDING, "waiting for the node to start its pod"),
        (Observed(waiting("ContainerCreating")), PENDING, "starting its container"),
        (
            Observed(waiting("ContainerCreating"), said={"Pod": ("Pulling", 'Pulling image "gradwire:1"')}),
            PENDING,
            'pulling its image: Pulling image "gradwire:1"',
        ),
        (
            Observed(waiting("ContainerCreating"), said={"Pod": ("FailedMount", "no volume yet")}),
            PENDING,
            "starting its container: no volume yet",
        ),
        (
            Observed(waiting("ErrImagePull", "not\nfound")),
            PENDING,
            'its image "gradwire:1" is not pulled yet (ErrImagePull): not found',
        ),
        (
            Observed(waiting("InvalidImageName", "x")),
            REFUSED,
            'The image "gradwire:1" cannot be pulled (InvalidImageName): x',
        ),
        (
            Observed(waiting("CreateContainerConfigError", 'secret "keys" not found')),
            PENDING,
            'its container does not start (CreateContainerConfigError): secret "keys" not found',
        ),
        (Observed(RUNNING), WORKING, "loading the model"),
        (Observed(RUNNING, ever_ready=True), WORKING, "restarting the worker"),
        (Observed(pod("Running", SCHEDULED, IS_READY)), READY, "ready"),
        (Observed(LEAVING, ever_ready=True), WORKING, "its pod is shutting down; the next one continues from there"),
        (Observed(CRASHED), ENDED, "The trainer ended with exit code 2."),
        (Observed(CRASHED, ever_ready=True), WORKING, "the trainer ended with exit code 2; it is being restarted"),
        (Observed(LOOPING, ever_ready=True), ENDED, "The trainer ended with signal 11."),
        (Observed(KILLED), ENDED, "The trainer ended with signal 9: it exceeded its memory limit (OOMKilled)."),
        (Observed(AGAIN), ENDED, "The trainer ended with exit code 1."),
        (Observed(AGAIN, ever_ready=True), WORKING, "restarting the worker"),
        (
            Observed(pod("Failed", message="The node was low on resource: memory.")),
            WORKING,
            "its pod failed and is being replaced: The node was low on resource: memory.",
        ),
    ],
)
def test_what_kubernetes_says_becomes_a_sentence(observed: Observed, condition: Condition, message: str):
    found = standing(observed)
    assert (found.condition, found.message[: len(message)]) == (condition, message)


def test_what_is_told_is_no_longer_than_a_person_reads():
    assert len(standing(Observed(waiting("ErrImagePull", "x" * 10_000))).message) < 600
