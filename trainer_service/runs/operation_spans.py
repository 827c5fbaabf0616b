"""Spans of operations, made once they are answered, from the times noted on their way.

    forward_backward            since it came, child of the call that sent it
      journal                   until it was on disk, or the worker began with it
      queue                     until the worker began with it: its turn, and the way there
      execute                   on the device
      answer                    until it and what came of it were on disk, and it was answered

Nothing is told of an operation before, so whoever is killed on the way leaves no half of a trace: the next trainer,
which has the caller's context from the journal, tells of it as of any other, and that it was taken up. What is executed
again only to bring a run back belongs to nobody's call: one span tells of all of it, `restore`, in a trace of its own,
and operations that waited for it link to it.
"""

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gradwire.errors import from_status
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.runs.recovery import Restored
from trainer_service.runs.sequence import Entry
from trainer_service.tracing import remote_context

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer

_MAX_LINKS = 32
"""Of a restoration, to operations that waited for it."""


class Traces:
    """Makes them.

    Args:
        tracer: What with.
    """

    def __init__(self, tracer: "Tracer") -> None:
        self._tracer = tracer

    def answered(self, run_id: str, entry: Entry, response: TrainResponse) -> None:
        """An operation got its answer just now."""
        from opentelemetry.trace import Link, SpanKind, StatusCode, set_span_in_context

        clock = _Clock()
        failed = response.WhichOneof("result") == "error"
        attributes: dict[str, Any] = {
            "gradwire.run_id": run_id,
            "gradwire.seq_id": entry.seq_id,
            "gradwire.attempts": entry.attempts,
            "gradwire.taken_up": entry.taken_up,
        }
        span = self._tracer.start_span(
            entry.kind,
            _caller(entry),
            kind=SpanKind.SERVER,
            attributes=attributes,
            links=[Link(context) for context in entry.restorations],
            start_time=clock.ns(entry.received_s),
        )
        if span.is_recording():
            for died_s in entry.deaths_s:
                span.add_event("worker died", timestamp=clock.ns(died_s))
            for name, start_s, end_s in _parts(entry, response, clock.now_s):
                inside = set_span_in_context(span)
                self._tracer.start_span(name, inside, start_time=clock.ns(start_s)).end(clock.ns(end_s))
            if failed:
                exc = from_status(response.error)
                span.set_attribute("error.type", exc.reason)
                span.set_status(StatusCode.ERROR, exc.message)
        span.end(clock.ns(clock.now_s))

    def restored(self, run_id: str, found: Restored, waiting: Iterable[Entry]) -> None:
        """A run is back on the worker just now; `waiting` are operations that go on with it."""
        from opentelemetry.context import Context
        from opentelemetry.trace import Link, get_current_span, set_span_in_context

        clock = _Clock()
        waiting = list(waiting)
        callers = [get_current_span(_caller(entry)).get_span_context() for entry in waiting[:_MAX_LINKS]]
        replayed_s = clock.now_s - found.replay_s
        loaded_s = replayed_s - found.load_s
        span = self._tracer.start_span(
            "restore",
            Context(),
            attributes={
                "gradwire.run_id": run_id,
                "gradwire.snapshot_seq_id": found.snapshot_seq_id,
                "gradwire.replayed": found.replayed,
            },
            links=[Link(context) for context in callers if context.is_valid],
            start_time=clock.ns(loaded_s),
        )
        for name, start_s, end_s in (("load", loaded_s, replayed_s), ("replay", replayed_s, clock.now_s)):
            inside = set_span_in_context(span)
            self._tracer.start_span(name, inside, start_time=clock.ns(start_s)).end(clock.ns(end_s))
        span.end(clock.ns(clock.now_s))
        for entry in waiting:
            entry.restorations.append(span.get_span_context())


class _Clock:
    """Tells time.perf_counter, in which operations are timed, in nanoseconds since 1970."""

    def __init__(self) -> None:
        self.now_s = time.perf_counter()
        self._offset_s = time.time() - self.now_s

    def ns(self, at_s: float) -> int:
        return round((self._offset_s + at_s) * 1e9)


def _caller(entry: Entry) -> "Context":
    request = entry.operation.request
    return remote_context({"traceparent": request.traceparent, "tracestate": request.tracestate})


def _parts(entry: Entry, response: TrainResponse, now_s: float) -> list[tuple[str, float, float]]:
    """(name, start, end) of an operation's parts, one behind the other."""
    found: list[tuple[str, float, float]] = []
    # The worker says for how long; it has just answered, over a socket of this machine.
    begun_s = max(entry.received_s, entry.done_s - response.execute_ms / 1000)
    written_s = entry.received_s
    if entry.journalled_s:
        # It may have been executed meanwhile.
        written_s = min(entry.journalled_s, begun_s) if entry.done_s else entry.journalled_s
        found.append(("journal", entry.received_s, written_s))
    if entry.done_s:
        found += [("queue", written_s, begun_s), ("execute", begun_s, entry.done_s), ("answer", entry.done_s, now_s)]
    return found
