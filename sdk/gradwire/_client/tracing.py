"""Spans around a client's calls, in a process that traces with OpenTelemetry.

Nothing is imported here before somebody else has: who traces has the API in memory, and whoever does not pays one look
for it a call. A span is the child of the caller's, and its context travels with the call: in the metadata of a unary
one, in the message of an operation, since all operations of a run share the metadata of one stream.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gradwire._wire.protocol_version import __version__

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Span


class CallSpan:
    """One call of the user's, from where it is made until its answer is here.

    Args:
        span: None where nothing is traced.
        context: The caller's, with the span in it.
    """

    def __init__(self, span: "Span | None" = None, context: "Context | None" = None) -> None:
        self._span = span
        self._context = context

    @property
    def headers(self) -> dict[str, str]:
        """What travels with the call: `traceparent`, and `tracestate` where there is one."""
        found: dict[str, str] = {}
        if self._span is not None:
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

            TraceContextTextMapPropagator().inject(found, self._context)
        return found

    def part(self) -> "CallSpan":
        """Of the same call, where something is done before its answer is here: it travels alike, and ends nothing."""
        return _Part(self._span, self._context)

    def end(self, exc: BaseException | None = None) -> None:
        """The answer is here, or the call failed. Ending twice counts once."""
        if self._span is None or not self._span.is_recording():
            return
        if exc is not None:
            from opentelemetry.trace import StatusCode

            self._span.record_exception(exc)
            self._span.set_status(StatusCode.ERROR, str(exc))
        self._span.end()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """A part of the call that runs the user's code, whose spans are its children, on whatever thread it runs."""
        if self._span is None:
            yield
            return
        from opentelemetry import context, trace

        tracer = trace.get_tracer("gradwire", __version__)
        token = context.attach(self._context or context.Context())
        try:
            with tracer.start_as_current_span(f"gradwire.{name}"):
                yield
        finally:
            context.detach(token)

    def __enter__(self) -> "CallSpan":
        return self

    def __exit__(self, kind: object, exc: BaseException | None, traceback: object) -> None:
        # Whoever stops listening has what he wanted.
        self.end(exc if isinstance(exc, Exception) else None)


class _Part(CallSpan):
    def end(self, exc: BaseException | None = None) -> None:
        pass


def start_span(name: str, **attributes: Any) -> CallSpan:
    """Begins the span of a call, where the caller is.

    Args:
        name: The call, as the user made it.
        **attributes: What it is about; told as `gradwire.…`.
    """
    trace = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return CallSpan()
    span = trace.get_tracer("gradwire", __version__).start_span(
        f"gradwire.{name}",
        kind=trace.SpanKind.CLIENT,
        attributes={f"gradwire.{key}": value for key, value in attributes.items()},
    )
    return CallSpan(span, trace.set_span_in_context(span))
