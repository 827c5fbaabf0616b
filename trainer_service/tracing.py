"""Traces of what a trainer does, sent to an OpenTelemetry collector (extra `gradwire[otel]`). Nothing is imported, and
nothing noted, where none are asked for.

The trainer alone exports. What the worker did is known from its answers, so it pays nothing, and one that is killed
leaves no span without its parent behind.
"""

import contextlib
import importlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from gradwire._wire.protocol_version import __version__

from trainer_service.command_lines import SettingsError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.trace import Tracer, TracerProvider

logger = logging.getLogger(__name__)

trace_headers: ContextVar[Mapping[str, str]] = ContextVar("trace_headers", default={})  # noqa: B039  (never written to)
"""`traceparent` and `tracestate` of the call being served, for what it asks for; empty where it is not traced."""

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_FLUSH_S = 3.0
"""How long the last spans may take to leave when the trainer stops."""


@contextlib.contextmanager
def exporting(endpoint: str | None) -> "Iterator[Tracer | None]":
    """What spans are made with while the block lasts; None where nothing asks for traces. All else is said by the
    OTEL_… variables that OpenTelemetry defines: protocol, headers, certificates, sampler, resource.

    Args:
        endpoint: URL of a collector; None takes that of the environment.

    Raises:
        SettingsError: A package is missing. Where only the environment names a collector, as it may for all that runs
            in a cluster, that is a warning.
    """
    if endpoint is None and not any(map(os.environ.get, _ENDPOINTS)):
        yield None
        return
    try:
        provider: Any = _provider(endpoint)
    except SettingsError as exc:
        if endpoint is not None:
            raise
        logger.warning(f"Nothing is traced. {exc}")
        yield None
        return
    try:
        yield tracer_of(provider)
    finally:
        # Nobody may be there to take the last spans; that must not keep the trainer.
        flushing = threading.Thread(target=provider.shutdown, name="traces", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)


def tracer_of(provider: "TracerProvider") -> "Tracer":
    """The trainer's, of whoever takes its spans."""
    return provider.get_tracer("gradwire.trainer", __version__)


def _provider(endpoint: str | None) -> Any:
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    kind = "http" if (protocol or "grpc").startswith("http/") else "grpc"
    try:
        exporter = importlib.import_module(f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter").OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as exc:
        package = "gradwire[otel]" if kind == "grpc" else "gradwire[otel] opentelemetry-exporter-otlp-proto-http"
        raise SettingsError(
            f"An OTLP endpoint is set, and {exc.name} cannot be imported; run `pip install '{package}'`."
        ) from exc
    attributes = {"service.version": __version__}
    if "OTEL_SERVICE_NAME" not in os.environ:
        attributes["service.name"] = "gradwire-trainer"
    provider = TracerProvider(resource=Resource.create(attributes), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter(**({} if endpoint is None else {"endpoint": endpoint}))))
    return provider


def remote_context(headers: Mapping[str, str]) -> "Context":
    """The context of a caller's span, as W3C Trace Context tells it; empty where headers tell none, or nonsense."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract(headers, Context())


@contextlib.contextmanager
def traced_call(tracer: "Tracer | None", method: str, metadata: Mapping[str, Any]) -> Iterator[None]:
    """The span of a call that is served, whose context `trace_headers` then has.

    Args:
        tracer: None traces nothing.
        method: As gRPC has it, "/package.Service/Method".
        metadata: What came with the call.
    """
    if tracer is None:
        yield
        return
    from opentelemetry.trace import SpanKind, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    service, _, name = method.removeprefix("/").partition("/")
    parent = remote_context({key: metadata[key] for key in ("traceparent", "tracestate") if key in metadata})
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    with tracer.start_as_current_span(f"{service}/{name}", parent, kind=SpanKind.SERVER, attributes=attributes) as span:
        headers: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(headers, set_span_in_context(span))
        token = trace_headers.set(headers)
        try:
            yield
        finally:
            trace_headers.reset(token)
