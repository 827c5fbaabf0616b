"""What Kubernetes says about a job's pod, as a sentence for whoever waits for the trainer."""

import enum
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]
_MAX_CHARS = 500
_REFUSALS = ("forbidden", "denied the request", "is invalid")
"""Parts of what a controller says when it may not create a pod, and trying again is no use."""
_IMAGE_NEVER_COMES = ("InvalidImageName", "ErrImageNeverPull")
_IMAGE_WAITS = ("ErrImagePull", "ImagePullBackOff", "ImageInspectError", "RegistryUnavailable")
_SIGNALS_FROM = 128


class Condition(enum.Enum):
    """How a job stands."""

    READY = "ready"
    WORKING = "working"
    """It makes progress: its image is pulled, its process started, its model loaded."""
    PENDING = "pending"
    """It waits for something that may never come: a node, a volume, an image, a Secret."""
    ENDED = "ended"
    """Its process ended by itself; the log says why."""
    REFUSED = "refused"
    """It will never start."""


@dataclass(frozen=True)
class Standing:
    """How a job stands, and the message about it."""

    condition: Condition
    message: str


@dataclass
class Observed:
    """The latest that the API server said about a job's objects."""

    pod: Object | None = None
    stateful_set_gone: bool = False
    ever_ready: bool = False
    said: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Kind of object to (reason, message) of the last event about it."""


def standing(observed: Observed) -> Standing:
    """How a job stands."""
    if observed.stateful_set_gone:
        return Standing(Condition.REFUSED, "Its StatefulSet was deleted in the cluster.")
    if observed.pod is None:
        return _without_pod(observed)
    pod = observed.pod
    status = pod.get("status", {})
    conditions = {one["type"]: one for one in status.get("conditions", [])}
    if pod["metadata"].get("deletionTimestamp"):
        return Standing(Condition.WORKING, "its pod is shutting down; the next one continues from there")
    if conditions.get("Ready", {}).get("status") == "True":
        return Standing(Condition.READY, "ready")
    if status.get("phase") == "Failed":
        why = _sentence(status.get("message") or status.get("reason") or "it gave no reason")
        return Standing(Condition.WORKING, f"its pod failed and is being replaced: {why}")
    scheduled = conditions.get("PodScheduled", {})
    if status.get("phase") != "Running" and scheduled.get("status") != "True":
        return _unscheduled(observed, scheduled)
    for container in status.get("containerStatuses", []):
        return _container(observed, container, pod)
    return Standing(Condition.PENDING, _pod_event(observed, "waiting for the node to start its pod"))


def _without_pod(observed: Observed) -> Standing:
    reason, message = observed.said.get("StatefulSet", ("", ""))
    if not reason.startswith("Failed"):
        return Standing(Condition.PENDING, "waiting for Kubernetes to create its pod")
    refused = any(word in message for word in _REFUSALS)
    text = f"Kubernetes does not create its pod: {_sentence(message)}"
    return Standing(Condition.REFUSED if refused else Condition.PENDING, text)


def _unscheduled(observed: Observed, scheduled: Object) -> Standing:
    claim_reason, claim_message = observed.said.get("PersistentVolumeClaim", ("", ""))
    if claim_reason == "ProvisioningFailed":
        lost = "storageclass" in claim_message and "not found" in claim_message
        text = f"its volume cannot be created: {_sentence(claim_message)}"
        return Standing(Condition.REFUSED, f"I{text[1:]}") if lost else Standing(Condition.PENDING, text)
    if scheduled.get("message"):
        return Standing(Condition.PENDING, f"waiting for a node: {_sentence(scheduled['message'])}")
    if claim_reason in ("FailedBinding", "WaitForPodScheduled", "WaitForFirstConsumer"):
        return Standing(Condition.PENDING, f"waiting for its volume: {_sentence(claim_message)}")
    return Standing(Condition.PENDING, _pod_event(observed, "waiting for a node"))


def _container(observed: Observed, container: Object, pod: Object) -> Standing:
    state = container.get("state", {})
    waiting, running = state.get("waiting"), state.get("running")
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated")
    image = pod["spec"]["containers"][0]["image"]
    if waiting is not None:
        reason, message = waiting.get("reason", ""), waiting.get("message", "")
        if reason in _IMAGE_NEVER_COMES:
            return Standing(Condition.REFUSED, f'The image "{image}" cannot be pulled ({reason}): {_sentence(message)}')
        if reason in _IMAGE_WAITS:
            told = message or observed.said.get("Pod", ("", ""))[1]
            return Standing(Condition.PENDING, f'its image "{image}" is not pulled yet ({reason}): {_sentence(told)}')
        if ended is None and reason in ("ContainerCreating", "PodInitializing", ""):
            return Standing(Condition.PENDING, _pod_event(observed, "starting its container"))
        if ended is None:
            return Standing(Condition.PENDING, f"its container does not start ({reason}): {_sentence(message)}")
    if ended is not None and running is None:
        how = _how_it_ended(ended)
        looping = waiting is not None and waiting.get("reason") == "CrashLoopBackOff"
        if observed.ever_ready and not looping:
            return Standing(Condition.WORKING, f"the trainer ended with {how}; it is being restarted")
        return Standing(Condition.ENDED, f"The trainer ended with {how}.")
    if ended is not None and not observed.ever_ready:
        # The kubelet restarts it, and it ends the same way.
        return Standing(Condition.ENDED, f"The trainer ended with {_how_it_ended(ended)}.")
    return Standing(Condition.WORKING, "loading the model" if not observed.ever_ready else "restarting the worker")


def _how_it_ended(ended: Object) -> str:
    code, reason = ended.get("exitCode", 0), ended.get("reason", "")
    if reason == "OOMKilled":
        return "signal 9: it exceeded its memory limit (OOMKilled)"
    return f"signal {code - _SIGNALS_FROM}" if code > _SIGNALS_FROM else f"exit code {code}"


def _pod_event(observed: Observed, otherwise: str) -> str:
    reason, message = observed.said.get("Pod", ("", ""))
    if reason == "Pulling":
        return f"pulling its image: {_sentence(message)}"
    return f"{otherwise}: {_sentence(message)}" if reason.startswith("Failed") else otherwise


def _sentence(text: str) -> str:
    """What Kubernetes said, on one line and short enough to read."""
    line = " ".join(text.split())
    return line if len(line) <= _MAX_CHARS else f"{line[:_MAX_CHARS]}…"
