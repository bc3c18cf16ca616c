"""Lanes: never more than there are, and whoever waits gets a turn."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.staging.lanes import Lanes, Road
from loadmaster.storage.base import Direction

ELEMENTS = ["DISK", "TAPE", "https://host"]


def road(element: str, direction: Direction = Direction.DOWNLOAD) -> Road:
    return Road(direction, "https", element)


class Job:
    """Wants so many files of each road, and takes one with each lane."""

    def __init__(self, log: list[tuple[Job, Road]], *wanted: Road) -> None:
        self.left = Counter(wanted)
        self.log = log

    def wanted(self) -> Iterable[Road]:
        return [each for each, count in self.left.items() if count]

    def take(self, road: Road) -> None:
        self.left[road] -= 1
        self.log.append((self, road))


@given(
    st.integers(1, 5),
    st.dictionaries(st.sampled_from(ELEMENTS), st.integers(1, 3)),
    st.lists(st.lists(st.tuples(st.sampled_from(ELEMENTS), st.sampled_from(Direction)), max_size=12), max_size=5),
    st.randoms(),
)
def test_never_more_than_there_are_and_everything_is_taken_once(
    streams: int, limits: dict[str, int], wishes: list[list[tuple[str, Direction]]], chance: object
) -> None:
    log: list[tuple[Job, Road]] = []
    lanes = Lanes(streams, limits)
    jobs = [Job(log, *(road(element, direction) for element, direction in wish)) for wish in wishes]
    for job in jobs:
        lanes.join(job)
    held: list[Road] = []
    seen = 0
    lanes.assign()
    while True:
        held += [each for _, each in log[seen:]]
        seen = len(log)
        in_use = Counter(each.direction for each in held)
        assert all(count <= streams for count in in_use.values())
        by_element = Counter((each.direction, each.element) for each in held)
        assert all(count <= limits.get(element, streams) for (_, element), count in by_element.items())
        if not held:
            break
        lanes.release(held.pop(chance.randrange(len(held))))  # type: ignore[attr-defined]
    assert len(log) == sum(map(len, wishes))
    assert all(not any(job.left.values()) for job in jobs)
    assert repr(lanes).startswith(f"<Lanes [{streams} download, {streams} upload, {streams} copy free")


def test_one_with_a_thousand_files_does_not_keep_one_with_three_waiting() -> None:
    log: list[tuple[Job, Road]] = []
    lanes = Lanes(2)
    many, few = Job(log, *[road("DISK")] * 1000), Job(log, *[road("DISK")] * 3)
    lanes.join(many)
    lanes.assign()
    lanes.join(few)
    for _ in range(6):
        lanes.release(road("DISK"))
    assert [job for job, _ in log[2:]].count(few) == 3


def test_nobody_starves_who_wants_what_is_scarce_while_others_take_what_is_not() -> None:
    """Whoever was refused lost its place, and the one that had just been served was ahead of it again."""
    log: list[tuple[Job, Road]] = []
    lanes = Lanes(4, {"TAPE": 1})
    first, second = Job(log, *[road("TAPE")] * 50), Job(log, *[road("TAPE")] * 50)
    other = Job(log, *[road("DISK")] * 500)
    for job in (first, second, other):
        lanes.join(job)
    lanes.assign()
    running = deque(each for _, each in log)
    for step in range(300):
        seen = len(log)
        tape = step % 3 == 0
        done = next((each for each in running if (each.element == "TAPE") == tape), running[0])
        running.remove(done)
        lanes.release(done)
        running += [each for _, each in log[seen:]]
    scarce = [job for job, each in log if each.element == "TAPE"]
    assert abs(scarce.count(first) - scarce.count(second)) <= 1


def test_who_leaves_gets_nothing_any_more() -> None:
    log: list[tuple[Job, Road]] = []
    lanes = Lanes(1)
    job = Job(log, road("DISK"), road("DISK"))
    lanes.join(job)
    lanes.assign()
    lanes.leave(job)
    lanes.release(road("DISK"))
    assert len(log) == 1
    assert lanes.limit("DISK") is None


def test_a_kind_of_storage_has_no_more_lanes_than_it_may() -> None:
    lanes = Lanes(4, scheme_streams={"file": 2})
    near, far = (Road(Direction.DOWNLOAD, scheme, f"{scheme}://h") for scheme in ("file", "https"))
    assert (lanes.width(near), lanes.width(far)) == (2, 4)
    taken: list[Road] = []

    class Both:
        def wanted(self) -> list[Road]:
            return [near, far]

        def take(self, road: Road) -> None:
            taken.append(road)

    lanes.join(Both())
    lanes.assign()
    assert taken == [near, near, far, far]
    lanes.release(near)
    assert taken[4:] == [near]
