"""When a trainer traces, and what it says where it cannot."""

import logging
import sys

import pytest

from trainer_service import tracing
from trainer_service.command_lines import SettingsError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)


def without_exporter(monkeypatch: pytest.MonkeyPatch, kind: str = "grpc") -> None:
    monkeypatch.setitem(sys.modules, f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter", None)


def test_nobody_asks_for_traces():
    with tracing.exporting(None) as tracer:
        assert tracer is None


def test_a_collector_that_is_asked_for_needs_its_package(monkeypatch: pytest.MonkeyPatch):
    without_exporter(monkeypatch)
    with pytest.raises(SettingsError, match=r"gradwire\[otel\]"), tracing.exporting("http://127.0.0.1:4317"):
        pass
    without_exporter(monkeypatch, "http")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
    with pytest.raises(SettingsError, match="otlp-proto-http"), tracing.exporting("http://127.0.0.1:4318/v1/traces"):
        pass


def test_a_collector_that_only_the_environment_names_is_missed_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    without_exporter(monkeypatch)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    with caplog.at_level(logging.WARNING), tracing.exporting(None) as tracer:
        assert tracer is None
    assert "gradwire[otel]" in caplog.text
