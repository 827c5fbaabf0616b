"""The gateway's metrics for Prometheus."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from trainer_service.gateway.gateway import Gateway


class _Counts(Collector):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are now."""
        custom = CounterMetricFamily(
            "gradwire_gateway_custom_losses",
            "Second passes of custom losses, by forwards they cost in all.",
            labels=["forwards"],
        )
        custom.add_metric(["1"], self._gateway.models.custom_losses.at_one_forward)
        custom.add_metric(["2"], self._gateway.models.custom_losses.at_two_forwards)
        yield custom
        yield CounterMetricFamily(
            "gradwire_gateway_merged_samples",
            "Sample requests that went along with the call of an equal one.",
            self._gateway.queue.merged,
        )
        yield GaugeMetricFamily("gradwire_gateway_sessions", "Sessions that go on.", self._gateway.sessions.num_live)
        yield GaugeMetricFamily("gradwire_gateway_models", "Models held.", self._gateway.models.num_held)
        yield GaugeMetricFamily(
            "gradwire_gateway_waiting_samples",
            "Sample requests unanswered.",
            self._gateway.sampling_sessions.num_waiting,
        )


def metrics_text(gateway: Gateway) -> bytes:
    """The metrics in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Counts(gateway))
    return generate_latest(registry)
