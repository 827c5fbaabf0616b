"""The trainer as a whole: builds it, serves it, drains it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from gradwire.v1 import checkpoint_service_pb2, sampling_service_pb2, trainer_service_pb2
from gradwire.v1.checkpoint_service_pb2_grpc import add_CheckpointServiceServicer_to_server
from gradwire.v1.sampling_service_pb2_grpc import add_SamplingServiceServicer_to_server
from gradwire.v1.trainer_service_pb2 import TrainResponse
from gradwire.v1.trainer_service_pb2_grpc import add_TrainerServiceServicer_to_server

from trainer_service.access import ApiKeys
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.object_store import Storage
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import PAGE_CONNECTIONS, TrainerConfig
from trainer_service.fleet.worker import Worker
from trainer_service.metrics import Metrics
from trainer_service.rpc.checkpoint_gate import CheckpointGate
from trainer_service.rpc.checkpoint_servicer import CheckpointServicer
from trainer_service.rpc.grpc_server import GrpcServer
from trainer_service.rpc.request_checks import RequestChecks
from trainer_service.rpc.sampling_servicer import SamplingServicer
from trainer_service.rpc.trainer_servicer import TrainerServicer
from trainer_service.runs.observer import Observer
from trainer_service.runs.operation_spans import Traces
from trainer_service.runs.recovery import Restored
from trainer_service.runs.registry import Runs
from trainer_service.runs.run_metrics import RunMetrics
from trainer_service.runs.sampling import SampleRequests
from trainer_service.runs.sequence import Entry
from trainer_service.served_model import ServedModel

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

CHECKPOINT_SERVICE = checkpoint_service_pb2.DESCRIPTOR.services_by_name["CheckpointService"].full_name
_SWEEP_INTERVAL_S = 30.0
"""How long an expired checkpoint may stay on disk, where nobody sees it."""

SERVICE = trainer_service_pb2.DESCRIPTOR.services_by_name["TrainerService"].full_name
SAMPLING_SERVICE = sampling_service_pb2.DESCRIPTOR.services_by_name["SamplingService"].full_name


class TrainerServer:
    """The front end over one worker.

    Args:
        config: Its settings.
        worker: Executes operations.
        tracer: Makes spans of calls and operations; None of none.
    """

    def __init__(self, config: TrainerConfig, worker: Worker, tracer: "Tracer | None" = None) -> None:
        self.config = config
        """Settings of the trainer."""
        self._worker = worker
        self._draining = asyncio.Event()
        self.api_keys = ApiKeys(config.api_keys, config.api_key_file)
        """Keys that the trainer accepts."""
        storage = Storage(config.storage_url) if config.storage_url else None
        self.catalog = Catalog(config.checkpoint_dir, storage)
        self.transfers = Transfers(self.catalog)
        self.metrics = Metrics()
        self.metrics.add_worker_counters(lambda: worker.counters)
        self._model = ServedModel(config.base_model, config.served_model_name, config.aliases)
        self.runs = Runs(
            worker,
            base_model=self._model,
            data_dir=config.data_dir,
            adapter_dir=config.adapter_dir or config.data_dir / "adapters",
            runs_dir=config.runs_dir or config.data_dir / "runs",
            durability=config.durability,
            limits=config.limits,
            detach_grace_s=config.detach_grace_s,
            observer=_Observer(self.metrics, tracer),
            transfers=self.transfers,
        )
        self.run_metrics = RunMetrics()
        """Curves of the runs."""
        self.sampling = SampleRequests(self.runs, worker, self.transfers, config.limits)
        self.metrics.in_flight.set_function(lambda: self.runs.unanswered)
        self.metrics.runs.set_function(lambda: len(self.runs))
        self.metrics.journal_commits.set_function(lambda: self.runs.journal_writer.commits)
        self.metrics.journal_seconds.set_function(lambda: self.runs.journal_writer.commit_s)
        worker.on_ready(self._readiness_changed)
        worker.on_death(lambda _: self._readiness_changed())
        worker.on_responding(self._readiness_changed)
        self._server = GrpcServer(
            config,
            api_keys=self.api_keys,
            metrics=self.metrics,
            max_message_bytes=config.limits.max_message_bytes,
            max_calls=config.limits.max_sample_requests,
            reserved_descriptors=_reserved_descriptors(config),
            checks=RequestChecks(config.limits),
            tracer=tracer,
        )
        self._background: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """host:port it listens on, once started."""
        return self._server.address

    async def start(self) -> None:
        """Starts to listen.

        Raises:
            OSError: An address cannot be used.
        """
        servicer = TrainerServicer(
            self.runs,
            self._worker,
            limits=self.config.limits,
            draining=self._draining,
            gate=CheckpointGate(self.transfers),
            base_model=self._model,
            metrics=self.run_metrics,
        )
        server = self._server.server
        add_CheckpointServiceServicer_to_server(CheckpointServicer(self.catalog, self._model), server)
        add_TrainerServiceServicer_to_server(servicer, server)
        sampling = SamplingServicer(self.sampling, base_model=self._model.name, draining=self._draining)
        add_SamplingServiceServicer_to_server(sampling, server)
        self._server.bind(SERVICE, CHECKPOINT_SERVICE, SAMPLING_SERVICE, reflected=self.config.reflection)
        self.runs.start()
        await self._server.set_serving(CHECKPOINT_SERVICE, True)
        await self._set_ready(False)
        await self._server.start()
        self._in_background(self._sweep())

    async def drain(self) -> None:
        """Accepts no new work, finishes what is queued or leaves it in the journal, and stops listening."""
        logger.info("Draining.", extra={"fields": {"operations": self.runs.unanswered}})
        self._draining.set()
        await self._set_ready(False)
        try:
            await asyncio.wait_for(self.runs.quiet(), self.config.drain_timeout_s)
        except TimeoutError:
            fields = {"operations": self.runs.unanswered}
            logger.warning("Operations are left to the next trainer.", extra={"fields": fields})
        await self._worker.stop()
        self.runs.suspend()
        # Streams end by themselves once idle; the grace period lets their last answers leave.
        await self._server.stop(grace_s=2.0)
        await self.runs.stop()
        self.transfers.close()
        logger.info("Stopped.")

    def _readiness_changed(self) -> None:
        ready = self._worker.ready is not None and self._worker.responding
        self._in_background(self._set_ready(ready and not self._draining.is_set()))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _sweep(self) -> None:
        """Deletes expired checkpoints, and retries what could not be stored, until drained."""
        while not self._draining.is_set():
            try:
                await self.transfers.sweep()
            except Exception as exc:
                # A store may be out of reach, or a disk full; the next round may succeed.
                logger.warning("Checkpoints could not be swept.", extra={"fields": {"error": str(exc)}})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), _SWEEP_INTERVAL_S)

    async def _set_ready(self, ready: bool) -> None:
        await self._server.set_serving(SERVICE, ready)


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


def _reserved_descriptors(config: TrainerConfig) -> int:
    """File descriptors for everything but clients: the trainer, the lock, journal and snapshot of each run, pages."""
    return 64 + 12 * config.limits.max_runs + (PAGE_CONNECTIONS if config.page_listen is not None else 0)
