"""The ledger and the limits, for any order of requests and any usage."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from loadmaster.description import JobDescription, Limits
from loadmaster.errors import PayloadNotStarted
from loadmaster.ledger import NO_JOB, Ledger, Slot
from loadmaster.limits import (
    BLIND_LOOK_SECONDS,
    SHORTEST_LOOK_SECONDS,
    WINDOW_STEPS,
    cpu_ratio,
    judge,
    remembered,
    seconds_until_look,
)
from loadmaster.line import Amounts, Line, Ticket
from loadmaster.result import Usage
from loadmaster.topology import Cpu, Gpu, choose_cpus

OFTEN = settings(max_examples=500, deadline=None)
"""No deadline: the first example pays for imports and schemas, and the suite shares its machine."""

CPUS = [Cpu(number, node=number % 4 // 2, core=number % 4) for number in range(8)]
GPUS = [Gpu("GPU-a", 0), Gpu("GPU-b", 1)]
MEMORY_MB, LICENCES = 1000, 2

JOBS = st.builds(
    JobDescription,
    executable=st.just("/bin/true"),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    number_of_processors=st.integers(1, len(CPUS)),
    max_number_of_processors=st.none() | st.just(len(CPUS)),
    whole_node=st.sampled_from([False] * 5 + [True]),
    number_of_gpus=st.sampled_from([0, 0, 0, 1, 2]),
    memory_mb=st.none() | st.integers(1, MEMORY_MB),
    resources=st.sampled_from([{}, {}, {"licences": 1}, {"licences": 2}]),
)


@dataclass(eq=False)
class Guest:
    """A job at the ledger, as `Ledger.lease` handles it."""

    job: JobDescription
    ticket: Ticket
    slot: Slot | None = None

    @property
    def granted(self) -> bool:
        return self.ticket.granted


class AnyOrderOfRequests(RuleBasedStateMachine):
    """Jobs ask, wake up with their slots, and leave, in any order; one that leaves while it waits was cancelled."""

    guests = Bundle("guests")

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(
            len(CPUS), MEMORY_MB, cpus=CPUS, gpus=GPUS, gpu_variables=["CUDA_VISIBLE_DEVICES"],
            extras={"licences": LICENCES}, patience=2,
        )  # fmt: skip
        self.open: list[Guest] = []
        self.claim: tuple[Ticket, list[Guest]] | None = None

    @rule(target=guests, job=JOBS)
    def request(self, job: JobDescription) -> Guest:
        guest = Guest(job, self.ledger._request(job))
        self.open.append(guest)
        return guest

    @rule(job=JOBS, cores=st.integers(0, 2), memory_mb=st.integers(0, 2), gpus=st.integers(0, 2))
    def request_too_much(self, job: JobDescription, cores: int, memory_mb: int, gpus: int) -> None:
        assume(cores or memory_mb or gpus)
        much = {"number_of_processors": len(CPUS) + cores} if cores else {}
        much |= {"memory_mb": MEMORY_MB + memory_mb} if memory_mb else {}
        much |= {"number_of_gpus": len(GPUS) + gpus} if gpus else {}
        before = repr(self.ledger)
        with pytest.raises(PayloadNotStarted, match="the node has"):
            self.ledger._request(job.model_copy(update=much))
        assert repr(self.ledger) == before

    @rule(guest=guests)
    def wake(self, guest: Guest) -> None:
        if guest in self.open and guest.granted and guest.slot is None:
            guest.slot = self.ledger._assigned(guest.ticket, guest.job)

    @rule(guest=consumes(guests))
    def leave(self, guest: Guest) -> None:
        self.ledger._return(guest.ticket, guest.slot)
        self.open.remove(guest)

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        held = [guest.ticket.holds for guest in self.open if guest.granted]
        capacity = (len(CPUS), MEMORY_MB, len(GPUS), LICENCES)
        free = tuple(there - sum(amounts) for there, amounts in zip(capacity, zip(*held, strict=True), strict=False))
        assert all(amount >= 0 for amount in free)
        assert (self.ledger.free_cores, self.ledger.free_memory_mb, self.ledger.free_gpus) == (free or capacity)[:3]
        assert self.ledger.waiting == len(self.open) - len(held)

    @invariant()
    def a_slot_has_what_the_job_needs_and_nobody_else_has_it(self) -> None:
        cpus: list[int] = []
        gpus: list[str] = []
        for guest in self.open:
            if (slot := guest.slot) is not None:
                job = guest.job
                whole = job.whole_node
                most = job.max_number_of_processors or job.number_of_processors
                assert job.number_of_processors <= slot.cores == len(slot.cpus)
                assert slot.cores == len(CPUS) if whole else slot.cores <= most
                assert len(slot.gpus) == (len(GPUS) if whole else job.number_of_gpus)
                assert slot.memory_mb == (MEMORY_MB if whole else job.memory_mb)
                assert slot.extras == ({"licences": LICENCES} if whole else job.resources)
                cpus += slot.cpus
                gpus += slot.gpus
        assert len(cpus) == len(set(cpus))
        assert len(gpus) == len(set(gpus))

    @invariant()
    def nobody_waits_who_could_have_a_slot(self) -> None:
        """What is free and not kept for anybody is too little for each of those who wait."""
        spare = self.ledger._line.spare()
        for guest in self.open:
            if not guest.granted:
                assert any(need > there for need, there in zip(guest.ticket.needs, spare, strict=True))

    @invariant()
    def who_has_the_best_claim_waits_only_for_those_before(self) -> None:
        best = next(self.ledger._line.claims(), None)
        if best is None:
            self.claim = None
        elif self.claim is None or self.claim[0] is not best:
            self.claim = best, [guest for guest in self.open if guest.granted]
        else:
            # Whoever came since with a higher priority was the head himself, and nobody had gone past him.
            ahead = (guest for guest in self.open if guest.granted and guest.ticket.priority > best.priority)
            assert any(guest in self.open for guest in self.claim[1]) or any(ahead)

    @invariant()
    def every_idle_core_has_a_reason(self) -> None:
        reasons = self.ledger.idle_reasons()
        assert sum(reasons.values()) == self.ledger.free_cores
        assert all(reasons.values())
        if not self.ledger.waiting:
            assert set(reasons) <= {NO_JOB}

    def teardown(self) -> None:
        """Every ticket ends granted or withdrawn: when the granted ones leave, those behind are granted in their turn."""
        while self.open:
            granted = next(guest for guest in self.open if guest.granted)
            self.wake(granted)
            self.leave(granted)
            self.a_slot_has_what_the_job_needs_and_nobody_else_has_it()
        assert repr(self.ledger) == f"<Ledger [{len(CPUS)} of {len(CPUS)} cores free, 0 waiting]>"
        assert set(self.ledger._free_cpus) == set(range(len(CPUS)))
        assert set(self.ledger._free_gpus) == {"GPU-a", "GPU-b"}


TestAnyOrderOfRequests = AnyOrderOfRequests.TestCase
TestAnyOrderOfRequests.settings = settings(max_examples=100, deadline=None)


class Watched(Line):
    """Counts for everybody how often they are gone past."""

    def __init__(self, cores: int, *, patience: int, seniority: int) -> None:
        super().__init__((cores,), patience=patience, seniority=seniority)
        self.past_head: dict[Ticket, int] = defaultdict(int)
        self.past_eldest: dict[Ticket, int] = defaultdict(int)

    def _grant(self, ticket: Ticket, spare: Amounts) -> None:
        waiting = list(self._waiting.values())
        eldest = min(waiting, key=lambda other: other.number)
        head = min(waiting, key=lambda other: (-other.priority, other.number))
        if ticket is not eldest:
            self.past_eldest[eldest] += 1
            if ticket is not head:
                self.past_head[head] += 1
        super()._grant(ticket, spare)


VISITS = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2), st.integers(0, 10)), max_size=60)


@OFTEN
@given(VISITS, st.integers(0, 4), st.integers(1, 6))
def test_nobody_is_gone_past_more_often_than_the_rule_says(
    visits: list[tuple[int, int, int]], patience: int, seniority: int
) -> None:
    """The head by those behind it, except who has waited longest; who has waited longest by anybody. All are granted."""
    line = Watched(4, patience=patience, seniority=seniority)
    tickets: list[Ticket] = []
    for cores, priority, leaves in visits:
        tickets.append(line.request((cores,), priority=priority))
        holders = [ticket for ticket in tickets if ticket.holds]
        if holders and leaves < 8:
            tickets.remove(holder := holders[leaves % len(holders)])
            line.give_back(holder)
    while tickets:
        tickets.remove(holder := next(ticket for ticket in tickets if ticket.holds))
        line.give_back(holder)
    assert max(line.past_head.values(), default=0) <= min(patience, seniority)
    assert max(line.past_eldest.values(), default=0) <= seniority
    assert (line.free, len(line)) == ((4,), 0)


@OFTEN
@given(st.sets(st.integers(0, 7), min_size=1), st.data())
def test_chosen_processors_are_free_ones_and_of_one_node_if_they_fit(free: set[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(free)))
    near = data.draw(st.sets(st.integers(0, 1)))
    chosen = choose_cpus([CPUS[number] for number in free], count, near)
    assert len(chosen) == len(set(chosen)) == count
    assert set(chosen) <= free
    room = [len([number for number in free if CPUS[number].node == node]) for node in (0, 1)]
    nodes = {CPUS[number].node for number in chosen}
    assert (len(nodes) == 1) == (count <= max(room))
    if len(nodes) == 1 and any(room[node] >= count for node in near):
        assert nodes <= near
    broken = [number for number in chosen if (number + 4) % 8 in free - set(chosen)]
    assert len(broken) <= 1, "at most one core is shared with somebody else"


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
