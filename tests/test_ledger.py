"""Slots: who holds one, who waits, and that all of it comes back."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from typing import Any

import anyio
import pytest
from anyio.abc import TaskStatus
from anyio.lowlevel import checkpoint

from loadmaster import JobDescription, Ledger, Slot
from loadmaster.errors import PayloadNotStarted, StagingFailed
from loadmaster.ledger import GPUS, HELD, MEMORY, NO_JOB, TOO_FEW, AsAsked
from loadmaster.topology import Cpu, Gpu

# Two NUMA nodes of two cores of two threads each.
CPUS = [Cpu(number, node=number % 4 // 2, core=number % 4) for number in range(8)]


def job(cores: int = 1, memory_mb: int | None = None, **words: Any) -> JobDescription:
    return JobDescription(executable="/bin/true", number_of_processors=cores, memory_mb=memory_mb, **words)


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
    ("words", "complaint"),
    [
        ({"cores": 3}, "needs 3 cores, the node has 2"),
        ({"cores": 1, "memory_mb": 2001}, "needs 2001 MB of memory, the node has 2000"),
        ({"number_of_gpus": 2}, "needs 2 GPUs, the node has 1"),
        ({"resources": {"licences": 4}}, "needs 4 licences, the node has 3"),
        ({"resources": {"cores": 1}}, "needs 'cores', which the node does not have"),
    ],
)
async def test_a_job_that_can_never_fit_is_told_so_at_once(words: dict[str, Any], complaint: str) -> None:
    ledger = Ledger(cores=2, memory_mb=2000, gpus=[Gpu("0")], extras={"licences": 3})
    with pytest.raises(PayloadNotStarted, match=complaint):
        ledger.check(job(**words))
    with pytest.raises(PayloadNotStarted, match=complaint):
        async with ledger.lease(job(**words)):
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


async def test_a_large_job_is_not_overtaken_for_ever_by_small_ones() -> None:
    """Once for each core; then what comes free is kept for it."""
    ledger = Ledger(cores=2)
    large = Tenant(ledger, job(2))
    small = [Tenant(ledger, job(1)) for _ in range(6)]
    async with anyio.create_task_group() as group:
        for tenant in (*small[:2], large, *small[2:]):
            group.start_soon(tenant)
            await settled()
        overtook = [0]
        for tenant in small[:4]:
            tenant.leave.set()
            await settled()
            overtook.append(sum(other.slot is not None for other in small[2:]))
        assert overtook == [0, 1, 2, 2, 2]
        assert large.slot == Slot(2, None)
        large.leave.set()
        for tenant in small:
            tenant.leave.set()


async def test_a_higher_priority_goes_first() -> None:
    ledger = Ledger(cores=1)
    low, high = Tenant(ledger, job()), Tenant(ledger, job(priority=1))
    async with anyio.create_task_group() as group:
        async with ledger.lease(job()):
            for tenant in (low, high):
                group.start_soon(tenant)
                await settled()
        await settled()
        assert (low.slot, high.slot) == (None, Slot(1, None))
        low.leave.set()
        high.leave.set()


async def test_who_is_cancelled_in_the_line_makes_way_for_those_behind() -> None:
    ledger = Ledger(cores=2, patience=0)
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


async def test_who_fits_would_have_a_slot_at_once() -> None:
    ledger = Ledger(cores=4, patience=0)
    assert (ledger.fits(job(4)), ledger.fits(job(5))) == (True, False)
    large = Tenant(ledger, job(4))
    async with anyio.create_task_group() as group:
        async with ledger.lease(job(2)):
            assert (ledger.fits(job(2)), ledger.fits(job(3))) == (True, False)
            group.start_soon(large)
            await settled()
            assert not ledger.fits(job(1)), "what is free is kept for the large one"
        await settled()
        large.leave.set()
    assert ledger.fits(job(4))


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_hundreds_of_jobs_do_nothing_is_held_twice_and_all_comes_back(seed: int) -> None:
    """They come, wait, are cancelled while they wait, in the moment of the grant, or later, and leave, at random."""
    chance = random.Random(seed)
    ledger = Ledger(cores=8, memory_mb=1000, cpus=CPUS, gpus=[Gpu("a", 0), Gpu("b", 1)], disk_bytes=100)
    held, done, cancelled = set[int | str](), list[int](), list[int]()

    def any_job() -> JobDescription:
        return job(
            chance.choice([1, 1, 1, 2, 3, 8]), chance.choice([None, 10, 600]), priority=chance.choice([0, 0, 1]),
            number_of_gpus=chance.choice([0, 0, 0, 1, 2]), whole_node=chance.random() < 0.02,
            max_number_of_processors=chance.choice([None, 8]),
        )  # fmt: skip

    async def stay(number: int, words: JobDescription, size: int, rounds: int) -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            async with ledger.reserve_disk(size), ledger.lease(words) as slot:
                mine: set[int | str] = {*slot.cpus, *slot.gpus}
                assert len(mine) == slot.cores + len(slot.gpus)
                assert not mine & held
                held.update(mine)
                try:
                    for _ in range(rounds):
                        await checkpoint()
                    done.append(number)
                finally:
                    held.difference_update(mine)
        if scope.cancelled_caught:
            cancelled.append(number)

    scopes: list[anyio.CancelScope] = []
    with anyio.fail_after(50):
        async with anyio.create_task_group() as group:
            for number in range(400):
                group.start_soon(stay, number, any_job(), chance.randint(0, 60), chance.randint(0, 20))
                for _ in range(chance.randint(0, 3)):
                    await checkpoint()
                if scopes and chance.random() < 0.3:
                    chance.choice(scopes).cancel()
    assert sorted(done + cancelled) == list(range(400))
    assert len(done) > 200
    assert len(cancelled) > 20
    assert held == set()
    assert repr(ledger) == "<Ledger [8 of 8 cores free, 0 waiting]>"
    assert (ledger.free_memory_mb, ledger.free_gpus, ledger.free_disk_bytes) == (1000, 2, 100)
    assert (len(ledger._free_cpus), len(ledger._free_gpus), ledger.waiting_for_disk) == (8, 2, 0)


# -- how many processors: the rules of DIRAC's pool ------------------------------------------------------------------


async def cores_granted(ledger: Ledger, **words: Any) -> int | None:
    """What a job would get now; None: it has to wait."""
    tenant = Tenant(ledger, job(**words))
    async with anyio.create_task_group() as group:
        group.start_soon(tenant)
        await settled()
        group.cancel_scope.cancel()
    return tenant.slot.cores if tenant.slot is not None else None


@pytest.mark.parametrize(
    ("words", "of_eight", "of_three"),
    [
        ({}, 1, 1),
        ({"tags": ["MultiProcessor"]}, 1, 1),
        ({"cores": 4}, 4, None),
        ({"cores": 2, "max_number_of_processors": 4}, 4, 3),
        ({"cores": 2, "max_number_of_processors": 20}, 8, 3),
        ({"cores": 2, "tags": ["MultiProcessor", "2Processors"]}, 2, 2),
        ({"whole_node": True}, 8, None),
        ({"tags": ["WholeNode", "MultiProcessor"]}, 8, None),
    ],
)
async def test_as_many_processors_as_diracs_pool_grants(
    words: dict[str, Any], of_eight: int, of_three: int | None
) -> None:
    ledger = Ledger(cores=8)
    assert await cores_granted(ledger, **words) == of_eight
    async with ledger.lease(job(5)):
        assert await cores_granted(ledger, **words) == of_three


async def test_who_has_the_whole_node_has_all_of_it() -> None:
    ledger = Ledger(cores=4, memory_mb=1000, gpus=[Gpu("0"), Gpu("1")], extras={"licences": 2})
    async with ledger.lease(job(memory_mb=10, whole_node=True)) as slot:
        assert (slot.cores, slot.memory_mb, slot.gpus, slot.extras) == (4, 1000, ("0", "1"), {"licences": 2})
        assert (ledger.free_cores, ledger.free_memory_mb, ledger.free_gpus) == (0, 0, 0)


# -- which ones ------------------------------------------------------------------------------------------------------


async def test_a_slot_names_its_processors_and_gpus_and_nobody_else_has_them() -> None:
    gpus = [Gpu("GPU-a", 0), Gpu("GPU-b", 1)]
    ledger = Ledger(cores=8, cpus=CPUS, gpus=gpus, gpu_variables=["CUDA_VISIBLE_DEVICES"])
    async with (
        ledger.lease(job(2, number_of_gpus=1)) as first,
        ledger.lease(job(2, number_of_gpus=1)) as second,
        ledger.lease(job(4)) as third,
    ):
        assert [slot.gpus for slot in (first, second, third)] == [("GPU-a",), ("GPU-b",), ()]
        assert [slot.cpus for slot in (first, second, third)] == [(0, 4), (2, 6), (1, 3, 5, 7)]
        assert third.gpu_variables == ("CUDA_VISIBLE_DEVICES",)
    async with ledger.lease(job(8)) as slot:
        assert slot.cpus == tuple(range(8))


async def test_a_gpu_is_taken_where_there_are_processors_for_it() -> None:
    ledger = Ledger(cores=8, cpus=CPUS, gpus=[Gpu("0", 0), Gpu("1", 1)])
    async with ledger.lease(job(3)) as beside, ledger.lease(job(3, tags=["GPU"])) as slot:
        assert beside.cpus == (0, 1, 4)
        assert (slot.cpus, slot.gpus) == ((2, 3, 6), ("1",))


def test_a_ledger_has_as_many_processors_by_number_as_cores() -> None:
    with pytest.raises(ValueError, match="4 cores, but 8 processors"):
        Ledger(cores=4, cpus=CPUS)


# -- why a core is idle ----------------------------------------------------------------------------------------------


async def test_an_idle_core_has_a_reason() -> None:
    ledger = Ledger(cores=4, memory_mb=1000, gpus=[Gpu("0")], extras={"licences": 1}, patience=1)
    assert ledger.idle_reasons() == {NO_JOB: 4}
    async with AsyncExitStack() as stack, anyio.create_task_group() as group:
        await stack.enter_async_context(ledger.lease(job(1, 1000, number_of_gpus=1, resources={"licences": 1})))
        assert ledger.idle_reasons() == {NO_JOB: 3}
        for words, reason in (
            ({"memory_mb": 1}, MEMORY),
            ({"number_of_gpus": 1}, GPUS),
            ({"resources": {"licences": 1}}, "licences"),
        ):
            scope = await group.start(Tenant(ledger, job(**words)))
            await settled()
            assert ledger.idle_reasons() == {reason: 3}
            scope.cancel()
            await settled()
        group.start_soon(Tenant(ledger, job(4)))
        await settled()
        assert ledger.idle_reasons() == {TOO_FEW: 3}
        await stack.enter_async_context(ledger.lease(job(1)))  # goes past the large one, the only time
        assert ledger.idle_reasons() == {HELD: 2}
        group.cancel_scope.cancel()
    assert ledger.idle_reasons() == {NO_JOB: 4}


async def test_no_core_is_idle_while_all_are_held() -> None:
    ledger = Ledger(cores=1)
    async with ledger.lease(job()):
        assert ledger.idle_reasons() == {}


async def test_cores_that_are_kept_and_cores_that_nobody_wants_are_told_apart() -> None:
    ledger = Ledger(cores=8, gpus=[Gpu("0")], patience=0)
    async with ledger.lease(job(1, number_of_gpus=1)), anyio.create_task_group() as group:
        await group.start(Tenant(ledger, job(2, number_of_gpus=1)))
        await settled()
        assert ledger.idle_reasons() == {GPUS: 2, NO_JOB: 5}
        group.cancel_scope.cancel()


# -- disk ------------------------------------------------------------------------------------------------------------


async def test_disk_is_reserved_apart_from_slots_and_comes_back() -> None:
    ledger = Ledger(cores=1, disk_bytes=100)
    order = list[str]()

    async def stay(name: str, size: int, leave: anyio.Event) -> None:
        async with ledger.reserve_disk(size):
            order.append(name)
            await leave.wait()

    async with anyio.create_task_group() as group:
        first, last = anyio.Event(), anyio.Event()
        for name, size, leave in (("a", 60, first), ("b", 60, last), ("c", 40, last)):
            group.start_soon(stay, name, size, leave)
            await settled()
        assert (order, ledger.free_disk_bytes, ledger.waiting_for_disk) == (["a", "c"], 0, 1)
        first.set()
        await settled()
        assert order == ["a", "c", "b"]
        last.set()
    assert (ledger.free_disk_bytes, ledger.waiting_for_disk) == (100, 0)


async def test_who_is_cancelled_while_waiting_for_disk_leaves_nothing_behind() -> None:
    ledger = Ledger(cores=1, disk_bytes=100)
    async with ledger.reserve_disk(100):
        with anyio.move_on_after(0) as scope:
            async with ledger.reserve_disk(1):
                pytest.fail("there is none left")
        assert scope.cancelled_caught
        assert ledger.waiting_for_disk == 0
    assert ledger.free_disk_bytes == 100


async def test_disk_that_is_not_there_at_all_is_refused() -> None:
    with pytest.raises(StagingFailed, match="needs 101 bytes of disk, the node has 100"):
        async with Ledger(cores=1, disk_bytes=100).reserve_disk(101):
            pytest.fail("there is not so much")


async def test_nothing_waits_for_disk_that_is_not_counted_or_not_needed() -> None:
    ledger, counted = Ledger(cores=1), Ledger(cores=1, disk_bytes=10)
    async with ledger.reserve_disk(10**18), counted.reserve_disk(10), counted.reserve_disk(0):
        assert (ledger.free_disk_bytes, counted.free_disk_bytes) == (None, 0)


# -- held all the time -------------------------------------------------------------------------------------------


async def test_a_slot_that_was_had_before_is_had_again_exactly() -> None:
    gpus = [Gpu("0", node=0), Gpu("1", node=1)]
    ledger = Ledger(8, 16_000, cpus=CPUS, gpus=gpus)
    slot = Slot(2, 4000, cpus=(1, 5), gpus=("1",))
    with ledger.hold(job(2, 4000), slot):
        assert (ledger.free_cores, ledger.free_memory_mb, ledger.free_gpus) == (6, 12_000, 1)
        async with ledger.lease(job(6, number_of_gpus=1)) as other:
            assert set(other.cpus) == {0, 2, 3, 4, 6, 7}
            assert other.gpus == ("0",)
    assert (ledger.free_cores, ledger.free_memory_mb, ledger.free_gpus) == (8, 16_000, 2)
    async with ledger.lease(job(8)) as whole:
        assert len(whole.cpus) == 8


async def test_a_node_that_has_shrunk_grants_nothing_until_there_is_room_again() -> None:
    ledger = Ledger(2, 1000)
    granted = anyio.Event()

    async def waits() -> None:
        async with ledger.lease(job(1, 100)):
            granted.set()

    async with anyio.create_task_group() as group:
        with ledger.hold(job(3), Slot(3, 500, cpus=(0, 1, 7))):
            with ledger.hold(job(1), Slot(1, 800)):
                assert ledger.free_cores == -2
                assert ledger.idle_reasons() == {}
                group.start_soon(waits)
                await settled()
                assert not granted.is_set()
            await settled()
            assert not granted.is_set()
        await granted.wait()
    assert repr(ledger) == "<Ledger [2 of 2 cores free, 0 waiting]>"


async def test_disk_that_is_in_use_is_held_whether_there_is_enough_or_not() -> None:
    ledger = Ledger(1, disk_bytes=100)
    with ledger.hold_disk(150):
        assert ledger.free_disk_bytes == -50
        with anyio.move_on_after(0.02) as scope:
            async with ledger.reserve_disk(10):
                pass
        assert scope.cancelled_caught
    async with ledger.reserve_disk(100):
        assert ledger.free_disk_bytes == 0
    with Ledger(1).hold_disk(100):
        pass
