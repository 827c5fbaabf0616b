"""The order of a run's operations, without anything that executes them."""

import weakref

import pytest
from gradwire.errors import AbortedError, OutOfRangeError
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.trainer_service_pb2 import TrainRequest

from trainer_service.runs import sequence as sequence_module
from trainer_service.runs.operation import Operation
from trainer_service.runs.sequence import Entry, Sequence


def step(seq_id: int, learning_rate: float = 1e-3) -> Operation:
    return Operation.made(TrainRequest(seq_id=seq_id, optim_step=ops.OptimStepRequest(learning_rate=learning_rate)))


def receive_new(sequence: Sequence, operation: Operation, got: list[bytes] | None = None) -> Entry:
    entry = sequence.receive(operation, (got if got is not None else []).append)
    assert entry is not None
    return entry


def test_numbers_are_taken_one_after_the_other():
    sequence = Sequence(min_retained_answers=1)
    for seq_id in (1, 2, 3):
        assert receive_new(sequence, step(seq_id)).seq_id == seq_id
    assert sequence.next_seq_id == 4
    assert sequence.unanswered == 3


def test_a_gap_is_refused_and_changes_nothing():
    sequence = Sequence(min_retained_answers=1)
    with pytest.raises(OutOfRangeError, match="seq_id is 2, but the next operation of this run is 1") as caught:
        sequence.receive(step(2), lambda _: None)
    assert caught.value.reason == "SEQ_ID_GAP"
    assert caught.value.metadata == {"expected": "1", "got": "2"}
    receive_new(sequence, step(1))


def test_a_repeat_gets_the_first_answer():
    sequence = Sequence(min_retained_answers=1)
    first: list[bytes] = []
    again: list[bytes] = []
    entry = receive_new(sequence, step(1), first)
    sequence.answer(entry, b"answer")
    assert sequence.receive(step(1), again.append) is None
    assert again == first == [b"answer"]


def test_a_repeat_of_an_operation_under_way_waits_for_the_same_answer():
    sequence = Sequence(min_retained_answers=1)
    first: list[bytes] = []
    again: list[bytes] = []
    entry = receive_new(sequence, step(1), first)
    assert sequence.receive(step(1), again.append) is None
    assert (first, again) == ([], [])
    sequence.answer(entry, b"answer")
    assert first == again
    assert len(first) == 1
    assert sequence.unanswered == 0


@pytest.mark.parametrize("answered", [False, True])
def test_a_repeat_with_other_content_is_refused(answered: bool):
    sequence = Sequence(min_retained_answers=1)
    entry = receive_new(sequence, step(1))
    if answered:
        sequence.answer(entry, b"answer")
    zero_grad = TrainRequest(seq_id=1, zero_grad=ops.ZeroGradRequest())
    for other in (step(1, learning_rate=2e-3), Operation.made(zero_grad)):
        with pytest.raises(AbortedError, match="seq_id 1 was used before") as caught:
            sequence.receive(other, lambda _: None)
        assert caught.value.reason == "SEQ_ID_CONFLICT"


def test_an_acknowledged_answer_is_released_and_its_repeat_refused():
    sequence = Sequence(min_retained_answers=1)
    for seq_id in (1, 2):
        sequence.answer(receive_new(sequence, step(seq_id)), b"answer")
    sequence.acknowledge(1)
    with pytest.raises(AbortedError, match="acknowledged") as caught:
        sequence.receive(step(1), lambda _: None)
    assert caught.value.reason == "ANSWER_RELEASED"
    assert sequence.receive(step(2), lambda _: None) is None


def test_acknowledging_what_is_not_answered_yet_lets_nothing_go():
    sequence = Sequence(min_retained_answers=1)
    got: list[bytes] = []
    entry = receive_new(sequence, step(1), got)
    sequence.acknowledge(5)
    sequence.answer(entry, b"answer")
    assert len(got) == 1
    assert sequence.receive(step(1), got.append) is None


def test_answers_nobody_acknowledges_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sequence_module, "MAX_RETAINED_ANSWERS", 3)
    sequence = Sequence(min_retained_answers=1)
    for seq_id in range(1, 6):
        sequence.answer(receive_new(sequence, step(seq_id)), b"answer")
    for seq_id in (1, 2):
        with pytest.raises(AbortedError):
            sequence.receive(step(seq_id), lambda _: None)
    for seq_id in (3, 4, 5):
        assert sequence.receive(step(seq_id), lambda _: None) is None


def test_answers_nobody_acknowledges_are_bounded_in_bytes_but_for_the_last_window(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sequence_module, "MAX_RETAINED_BYTES", 1000)
    sequence = Sequence(min_retained_answers=2)
    for seq_id in range(1, 5):
        sequence.answer(receive_new(sequence, step(seq_id)), bytes(900))
    with pytest.raises(AbortedError):
        sequence.receive(step(2), lambda _: None)
    for seq_id in (3, 4):
        assert sequence.receive(step(seq_id), lambda _: None) is None


def test_what_was_asked_is_let_go_once_it_is_answered():
    sequence = Sequence(min_retained_answers=1)
    operation = step(1)
    asked = weakref.ref(operation)
    sequence.answer(receive_new(sequence, operation), b"answer")
    del operation
    assert asked() is None
    with pytest.raises(AbortedError, match="used before"):
        sequence.receive(step(1, learning_rate=2e-3), lambda _: None)
    got: list[bytes] = []
    assert sequence.receive(step(1), got.append) is None
    assert got == [b"answer"]
