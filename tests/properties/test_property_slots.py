"""The ledger and the limits, for any order of requests and any usage."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loadmaster.errors import PayloadNotStarted
from loadmaster.ledger import Ledger, Slot, _Ticket
from loadmaster.limits import SHORTEST_LOOK_SECONDS, Usage, judge, seconds_until_look
from loadmaster.model import Limits

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

SECONDS = st.floats(min_value=0, max_value=1e7, allow_nan=False)
SOME_LIMITS = st.builds(
    Limits,
    wall_seconds=st.none() | st.floats(min_value=1e-3, max_value=1e7),
    cpu_seconds=st.none() | st.floats(min_value=1e-3, max_value=1e7),
)


@OFTEN
@given(SECONDS, SECONDS, SOME_LIMITS, st.integers(1, 256), st.floats(min_value=0, max_value=3600))
def test_the_next_look_comes_and_comes_before_any_limit_could_be_reached(
    wall: float, cpu: float, limits: Limits, cores: int, heartbeat: float
) -> None:
    usage = Usage(wall, cpu)
    look = seconds_until_look(usage, limits, cores=cores, heartbeat_seconds=heartbeat)
    assert SHORTEST_LOOK_SECONDS <= look <= max(heartbeat, SHORTEST_LOOK_SECONDS)
    if look > SHORTEST_LOOK_SECONDS:
        just_before = 0.999 * look
        busiest = Usage(wall + just_before, cpu + just_before * cores)
        assert judge(busiest, limits) is None


@OFTEN
@given(SECONDS, SECONDS, SOME_LIMITS)
def test_a_verdict_is_given_exactly_when_a_limit_is_reached(wall: float, cpu: float, limits: Limits) -> None:
    reached = [
        limit
        for used, limit in ((wall, limits.wall_seconds), (cpu, limits.cpu_seconds))
        if limit is not None and used >= limit
    ]
    verdict = judge(Usage(wall, cpu), limits)
    assert (verdict is not None) == bool(reached)
    if verdict is not None:
        assert verdict.threshold == reached[0]
        assert verdict.value >= verdict.threshold
