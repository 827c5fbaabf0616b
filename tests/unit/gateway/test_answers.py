"""Answers that wait in memory: bounded, and gone with their session."""

from trainer_service.gateway.answers import Answers
from trainer_service.gateway.outcomes import Outcome


def test_the_oldest_make_room_even_where_bodies_are_empty():
    answers = Answers(max_bytes=10_000)
    for number in range(1000):
        answers.keep(f"s:sample:0:{number}", Outcome.result())
    kept = [number for number in range(1000) if answers.get(f"s:sample:0:{number}") is not None]
    assert 1 < len(kept) < 20
    assert kept == list(range(1000 - len(kept), 1000))


def test_an_ended_session_leaves_nothing():
    answers = Answers()
    answers.keep("one:train:0:1", Outcome.result(loss=1.0))
    answers.keep("one:sample:0:7", Outcome.result())
    answers.keep("two:train:0:1", Outcome.result())
    answers.forget("one:sample:0:7")
    answers.forget_session("one")
    answers.forget_session("never heard of")
    assert answers.get("one:train:0:1") is None
    assert answers.get("two:train:0:1") == Outcome.result()


def test_an_answer_that_is_kept_twice_takes_its_place_once():
    answers = Answers(max_bytes=1200)
    for _ in range(3):
        answers.keep("s:train:0:1", Outcome.result())
    answers.keep("s:train:0:2", Outcome.result())
    assert answers.get("s:train:0:1") is not None
