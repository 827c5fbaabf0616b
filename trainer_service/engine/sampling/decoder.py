"""A model as sampling uses it: new tokens in, logits out, everything before them cached.

Most architectures send attention through transformers' interface; they decode the requests of a step together, in one
row without padding (attention.py), or, where layers remember more than keys and values, in a row for each sample
(states.py). Those with attention of their own, such as a bias by distance, decode each sample by itself over
transformers' own cache: the same numbers, slower. Those whose cache does not go on from where it was compute everything
again for every token. Which it is, is found by trying when the model is loaded (trial.py), and may be another for
sequences longer than some boundary of the model's.

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
from trainer_service.engine.sampling.cache import Block, CacheShape
from trainer_service.engine.sampling.decoding_plan import DecodingPlan, Way
from trainer_service.engine.sampling.sequences import Sequences, shares_prompt
from trainer_service.engine.sampling.slots import Group, Slot, Slots
from trainer_service.engine.sampling.states import ROWS, StateRow, States, cache_over, states_of, write_back


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
    decoding: DecodingPlan
    _configs: list[Any] = field(init=False)
    _arguments: frozenset[str] = field(init=False)
    _slots: Slots | None = field(init=False, default=None)
    _states: States | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # Modules share a few config objects; each says which attention its modules use.
        configs = {id(config): config for module in self.model.modules() if (config := getattr(module, "config", None))}
        self._arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    @property
    def shape(self) -> CacheShape | None:
        """Of a cached token; None where no samples are decoded together."""
        return self.decoding.shape

    @property
    def _stateful(self) -> bool:
        """Whether layers remember more than keys and values: then nobody's row holds anything but its own tokens."""
        return self.shape is not None and bool(self.shape.states)

    def with_model(self, model: PreTrainedModel) -> "Decoder":
        """The same over another copy of the model, which goes on with what is cached."""
        decoder = Decoder(model, self.device, self.decoding)
        decoder._slots, decoder._states = self._slots, self._states
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
        if together and self._stateful:
            for number in together:
                found[batch[number]] = self._prefill_stateful(batch[number], tokens[number], num_logits[number])
        elif together:
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
        if self._stateful:
            if self._states is None:
                self._states = States(self.shape.states, self.device.torch_device)
            sequences.rows = [self._states.add(sequences.states) for _ in range(count)]
            sequences.states = []
        if shares_prompt(count, sequences.length):
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
            NotImplementedError: It keeps something else, or keys and values of several shapes.
        """
        cache = DynamicCache(config=self.model.config)
        self._forward_with(cache, [0], [0], num_wanted=1)
        states = states_of(cache)
        # Attention gives the tokens without a meaning zeros, and notes what it was called with.
        in_use = Tokens([], [], ROWS)
        self._forward(in_use, [0] * ROWS, list(range(ROWS)), [0])
        with_keys = any(isinstance(getattr(layer, "keys", None), Tensor) for layer in cache.layers)
        if with_keys is not bool(in_use.calls) or not (with_keys or states):
            raise NotImplementedError("attention that does not go through transformers' interface")
        return CacheShape.of(in_use.calls, [shape for shape, _ in states], self.device.torch_device)

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
        num_padding = -len(inputs) % ROWS
        inputs += [0] * num_padding
        positions += [0] * num_padding
        logits_NV = self._forward(Tokens(parts, [], num_padding), inputs, positions, wanted)
        return list(logits_NV.split(num_logits))

    def _prefill_stateful(self, sequences: Sequences, tokens: list[int], num_logits: int) -> Tensor:
        """A prompt by itself: what layers remember must not see another's tokens, nor any without a meaning."""
        assert self.shape is not None
        if sequences.prompt is None:
            sequences.prompt = Block(self.shape, 1, len(tokens))
        in_use = Tokens([Part.of(sequences.prompt, len(tokens))], [], 0)
        first = sequences.length
        states = list(zip(self.shape.states, sequences.states, strict=True)) if first else []
        cache = cache_over(self.model.config, states, first)
        positions = torch.arange(first, first + len(tokens), device=self.device.torch_device)
        logits_NV = self._forward_states(in_use, cache, [tokens], positions[None], num_logits)[0]
        sequences.states = [state for _, state in states_of(cache)]
        return logits_NV

    def _decode_together(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        parts: list[Part] = []
        order: list[int] = []
        positions: list[int] = []
        row_of: dict[Slot, int] = {}
        state_rows: list[StateRow] = []
        for sequences in batch:
            state_rows += sequences.rows
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
        num_padding = -len(order) % ROWS
        if self._stateful:
            return self._decode_states((parts, groups, num_padding), order, state_rows, tokens, positions)
        place = {row: number for number, row in enumerate(order)}
        return self._forward(
            Tokens(parts, groups, num_padding),
            [tokens[row] for row in order] + [0] * num_padding,
            [positions[row] for row in order] + [0] * num_padding,
            [place[row] for row in range(len(tokens))],
        )

    def _decode_states(
        self,
        in_use: tuple[list[Part], list[Group], int],
        order: list[int],
        state_rows: list[StateRow],
        tokens: list[int],
        positions: list[int],
    ) -> Tensor:
        """One more token of every sample, each in the row where its states are.

        Args:
            in_use: What Tokens takes.
            order: The samples' numbers in the order of those.
            state_rows: The samples' rows.
            tokens: Theirs.
            positions: Likewise.
        """
        assert self._states is not None
        assert self.shape is not None
        assert len(state_rows) == len(self._states.rows)
        parts, groups, num_padding = in_use
        device, count = self.device.torch_device, len(tokens) + num_padding
        row_of = [row.number for row in state_rows]
        rows = torch.tensor([row_of[sample] for sample in order] + list(range(len(tokens), count)), device=device)
        by_row, places = [[0] for _ in range(count)], torch.zeros(count, 1, dtype=torch.int64)
        for row, token, position in zip(row_of, tokens, positions, strict=True):
            by_row[row], places[row] = [token], position
        states = list(zip(self.shape.states, self._states.tensors(), strict=True))
        cache = cache_over(self.model.config, states, max(positions))
        logits_nV = self._forward_states(Tokens(parts, groups, num_padding, rows), cache, by_row, places.to(device), 1)
        write_back(cache, states)
        return logits_nV[row_of, 0]

    def _forward_states(
        self, in_use: Tokens, cache: DynamicCache, tokens: list[list[int]], positions: Tensor, num_wanted: int
    ) -> Tensor:
        """Logits behind the last tokens of each row, float32 [rows, num_wanted, V]."""
        extra: dict[str, Any] = {"logits_to_keep": num_wanted} if self.takes("logits_to_keep") else {}
        if self.takes("position_ids"):
            extra["position_ids"] = positions
        with torch.no_grad(), self.device.autocast(), self._attention(ATTENTION), tokens_in_use(in_use):
            logits = self.model(
                input_ids=torch.tensor(tokens, device=positions.device),
                use_cache=True,
                **{self.decoding.cache_argument: cache},
                **extra,
            ).logits
            self._check_calls(in_use)
        return logits[:, -num_wanted:].float()

    def _check_calls(self, in_use: Tokens) -> None:
        if self.shape is not None and len(in_use.calls) != self.shape.num_layers:
            raise NotImplementedError("attention that is not called alike every time")

    def _forward(self, in_use: Tokens, tokens: list[int], positions: list[int], wanted: list[int]) -> Tensor:
        # The head's rows are padded as well, for the same reason.
        rows = wanted + [wanted[0]] * (-len(wanted) % ROWS)
        device = self.device.torch_device
        logits_to_keep = (
            torch.tensor(rows, device=device) if self.takes("logits_to_keep") and len(rows) < len(tokens) else None
        )
        extra = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        with torch.no_grad(), self.device.autocast(), self._attention(ATTENTION), tokens_in_use(in_use):
            logits_NV = self.model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.tensor([positions], device=device),
                use_cache=False,
                **extra,
            ).logits[0]
            self._check_calls(in_use)
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
