"""The trainer's Prometheus metrics. Ground floor; metrics_server.py serves them."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from trainer_service.metrics_server import serve_metrics

_MS_BUCKETS = (0.25, 0.5, 1, 2, 5, 10, 25, 50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 30_000, 60_000, 300_000)


class Metrics:
    """The trainer's Prometheus metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "gradwire_calls", "Calls answered, by method and status code.", ["method", "code"], registry=self.registry
        )
        self.operations = Counter(
            "gradwire_operations",
            "Operations answered, by kind and outcome.",
            ["kind", "outcome"],
            registry=self.registry,
        )
        self.operation_ms = {
            part: Histogram(
                f"gradwire_operation_{part}_ms", text, ["kind"], buckets=_MS_BUCKETS, registry=self.registry
            )
            for part, text in {
                "queue": "Time an operation waited for its turn, milliseconds.",
                "execute": "Time an operation ran on the device, milliseconds.",
                "transfer": "Time an operation moved between trainer and worker, milliseconds.",
            }.items()
        }
        self.in_flight = Gauge(
            "gradwire_operations_in_flight", "Operations received and not yet answered.", registry=self.registry
        )
        self.runs = Gauge("gradwire_runs", "Runs held.", registry=self.registry)
        self.journal_commits = Gauge("gradwire_journal_commits", "Transactions written.", registry=self.registry)
        self.journal_seconds = Gauge("gradwire_journal_seconds", "Time spent writing them.", registry=self.registry)

    def add_worker_counters(self, read: Callable[[], Mapping[str, float]]) -> None:
        """Exports the worker's counters under their own names, read at each scrape."""
        self.registry.register(_WorkerCounters(read))

    def serve(self, listen: str) -> tuple[str, Callable[[], None]]:
        """Serves /metrics on threads. Returns the address it listens on and a function that stops it.

        Raises:
            OSError: The address cannot be used.
        """
        return serve_metrics(listen, self.registry)


class _WorkerCounters(Collector):
    def __init__(self, read: Callable[[], Mapping[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        for name, value in self._read().items():
            if name.endswith("_total"):
                yield CounterMetricFamily(name.removesuffix("_total"), "Counted by the worker.", value=value)
            else:
                yield GaugeMetricFamily(name, "Measured by the worker.", value=value)
