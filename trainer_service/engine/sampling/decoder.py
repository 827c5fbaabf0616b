"""A model as sampling uses it: new tokens in, logits out, everything before them cached.

Most architectures send attention through transformers' interface; they decode the requests of a step together, in one
row without padding (attention.py). Those that do not (recurrent ones, or with a bias of their own) decode each sample
by itself over transformers' own cache: the same numbers, slower. Those whose cache does not go on from where it was
compute everything again for every token. Which it is, is found by trying when the model is loaded (trial.py), and may
be another for sequences longer than some boundary of the model's.

Shape suffixes: N new tokens, C tokens of a prompt so far, V vocabulary.
"""

import contextlib
import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.sampling.attention import ATTENTION, Part, Tokens, tokens_in_use
from trainer_service.engine.sampling.cache import Block, CacheShape, capacity
from trainer_service.engine.sampling.decoding import Decoding, Way
from trainer_service.engine.sampling.slots import Group, Slot, Slots

_ROWS = 16
"""Forwards have a multiple of this many rows. On the CPU a matrix product of few rows, or of some odd number of them,
adds up in another order than others, whose rows come out the same however many there are, and as in training: so the
numbers of a sample do not depend on its company."""
_MAX_COPIED = 4096
"""Tokens of a prompt that are copied for its samples, all together; beyond, they share it."""


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
        self.tokens: list[list[int]] = [[]]
        """What each sample has been through, where it may have to be computed again; of the prompt at first."""
        self.way: Way | None = None
        """How they are decoded now; None before the first token."""
        self.beyond = False
        """Whether they have passed the decoding's boundary."""
        self.length = 0
        """Tokens each sample has been through."""

    def keep(self, samples: list[int]) -> None:
        """Lets go of all samples but these, by their present numbers."""
        self.num_samples = len(samples)
        self.tokens = [self.tokens[sample] for sample in samples]
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

    def follow(self, prompt: "Sequences") -> None:
        """Goes on from a whole prompt that another request took in, and from which that one has not branched."""
        # A prompt's block is only read from then on.
        self.prompt = prompt.prompt
        self.caches = copy.deepcopy(prompt.caches)
        self.tokens = [list(prompt.tokens[0])]
        self.way, self.beyond, self.length = prompt.way, prompt.beyond, prompt.length

    def close(self) -> None:
        """Lets go of everything."""
        for slot in self.slots:
            slot.free()
        self.slots, self.caches = [], []
        self.prompt = self.own = None

    def add(self, tokens: list[list[int]]) -> None:
        """Notes new tokens of each sample, or of the prompt."""
        for own, new in zip(self.tokens, tokens, strict=True):
            own += new


def num_cached_tokens(num_samples: int, num_prompt: int, num_generated: int, *, num_alive: int) -> int:
    """Tokens that a request's caches have room for.

    Args:
        num_samples: That it began with.
        num_prompt: Tokens of its prompt.
        num_generated: Tokens of each sample behind it.
        num_alive: Samples that go on.
    """
    if _shares_prompt(num_samples, num_prompt):
        return capacity(num_prompt) + num_alive * capacity(num_generated)
    return num_alive * capacity(num_prompt + num_generated)


def _shares_prompt(num_samples: int, num_prompt: int) -> bool:
    return num_samples > 1 and num_samples * num_prompt > _MAX_COPIED


@dataclass
class Decoder:
    """Runs one model over caches.

    Attributes:
        model: Its parameters are read, never changed.
        device: Where the model is.
        decoding: How; of a model of the same architecture.
    """

    model: PreTrainedModel
    device: Device
    decoding: Decoding
    _configs: list[Any] = field(init=False)
    _arguments: frozenset[str] = field(init=False)
    _slots: Slots | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Modules share a few config objects; each says which attention its modules use.
        configs = {id(config): config for module in self.model.modules() if (config := getattr(module, "config", None))}
        self._arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    @property
    def shape(self) -> CacheShape | None:
        """Of a cached token; None where no samples are decoded together."""
        return self.decoding.shape

    def with_model(self, model: PreTrainedModel) -> "Decoder":
        """The same over another copy of the model, which goes on with what is cached."""
        decoder = Decoder(model, self.device, self.decoding)
        decoder._slots = self._slots
        return decoder

    def piece(self, num_prompt: int, usual: int) -> int:
        """Tokens of a prompt to take in at a time: as many as usual, or all where only the whole comes out right."""
        decoding = self.decoding
        return num_prompt if decoding.whole or decoding.is_beyond(num_prompt) else usual

    def prefill(self, batch: list[Sequences], tokens: list[list[int]], *, num_logits: list[int]) -> list[Tensor]:
        """Takes the next tokens of prompts in.

        Args:
            batch: Whose prompts.
            tokens: N of each, no more at a time than `piece` says and no fewer but at the end.
            num_logits: Of each, behind how many of its last tokens logits are wanted; 1 at least.

        Returns:
            float32 [num_logits, V] of each.
        """
        found: dict[Sequences, Tensor] = {}
        together: list[int] = []
        for number, (sequences, own) in enumerate(zip(batch, tokens, strict=True)):
            self._take_note(sequences, [own], len(own))
            if sequences.way is Way.TOGETHER:
                together.append(number)
            else:
                (logits_NV,) = self._forward_alone(sequences, [own], num_wanted=num_logits[number])
                found[sequences] = logits_NV
        if together:
            parts = [batch[number] for number in together]
            logits = self._prefill_together(
                parts, [tokens[number] for number in together], [num_logits[number] for number in together]
            )
            found.update(zip(parts, logits, strict=True))
        for sequences, own in zip(batch, tokens, strict=True):
            sequences.length += len(own)
        return [found[sequences] for sequences in batch]

    def branch(self, sequences: Sequences) -> None:
        """The prompt is complete: from here each sample goes its own way."""
        count = sequences.num_samples
        sequences.tokens = [list(sequences.tokens[0]) for _ in range(count)]
        if sequences.way is not Way.TOGETHER:
            sequences.caches += [copy.deepcopy(sequences.caches[0]) for _ in range(count - 1)]
            return
        assert self.shape is not None
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
        rows: dict[int, Tensor] = {}
        together: list[Sequences] = []
        places: list[int] = []
        start = 0
        for sequences in batch:
            own = range(start, start + sequences.num_samples)
            new = [[tokens[place]] for place in own]
            self._take_note(sequences, new, 1)
            if sequences.way is Way.TOGETHER:
                together.append(sequences)
                places += own
            else:
                rows.update(zip(own, self._forward_alone(sequences, new, num_wanted=1), strict=True))
            start = own.stop
        logits_NV = self._decode_together(together, [tokens[place] for place in places]) if together else None
        for sequences in batch:
            sequences.length += 1
        if logits_NV is not None:
            if not rows:
                return logits_NV
            rows.update(zip(places, logits_NV.split(1), strict=True))
        return torch.cat([rows[place] for place in range(start)])

    def own_logits(self, tokens: list[int], positions: list[int] | None = None) -> Tensor:
        """What a plain forward of the model itself finds behind each token of a sequence, float32 [N, V].

        Args:
            tokens: N of them.
            positions: Theirs, where they are not those of a sequence.
        """
        return self._forward_with(None, tokens, positions, num_wanted=len(tokens))

    def find_shape(self) -> CacheShape:
        """What a token takes, as the model's own cache has it after one.

        Raises:
            NotImplementedError: Not every layer has keys and values of one shape.
        """
        cache = DynamicCache(config=self.model.config)
        self._forward_with(cache, [0], [0], num_wanted=1)
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

    def takes(self, argument: str) -> bool:
        """Whether the model's forward has an argument of that name."""
        return argument in self._arguments

    def _take_note(self, sequences: Sequences, tokens: list[list[int]], count: int) -> None:
        """`count` new tokens of each sample are coming; what was cached goes where it does not serve for so many."""
        decoding = self.decoding
        if decoding.boundary is not None:
            sequences.add(tokens)
        beyond = decoding.is_beyond(sequences.length + count)
        if beyond is not sequences.beyond:
            sequences.close()
        sequences.way, sequences.beyond = decoding.far if beyond else decoding.near, beyond

    def _prefill_together(self, batch: list[Sequences], tokens: list[list[int]], num_logits: list[int]) -> list[Tensor]:
        assert self.shape is not None
        parts: list[Part] = []
        inputs: list[int] = []
        positions: list[int] = []
        wanted: list[int] = []
        for sequences, own, count in zip(batch, tokens, num_logits, strict=True):
            if sequences.prompt is None:
                sequences.prompt = Block(self.shape, 1, len(own))
            parts.append(Part.of(sequences.prompt, len(own)))
            inputs += own
            positions += range(sequences.length, sequences.length + len(own))
            wanted += range(len(inputs) - count, len(inputs))
        logits_NV = self._forward(parts, [], inputs, positions, wanted)
        return list(logits_NV.split(num_logits))

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
            torch.tensor(rows, device=device) if self.takes("logits_to_keep") and len(rows) < len(tokens) else None
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

    def _forward_alone(self, sequences: Sequences, tokens: list[list[int]], *, num_wanted: int) -> list[Tensor]:
        """New tokens of each sample, or of the prompt: logits behind the last `num_wanted` of them, [num_wanted, V]."""
        start = sequences.length
        if not sequences.caches:
            # At the beginning, or where what was cached went: then everything so far is computed anew.
            sequences.caches = [self._new_cache(sequences) for _ in tokens]
            if start:
                start, tokens = 0, sequences.tokens
        return [
            self._forward_with(cache, own, range(start, start + len(own)), num_wanted=num_wanted)
            for cache, own in zip(sequences.caches, tokens, strict=True)
        ]

    def _new_cache(self, sequences: Sequences) -> Any:
        """The model's own, or the tokens themselves."""
        return [] if sequences.way is Way.RECOMPUTED else DynamicCache(config=self.model.config)

    def _forward_with(
        self, cache: Any, tokens: list[int], positions: Sequence[int] | None, *, num_wanted: int
    ) -> Tensor:
        """Logits behind the last `num_wanted` of new tokens, by the model's own attention.

        Args:
            cache: Of what comes before them; a list of tokens is computed again, None is for nothing.
            tokens: New ones; what comes behind them goes on from the cache.
            positions: Theirs; None leaves them to the model, as training does.
            num_wanted: At most as many as new tokens.
        """
        device = self.device.torch_device
        extra: dict[str, Any] = {"logits_to_keep": num_wanted} if self.takes("logits_to_keep") else {}
        if isinstance(cache, list):
            cache += tokens
            cache, tokens, positions = None, cache, None
        if positions is not None and self.takes("position_ids"):
            extra["position_ids"] = torch.tensor([*positions], device=device)[None]
        extra |= {"use_cache": False} if cache is None else {"use_cache": True, self.decoding.cache_argument: cache}
        with torch.no_grad(), self.device.autocast(), self._attention(self.decoding.attention):
            return self.model(input_ids=torch.tensor([tokens], device=device), **extra).logits[0, -num_wanted:].float()

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
