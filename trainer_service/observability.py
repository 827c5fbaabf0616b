"""Logs, request ids and Prometheus metrics."""

import contextvars
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from trainer_service.metrics_server import serve_metrics

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Id of the call being served; every log line of the call has it."""


MAX_FIELD_CHARS = 200
"""Longest field value in a log line; much of it comes from outside."""
_MAX_MESSAGE_CHARS = 4096
_MAX_EXCEPTION_CHARS = 16_384
_PLAIN = re.compile(r"""[^\s"'=\\]+""")


def quoted(value: object) -> str:
    """A field's value for a log line: one word, or a JSON string that cannot pass for another field, end the line or
    control a terminal; cut off after MAX_FIELD_CHARS."""
    text = _cut(str(value))
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    return _on_one_line(json.dumps(text, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_FIELD_CHARS else f"{text[:MAX_FIELD_CHARS]}…({len(text)} characters)"


def _on_one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class _Lines(logging.Formatter):
    """`12:00:01.234 INFO trainer.rpc message request_id=…`, for people; extra fields as key=value.

    An exception follows on lines that begin with spaces, so that none can pass for a log line, whatever it contains.
    """

    default_time_format = "%Y-%m-%d %H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname:<7} {record.name.removeprefix('trainer_service.')}: "
        line += _on_one_line(record.getMessage()[:_MAX_MESSAGE_CHARS])
        for name, value in _fields(record).items():
            line += f" {name}={quoted(value)}"
        if record.exc_info:
            # The end of a traceback names the exception.
            text = self.formatException(record.exc_info)[-_MAX_EXCEPTION_CHARS:]
            line += "".join(f"\n    {_on_one_line(part)}" for part in text.splitlines())
        return line


class _Json(logging.Formatter):
    """One JSON object per line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:_MAX_MESSAGE_CHARS],
            **{name: value if isinstance(value, _JSON_NUMBERS) else _cut(str(value)) for name, value in fields.items()},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)[-_MAX_EXCEPTION_CHARS:]
        return json.dumps(entry)


_JSON_NUMBERS = (bool, int, float, type(None))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = dict(getattr(record, "fields", {}))
    if current := request_id.get():
        fields["request_id"] = current
    return fields


def configure_logging(*, as_json: bool, level: str = "INFO") -> None:
    """Sends all logs to stderr, one line per event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


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
