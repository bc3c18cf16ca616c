"""The line: who is next, who may go ahead, and for whom things are kept."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from loadmaster.line import LOOK_AHEAD, Line, Ticket


def granted(*tickets: Ticket) -> list[bool]:
    return [ticket.granted for ticket in tickets]


def full(capacity: tuple[int, ...], *, patience: int = 3, seniority: int = 100) -> tuple[Line, list[Ticket]]:
    """A line whose cores are all held, by tickets of one core each."""
    line = Line(capacity, patience=patience, seniority=seniority)
    rest = (0,) * (len(capacity) - 1)
    return line, [line.request((1, *rest)) for _ in range(capacity[0])]


def test_who_fits_is_granted_at_once() -> None:
    line = Line((4,), patience=0)
    assert granted(line.request((3,)), line.request((1,)), line.request((1,))) == [True, True, False]
    assert (line.free, len(line)) == ((0,), 1)


def test_first_come_first_served_within_a_priority() -> None:
    line, (holder,) = full((1,))
    low, early, late = line.request((1,)), line.request((1,), priority=5), line.request((1,), priority=5)
    for expected in (early, late, low):
        line.give_back(holder)
        assert granted(expected) == [True]
        holder = expected


def test_more_is_taken_up_to_the_most_that_is_free() -> None:
    line = Line((8,), patience=0)
    assert line.request((2,), most=5).holds == (5,)
    assert line.request((1,), most=8).holds == (3,)
    waiting = line.request((1,), most=8)
    assert granted(waiting) == [False]
    line.give_back(waiting)
    assert line.free == (0,)


def test_who_fits_goes_ahead_of_a_head_that_does_not_as_often_as_it_has_patience() -> None:
    line, holders = full((2,), patience=3)
    large = line.request((2,))
    small = [line.request((1,)) for _ in range(10)]
    for number in range(3):
        line.give_back(holders.pop(0))
        holders.append(small[number])
        assert granted(large, *small[: number + 2]) == [False] + [True] * (number + 1) + [False]
    line.give_back(holders.pop(0))
    assert granted(large, small[3]) == [False, False]
    assert (line.spare(), line.free) == ((0,), (1,))
    line.give_back(holders.pop(0))
    assert granted(large, small[3]) == [True, False]
    line.give_back(large)
    assert granted(*small[3:]) == [True, True] + [False] * 5


def test_without_patience_nobody_goes_ahead() -> None:
    line, (holder, *_) = full((2,), patience=0)
    large, small = line.request((2,)), line.request((1,))
    line.give_back(holder)
    assert granted(large, small) == [False, False]


def test_a_low_priority_does_not_wait_for_ever() -> None:
    line, (holder,) = full((1,), seniority=4)
    low = line.request((1,))
    past = 0
    while not granted(low)[0]:
        high = line.request((1,), priority=9)
        line.give_back(holder)
        holder, past = high, past + 1
    assert past == 5, "four went past; the fifth did not"
    assert not granted(high)[0]


def test_a_low_priority_that_is_large_is_granted_in_the_end() -> None:
    """High ones go past five times; then each core that comes free is kept."""
    line, holders = full((3,), patience=3, seniority=5)
    low = line.request((3,))
    for _ in range(5):
        holders.append(line.request((1,), priority=9))
        line.give_back(holders.pop(0))
    high = line.request((1,), priority=9)
    for kept in (1, 2, 0):
        line.give_back(holders.pop(0))
        assert line.free == (kept,)
    assert granted(low, high) == [True, False]


def test_what_is_kept_for_somebody_leaves_the_rest_to_others() -> None:
    """It waits for a GPU and needs two cores: the others may have all but two, and no GPU."""
    line = Line((8, 1), patience=0)
    holder = line.request((1, 1))
    head = line.request((2, 1))
    beside, too_many, its_gpu = line.request((5, 0)), line.request((1, 0)), line.request((1, 1))
    assert granted(head, beside, too_many, its_gpu) == [False, True, False, False]
    assert line.free == (2, 0)
    line.give_back(holder)
    assert granted(head, beside, too_many, its_gpu) == [True, True, True, False]


def test_who_may_take_more_than_it_needs_takes_none_of_what_is_kept() -> None:
    line = Line((8, 1), patience=0)
    line.request((1, 1))
    head = line.request((2, 1))
    assert line.request((1, 0), most=8).holds == (5, 0)
    assert (granted(head), line.free) == ([False], (2, 0))


def test_who_leaves_the_line_makes_way() -> None:
    line, (holder, *_) = full((2,), patience=0)
    large, small = line.request((2,)), line.request((1,))
    line.give_back(holder)
    line.give_back(large)
    assert granted(small) == [True]
    assert len(line) == 0


def test_a_higher_priority_takes_the_place_of_one_for_whom_things_were_kept() -> None:
    line, (holder, _) = full((2,), patience=0)
    large = line.request((2,))
    line.give_back(holder)
    high = line.request((1,), priority=1)
    assert granted(large, high) == [False, True]


def calls(do: Callable[[], object]) -> int:
    """How many Python functions are called: a measure of work that does not depend on the machine."""
    count = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(profile)
    try:
        do()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("kinds", [1, 30, 10_000], ids="{} kinds".format)
def test_the_work_of_a_change_does_not_grow_with_the_line(kinds: int) -> None:
    def work(waiting: int) -> int:
        line = Line((64, 10**9), patience=64)
        large = line.request((64, 0))
        for number in range(waiting):
            line.request((2 + number % 3, 10**6 + number % kinds), priority=number % 2)
        line.give_back(large)
        return max(
            calls(lambda: line.give_back(line.request((1, 5)))),
            calls(lambda: line.give_back(line.request((60, 5), priority=7))),
            calls(lambda: line.give_back(line.request((60, 5), priority=-7))),
        )

    assert work(10_000) <= work(3 * LOOK_AHEAD) + 10
