"""Who comes in, who waits and who is put back: shares of owners, and room that is taken as it grows."""

from dataclasses import dataclass, field
from itertools import count
from typing import Any

import pytest

from trainer_service.engine.sampling import admission as admission_module
from trainer_service.engine.sampling.admission import Admission

_CLOCK = count()


@dataclass(eq=False)
class Asked:
    """Stands for a Job: `size` bytes now, `most` in the end."""

    owner: str
    rows: int = 1
    size: int = 1
    most: int = 1
    times_put_back: int = 0
    waiting_since_s: float = field(default_factory=lambda: float(next(_CLOCK)))

    @property
    def held(self) -> range:
        return range(self.rows)

    def cache_bytes(self, *, in_the_end: bool) -> int:
        return self.most if in_the_end else self.size

    def put_back(self) -> None:
        self.times_put_back += 1


def ask(admission: Admission, *jobs: Asked) -> tuple[Asked, ...]:
    for job in jobs:
        admission.add(job)  # pyright: ignore[reportArgumentType]
    return jobs


def admit(admission: Admission) -> tuple[list[Any], list[Any]]:
    return admission.admit()


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(admission_module.time, "monotonic", lambda: now[0])
    return now


def test_one_owners_requests_come_in_the_order_they_came():
    admission = Admission(max_rows=8, max_cache_bytes=800)
    asked = ask(admission, *(Asked("a", rows=4) for _ in range(3)))
    assert admit(admission) == ([*asked[:2]], [])
    admission.remove(asked[0])  # pyright: ignore[reportArgumentType]
    assert admit(admission) == ([asked[2]], [])
    assert len(admission) == 2


def test_rows_that_one_owner_took_keep_no_other_from_its_share():
    admission = Admission(max_rows=8, max_cache_bytes=800)
    ask(admission, *(Asked("a") for _ in range(30)))
    assert len(admit(admission)[0]) == 8
    others = ask(admission, *(Asked("b") for _ in range(6)))
    assert admit(admission) == ([*others[:4]], [])
    # One request of a third comes in however many samples it has.
    (third,) = ask(admission, Asked("c", rows=100))
    assert admit(admission) == ([third], [])


def test_owners_take_turns_when_they_come_in():
    admission = Admission(max_rows=4, max_cache_bytes=800)
    ask(admission, *(Asked("a") for _ in range(9)), *(Asked("b") for _ in range(9)))
    assert [job.owner for job in admit(admission)[0]] == ["a", "b", "a", "b"]


def test_room_that_one_owner_took_is_made_for_another_by_its_newest():
    admission = Admission(max_rows=100, max_cache_bytes=80)
    asked = ask(admission, *(Asked("a", size=10, most=40) for _ in range(9)))
    assert admit(admission) == ([*asked[:7]], [])
    (other,) = ask(admission, Asked("b", size=30, most=40))
    assert admit(admission) == ([other], [asked[6], asked[5]])
    # Nor do those put back come in again before there is room.
    assert admit(admission) == ([], [])
    admission.remove(other)  # pyright: ignore[reportArgumentType]
    assert admit(admission) == ([asked[5], asked[6]], [])


def test_who_outgrows_the_room_puts_the_newest_of_whoever_takes_most_back():
    admission = Admission(max_rows=100, max_cache_bytes=80)
    first, second, other = ask(admission, Asked("a", size=20), Asked("a", size=20), Asked("b", size=10))
    admit(admission)
    assert admission.make_room() == []
    first.size = second.size = 40
    assert admission.make_room() == [second]
    other.size = 100
    assert admission.make_room() == [other]
    # The last one stays, however much it takes.
    first.size = 1000
    assert admission.make_room() == []


def test_one_put_back_twice_comes_in_when_all_it_may_need_fits_and_stays():
    admission = Admission(max_rows=100, max_cache_bytes=80)
    often, beside = ask(admission, Asked("a", size=10, most=60, times_put_back=2), Asked("b", size=30, most=80))
    admission.remove(often)  # pyright: ignore[reportArgumentType]
    assert admit(admission) == ([beside], [])
    ask(admission, often)
    assert admit(admission) == ([], [])
    admission.remove(beside)  # pyright: ignore[reportArgumentType]
    assert admit(admission) == ([often], [])
    often.size = 60
    (late,) = ask(admission, Asked("b", size=20, most=20))
    assert admit(admission) == ([late], [])
    late.size = 40
    assert admission.make_room() == [late]


def test_one_that_needs_more_than_its_share_keeps_others_out_once_it_waited_long(still: list[float]):
    admission = Admission(max_rows=100, max_cache_bytes=80)
    running = ask(admission, Asked("a", size=30), Asked("b", size=30))
    admit(admission)
    still[0] = 1000.0
    (large,) = ask(admission, Asked("c", size=70, waiting_since_s=still[0]))
    (small,) = ask(admission, Asked("a", size=5, waiting_since_s=still[0]))
    assert admit(admission) == ([small], [])
    still[0] += 60
    ask(admission, Asked("b", size=1, waiting_since_s=still[0]))
    assert admit(admission) == ([], [])
    for job in (*running, small):
        admission.remove(job)  # pyright: ignore[reportArgumentType]
    assert admit(admission)[0][0] is large
