"""The trainer as a whole: builds it, serves it, drains it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import grpc.aio
from gradwire._wire.version import __version__
from gradwire.v1 import checkpoint_service_pb2, sampling_service_pb2, trainer_service_pb2
from gradwire.v1.checkpoint_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from gradwire.v1.sampling_service_pb2_grpc import add_SamplingServiceServicer_to_server
from gradwire.v1.trainer_service_pb2 import TrainResponse
from gradwire.v1.trainer_service_pb2_grpc import add_TrainerServiceServicer_to_server
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from trainer_service import descriptors
from trainer_service.access import ApiKeys
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.storage import Storage
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import PAGE_CONNECTIONS, TrainerConfig, listens_on_loopback
from trainer_service.fleet.worker import Worker
from trainer_service.observability import Metrics
from trainer_service.rpc.border import Border
from trainer_service.rpc.checkpoint_gate import CheckpointGate
from trainer_service.rpc.checkpoint_servicer import CheckpointServicer
from trainer_service.rpc.ports import open_port, serve_health
from trainer_service.rpc.request_limiter import RequestLimiter
from trainer_service.rpc.sampling_servicer import SamplingServicer
from trainer_service.rpc.trainer_servicer import TrainerServicer
from trainer_service.rpc.transport import server_options
from trainer_service.runs.recovery import Restored
from trainer_service.runs.registry import Runs
from trainer_service.runs.run import Observer
from trainer_service.runs.run_metrics import RunMetrics
from trainer_service.runs.sampling import Sampling
from trainer_service.runs.sequence import Entry
from trainer_service.runs.traces import Traces
from trainer_service.served_model import ServedModel

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

CHECKPOINT_SERVICE = checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"].full_name
_SWEEP_INTERVAL_S = 30.0
"""How long an expired checkpoint may stay on disk; nobody sees it meanwhile."""

SERVICE = trainer_service_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
SAMPLING_SERVICE = sampling_service_pb2.DESCRIPTOR.services_by_name["SamplingService"].full_name


class TrainerServer:
    """The front end over one worker.

    Args:
        config: Its settings.
        worker: What executes.
        tracer: Makes spans of calls and operations; None of none.
    """

    def __init__(self, config: TrainerConfig, worker: Worker, tracer: "Tracer | None" = None) -> None:
        self.config = config
        """Its settings."""
        self._worker = worker
        self._tracer = tracer
        self._draining = asyncio.Event()
        self.api_keys = ApiKeys(config.api_keys, config.api_key_file)
        """Keys that open it."""
        storage = Storage(config.storage_url) if config.storage_url else None
        self.catalog = Catalog(config.checkpoint_dir, storage)
        self.transfers = Transfers(self.catalog)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]
        self.metrics = Metrics()
        self.metrics.add_worker_counters(lambda: worker.counters)
        self._model = ServedModel(config.base_model, config.served_model_name, config.aliases)
        self.runs = Runs(
            worker,
            base_model=self._model,
            data_dir=config.data_dir,
            adapter_dir=config.adapter_dir,
            runs_dir=config.runs_dir or config.data_dir / "runs",
            durability=config.durability,
            limits=config.limits,
            detach_grace_s=config.detach_grace_s,
            observer=_Observer(self.metrics, tracer),
            transfers=self.transfers,
        )
        self.run_metrics = RunMetrics()
        """Their curves."""
        self.sampling = Sampling(self.runs, worker, self.transfers, config.limits)
        self.metrics.in_flight.set_function(lambda: self.runs.unanswered)
        self.metrics.runs.set_function(lambda: len(self.runs))
        self.metrics.journal_commits.set_function(lambda: self.runs.journal_writer.commits)
        self.metrics.journal_seconds.set_function(lambda: self.runs.journal_writer.commit_s)
        worker.on_ready(self._readiness_changed)
        worker.on_death(lambda _: self._readiness_changed())
        worker.on_responding(self._readiness_changed)
        self._server: grpc.aio.Server | None = None
        self._health_port: grpc.aio.Server | None = None
        self._background: set[asyncio.Task[None]] = set()
        self.address = ""
        """host:port it listens on, once started."""

    async def start(self) -> None:
        """Listens.

        Raises:
            OSError: The address cannot be had.
            SettingsError: Too few files may be open.
        """
        limits = self.config.limits
        options = server_options(
            max_message_bytes=limits.max_message_bytes,
            max_connections=descriptors.max_connections(reserved=_descriptors_reserved(self.config)),
            max_calls=limits.max_sample_requests,
        )
        border = Border(
            api_keys=self.api_keys,
            metrics=self.metrics,
            max_message_bytes=limits.max_message_bytes,
            limiter=RequestLimiter(limits),
            tracer=self._tracer,
        )
        self._server = grpc.aio.server(interceptors=[border], options=options)
        servicer = TrainerServicer(
            self.runs,
            self._worker,
            limits=limits,
            draining=self._draining,
            gate=CheckpointGate(self.transfers),
            base_model=self._model,
            metrics=self.run_metrics,
        )
        add_CheckpointServiceServicer_to_server(CheckpointServicer(self.catalog, self._model), self._server)
        add_TrainerServiceServicer_to_server(servicer, self._server)
        sampling = SamplingServicer(self.sampling, base_model=self._model.name, draining=self._draining)
        add_SamplingServiceServicer_to_server(sampling, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if self.config.reflection:
            ours = (SERVICE, CHECKPOINT_SERVICE, SAMPLING_SERVICE)
            names = (*ours, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        self.address = open_port(self._server, self.config.listen, self.config.tls)
        self.runs.start()
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(CHECKPOINT_SERVICE, health_pb2.HealthCheckResponse.SERVING)
        await self._health.set(SERVICE, health_pb2.HealthCheckResponse.NOT_SERVING)
        if self.config.health_listen is not None:
            self._health_port = await serve_health(self.config.health_listen, self._health)
        await self._server.start()
        self._in_background(self._sweep())
        if self.config.tls is None and self.api_keys.required and not listens_on_loopback(self.config.listen):
            logger.warning("API keys cross the network in plaintext; give --tls-cert-file, or put TLS in front.")
        logger.info("Listening.", extra={"fields": {"address": self.address, "version": __version__}})

    async def drain(self) -> None:
        """Takes no new work, lets what is queued finish or leaves it in the journal, and stops listening."""
        logger.info("Draining.", extra={"fields": {"operations": self.runs.unanswered}})
        self._draining.set()
        await self._set_health(False)
        try:
            await asyncio.wait_for(self.runs.quiet(), self.config.drain_timeout_s)
        except TimeoutError:
            fields = {"operations": self.runs.unanswered}
            logger.warning("Operations are left to the next trainer.", extra={"fields": fields})
        await self._worker.stop()
        self.runs.suspend()
        if self._server is not None:
            # Streams end by themselves once quiet; the grace is for their last answers to leave.
            await self._server.stop(grace=2.0)
        if self._health_port is not None:
            await self._health_port.stop(grace=None)
        await self.runs.stop()
        self.transfers.close()
        logger.info("Stopped.")

    def _readiness_changed(self) -> None:
        ready = self._worker.ready is not None and self._worker.responding
        self._in_background(self._set_health(ready and not self._draining.is_set()))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _sweep(self) -> None:
        """Deletes expired checkpoints, and stores what could not be stored before, until drained."""
        while not self._draining.is_set():
            try:
                await self.transfers.sweep()
            except Exception as exc:
                # A store out of reach, a full disk: the next round may fare better.
                logger.warning("Checkpoints could not be swept.", extra={"fields": {"error": str(exc)}})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), _SWEEP_INTERVAL_S)

    async def _set_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse
        await self._health.set(SERVICE, status.SERVING if ready else status.NOT_SERVING)


class _Observer(Observer):
    """Counts and times operations, logs those that fail, and makes spans of them where there is a tracer."""

    def __init__(self, metrics: Metrics, tracer: "Tracer | None") -> None:
        self._metrics = metrics
        self._traces = None if tracer is None else Traces(tracer)

    def answered(self, run_id: str, entry: Entry, response: TrainResponse) -> None:
        failed = response.WhichOneof("result") == "error"
        self._metrics.operations.labels(entry.kind, "error" if failed else "ok").inc()
        for part, histogram in self._metrics.operation_ms.items():
            histogram.labels(entry.kind).observe(getattr(response, f"{part}_ms"))
        if failed:
            fields = {"kind": entry.kind, "seq_id": response.seq_id, "error": response.error.message}
            logger.info("Operation failed.", extra={"fields": fields})
        self._trace(lambda traces: traces.answered(run_id, entry, response))

    def restored(self, run_id: str, found: Restored, waiting: list[Entry]) -> None:
        self._trace(lambda traces: traces.restored(run_id, found, waiting))

    def _trace(self, tell: Callable[[Traces], object]) -> None:
        if self._traces is None:
            return
        try:
            tell(self._traces)
        except Exception:
            # Whatever a foreign package, and what is plugged into it, makes of a span: answers go out.
            logger.exception("A span could not be made.")


def _descriptors_reserved(config: TrainerConfig) -> int:
    """Those kept for what is no client's connection: the trainer, lock, journal and snapshot of its runs, pages."""
    return 64 + 12 * config.limits.max_runs + (PAGE_CONNECTIONS if config.page_listen is not None else 0)
