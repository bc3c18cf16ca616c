"""Which of a node's jobs may begin."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from loadmaster import JobDescription
from loadmaster.admission import Admission
from loadmaster.ahead import Ahead


@dataclass(frozen=True)
class Applicant:
    number: int
    job: JobDescription


def applicant(number: int, priority: int = 0, size_bytes: int = 0) -> Applicant:
    data = [{"source": "memory://se/x", "size_bytes": size_bytes}] if size_bytes else []
    return Applicant(number, JobDescription(executable="/bin/true", priority=priority, input_data=data))


def test_the_next_is_who_has_priority_and_then_who_came_first() -> None:
    line = Admission[Applicant](Ahead(10))
    for each in (applicant(0), applicant(1, 5), applicant(2), applicant(3, 5)):
        line.put(each)
    assert line.withdraw(applicant(2))
    assert not line.withdraw(applicant(2))
    assert [each.number for each in iter(lambda: line.next(0.0), None)] == [1, 3, 0]
    assert repr(line) == "<Admission [0 waiting, 0 begun]>"


def test_who_computes_leaves_his_place_to_another() -> None:
    line = Admission[Applicant](Ahead(1, slow_seconds=10))
    first, second = applicant(0), applicant(1)
    line.put(first)
    line.put(second)
    assert line.next(0.0) == first
    line.begin(first, 0.0)
    assert line.next(0.0) is None
    assert line.next_slow(0.0) == 10.0
    line.get_ready(first)
    assert line.next_slow(0.0) == float("inf")
    assert line.leave(first)
    assert not line.leave(first)
    assert line.next(0.0) == second


def test_the_bytes_of_those_begun_have_an_end_but_one_is_always_let_in() -> None:
    line = Admission[Applicant](Ahead(10, bytes=10))
    large, small = applicant(0, size_bytes=100), applicant(1, size_bytes=1)
    line.put(large)
    line.put(small)
    assert line.next(0.0) == large
    line.begin(large, 0.0)
    assert line.next(0.0) is None
    line.leave(large)
    assert line.next(0.0) == small


@given(st.lists(st.sampled_from(["come", "begin", "ready", "leave", "withdraw"]), max_size=60), st.integers(1, 4))
def test_nobody_is_begun_beyond_the_places_nor_lost(steps: list[str], jobs: int) -> None:
    line = Admission[Applicant](Ahead(jobs, slow_seconds=10))
    waiting: list[Applicant] = []
    begun: list[Applicant] = []
    for now, step in enumerate(steps):
        match step:
            case "come":
                waiting.append(applicant(now))
                line.put(waiting[-1])
            case "begin" if (found := line.next(float(now))) is not None:
                assert found == waiting.pop(0)
                line.begin(found, float(now))
                begun.append(found)
            case "ready" if begun:
                line.get_ready(begun[0])
            case "leave" if begun:
                assert line.leave(begun.pop(0))
            case "withdraw" if waiting:
                assert line.withdraw(waiting.pop())
        assert len(line) == len(waiting)
        assert len(begun) <= jobs * 5  # those that are slow have others' places beside them, up to four times
        assert line.places(0.0) == jobs - len(begun)
