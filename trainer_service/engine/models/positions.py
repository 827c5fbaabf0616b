"""What a model does with positions: how long its sequences may be, and at which lengths its attention changes.

Most models treat a token alike however long its sequence is. Some see only a window of it or the chunk they are in;
some turn by other angles once a sequence is longer than those they were first trained on. A few short sequences show
nothing of that, so what is tried out on them (probe.py, sampling/trial.py) is tried out past these boundaries too.
A boundary may lie at many thousand tokens: `moved` moves it to a few while it is tried.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

_WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "attention_window_size",
    "window_size",
    "attention_chunk_size",
    "index_topk",
    "floor_scale",
)
"""Fields of configurations, and of layers, that say from which length on attention leaves tokens out or is scaled."""
BY_ROW = {"floor_scale"}
"""Those that models count from the beginning of a row: a row of many short sequences crosses them too."""
LONGEST_ROW = 4096
"""Tokens of many sequences that sampling puts into one row, at most."""
_ORIGINAL = "original_max_position_embeddings"
_LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len")


@dataclass(frozen=True)
class Boundary:
    """A length beyond which a model computes differently.

    Attributes:
        name: Name of the field in the configuration.
        length: In tokens.
        grows: Whether each length beyond it is computed differently from every other.
    """

    name: str
    length: int
    grows: bool = False

    @property
    def in_rows(self) -> bool:
        """Whether a row of sequences passes it that do not."""
        return self.name in BY_ROW and self.length < LONGEST_ROW

    def side_of(self, length: int) -> int:
        """Equal for sequences that are computed alike: 0 on this side, on the other 1, or each length by itself."""
        return 0 if length <= self.length else length if self.grows else 1


def context_length(config: Any) -> int:
    """Tokens of the longest sequence a configuration allows; 0 for no limit, as recurrent models have none.

    Rotary embeddings scaled by YaRN, or as a sequence grows, reach as far as they are scaled, which `factor` says and
    `max_position_embeddings` does not always.
    """
    own = next((int(length) for name in _LONGEST if (length := getattr(config, name, None))), 0)
    if not own:
        return 0
    reach = [own]
    for rope in rope_settings(config):
        if rope.get("rope_type") in ("yarn", "dynamic"):
            reach.append(int((rope.get(_ORIGINAL) or own) * (rope.get("factor") or 1)))
    return max(reach)


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """Settings of a configuration's rotary embeddings: one, or one for each kind of layer; empty where it has none."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [settings for settings in found.values() if isinstance(settings, dict) and "rope_type" in settings]
    return nested or ([found] if "rope_type" in found else [])


def rope_boundaries(config: Any) -> list[Boundary]:
    """Lengths beyond which rotary embeddings turn every token of a sequence by other angles."""
    found = []
    for rope in rope_settings(config):
        if rope.get("rope_type") == "longrope":
            length = rope.get(_ORIGINAL) or getattr(config, _ORIGINAL, None) or config.max_position_embeddings
            found.append(Boundary(_ORIGINAL, int(length)))
        elif rope.get("rope_type") == "dynamic":
            found.append(Boundary("max_position_embeddings", int(config.max_position_embeddings), grows=True))
    return found


def boundaries(model: PreTrainedModel, *, max_context_length: int) -> list[Boundary]:
    """The boundaries that sequences of at most `max_context_length` tokens, or rows of them, pass, nearest first."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    found = rope_boundaries(config)
    for name in _WINDOWS:
        length = getattr(config, name, None)
        unused = {
            "sliding_window": kinds is not None and "sliding_attention" not in kinds,
            "floor_scale": not getattr(config, "attn_temperature_tuning", True),
        }
        if isinstance(length, int) and length > 0 and not unused.get(name):
            found.append(Boundary(name, length))
    passed = [one for one in found if one.length < max_context_length or one.in_rows]
    return sorted(passed, key=lambda one: one.length)


@contextlib.contextmanager
def moved(model: PreTrainedModel, moving: Sequence[Boundary], length: int) -> Iterator[None]:
    """These boundaries lie at `length` within, wherever configurations and layers have them as numbers."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    configs |= {id(config): config for config in (model.config, model.config.get_text_config())}
    before: list[tuple[Any, str, Any]] = []

    def put(place: Any, name: str, old: int) -> None:
        values = place if isinstance(place, dict) else vars(place)
        if isinstance(values.get(name), int) and values[name] == old:
            before.append((values, name, old))
            values[name] = length

    for boundary in moving:
        for config in configs.values():
            put(config, boundary.name, boundary.length)
            for rope in rope_settings(config):
                put(rope, boundary.name, boundary.length)
        for module in model.modules():
            put(module, boundary.name, boundary.length)
            if boundary.name == "max_position_embeddings":
                for name in vars(module).copy():
                    if name.endswith("original_max_seq_len"):
                        put(module, name, boundary.length)
    try:
        yield
    finally:
        for values, name, old in before:
            values[name] = old


def forget_longest_sequence(model: PreTrainedModel) -> None:
    """Has rotary embeddings that grow with the sequence start anew with each forward.

    By themselves they keep the angles of the longest sequence there was, and what is computed for a shorter one that
    comes behind it would depend on that.
    """
    kinds = {rope.get("rope_type") for rope in rope_settings(model.config.get_text_config())}
    if "dynamic" not in kinds:
        return
    for module in model.modules():
        if hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_start_anew)


def _start_anew(rotary: Any, *_: object) -> None:
    for name in [name for name, _ in rotary.named_buffers() if name.endswith("original_inv_freq")]:
        prefix = name.removesuffix("original_inv_freq")
        current = f"{prefix}inv_freq"
        rotary.register_buffer(current, getattr(rotary, name).clone(), persistent=False)
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)
