"""Finds out how samples of a model can be decoded, by decoding a few tokens in one way after the other.

Right is what a plain forward of the model itself computes of the whole sequence so far, with its own attention. A way
that comes out otherwise is not used: neither for the sequences it was tried on, nor, where the model has a boundary
beyond which it computes otherwise (models/positions.py), for those beyond it.
"""

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.models.comparison import relative_difference
from trainer_service.engine.models.positions import BY_ROW, Boundary, boundaries, moved, rope_boundaries
from trainer_service.engine.models.runner import quiet_transformers
from trainer_service.engine.sampling.cache import CacheShape
from trainer_service.engine.sampling.decoder import Decoder
from trainer_service.engine.sampling.decoding_plan import DecodingPlan, Way
from trainer_service.engine.sampling.forwards import Forwards
from trainer_service.engine.sampling.sequences import Sequences

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Largest difference of logits, relative to the largest, between a way to decode and a plain forward."""
_NOTICED = 1e-5
"""Difference from which on a boundary that was moved was moved indeed, and what came out is no rounding."""
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
_WAYS = (
    *((way, whole, False) for way in (Way.TOGETHER, Way.ROWS, Way.ALONE) for whole in (False, True)),
    (Way.RECOMPUTED_ROWS, True, False),
)
"""Ways, whether prompts are taken in whole, and whether the model is told its places; in the order they are tried."""
_NEAR = (3, 7, 5, 2, 11, 6, 4, 9)
_MOVED_TO = 8
"""Tokens at which boundaries are tried."""
_MOST_IN_PLACE = 1024
"""Tokens at which a boundary that cannot be moved is still tried: beyond, loading a model would take too long."""


def find_decoding(model: PreTrainedModel, device: Device, *, attention: str, max_context_length: int) -> DecodingPlan:
    """Tries a model out. Leaves it as it was.

    Args:
        model: In float32, on the device.
        device: Where the model is.
        attention: Name of the model's own, with which it was loaded.
        max_context_length: Longest sequence there will be, tokens.
    """
    with quiet_transformers():
        passed = boundaries(model, max_context_length=max_context_length)
        found = _Trial(model, device, attention).run(passed)
    fields = {"architecture": type(model).__name__, "sampling": found.described}
    log = logger.info if found.near is found.far is Way.TOGETHER else logger.warning
    log("Found out how samples are decoded.", extra={"fields": fields})
    return found


class _Trial:
    def __init__(self, model: PreTrainedModel, device: Device, attention: str) -> None:
        self._model = model
        self._device = device
        # Tried in float32 whatever will be computed in: then what differs is the model's doing, not rounding's.
        self._exact = dataclasses.replace(device, compute_dtype=torch.float32)
        start = self._decoder(DecodingPlan(Way.RECOMPUTED, Way.RECOMPUTED, attention, whole=True))
        self._start = dataclasses.replace(
            start.decoding, cache_argument=next(filter(start.forwards.takes, _CACHE_ARGUMENTS), "")
        )
        self._shape: CacheShape | None = None
        self._row_shape: CacheShape | None = None
        self._vocab_size = int(model.config.get_text_config().vocab_size)

    def run(self, passed: Sequence[Boundary]) -> DecodingPlan:
        """How sequences are decoded, if the longest pass these boundaries."""
        movable, fixed = self._sorted_out(passed)
        near = self._near(movable)
        return self._served(near if near.near is Way.RECOMPUTED else self._far(near, movable, fixed))

    def _near(self, movable: Sequence[Boundary]) -> DecodingPlan:
        """How short sequences are decoded, and all of them as far as is known by then."""
        why_near = ""
        reached = [one for one in movable if one.in_rows or one.name not in BY_ROW]
        placed = [(Way.TOGETHER, False, True)] if any(one.name in BY_ROW for one in movable) else []
        for way, whole, placing in (*placed, *_WAYS):
            made = lambda way=way, whole=whole, placing=placing: self._made(way, whole=whole, placed=placing)  # noqa: E731
            attempt = lambda made=made: self._try_near(made())  # noqa: E731
            found = self._works(attempt)
            if not found and movable:
                # Where a row passes them, and no sequence in it does.
                with moved(self._model, reached, _MOVED_TO):
                    found = self._works(attempt)
            if not found:
                return dataclasses.replace(made(), why_near=why_near)
            why_near = why_near or found
        return dataclasses.replace(self._start, why_near=why_near)

    def _far(self, near: DecodingPlan, movable: Sequence[Boundary], fixed: Sequence[Boundary]) -> DecodingPlan:
        """How sequences are decoded that pass boundaries, if short ones are decoded as in `near`."""
        found: list[tuple[int, Way, str]] = []
        for number, boundary in enumerate(movable):
            with moved(self._model, movable[: number + 1], _MOVED_TO):
                why = self._goes_on(near, _MOVED_TO)
            if why:
                with moved(self._model, movable, _MOVED_TO):
                    found.append((boundary.length, self._way_beyond(near, _MOVED_TO), why))
                break
        for boundary in fixed:
            if boundary.length > _MOST_IN_PLACE:
                why = f"its {boundary.name} of {boundary.length} tokens could not be tried"
                found.append((boundary.length, Way.RECOMPUTED, why))
            elif why := self._goes_on(near, boundary.length):
                found.append((boundary.length, self._way_beyond(near, boundary.length), why))
        if not found:
            return near
        _, far, why = max(found, key=lambda one: one[1])
        row_shape = near.row_shape or self._rows_of(far)
        return dataclasses.replace(near, far=far, boundary=min(found)[0], row_shape=row_shape, why_far=why)

    def _sorted_out(self, passed: Sequence[Boundary]) -> tuple[list[Boundary], list[Boundary]]:
        """Boundaries that can be moved, and those that can be tried in their place alone."""
        movable: list[Boundary] = []
        fixed: list[Boundary] = []
        forwards, tokens = self._decoder(self._start).forwards, self._tokens(3 * _MOVED_TO)
        before = forwards.own_logits(tokens) if passed else None
        ropes = rope_boundaries(self._model.config.get_text_config())
        for boundary in passed:
            with moved(self._model, [boundary], _MOVED_TO):
                noticed = before is None or relative_difference(forwards.own_logits(tokens), before) > _NOTICED
            if noticed or boundary.length <= _MOVED_TO:
                movable.append(boundary)
            elif boundary not in ropes or self._turns_otherwise(forwards, boundary):
                fixed.append(boundary)
        return movable, fixed

    def _turns_otherwise(self, forwards: Forwards, boundary: Boundary) -> bool:
        """Whether tokens come out otherwise beside one whose place is past a boundary: some configurations tell one
        beyond which all is as before it."""
        if not forwards.takes("position_ids"):
            return True
        tokens = self._tokens(_MOVED_TO)
        short, long = (
            forwards.own_logits(tokens, [*range(_MOVED_TO - 1), last])[:-1] for last in (_MOVED_TO - 1, boundary.length)
        )
        return relative_difference(long, short) > _NOTICED

    def _goes_on(self, near: DecodingPlan, at: int) -> str:
        """Why sequences longer than `at` are not decoded as shorter ones; "" where they are."""
        decoding = self._made(near.near, whole=near.whole, placed=near.placed)
        return self._works(lambda: self._try_beyond(decoding, at))

    def _way_beyond(self, near: DecodingPlan, at: int) -> Way:
        """The fastest way for sequences longer than `at`, computed again, whole, when they get there."""
        for way in (Way.ROWS, Way.ALONE, Way.RECOMPUTED_ROWS):
            if not self._works(lambda way=way: self._try_beyond(self._changing(near, way, at), at)):
                return way
        return Way.RECOMPUTED

    def _changing(self, near: DecodingPlan, way: Way, at: int) -> DecodingPlan:
        """Decoding as in `near`, that way beyond `at`."""
        made = self._made(near.near, whole=near.whole, placed=near.placed)
        return dataclasses.replace(made, far=way, boundary=at, row_shape=made.row_shape or self._rows_of(way))

    def _try_near(self, decoding: DecodingPlan) -> None:
        """Two samples of one prompt, and a third beside them; in a row together, behind a crowd."""
        decoder, tokens = self._decoder(decoding), [token % self._vocab_size for token in _NEAR]
        num_crowd = 2 * _MOVED_TO if decoding.near in (Way.TOGETHER, Way.ROWS) else 0
        pair, single = Sequences(2), Sequences(1)
        crowd = [Sequences(num_crowd)] if num_crowd else []
        batch = [*crowd, pair, single]
        first = 0 if decoding.whole else 2
        if first:
            decoder.prefill([pair], [tokens[:first]], num_logits=[1])
        pieces = [*([tokens[:6]] if crowd else []), tokens[first:5], tokens[:3]]
        *_, second_piece, whole_piece = decoder.prefill(batch, pieces, num_logits=[len(piece) for piece in pieces])
        _compare(second_piece, decoder.forwards.own_logits(tokens[:5])[first:])
        _compare(whole_piece, decoder.forwards.own_logits(tokens[:3]))
        for sequences in batch:
            decoder.branch(sequences)
        decoder.decode(batch, [*tokens[:1] * num_crowd, tokens[5], tokens[6], tokens[3]])
        got = decoder.decode(batch, [*tokens[:1] * num_crowd, tokens[6], tokens[7], tokens[4]])[num_crowd:]
        wholes = ([*tokens[:5], tokens[5], tokens[6]], [*tokens[:5], tokens[6], tokens[7]], tokens[:5])
        for row, whole in zip(got, wholes, strict=True):
            _compare(row, decoder.forwards.own_logits(whole)[-1])

    def _try_beyond(self, decoding: DecodingPlan, at: int) -> None:
        """Two samples that pass a boundary as they grow, and one whose prompt lies beyond, side by side."""
        decoder, tokens = self._decoder(decoding), self._tokens(2 * at + 3)
        pair, single = Sequences(2), Sequences(1)
        self._prefill(decoder, pair, tokens[: at - 2])
        own = decoder.forwards.own_logits(tokens[: 2 * at - 1])
        _compare(self._prefill(decoder, single, tokens[: 2 * at - 1]), own)
        for step in range(4):
            first, second, third = at - 2 + step, at - 1 + step, 2 * at - 1 + step
            got = decoder.decode([pair, single], [tokens[first], tokens[second], tokens[third]])
            if step:
                _compare(got[0], decoder.forwards.own_logits(tokens[: first + 1])[-1])
                _compare(got[2], decoder.forwards.own_logits(tokens[: third + 1])[-1])
        _compare(got[1], decoder.forwards.own_logits([*tokens[: at - 2], *tokens[at - 1 : at + 3]])[-1])  # pyright: ignore[reportPossiblyUnboundVariable]

    def _prefill(self, decoder: Decoder, sequences: Sequences, prompt: list[int]) -> torch.Tensor:
        size = decoder.piece(len(prompt), len(prompt) // 2)
        pieces = [prompt[start : start + size] for start in range(0, len(prompt), size)]
        found = [decoder.prefill([sequences], [piece], num_logits=[len(piece)])[0] for piece in pieces]
        decoder.branch(sequences)
        return torch.cat(found)

    def _made(self, way: Way, *, whole: bool, placed: bool) -> DecodingPlan:
        """That way for all sequences, prompts taken in whole or in pieces, and told its places or not; in float32.

        Raises:
            NotImplementedError: It is none for this model.
        """
        if not self._start.cache_argument and not way.recomputed:
            raise NotImplementedError("no cache that its forward takes")
        if way is Way.TOGETHER and self._shape is None:
            self._shape = self._decoder(self._start).forwards.find_shape()
        shape = self._shape if way is Way.TOGETHER else None
        return dataclasses.replace(
            self._start, near=way, far=way, shape=shape, row_shape=self._rows_of(way), placed=placed, whole=whole
        )

    def _rows_of(self, way: Way) -> CacheShape | None:
        """The shape of a token in rows, if that is how."""
        if way is not Way.ROWS:
            return None
        if self._row_shape is None:
            self._row_shape = self._decoder(self._start).forwards.find_row_shape()
        return self._row_shape

    def _served(self, decoding: DecodingPlan) -> DecodingPlan:
        """The same in the dtype that is computed in."""
        if self._device == self._exact:
            return decoding
        decoder = Decoder(self._model, self._device, self._start)
        return dataclasses.replace(
            decoding,
            shape=decoding.shape and decoder.forwards.find_shape(),
            row_shape=decoding.row_shape and decoder.forwards.find_row_shape(),
        )

    def _works(self, attempt: Callable[[], None]) -> str:
        """Why something does not work; "" where it does."""
        try:
            attempt()
        except NotImplementedError as exc:
            return f"it has {exc}"
        except Exception as exc:
            # Whatever a model does that we do not foresee, another way serves it.
            return f"its forward in company fails ({type(exc).__name__}: {str(exc).partition(chr(10))[0]})"
        return ""

    def _decoder(self, decoding: DecodingPlan) -> Decoder:
        return Decoder(self._model, self._exact, decoding)

    def _tokens(self, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self._vocab_size, (count,), generator=generator).tolist()


def _compare(got: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = relative_difference(got, wanted)
    if not difference < _TOLERANCE:
        raise NotImplementedError(f"attention that comes out otherwise, by {difference:.2g}")
