"""A collector of OpenTelemetry traces, as trainers export them: OTLP over gRPC."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest


class Collector:
    """Keeps the spans it is sent.

    Attributes:
        endpoint: URL.
    """

    def __init__(self) -> None:
        self.endpoint = ""
        self._spans: list[tuple[str, Any]] = []
        self._came = threading.Condition()

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

        with self._came:
            for resource in request.resource_spans:
                named = {each.key: each.value.string_value for each in resource.resource.attributes}
                self._spans += [(named["service.name"], span) for scope in resource.scope_spans for span in scope.spans]
            self._came.notify_all()
        return ExportTraceServiceResponse()

    def wait_for(self, enough: Callable[[list[tuple[str, Any]]], bool]) -> list[tuple[str, Any]]:
        """(service, span) of all that came, once they are enough."""
        with self._came:
            assert self._came.wait_for(lambda: enough(self._spans), 30), [span.name for _, span in self._spans]
            return list(self._spans)


@contextlib.contextmanager
def otlp_collector() -> Iterator[Collector]:
    """One on a free port."""
    reason = "opentelemetry-exporter-otlp-proto-grpc is not installed; see the dev extra"
    pytest.importorskip("opentelemetry.exporter.otlp.proto.grpc", reason=reason)
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc

    server = grpc.server(ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait(10)
