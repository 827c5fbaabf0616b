"""Slots hold what was written to them, whoever comes, grows and goes beside them."""

import hypothesis.strategies as st
import torch
from hypothesis import given

from trainer_service.engine.sampling.cache import Block, CacheShape, capacity
from trainer_service.engine.sampling.slots import Reach, Slot, Slots

SHAPE = CacheShape(2, 3, 4, 5, torch.float32, torch.device("cpu"))


def prompt_of(length: int, value: float) -> Block:
    block = Block(SHAPE, 1, length)
    block.reserve(length)
    views = block.views(length)
    for held in (*views.new_keys, *views.new_values):
        held.fill_(value)
    block.length = length
    return block


def write(slots: Slots, values: dict[Slot, float]) -> None:
    """One more token of every slot, as attention writes it."""
    for slot in values:
        slots.reserve(slot)
    for group in slots.groups():
        new = torch.tensor([values[slot] for slot in group.slots]).repeat_interleave(SHAPE.num_heads)[:, None]
        for held in (*group.keys, *group.values):
            held.view(-1, held.shape[-1]).index_copy_(0, group.index_nJ, new.expand(-1, held.shape[-1]))
        for slot in group.slots:
            slot.length += 1


@given(st.lists(st.tuples(st.integers(1, 200), st.sampled_from(["add", "write", "remove"])), max_size=40))
def test_slots_hold_what_was_written_to_them(steps: list[tuple[int, str]]):
    slots = Slots(SHAPE)
    values: dict[Slot, float] = {}
    lengths: dict[Slot, int] = {}
    for number, (size, what) in enumerate(steps):
        if what == "add":
            slot = slots.add(prompt_of(size, float(number + 1)))
            values[slot], lengths[slot] = float(number + 1), size
        elif what == "write":
            write(slots, values)
            lengths = {slot: length + 1 for slot, length in lengths.items()}
        elif values:
            slot = list(values)[size % len(values)]
            slot.free()
            del values[slot], lengths[slot]
        assert sum(len(group.slots) for group in slots.groups()) == len(values)
        for slot, value in values.items():
            assert slot.length == lengths[slot]
            assert slot.pool.size in (capacity(slot.length), capacity(slot.length + 1))
            for held in (slot.pool.keys, slot.pool.values):
                assert bool((held[:, slot.number, :, : slot.length] == value).all())
    for slot in list(values):
        slot.free()
    assert not slots.groups()


def test_a_token_sees_what_its_window_or_chunk_has_and_blocks_before_it_are_left_out():
    slots = Slots(SHAPE)
    short, long = slots.add(prompt_of(1030, 1.0)), slots.add(prompt_of(1500, 1.0))
    (group,) = slots.groups()
    assert [slot is other for slot, other in zip(group.slots, (short, long), strict=True)] == [True, True]
    # The shorter one's new token is at place 1030, the longer one's at 1500.
    reaches = {
        Reach(): 0,
        Reach(window=100): 512,
        Reach(window=600): 0,
        Reach(chunk=100): 1000 // 512 * 512,
        Reach(chunk=700): 512,
    }
    for reach, start in reaches.items():
        assert group.start(reach) == start
        mask = group.mask(reach)[:, 0, 0]
        assert mask.shape == (2, 1536 - start)
        for row, length in ((mask[0], 1031), (mask[1], 1501)):
            first = 0 if reach.window is None else length - reach.window
            if reach.chunk is not None:
                first = (length - 1) // reach.chunk * reach.chunk
            assert row.nonzero().flatten().tolist() == list(range(first - start, length - start))
