"""Trainer jobs in a cluster: each is a Service, a StatefulSet of one pod, and a Secret.

They outlive the control plane: the next one finds them by their label. Their state is watched, never polled.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from gradwire.errors import GradwireError, error

from trainer_service.addresses import split_address
from trainer_service.certificates import make_certificate
from trainer_service.command_lines import SettingsError
from trainer_service.config import JobsConfig, KubernetesSettings
from trainer_service.jobs.kubernetes_api import ApiError, KubernetesApi, Object
from trainer_service.jobs.kubernetes_objects import (
    CREATION_LABEL,
    JOB_LABEL,
    LABEL_VALUE,
    JobRecord,
    Template,
    claim_name,
    patch_of,
    secret_of,
    selector,
    service_of,
    stateful_set_of,
)
from trainer_service.jobs.kubernetes_status import Condition, Observed, Standing, standing
from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobSpec, TrainerJobState

logger = logging.getLogger(__name__)

_LOG_LINES = 20
_FIRST_LIST_S = 30.0
_GONE_POLL_S = 0.5
_GONE_MARGIN_S = 60.0
"""How long beyond the pod's own grace period until an unfinished deletion is reported."""
_GIVEN_TLS = "--tls-cert-file"

T = TypeVar("T")


@dataclass
class _Job:
    """One trainer in the cluster, and what is known about it."""

    record: JobRecord
    observed: Observed = field(default_factory=Observed)
    pending_since: float | None = None
    """Since when it has waited for something that may never come, by time.monotonic."""
    log_tail: str = ""
    log_of: tuple[str, int] | None = None
    """The end for which the log's tail was read: the pod's uid and its number of restarts."""


class KubernetesJobs:
    """TrainerJobs in one namespace of a cluster. All on one event loop.

    Args:
        config: The control plane's settings.
        settings: Its settings for trainers in a cluster.
        api: The cluster.

    Raises:
        SettingsError: The template or the address is invalid.
    """

    def __init__(self, config: JobsConfig, settings: KubernetesSettings, api: KubernetesApi) -> None:
        self._config = config
        self._settings = settings
        self._api = api
        self._template = Template.read(settings)
        (container,) = self._template.stateful_set["spec"]["template"]["spec"]["containers"]
        self._shows_given_certificate = any(arg.startswith(_GIVEN_TLS) for arg in container["args"])
        self._jobs: dict[str, _Job] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        if not LABEL_VALUE.fullmatch(settings.name):
            raise SettingsError(
                f"--kubernetes-name {settings.name!r} must be the value of a label: at most 63 letters, digits, "
                '"-", "_" and ".", beginning and ending with a letter or digit.'
            )
        try:
            split_address(self._address({"metadata": {"name": "x"}, "spec": {"ports": []}}))
        except (KeyError, ValueError, IndexError) as exc:
            raise SettingsError(
                f"--kubernetes-address {settings.address} must be host:port, in which {{name}}, {{namespace}}, "
                f"{{port}} and {{node_port}} are filled in: {exc}"
            ) from exc

    @classmethod
    async def connect(cls, config: JobsConfig, settings: KubernetesSettings) -> "KubernetesJobs":
        """Jobs in the cluster we run in, or the one that KUBECONFIG names.

        Raises:
            SettingsError: There is no cluster, or a setting is invalid.
        """
        api = await KubernetesApi.connect(settings.namespace)
        try:
            return cls(config, settings, api)
        except BaseException:
            await api.close()
            raise

    async def start(self) -> None:
        try:
            services, _ = await self._asked(self._api.listing("Service", selector(self._settings)), "look for its jobs")
        except GradwireError as exc:
            await self._api.close()
            raise SettingsError(str(exc)) from exc
        for service in services:
            try:
                record = JobRecord.of(service, self._address)
            except ValueError as exc:
                fields = {"service": service["metadata"]["name"], "error": str(exc)}
                logger.error("A Service does not belong to a trainer job; ignored.", extra={"fields": fields})
                continue
            self._jobs[record.name] = _Job(record)
        # Before anyone asks, so that a job found again is reported in its current state.
        own = selector(self._settings)
        for kind, labels, watch in (
            ("Pod", own, self._watch_pods),
            ("StatefulSet", own, self._watch_stateful_sets),
            ("Event", "", self._watch_events),
        ):
            listed = asyncio.Event()
            task = asyncio.create_task(watch(self._api.follow(kind, labels), listed), name=f"watch-{kind}")
            task.add_done_callback(_watching_ended)
            self._tasks.append(task)
            try:
                await asyncio.wait_for(listed.wait(), _FIRST_LIST_S)
            except TimeoutError:
                await self.stop()
                raise SettingsError(
                    f"The control plane cannot watch {kind}s in the namespace {self._api.namespace}; its log says why."
                ) from None
        if self._jobs:
            logger.info("Took over trainer jobs.", extra={"fields": {"jobs": len(self._jobs)}})

    async def create(self, spec: TrainerJobSpec, *, owner: str, request_id: str) -> TrainerJob:
        if self._stopped:
            raise error("DRAINING", "The control plane is shutting down and starts no trainers.", retry_after_s=5.0)
        made = self._config.make_certificates
        tls = made or self._shows_given_certificate
        service = service_of(self._template, self._settings, spec, owner=owner, request_id=request_id, tls=tls)
        service = await self._asked(self._make_service(service), "make the job's Service")
        name = service["metadata"]["name"]
        try:
            job = await self._make_the_rest(spec, service, made)
        except BaseException:
            # The refusal is raised whether or not the rest can be removed.
            with contextlib.suppress(GradwireError):
                await asyncio.shield(self._remove(name))
            self._jobs.pop(name, None)
            raise
        fields = {"job_id": name, "base_model": spec.base_model, "namespace": self._api.namespace}
        logger.info("Trainer started.", extra={"fields": fields})
        return self._describe(job)

    async def find(self, job_id: str) -> TrainerJob | None:
        job = self._jobs.get(job_id)
        return None if job is None else self._describe(job)

    async def get(self, job_id: str) -> TrainerJob:
        job = self._jobs[job_id]
        await self._read_log(job)
        return self._describe(job)

    async def list(self) -> list[TrainerJob]:
        jobs = sorted(self._jobs.values(), key=lambda job: job.record.created_at, reverse=True)
        return [self._describe(job) for job in jobs]

    async def delete(self, job_id: str) -> None:
        await self._remove(job_id)
        self._jobs.pop(job_id, None)
        logger.info("Trainer stopped.", extra={"fields": {"job_id": job_id}})

    async def stop(self) -> None:
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._api.close()

    async def _make_service(self, service: Object) -> Object:
        try:
            return await self._api.create("Service", service)
        except ApiError as exc:
            if exc.status == 0:
                # It may have been created before the connection broke; nobody would know its name.
                label = f"{CREATION_LABEL}={service['metadata']['labels'][CREATION_LABEL]}"
                with contextlib.suppress(ApiError):
                    for made in (await self._api.listing("Service", label))[0]:
                        await self._api.delete("Service", made["metadata"]["name"])
            raise

    async def _make_the_rest(self, spec: TrainerJobSpec, service: Object, made: bool) -> _Job:
        """Creates what the job's Service owns, and points the Service at its pod."""
        pair = None
        if made:
            # Signing takes a millisecond; not worth a thread.
            pair = make_certificate(self._hosts(service))
        patch = patch_of(service, ca_certificate=pair[0].decode() if pair else "")
        service = await self._asked(
            self._api.patch("Service", service["metadata"]["name"], patch), "finish the job's Service"
        )
        record = JobRecord.of(service, self._address)
        # Before its pod can exist, so that no event about it is missed.
        job = self._jobs[record.name] = _Job(record)
        secret = secret_of(record, self._settings, api_keys=self._config.api_keys, tls_pair=pair)
        if secret is not None:
            await self._asked(self._api.create("Secret", secret), "make the job's Secret")
        stateful_set = stateful_set_of(self._template, record, self._settings, spec, secret=secret)
        await self._asked(self._api.create("StatefulSet", stateful_set), "make the job's StatefulSet")
        return job

    async def _remove(self, name: str) -> None:
        """Deletes everything of a job, and returns once its pod is gone."""
        what = "remove the job"
        # The owner first: if we get no further, the cluster removes what it owned.
        await self._asked(self._api.delete("Service", name), what)
        await self._asked(self._api.delete("StatefulSet", name, wait_for_dependents=True), what)
        await self._asked(self._api.delete("Secret", name), what)
        spec = self._template.stateful_set["spec"]["template"]["spec"]
        deadline = time.monotonic() + spec.get("terminationGracePeriodSeconds", 30) + _GONE_MARGIN_S
        label = f"{JOB_LABEL}={name}"
        while True:
            left = [
                item
                for kind in ("StatefulSet", "Pod")
                for item in (await self._asked(self._api.listing(kind, label), what))[0]
            ]
            if not left:
                break
            if time.monotonic() > deadline:
                raise error(
                    "TRAINER_JOB_FAILED",
                    f"The cluster has not removed the pod of {name} yet; delete the job again to wait for it.",
                    job_id=name,
                )
            await asyncio.sleep(_GONE_POLL_S)
        # Last, since the StatefulSet's controller would create it again.
        await self._asked(self._api.delete("PersistentVolumeClaim", claim_name(name)), what)

    async def _watch_pods(self, changes: AsyncIterator[tuple[str, Object]], listed: asyncio.Event) -> None:
        async for what, body in changes:
            if what == "LISTED":
                pods = {item["metadata"]["labels"].get(JOB_LABEL): item for item in body["items"]}
                for name, job in self._jobs.items():
                    self._saw_pod(job, pods.get(name))
                listed.set()
                continue
            job = self._jobs.get(body["metadata"]["labels"].get(JOB_LABEL, ""))
            if job is not None:
                self._saw_pod(job, None if what == "DELETED" else body)

    def _saw_pod(self, job: _Job, pod: Object | None) -> None:
        before = standing(job.observed)
        job.observed.pod = pod
        now = self._standing(job)
        job.observed.ever_ready |= now.condition is Condition.READY
        if now.condition is not before.condition:
            fields = {"job_id": job.record.name, "condition": now.condition.value, "message": now.message}
            logger.info("Trainer's state changed.", extra={"fields": fields})

    async def _watch_stateful_sets(self, changes: AsyncIterator[tuple[str, Object]], listed: asyncio.Event) -> None:
        seen: set[str] = set()
        async for what, body in changes:
            items = body["items"] if what == "LISTED" else [body]
            there = {item["metadata"]["name"] for item in items}
            if what == "LISTED":
                # Including older ones: a Service without a StatefulSet is left from an interrupted creation.
                gone = (seen | set(self._jobs) if not listed.is_set() else seen) - there
                listed.set()
            else:
                gone = there if what == "DELETED" else set()
            seen = (seen | there) - gone
            for name in gone & set(self._jobs):
                self._jobs[name].observed.stateful_set_gone = True

    async def _watch_events(self, changes: AsyncIterator[tuple[str, Object]], listed: asyncio.Event) -> None:
        async for what, body in changes:
            events = body["items"] if what == "LISTED" else [body] if what != "DELETED" else []
            for event in sorted(events, key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or ""):
                about = event.get("involvedObject", {})
                job = self._job_of(about.get("kind", ""), about.get("name", ""))
                if job is not None:
                    job.observed.said[about["kind"]] = (event.get("reason") or "", event.get("message") or "")
            if what == "LISTED":
                listed.set()

    def _job_of(self, kind: str, name: str) -> _Job | None:
        if kind == "Pod":
            name = name.removesuffix("-0")
        elif kind == "PersistentVolumeClaim":
            name = name.partition("-")[2].removesuffix("-0")
        elif kind != "StatefulSet":
            return None
        return self._jobs.get(name)

    def _standing(self, job: _Job) -> Standing:
        """The job's status, given how long it has waited."""
        now = standing(job.observed)
        if now.condition is not Condition.PENDING:
            job.pending_since = None
            return now
        if job.pending_since is None:
            job.pending_since = time.monotonic()
        timeout_s = self._settings.pending_timeout_s
        if time.monotonic() - job.pending_since < timeout_s:
            return now
        return Standing(Condition.REFUSED, f"Given up after {timeout_s:g} s: {now.message}")

    async def _read_log(self, job: _Job) -> None:
        """Reads the last log lines of a trainer that ended, once for each end."""
        pod = job.observed.pod
        if pod is None or self._standing(job).condition is not Condition.ENDED:
            return
        (container, *_) = pod["status"]["containerStatuses"]
        end = pod["metadata"]["uid"], container.get("restartCount", 0)
        if job.log_of == end:
            return
        job.log_of = end
        previous = "terminated" not in container.get("state", {})
        job.log_tail = await self._api.log_tail(pod["metadata"]["name"], lines=_LOG_LINES, previous=previous)

    def _describe(self, job: _Job) -> TrainerJob:
        record, now = job.record, self._standing(job)
        state = {
            Condition.READY: TrainerJobState.READY,
            Condition.WORKING: TrainerJobState.STARTING,
            Condition.PENDING: TrainerJobState.STARTING,
        }.get(now.condition, TrainerJobState.FAILED)
        ended = now.condition is Condition.ENDED
        return TrainerJob(
            job_id=record.name,
            job_name=f"{record.spec.display_name or 'trainer'}-{record.name.removeprefix('job-')[:4]}",
            base_url=f"{'https' if record.tls else 'http'}://{record.address}",
            base_model=record.spec.base_model,
            state=state,
            status_message=_last_sentence(job.log_tail, now.message) if ended else now.message,
            log_tail=job.log_tail if ended else "",
            created_at=record.created_at,
            log_path="",
            owner=record.owner,
            request_id=record.request_id,
            ca_certificate=record.ca_certificate,
        )

    def _address(self, service: Object) -> str:
        """host:port where clients reach a job's trainer."""
        node_port = next((one["nodePort"] for one in service["spec"].get("ports", []) if one.get("nodePort")), 0)
        return self._settings.address.format(
            name=service["metadata"]["name"],
            namespace=self._api.namespace,
            port=self._template.port,
            node_port=node_port,
        )

    def _hosts(self, service: Object) -> Sequence[str]:
        """Names by which clients may reach the trainer: our address for it, its names in the cluster, and localhost for
        forwarded ports."""
        name, namespace = service["metadata"]["name"], self._api.namespace
        host, _ = split_address(self._address(service))
        inside = [f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local", f"{name}.{namespace}", name]
        return [host, *inside, "localhost", "127.0.0.1"]

    async def _asked(self, call: Awaitable[T], what: str) -> T:
        """The call's answer, or its refusal as an error for the caller."""
        try:
            return await call
        except ApiError as exc:
            raise _in_words(exc, what, self._api.namespace) from exc


def _watching_ended(task: asyncio.Task[None]) -> None:
    """Watching never ends by itself; if it does, that is a bug, and jobs would stand still unnoticed."""
    if not task.cancelled() and task.exception() is not None:
        logger.critical("Jobs are no longer watched.", exc_info=task.exception())


def _in_words(exc: ApiError, what: str, namespace: str) -> GradwireError:
    """A refusal by the API server, as an error for whoever asked for the job."""
    message = " ".join(exc.message.split())
    if exc.status == 0 or exc.status >= 500 or exc.status == 429:
        text = f"The cluster's API server does not answer, so the control plane cannot {what}: {message}"
    elif "exceeded quota" in message:
        text = f"The namespace {namespace} has no room for another trainer: {message}"
    elif exc.status == 403:
        text = f"The control plane may not {what} in the namespace {namespace}; its owner must allow it: {message}"
    elif exc.status == 401:
        text = f"The cluster does not know the control plane, which cannot {what}; its owner must give it a token."
    elif exc.status == 404:
        text = (
            f"The control plane cannot {what}: {message}. Its owner can check whether the namespace {namespace} exists."
        )
    else:
        text = f"The cluster refused to {what}: {message}"
    return error("TRAINER_JOB_FAILED", text)


def _last_sentence(log_tail: str, otherwise: str) -> str:
    """The trainer's own last message, if there is one."""
    said = [line.removeprefix("gradwire: ") for line in log_tail.splitlines() if line.startswith("gradwire: ")]
    return said[-1] if said else otherwise
