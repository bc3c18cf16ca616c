"""Where a file is tried next: every place has its turn, nothing is tried for ever."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.staging.retry import Course, Patience, Step, delay

CHANCES = st.floats(0, 1)
PATIENCE = st.builds(
    Patience,
    attempts=st.integers(1, 6),
    first_seconds=st.floats(0.001, 10),
    most_seconds=st.floats(10, 100),
    total_seconds=st.floats(0, 1000),
)
FAILURES = st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 2000)), min_size=60, max_size=60)


@given(PATIENCE, st.integers(1, 3), st.integers(0, 2), FAILURES, CHANCES)
def test_it_ends_within_its_budget_and_every_place_has_had_its_turn(
    patience: Patience, wanted: int, failover: int, failures: list[tuple[bool, float | None]], chance: float
) -> None:
    course, tried, waited = Course(wanted, failover), list[int](), 0.0
    step: Step | None = Step(0)
    for retryable, retry_after in failures:
        assert step is not None
        tried.append(step.place)
        step = course.failed(step.place, patience, lambda: chance, retryable=retryable, retry_after=retry_after)
        if step is None:
            break
        waited += step.wait_seconds
    assert step is None, "six attempts at each of five places are fewer than sixty"
    assert waited <= patience.total_seconds
    assert set(tried) == set(range(wanted + failover))
    assert all(tried.count(place) <= patience.attempts for place in tried)
    assert [place for place in tried if place < wanted] == tried[: sum(place < wanted for place in tried)]


@given(PATIENCE, st.integers(1, 40), CHANCES)
def test_a_wait_is_bounded_and_never_nothing(patience: Patience, failures: int, chance: float) -> None:
    wait = delay(patience, failures, lambda: chance)
    assert 0 < wait <= patience.most_seconds
    assert wait >= min(patience.most_seconds, patience.first_seconds) / 2


def walk(course: Course, failures: list[tuple[bool, float | None]], patience: Patience) -> list[tuple[int, float]]:
    steps, place = [], 0
    for retryable, retry_after in failures:
        step = course.failed(place, patience, lambda: 1.0, retryable=retryable, retry_after=retry_after)
        if step is None:
            steps.append((-1, 0.0))
            break
        steps.append((step.place, step.wait_seconds))
        place = step.place
    return steps


AGAIN, NEVER = (True, None), (False, None)


@pytest.mark.parametrize(
    ("course", "failures", "steps"),
    [
        (Course(1), [AGAIN] * 4, [(0, 1.0), (0, 2.0), (0, 4.0), (-1, 0)]),
        (Course(1), [NEVER], [(-1, 0)]),
        (Course(2), [AGAIN, AGAIN, AGAIN, NEVER, NEVER], [(1, 0), (0, 1.0), (1, 1.0), (0, 2.0), (-1, 0)]),
        (Course(2), [NEVER, AGAIN, AGAIN], [(1, 0), (1, 1.0), (1, 2.0)]),
        (Course(1, 1), [NEVER, AGAIN, NEVER], [(1, 0), (1, 1.0), (-1, 0)]),
        (Course(1, 1), [AGAIN, NEVER, NEVER], [(0, 1.0), (1, 0), (-1, 0)]),
    ],
)
def test_other_places_come_first_then_the_same_later_then_failover(
    course: Course, failures: list[tuple[bool, float | None]], steps: list[tuple[int, float]]
) -> None:
    assert walk(course, failures, Patience()) == steps


def test_a_storage_that_asks_for_time_gets_it_unless_it_is_more_than_there_is() -> None:
    assert walk(Course(1), [(True, 90.0), AGAIN], Patience()) == [(0, 90.0), (0, 2.0)]
    assert walk(Course(1), [(True, 3600.0)], Patience()) == [(-1, 0)]
    assert walk(Course(1, 1), [(True, 3600.0)], Patience()) == [(1, 0)]
