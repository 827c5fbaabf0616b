"""A model as sampling uses it: new tokens in, logits out, everything before them cached.

Most architectures send attention through transformers' interface; they decode the requests of a step together, in one
row without padding (attention.py), or, where layers remember more than keys and values, in a row for each sample
(states.py). Those with attention of their own, such as a bias by distance, take a row for each sample too, with keys
padded on the left (rows.py), or decode each sample by itself over transformers' own cache: the same numbers, slower.
Those whose cache does not go on from where it was compute everything again for every token, in rows padded on the right
if they can. Which it is, is found by trying when the model is loaded (trial.py), and may be another for sequences
longer than some boundary of the model's.

Shape suffixes: N new tokens, C tokens of a prompt so far, V vocabulary.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.sampling.attention import Part, Tokens
from trainer_service.engine.sampling.cache import Block, CacheShape
from trainer_service.engine.sampling.decoding_plan import DecodingPlan, Way
from trainer_service.engine.sampling.forwards import Forwards
from trainer_service.engine.sampling.rows import held_by
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
    forwards: Forwards = field(init=False)
    _slots: Slots | None = field(init=False, default=None)
    _row_slots: Slots | None = field(init=False, default=None)
    _states: States | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.forwards = Forwards(self.model, self.device, self.decoding)

    @property
    def shape(self) -> CacheShape | None:
        """Of a token that we cache; None where caches are the model's own or none."""
        return self.decoding.shape or self.decoding.row_shape

    @property
    def shares_prompts(self) -> bool:
        """Whether samples of a long prompt may share what is cached of it."""
        return self.decoding.shape is not None

    @property
    def _stateful(self) -> bool:
        """Whether layers remember more than keys and values: then nobody's row holds anything but its own tokens."""
        return self.decoding.shape is not None and bool(self.decoding.shape.states)

    def with_model(self, model: PreTrainedModel) -> "Decoder":
        """The same over another copy of the model, which goes on with what is cached."""
        decoder = Decoder(model, self.device, self.decoding)
        decoder._slots, decoder._row_slots, decoder._states = self._slots, self._row_slots, self._states
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
        if sequences.way is Way.ROWS:
            self._take_rows(sequences)
            return
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
        found: dict[int, Tensor] = {}
        company: dict[Way, list[Sequences]] = {}
        places: dict[Way, list[int]] = {}
        arrived: list[Sequences] = []
        start = 0
        for sequences in batch:
            own = range(start, start + sequences.num_samples)
            start = own.stop
            new = [[tokens[place]] for place in own]
            self._take_note(sequences, new, 1)
            way = sequences.way
            assert way is not None
            # They have just passed the boundary: from here on they have rows.
            arrives = way is Way.ROWS and not sequences.slots
            if arrives:
                arrived.append(sequences)
            elif way is Way.RECOMPUTED_ROWS:
                self._note_again(sequences, new)
            if arrives or way is Way.ALONE or way is Way.RECOMPUTED:
                found.update(zip(own, self._forward_alone(sequences, new, num_wanted=1), strict=True))
            else:
                company.setdefault(way, []).append(sequences)
                places.setdefault(way, []).extend(own)
        make = {
            Way.TOGETHER: self._decode_together,
            Way.ROWS: self._decode_rows,
            Way.RECOMPUTED_ROWS: self._decode_again,
        }
        for way, members in company.items():
            logits_NV = make[way](members, [tokens[place] for place in places[way]])
            if len(logits_NV) == start:
                found[0] = logits_NV
                break
            found.update(zip(places[way], logits_NV.split(1), strict=True))
        for sequences in batch:
            sequences.length += 1
        for sequences in arrived:
            self._take_rows(sequences)
        return found[0] if len(found) == 1 else torch.cat([found[place] for place in range(start)])

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
        logits_NV = self.forwards.in_a_row(Tokens(parts, [], num_padding), inputs, positions, wanted)
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
        logits_NV = self.forwards.in_rows(in_use, cache, [tokens], positions[None], num_logits)[0]
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
        return self.forwards.in_a_row(
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
        logits_nV = self.forwards.in_rows(Tokens(parts, groups, num_padding, rows), cache, by_row, places.to(device), 1)
        write_back(cache, states)
        return logits_nV[row_of, 0]

    def _decode_rows(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        assert self._row_slots is not None
        slots = [slot for sequences in batch for slot in sequences.slots]
        for slot in slots:
            self._row_slots.reserve(slot)
        token_of = dict(zip(slots, tokens, strict=True))
        found: dict[Slot, Tensor] = {}
        for pool in self._row_slots.pools():
            logits_NV = self.forwards.over_slots(pool, [token_of[slot] for slot in pool.slots])
            found.update(zip(pool.slots, logits_NV.split(1), strict=True))
        return torch.cat([found[slot] for slot in slots])

    def _take_rows(self, sequences: Sequences) -> None:
        """What was cached of samples, or of the prompt for all of them, goes where there are rows."""
        assert self.decoding.row_shape is not None
        if self._row_slots is None:
            self._row_slots = Slots(self.decoding.row_shape, multiple=ROWS)
        held = [held_by(cache) for cache in sequences.caches]
        if len(held) < sequences.num_samples:
            held *= sequences.num_samples
        sequences.slots = [self._row_slots.add_copy(*one) for one in held]
        sequences.caches = []

    def _note_again(self, sequences: Sequences, tokens: list[list[int]]) -> None:
        """New tokens of samples that are computed again."""
        if not sequences.caches:
            sequences.caches = [list(own) for own in sequences.tokens]
            return
        for cache, own in zip(sequences.caches, tokens, strict=True):
            cache += own

    def _decode_again(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        samples: list[list[int]] = [cache for sequences in batch for cache in sequences.caches]
        assert len(samples) == len(tokens)
        return self.forwards.again(samples)

    def _forward_alone(self, sequences: Sequences, tokens: list[list[int]], *, num_wanted: int) -> list[Tensor]:
        """New tokens of each sample, or of the prompt: logits behind the last `num_wanted` of them, [num_wanted, V]."""
        start = sequences.length
        if not sequences.caches:
            # At the beginning, or where what was cached went: then everything so far is computed anew.
            sequences.caches = [self._new_cache(sequences) for _ in tokens]
            if start:
                start, tokens = 0, sequences.tokens
        return [
            self.forwards.over_cache(cache, own, range(start, start + len(own)), num_wanted=num_wanted)
            for cache, own in zip(sequences.caches, tokens, strict=True)
        ]

    def _new_cache(self, sequences: Sequences) -> Any:
        """The model's own, or the tokens themselves."""
        return [] if sequences.way is not None and sequences.way.recomputed else DynamicCache(config=self.model.config)
