"""The ledger and the limits, for any order of requests and any usage."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loadmaster.description import Limits
from loadmaster.errors import PayloadNotStarted
from loadmaster.ledger import Ledger, Slot, _Ticket
from loadmaster.limits import (
    BLIND_LOOK_SECONDS,
    SHORTEST_LOOK_SECONDS,
    WINDOW_STEPS,
    cpu_ratio,
    judge,
    remembered,
    seconds_until_look,
)
from loadmaster.result import Usage

OFTEN = settings(max_examples=500, deadline=None)
"""No deadline: the first example pays for imports and schemas, and the suite shares its machine."""

CORES, MEMORY_MB = 4, 1000


class AnyOrderOfRequests(RuleBasedStateMachine):
    """Tickets are requested and returned in any order, granted or not: a return of a waiting one is a cancellation."""

    tickets = Bundle("tickets")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(CORES, MEMORY_MB)
        self.open: list[_Ticket] = []

    @rule(target=tickets, cores=st.integers(1, CORES), memory_mb=st.none() | st.integers(1, MEMORY_MB))
    def request(self, cores: int, memory_mb: int | None) -> _Ticket:
        ticket = self.ledger._request(Slot(cores, memory_mb))
        self.open.append(ticket)
        return ticket

    @rule(cores=st.integers(1, 2 * CORES), memory_mb=st.integers(MEMORY_MB + 1, 2 * MEMORY_MB))
    def request_too_much(self, cores: int, memory_mb: int) -> None:
        before = repr(self.ledger)
        try:
            self.ledger._request(Slot(cores, memory_mb))
        except PayloadNotStarted:
            assert repr(self.ledger) == before
        else:
            raise AssertionError("a job that can never fit was given a place in the line")

    @rule(ticket=consumes(tickets))
    def give_back(self, ticket: _Ticket) -> None:
        self.ledger._return(ticket)
        self.open.remove(ticket)

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        granted = [ticket.slot for ticket in self.open if ticket.granted.is_set()]
        assert sum(slot.cores for slot in granted) <= CORES
        assert sum(slot.memory_mb or 0 for slot in granted) <= MEMORY_MB
        free = CORES - sum(slot.cores for slot in granted)
        waiting = len(self.open) - len(granted)
        assert repr(self.ledger) == f"<Ledger [{free} of {CORES} cores free, {waiting} waiting]>"

    @invariant()
    def first_come_first_served(self) -> None:
        order = [ticket.granted.is_set() for ticket in self.open]
        assert order == sorted(order, reverse=True)

    @invariant()
    def nobody_waits_who_fits(self) -> None:
        granted = [ticket.slot for ticket in self.open if ticket.granted.is_set()]
        head = next((ticket.slot for ticket in self.open if not ticket.granted.is_set()), None)
        if head is not None:
            cores = head.cores + sum(slot.cores for slot in granted)
            memory = (head.memory_mb or 0) + sum(slot.memory_mb or 0 for slot in granted)
            assert cores > CORES or memory > MEMORY_MB

    def teardown(self) -> None:
        """Every ticket ends granted or withdrawn: when the granted ones leave, those behind are granted in their turn."""
        while self.open:
            assert self.open[0].granted.is_set()
            self.ledger._return(self.open.pop(0))
        assert repr(self.ledger) == f"<Ledger [{CORES} of {CORES} cores free, 0 waiting]>"


TestAnyOrderOfRequests = AnyOrderOfRequests.TestCase
TestAnyOrderOfRequests.settings = settings(max_examples=50, deadline=None)

NOON = datetime(2030, 5, 1, 12, 0, tzinfo=UTC)
SECONDS = st.floats(min_value=0, max_value=1e7, allow_nan=False)
BYTES = st.integers(0, 2**50)
SOME_BYTES = st.none() | st.integers(1, 2**50)
SOME_SECONDS = st.none() | st.floats(min_value=1e-3, max_value=1e7)
SOME_LIMITS = st.builds(
    Limits,
    wall_seconds=SOME_SECONDS,
    cpu_seconds=SOME_SECONDS,
    deadline=st.none() | st.builds(lambda seconds: NOON + timedelta(seconds=seconds), st.floats(-1e6, 1e6)),
)
ALL_LIMITS = st.builds(
    Limits,
    wall_seconds=SOME_SECONDS,
    cpu_seconds=SOME_SECONDS,
    memory_bytes=SOME_BYTES,
    processes=st.none() | st.integers(1, 1000),
    workdir_bytes=SOME_BYTES,
    free_disk_bytes=SOME_BYTES,
    output_bytes=SOME_BYTES,
)
USAGE = st.builds(
    Usage,
    wall_seconds=SECONDS,
    cpu_seconds=SECONDS,
    rss_bytes=BYTES,
    processes=st.integers(0, 1000),
    pss_bytes=st.none() | BYTES,
    workdir_bytes=st.none() | BYTES,
    free_disk_bytes=st.none() | BYTES,
    output_bytes=BYTES,
)


@OFTEN
@given(SECONDS, SECONDS, SOME_LIMITS, st.integers(1, 256), st.floats(min_value=0, max_value=3600))
def test_the_next_look_comes_and_comes_before_any_foreseeable_limit_could_be_reached(
    wall: float, cpu: float, limits: Limits, cores: int, heartbeat: float
) -> None:
    usage = Usage(wall, cpu)
    look = seconds_until_look(usage, limits, now=NOON, cores=cores, heartbeat_seconds=heartbeat)
    assert SHORTEST_LOOK_SECONDS <= look <= max(heartbeat, SHORTEST_LOOK_SECONDS)
    if look > SHORTEST_LOOK_SECONDS:
        just_before = 0.999 * look
        busiest = Usage(wall + just_before, cpu + just_before * cores)
        assert judge([busiest], limits, now=NOON + timedelta(seconds=just_before)) is None


@OFTEN
@given(USAGE, ALL_LIMITS, st.integers(1, 256))
def test_a_limit_that_may_be_reached_at_any_rate_is_looked_at_within_seconds(
    usage: Usage, limits: Limits, cores: int
) -> None:
    look = seconds_until_look(usage, limits, now=NOON, cores=cores, heartbeat_seconds=3600)
    blind = (limits.memory_bytes, limits.processes, limits.workdir_bytes, limits.free_disk_bytes, limits.output_bytes)
    assert look >= SHORTEST_LOOK_SECONDS
    if any(limit is not None for limit in blind):
        assert look <= BLIND_LOOK_SECONDS[1]


@OFTEN
@given(USAGE, ALL_LIMITS)
def test_a_verdict_is_given_exactly_when_a_limit_is_reached(usage: Usage, limits: Limits) -> None:
    times = ((usage.wall_seconds, limits.wall_seconds), (usage.cpu_seconds, limits.cpu_seconds))
    amounts = (
        (usage.pss_bytes, limits.memory_bytes),
        (usage.processes, limits.processes),
        (usage.workdir_bytes, limits.workdir_bytes),
        (usage.output_bytes, limits.output_bytes),
    )
    free, least = usage.free_disk_bytes, limits.free_disk_bytes
    reached: list[float] = [limit for used, limit in times if limit is not None and used >= limit]
    reached += [limit for used, limit in amounts if limit is not None and used is not None and used > limit]
    reached += [least] if least is not None and free is not None and free < least else []
    verdict = judge([usage], limits, now=NOON)
    assert (verdict is not None) == bool(reached)
    if verdict is not None:
        assert verdict.threshold == reached[0]
        assert (verdict.value < verdict.threshold) == (verdict.limit == "free disk")
        assert str(verdict).startswith(verdict.limit)


STEPS = st.lists(
    st.tuples(st.floats(min_value=0.05, max_value=500), st.floats(min_value=0, max_value=1)), min_size=1, max_size=100
)


@OFTEN
@given(STEPS, st.floats(min_value=1, max_value=5000))
def test_what_is_forgotten_changes_the_cpu_ratio_by_little(steps: list[tuple[float, float]], window: float) -> None:
    """The ratio over what is remembered is one over at least the window, and it is known whenever it can be."""
    limits = Limits(cpu_ratio=0.05, cpu_ratio_window_seconds=window)
    kept: tuple[Usage, ...] = (Usage(0.0),)
    everything = [Usage(0.0)]
    longest = max(step for step, _ in steps)
    for step, busy in steps:
        last = everything[-1]
        usage = Usage(last.wall_seconds + step, last.cpu_seconds + busy * step)
        everything.append(usage)
        kept = remembered(kept, usage, limits)
        ratio = cpu_ratio(kept, window)
        assert (ratio is None) == (cpu_ratio(everything, window) is None)
        assert set(kept) <= set(everything)
        assert len(kept) <= WINDOW_STEPS + 3
        if ratio is not None:
            first = next(old for old in reversed(kept) if usage.wall_seconds - old.wall_seconds >= window)
            span = usage.wall_seconds - first.wall_seconds
            assert window <= span <= window + max(longest, window / WINDOW_STEPS) * 2
            assert 0 <= ratio <= 1 + 1e-6
