"""Slots: who holds one, who waits, and that all of it comes back."""

from __future__ import annotations

from contextlib import AsyncExitStack

import anyio
import pytest
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from loadmaster import JobDescription, Ledger, Slot
from loadmaster.errors import PayloadNotStarted
from loadmaster.ledger import AsAsked


def job(cores: int = 1, memory_mb: int | None = None) -> JobDescription:
    return JobDescription(executable="/bin/true", number_of_processors=cores, memory_mb=memory_mb)


async def settled() -> None:
    """Every task that can go on has gone on: a few rounds of the loop, not a time."""
    for _ in range(10):
        await checkpoint()


class Tenant:
    """A task that leases a slot and keeps it until it is told to leave."""

    def __init__(self, ledger: Ledger, job: JobDescription) -> None:
        self.ledger, self.job = ledger, job
        self.slot: Slot | None = None
        self.leave = anyio.Event()

    async def __call__(self, *, task_status: TaskStatus[anyio.CancelScope] = anyio.TASK_STATUS_IGNORED) -> None:
        with anyio.CancelScope() as scope:
            task_status.started(scope)
            async with self.ledger.lease(self.job) as self.slot:
                await self.leave.wait()


# -- one lease ---------------------------------------------------------------------------------------------------


async def test_a_slot_has_what_the_job_asked_for_and_comes_back() -> None:
    ledger = Ledger(cores=8, memory_mb=4000)
    async with ledger.lease(job(3, 1000)) as slot:
        assert slot == Slot(cores=3, memory_mb=1000)
        assert repr(ledger) == "<Ledger [5 of 8 cores free, 0 waiting]>"
    assert repr(ledger) == "<Ledger [8 of 8 cores free, 0 waiting]>"


async def test_a_slot_comes_back_from_a_payload_that_raises() -> None:
    ledger = Ledger(cores=1)
    with pytest.raises(ZeroDivisionError):
        async with ledger.lease(job()):
            _ = 1 / 0
    assert repr(ledger) == "<Ledger [1 of 1 cores free, 0 waiting]>"


@pytest.mark.parametrize(
    ("cores", "memory", "complaint"),
    [(3, None, "needs 3 cores, the node has 2"), (1, 2001, "needs 2001 MB of memory, the node has 2000")],
)
async def test_a_job_that_can_never_fit_is_told_so_at_once(cores: int, memory: int | None, complaint: str) -> None:
    ledger = Ledger(cores=2, memory_mb=2000)
    with pytest.raises(PayloadNotStarted, match=complaint):
        async with ledger.lease(job(cores, memory)):
            pytest.fail("it was given a slot")
    assert repr(ledger) == "<Ledger [2 of 2 cores free, 0 waiting]>"


async def test_memory_is_not_counted_where_nobody_said_how_much_there_is() -> None:
    ledger = Ledger(cores=2)
    async with ledger.lease(job(1, 10**9)), ledger.lease(job(1, 10**9)):
        assert repr(ledger) == "<Ledger [0 of 2 cores free, 0 waiting]>"


async def test_as_asked_never_makes_a_job_wait() -> None:
    slots = AsAsked()
    async with AsyncExitStack() as stack:
        for _ in range(3):
            assert await stack.enter_async_context(slots.lease(job(1000, 5))) == Slot(1000, 5)


# -- a line ------------------------------------------------------------------------------------------------------


async def test_who_does_not_fit_waits_until_somebody_leaves() -> None:
    ledger = Ledger(cores=2)
    first, second = Tenant(ledger, job(2)), Tenant(ledger, job(1))
    async with anyio.create_task_group() as group:
        group.start_soon(first)
        await settled()
        group.start_soon(second)
        await settled()
        assert (first.slot, second.slot) == (Slot(2, None), None)
        assert repr(ledger) == "<Ledger [0 of 2 cores free, 1 waiting]>"
        first.leave.set()
        await settled()
        assert second.slot == Slot(1, None)
        second.leave.set()


async def test_memory_makes_a_job_wait_as_cores_do() -> None:
    ledger = Ledger(cores=8, memory_mb=1000)
    second = Tenant(ledger, job(1, 600))
    async with anyio.create_task_group() as group:
        async with ledger.lease(job(1, 600)):
            group.start_soon(second)
            await settled()
            assert second.slot is None
        await settled()
        assert second.slot == Slot(1, 600)
        second.leave.set()


async def test_a_small_job_does_not_overtake_a_large_one() -> None:
    """Or the large one would wait for as long as small ones come."""
    ledger = Ledger(cores=4)
    large, small = Tenant(ledger, job(4)), Tenant(ledger, job(1))
    async with anyio.create_task_group() as group:
        async with ledger.lease(job(1)):
            group.start_soon(large)
            await settled()
            group.start_soon(small)
            await settled()
            assert (large.slot, small.slot) == (None, None)
        await settled()
        assert (large.slot, small.slot) == (Slot(4, None), None)
        large.leave.set()
        small.leave.set()


async def test_who_is_cancelled_in_the_line_makes_way_for_those_behind() -> None:
    ledger = Ledger(cores=2)
    large, small = Tenant(ledger, job(2)), Tenant(ledger, job(1))
    async with anyio.create_task_group() as group, ledger.lease(job(1)):
        scope = await group.start(large)
        await settled()
        group.start_soon(small)
        await settled()
        assert small.slot is None
        scope.cancel()
        await settled()
        assert small.slot == Slot(1, None)
        assert repr(ledger) == "<Ledger [0 of 2 cores free, 0 waiting]>"
        small.leave.set()


async def test_who_is_cancelled_in_the_moment_of_the_grant_gives_the_slot_back() -> None:
    """Granted by the one who leaves, cancelled before it could run: the slot must not be lost between the two."""
    ledger = Ledger(cores=1)
    waiting = Tenant(ledger, job(1))
    async with anyio.create_task_group() as group:
        async with ledger.lease(job(1)):
            scope = await group.start(waiting)
            await settled()
        assert repr(ledger) == "<Ledger [0 of 1 cores free, 0 waiting]>"  # granted, and has not run yet
        scope.cancel()
    assert repr(ledger) == "<Ledger [1 of 1 cores free, 0 waiting]>"
