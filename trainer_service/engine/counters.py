"""What the worker counts, by Prometheus name."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass
class Counters:
    """Totals since the worker started; those not ending in _total are gauges."""

    operations_total: int = 0
    """Operations executed, including failed ones."""
    failed_operations_total: int = 0
    forward_passes_total: int = 0
    """Forwards of the model, one for each microbatch."""
    backward_passes_total: int = 0
    """Backwards of the model, one for each microbatch."""
    tokens_total: int = 0
    """Tokens that went through a forward."""
    shared_tokens_total: int = 0
    """Tokens that did not have to, because they begin another sequence that went through."""
    padding_tokens_total: int = 0
    """The part of tokens_total that pads rows, for models that cannot be packed."""
    optim_steps_total: int = 0
    held_graphs: int = 0
    """Graphs held for custom losses now."""
    held_graph_bytes: int = 0
    """Memory that these graphs hold."""
    recomputed_graphs_total: int = 0
    """Forwards recomputed for their backward, because holding their graphs would have exceeded the budget."""
    runs: int = 0
    """Runs held now."""
    memory_bytes: int = 0
    """Memory in use, see Device.take_peak_bytes; of rank 0."""
    memory_limit_bytes: int = 0
    """Memory that its device has."""
    adapters_in_host_memory: int = 0
    """Adapters that wait in host memory for their run's next operation."""
    busy_seconds_total: float = 0.0
    """Time spent executing operations."""

    sample_requests_total: int = 0
    """Sample requests answered, including failed and cancelled ones."""
    sample_requests: int = 0
    """Sample requests under way now."""
    prompt_tokens_total: int = 0
    """Prompt tokens processed for sampling."""
    shared_prompts_total: int = 0
    """Requests that did not process their prompt, because an equal prompt of the same owner already was."""
    requeued_samples_total: int = 0
    """Requests put back to make room, which recompute what they had."""
    sampled_tokens_total: int = 0
    sampling_seconds_total: float = 0.0
    """Time spent sampling, on top of busy_seconds_total."""

    others: dict[int, Mapping[str, float]] = field(default_factory=dict)
    """What other ranks said last of their sampling, by rank; all else every rank counts alike."""

    def as_metrics(self) -> dict[str, float]:
        """By full name, such as gradwire_worker_tokens_total."""
        own = {
            f"gradwire_worker_{item.name}": getattr(self, item.name) for item in fields(self) if item.name != "others"
        }
        for counted in self.others.values():
            for name in _DIVIDED:
                own[name] += counted.get(name, 0.0)
        return {name: float(value) for name, value in own.items()}


_DIVIDED = [
    f"gradwire_worker_{name}"
    for name in (
        *("sample_requests_total", "sample_requests", "prompt_tokens_total", "shared_prompts_total"),
        *("requeued_samples_total", "sampled_tokens_total", "sampling_seconds_total"),
    )
]
"""What each rank does a share of."""
