"""The Grafana dashboard asks for metrics that there are."""

import json
import re
from pathlib import Path

from prometheus_client import generate_latest

from trainer_service.engine.counters import Counters
from trainer_service.fleet.supervisor import WorkerSupervisor
from trainer_service.metrics import Metrics
from trainer_service.worker_config import WorkerConfig

DASHBOARD = Path(__file__).parents[3] / "deploy" / "grafana" / "gradwire.json"


async def exported() -> set[str]:
    """Names that a trainer's --metrics-port has."""
    metrics = Metrics()
    config = WorkerConfig(base_model="model", checkpoint_dir=Path("checkpoints"), max_runs=1)
    counted = {**WorkerSupervisor(config).counters, **Counters().as_metrics()}
    metrics.add_worker_counters(lambda: counted)
    metrics.calls.labels("m", "OK").inc()
    metrics.operations.labels("forward", "ok").inc()
    for histogram in metrics.operation_ms.values():
        histogram.labels("forward").observe(1)
    return set(re.findall(r"^(gradwire_\w+)", generate_latest(metrics.registry).decode(), re.MULTILINE))


async def test_every_metric_of_the_dashboard_is_exported():
    asked = set(re.findall(r"gradwire_\w+", DASHBOARD.read_text()))
    assert len(asked) > 20
    assert asked - await exported() == set()


def test_its_panels_lie_beside_one_another():
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in panels):
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
