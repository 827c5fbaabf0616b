"""A model as sampling uses it: new tokens in, logits out, everything before them cached.

Most architectures send attention through transformers' interface; they decode the requests of a step together, in one
row without padding (attention.py). Those that do not (recurrent ones, or with a bias of their own) decode each sample
by itself over transformers' own cache: the same numbers, slower. Those whose cache does not go on from where it was
compute everything again for every token. Which it is, is found by trying.

Shape suffixes: N new tokens, C tokens of a prompt so far, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.sampling.attention import ATTENTION, Part, Tokens, tokens_in_use
from trainer_service.engine.sampling.cache import Block, CacheShape, capacity
from trainer_service.engine.sampling.slots import Group, Slot, Slots

logger = logging.getLogger(__name__)

_ROWS = 16
"""Forwards have a multiple of this many rows. On the CPU a matrix product of few rows, or of some odd number of them,
adds up in another order than others, whose rows come out the same however many there are, and as in training: so the
numbers of a sample do not depend on its company."""
_MAX_COPIED = 4096
"""Tokens of a prompt that are copied for its samples, all together; beyond, they share it."""
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
_TRIAL = (3, 7, 5, 2, 11, 6, 4, 9)
_TRIAL_TOLERANCE = 1e-3


class Sequences:
    """The samples of one request, and what the model remembers of them.

    Args:
        num_samples: How many will continue the prompt.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.prompt: Block | None = None
        """While the prompt is taken in, and where samples share it to the end."""
        self.own: Block | None = None
        """What each of the samples that share a prompt generated."""
        self.slots: list[Slot] = []
        """Of samples that do not."""
        self.caches: list[Any] = []
        """Where samples are decoded by themselves: of the prompt at first, then one a sample."""
        self.length = 0
        """Tokens each sample has been through."""

    def keep(self, samples: list[int]) -> None:
        """Lets go of all samples but these, by their present numbers."""
        self.num_samples = len(samples)
        if self.own is not None:
            self.own.keep(samples)
        elif self.slots:
            kept = [self.slots[sample] for sample in samples]
            for slot in self.slots:
                if slot not in kept:
                    slot.free()
            self.slots = kept
        elif self.caches:
            self.caches = [self.caches[sample] for sample in samples]

    def close(self) -> None:
        """Lets go of everything."""
        for slot in self.slots:
            slot.free()
        self.slots, self.caches = [], []
        self.prompt = self.own = None


def num_cached_tokens(num_samples: int, num_prompt: int, max_tokens: int) -> int:
    """Tokens that a request's caches have room for in the end."""
    if _shares_prompt(num_samples, num_prompt):
        return capacity(num_prompt) + num_samples * capacity(max_tokens)
    return num_samples * capacity(num_prompt + max_tokens)


def _shares_prompt(num_samples: int, num_prompt: int) -> bool:
    return num_samples > 1 and num_samples * num_prompt > _MAX_COPIED


@dataclass
class Decoder:
    """Runs one model over caches.

    Attributes:
        model: Its parameters are read, never changed.
        device: Where.
        shape: Of a cached token; None where each sample is decoded by itself.
        why_alone: Why it is; "" where they are decoded together.
        cache_argument: Under which name the model takes its own cache; "" where it is of no use.
    """

    model: PreTrainedModel
    device: Device
    shape: CacheShape | None = None
    why_alone: str = ""
    cache_argument: str = ""
    _configs: list[Any] = field(init=False)
    _arguments: frozenset[str] = field(init=False)
    _slots: Slots | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Modules share a few config objects; each says which attention its modules use.
        configs = {id(config): config for module in self.model.modules() if (config := getattr(module, "config", None))}
        self._arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    @classmethod
    def of(cls, model: PreTrainedModel, device: Device) -> "Decoder":
        """The decoder of a model, tried on a few tokens."""
        # Tried in float32 whatever will be computed in: then what differs is the model's doing, not rounding's.
        trial = cls(model, dataclasses.replace(device, compute_dtype=torch.float32))
        trial.cache_argument = next(filter(trial._takes, _CACHE_ARGUMENTS), "")
        try:
            trial.shape = trial._find_shape()
            trial._try_out()
        except Exception as exc:
            # Whatever a model does that we do not foresee, another way serves it.
            trial.shape, trial.why_alone = None, str(exc).partition("\n")[0] or type(exc).__name__
            fields = {"architecture": type(model).__name__, "why": trial.why_alone}
            logger.warning("Samples are decoded one by one: slower, same tokens.", extra={"fields": fields})
            try:
                trial._try_out()
            except Exception as exc:
                trial.cache_argument = ""
                fields = {"architecture": type(model).__name__, "why": str(exc).partition("\n")[0]}
                logger.warning("Every token computes all before it again: very slow.", extra={"fields": fields})
        decoder = cls(model, device, None, trial.why_alone, trial.cache_argument)
        if trial.shape is not None:
            decoder.shape = decoder._find_shape()
        return decoder

    def with_model(self, model: PreTrainedModel) -> "Decoder":
        """The same over another copy of the model, which goes on with what is cached."""
        decoder = Decoder(model, self.device, self.shape, self.why_alone, self.cache_argument)
        decoder._slots = self._slots
        return decoder

    def prefill(self, batch: list[Sequences], tokens: list[list[int]], *, all_logits: list[bool]) -> list[Tensor]:
        """Takes the next tokens of prompts in.

        Args:
            batch: Whose prompts.
            tokens: N of each.
            all_logits: Whether the logits behind each token are wanted, or only those behind the last, of each.

        Returns:
            float32 [N, V] or [1, V] of each.
        """
        prefill = self._prefill_alone if self.shape is None else self._prefill_together
        found = prefill(batch, tokens, all_logits)
        for sequences, own in zip(batch, tokens, strict=True):
            sequences.length += len(own)
        return found

    def branch(self, sequences: Sequences) -> None:
        """The prompt is complete: from here each sample goes its own way."""
        count = sequences.num_samples
        if self.shape is None:
            sequences.caches += [copy.deepcopy(sequences.caches[0]) for _ in range(count - 1)]
            return
        assert sequences.prompt is not None, "branch before prefill"
        if _shares_prompt(count, sequences.length):
            sequences.own = Block(self.shape, count, 1)
            return
        if self._slots is None:
            self._slots = Slots(self.shape)
        sequences.slots = [self._slots.add(sequences.prompt) for _ in range(count)]
        sequences.prompt = None

    def decode(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        """One more token of every sample there is.

        Args:
            batch: All requests whose prompts are complete.
            tokens: Of their samples, one after the other.

        Returns:
            Logits behind them, float32 [tokens, V].
        """
        logits_NV = self._decode_alone(batch, tokens) if self.shape is None else self._decode_together(batch, tokens)
        for sequences in batch:
            sequences.length += 1
        return logits_NV

    def _prefill_together(
        self, batch: list[Sequences], tokens: list[list[int]], all_logits: list[bool]
    ) -> list[Tensor]:
        assert self.shape is not None
        parts: list[Part] = []
        inputs: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for sequences, own, every in zip(batch, tokens, all_logits, strict=True):
            if sequences.prompt is None:
                sequences.prompt = Block(self.shape, 1, len(own))
            parts.append(Part.of(sequences.prompt, len(own)))
            inputs += own
            positions += range(sequences.length, sequences.length + len(own))
            wanted += range(len(inputs) - len(own) if every else len(inputs) - 1, len(inputs))
        logits_NV = self._forward(parts, [], inputs, positions, wanted)
        return list(logits_NV.split([len(own) if every else 1 for own, every in zip(tokens, all_logits, strict=True)]))

    def _decode_together(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        parts: list[Part] = []
        order: list[int] = []
        positions: list[int] = []
        row_of: dict[Slot, int] = {}
        for sequences in batch:
            rows = range(len(positions), len(positions) + sequences.num_samples)
            positions += [sequences.length] * len(rows)
            if sequences.own is None:
                row_of.update(zip(sequences.slots, rows, strict=True))
            else:
                parts.append(Part.of(sequences.own, 1, sequences.prompt))
                order += rows
        groups: list[Group] = []
        if self._slots is not None:
            for slot in row_of:
                self._slots.reserve(slot)
            groups = self._slots.groups()
            order += [row_of[slot] for group in groups for slot in group.slots]
        place = {row: number for number, row in enumerate(order)}
        return self._forward(
            parts,
            groups,
            [tokens[row] for row in order],
            [positions[row] for row in order],
            [place[row] for row in range(len(tokens))],
        )

    def _forward(
        self, parts: list[Part], groups: list[Group], tokens: list[int], positions: list[int], wanted: list[int]
    ) -> Tensor:
        num_padding = -len(tokens) % _ROWS
        in_use = Tokens(parts, groups, num_padding)
        # The head's rows are padded as well, for the same reason.
        rows = wanted + [wanted[0]] * (-len(wanted) % _ROWS)
        device = self.device.torch_device
        logits_to_keep = (
            torch.tensor(rows, device=device) if self._takes("logits_to_keep") and len(rows) < len(tokens) else None
        )
        extra = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        with torch.no_grad(), self.device.autocast(), self._attention(ATTENTION), tokens_in_use(in_use):
            logits_NV = self.model(
                input_ids=torch.tensor([tokens + [0] * num_padding], device=device),
                position_ids=torch.tensor([positions + [0] * num_padding], device=device),
                use_cache=False,
                **extra,
            ).logits[0]
            if self.shape is not None and len(in_use.layers_seen) != self.shape.num_layers:
                raise NotImplementedError("layers that share their keys")
        if logits_to_keep is not None:
            return logits_NV[: len(wanted)].float()
        in_order = wanted == list(range(len(wanted)))
        return (logits_NV[: len(wanted)] if in_order else logits_NV[wanted]).float()

    def _new_cache(self) -> Any:
        """The model's own, or else the tokens themselves."""
        return DynamicCache(config=self.model.config) if self.cache_argument else []

    def _forward_alone(self, cache: Any, tokens: list[int], positions: list[int]) -> Tensor:
        device = self.device.torch_device
        with torch.no_grad(), self.device.autocast(), self._attention("eager"):
            if isinstance(cache, list):
                cache += tokens
                logits_CV = self.model(input_ids=torch.tensor([cache], device=device), use_cache=False).logits[0]
                return logits_CV[-len(tokens) :].float()
            places = {"position_ids": torch.tensor([positions], device=device)} if self._takes("position_ids") else {}
            return (
                self.model(
                    input_ids=torch.tensor([tokens], device=device),
                    use_cache=True,
                    **{self.cache_argument: cache},
                    **places,
                )
                .logits[0]
                .float()
            )

    def _prefill_alone(self, batch: list[Sequences], tokens: list[list[int]], all_logits: list[bool]) -> list[Tensor]:
        found: list[Tensor] = []
        for sequences, own, every in zip(batch, tokens, all_logits, strict=True):
            if not sequences.caches:
                sequences.caches = [self._new_cache()]
            positions = list(range(sequences.length, sequences.length + len(own)))
            logits_NV = self._forward_alone(sequences.caches[0], own, positions)
            found.append(logits_NV if every else logits_NV[-1:])
        return found

    def _decode_alone(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        rows, place = [], 0
        for sequences in batch:
            for cache in sequences.caches:
                rows.append(self._forward_alone(cache, [tokens[place]], [sequences.length]))
                place += 1
        return torch.cat(rows)

    def _takes(self, argument: str) -> bool:
        return argument in self._arguments

    @contextlib.contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        """The model's attention is this one within. Training goes on with its own."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = implementation
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation = own

    def _find_shape(self) -> CacheShape:
        """What a token takes, as the model's own cache has it after one."""
        cache = DynamicCache(config=self.model.config)
        self._forward_alone(cache, [0], [0])
        found = set()
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
                raise NotImplementedError(f"{type(layer).__name__} without keys and values")
            found.add((keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
        if len(found) != 1:
            raise NotImplementedError("layers whose keys differ in shape")
        num_heads, key_size, value_size, dtype = found.pop()
        return CacheShape(len(cache.layers), num_heads, key_size, value_size, dtype, self.device.torch_device)

    def _try_out(self) -> None:
        """Decodes two samples of one prompt, and a third beside them, as the model itself computes them."""
        tokens = [token % self.model.config.get_text_config().vocab_size for token in _TRIAL]
        pair, single = Sequences(2), Sequences(1)
        self.prefill([pair], [tokens[:2]], all_logits=[False])
        self.prefill([pair, single], [tokens[2:5], tokens[:3]], all_logits=[False, False])
        self.branch(pair)
        self.branch(single)
        self.decode([pair, single], [tokens[5], tokens[6], tokens[3]])
        got = self.decode([pair, single], [tokens[6], tokens[7], tokens[4]])
        for row, whole in zip(
            got, ([*tokens[:5], tokens[5], tokens[6]], [*tokens[:5], tokens[6], tokens[7]], tokens[:5]), strict=True
        ):
            own = self._forward_alone([], whole, [])[-1]
            error = float((own - row).abs().max() / own.abs().max().clamp(min=1.0))
            if not error < _TRIAL_TOLERANCE:
                raise NotImplementedError(f"attention that comes out otherwise, by {error:.2g}")
