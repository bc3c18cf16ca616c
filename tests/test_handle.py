"""The outside's hold on one job: whoever follows sees everything, and nobody before the journal has it."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator

import anyio
import pytest

from loadmaster import JobHandle, RuntimeFault, Status
from loadmaster.errors import IllegalEvent
from loadmaster.events import (
    ComputingEnded,
    Event,
    Heartbeat,
    JobAccepted,
    JobFinished,
    ParameterReported,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.handle import TRANSIENT_EVENTS_KEPT
from loadmaster.lifecycle import Stage
from loadmaster.result import Phase


def opened(handle: JobHandle | None = None) -> JobHandle:
    handle = handle or JobHandle()
    handle.open("7", 1)
    return handle


async def live(handle: JobHandle) -> None:
    """A whole life in five events."""
    await handle.record(JobAccepted, {})
    await handle.record(StageInStarted)
    await handle.record(ComputingEnded, None)
    await handle.record(StageOutStarted)
    await handle.record(JobFinished, Status.DONE, None)
    handle.close()


LIFE = ["JobAccepted", "StageInStarted", "ComputingEnded", "StageOutStarted", "JobFinished"]


async def kinds(events: AsyncIterator[Event]) -> list[str]:
    return [event.kind async for event in events]


def beat(handle: JobHandle, seconds: float = 1) -> None:
    handle.offer(Heartbeat, Phase.PAYLOAD, seconds)


class Paper:
    """A journal that is slow, and may be told to fail."""

    def __init__(self) -> None:
        self.written: list[Event] = []
        self.writing = 0
        self.ready = anyio.Event()
        self.broken = False

    async def append(self, event: Event) -> None:
        self.writing += 1
        await self.ready.wait()
        if self.broken:
            raise OSError("no paper")
        self.written.append(event)


def ready(paper: Paper) -> Paper:
    paper.ready.set()
    return paper


# -- followers ---------------------------------------------------------------------------------------------------


async def test_a_follower_sees_events_as_they_come_and_its_cursor_ends_with_the_job() -> None:
    handle, seen = opened(), list[str]()

    async def follow() -> None:
        seen.extend(await kinds(handle.events()))

    async with anyio.create_task_group() as group:
        group.start_soon(follow)
        await anyio.wait_all_tasks_blocked()
        await live(handle)
    assert seen == LIFE


async def test_a_late_follower_sees_everything() -> None:
    handle = opened()
    await live(handle)
    assert await kinds(handle.events()) == LIFE
    assert await kinds(handle.follow()) == LIFE


async def test_each_event_is_seen_when_it_comes_not_when_the_next_does() -> None:
    handle = opened()
    events = handle.events()
    await handle.record(JobAccepted, {})
    assert (await anext(events)).kind == "JobAccepted"
    with anyio.move_on_after(0.02) as scope:
        await anext(events)
    assert scope.cancelled_caught
    await handle.record(StageInStarted)
    with anyio.fail_after(5):
        assert (await anext(events)).kind == "StageInStarted"


async def test_two_followers_see_the_same_each_at_its_own_pace() -> None:
    handle = opened()
    slow, fast = handle.events(), handle.events()
    await handle.record(JobAccepted, {})
    first = await anext(fast)
    await handle.record(StageInStarted)
    await anext(fast)
    assert await anext(slow) is first


async def test_a_follower_that_never_reads_blocks_nobody() -> None:
    handle = opened()
    asleep = handle.follow()
    with anyio.fail_after(5):
        await handle.record(JobAccepted, {})
        for number in range(10_000):
            await handle.record(ParameterReported, "step", str(number))
            beat(handle)
        await handle.record(ComputingEnded, None)
        await handle.record(JobFinished, Status.DONE, None)
        handle.close()
    seen = await kinds(asleep)
    assert seen.count("ParameterReported") == 10_000
    assert seen.count("Heartbeat") == TRANSIENT_EVENTS_KEPT


async def test_heartbeats_are_for_those_who_want_them_and_the_latest_are_kept() -> None:
    handle = opened()
    everything, history = handle.follow(), handle.events()
    await handle.record(JobAccepted, {})
    for number in range(1000):
        beat(handle, number)
    handle.close()
    assert await kinds(history) == ["JobAccepted"]
    seen = [event async for event in everything]
    assert [event.seconds for event in seen if isinstance(event, Heartbeat)] == list(range(744, 1000))


async def test_heartbeats_are_not_made_for_nobody() -> None:
    handle = opened()
    assert not handle.followed
    history = handle.events()
    assert not handle.followed
    follower = handle.follow()
    assert handle.followed
    del follower
    gc.collect()
    assert not handle.followed
    assert history is not None


async def test_an_interrupted_job_ends_its_followers_without_a_result() -> None:
    handle = opened()
    await handle.record(JobAccepted, {})
    handle.close()
    assert await kinds(handle.events()) == ["JobAccepted"]
    assert handle.result is None


async def test_events_carry_whose_they_are_and_a_date_in_utc() -> None:
    handle = JobHandle()
    handle.open("7", 3)
    await handle.record(JobAccepted, {})
    event = await anext(handle.events())
    offset = event.time.utcoffset()
    assert (event.job_id, event.attempt) == ("7", 3)
    assert offset is not None
    assert not offset


async def test_the_result_is_there_when_the_job_has_finished_and_not_before() -> None:
    handle = opened()
    await handle.record(JobAccepted, {})
    assert handle.result is None
    assert handle.stage is Stage.ACCEPTED
    await handle.record(ComputingEnded, None)
    await handle.record(JobFinished, Status.DONE, None)
    assert handle.result is not None
    assert handle.result.status is Status.DONE
    assert repr(handle) == "<JobHandle 7: finished, 3 events>"


async def test_an_event_out_of_order_is_refused_and_told_to_nobody() -> None:
    paper = ready(Paper())
    handle = opened(JobHandle(paper))
    with pytest.raises(IllegalEvent):
        await handle.record(StageInStarted)
    handle.close()
    assert await kinds(handle.events()) == []
    assert paper.written == []


async def test_a_handle_is_for_one_job() -> None:
    handle = JobHandle()
    with pytest.raises(RuntimeFault, match="not been given to a job"):
        await handle.record(JobAccepted, {})
    handle.open("7", 1)
    with pytest.raises(RuntimeFault, match="already used for job 7"):
        handle.open("8", 1)


# -- kill --------------------------------------------------------------------------------------------------------


async def test_a_kill_before_the_start_ends_the_computing_at_once() -> None:
    handle = JobHandle()
    assert handle.kill("changed my mind")
    opened(handle)
    reached = False
    with anyio.fail_after(5), handle.computing():
        await anyio.sleep_forever()
        reached = True
    assert not reached
    assert handle.kill_reason == "changed my mind"


async def test_a_kill_ends_what_is_computing_and_nothing_else() -> None:
    handle = opened()
    async with anyio.create_task_group() as group:

        async def compute() -> None:
            with handle.computing():
                await anyio.sleep_forever()
            await anyio.sleep(0)  # what comes after is not cancelled

        group.start_soon(compute)
        await anyio.wait_all_tasks_blocked()
        with anyio.fail_after(5):
            assert handle.kill("enough")
    assert handle.kill_reason == "enough"


async def test_the_first_reason_is_kept() -> None:
    handle = opened()
    assert handle.kill("first")
    assert handle.kill("second")
    assert handle.kill_reason == "first"


async def test_an_order_is_in_the_journal_before_it_is_obeyed() -> None:
    """A workload system may deliver it only once: an agent that dies over it must not forget it."""
    paper = Paper()
    paper.ready.set()
    handle = opened(JobHandle(paper))
    await handle.record(JobAccepted, {})
    paper.ready = anyio.Event()
    ended = anyio.Event()

    async def compute() -> None:
        with handle.computing():
            await anyio.sleep_forever()
        ended.set()

    async with anyio.create_task_group() as group:
        group.start_soon(compute)
        await anyio.wait_all_tasks_blocked()
        handle.begin(group, lambda: None)
        assert handle.kill("enough")
        await anyio.wait_all_tasks_blocked()
        assert not ended.is_set()
        assert [event.kind for event in paper.written] == ["JobAccepted"]
        paper.ready.set()
        with anyio.fail_after(5):
            await ended.wait()
    assert [event.kind for event in paper.written] == ["JobAccepted", "KillOrdered"]
    assert handle.life.kill_reason == "enough"


async def test_an_order_that_is_on_record_is_obeyed_after_a_restart() -> None:
    paper = ready(Paper())
    handle = opened(JobHandle(paper))
    await handle.record(JobAccepted, {})
    handle.kill("enough")
    await handle.keep_order()
    again = JobHandle.resumed(paper, paper.written)
    again.open("7", 1)
    assert again.kill_reason == "enough"
    with anyio.fail_after(5), again.computing():
        await anyio.sleep_forever()


async def test_an_order_for_another_attempt_is_ignored() -> None:
    handle = JobHandle()
    handle.open("7", 2)
    assert not handle.kill("stale", attempt=1)
    assert handle.kill_reason is None
    assert handle.kill("fresh", attempt=2)


async def test_an_order_that_cannot_be_kept_is_a_fault_and_is_not_obeyed() -> None:
    paper = ready(Paper())
    handle = opened(JobHandle(paper))
    await handle.record(JobAccepted, {})
    paper.broken = True
    handle.kill("enough")
    with pytest.raises(RuntimeFault, match="did not take KillOrdered"):
        await handle.keep_order()
    assert handle.life.kill_reason is None


async def test_a_kill_that_comes_too_late_says_so() -> None:
    handle = opened()
    with handle.computing():
        await anyio.sleep(0)
    assert not handle.kill("too late")
    assert handle.kill_reason is None


async def test_a_kill_after_the_job_is_over_says_so() -> None:
    handle = opened()
    handle.close()
    assert not handle.kill("too late")


# -- the journal -------------------------------------------------------------------------------------------------


async def test_nobody_sees_an_event_before_the_journal_has_it() -> None:
    paper = Paper()
    handle = opened(JobHandle(paper))
    events = handle.events()
    async with anyio.create_task_group() as group:
        group.start_soon(handle.record, JobAccepted, {})
        with anyio.move_on_after(0.05) as early:
            await anext(events)
        assert early.cancelled_caught
        assert paper.writing == 1
        assert handle.stage is Stage.NEW
        paper.ready.set()
        seen = await anext(events)
    assert paper.written == [seen]


async def test_events_recorded_at_once_are_in_the_journal_in_the_order_they_are_told() -> None:
    class Uneven(Paper):
        async def append(self, event: Event) -> None:
            if isinstance(event, ParameterReported) and int(event.value) % 2 == 0:
                await anyio.sleep(0.002)
            await super().append(event)

    paper = ready(Uneven())
    handle = opened(JobHandle(paper))
    await handle.record(JobAccepted, {})
    async with anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(handle.record, ParameterReported, "n", str(number))
    handle.close()
    told = [event async for event in handle.events()]
    assert told == paper.written
    assert len(told) == 51
    assert [event.time for event in told] == sorted(event.time for event in told)


async def test_when_the_journal_fails_nobody_is_told() -> None:
    paper = ready(Paper())
    handle = opened(JobHandle(paper))
    await handle.record(JobAccepted, {})
    paper.broken = True
    with pytest.raises((RuntimeFault, OSError), match="no paper"):
        await handle.record(StageInStarted)
    assert handle.stage is Stage.ACCEPTED
    handle.close()
    assert await kinds(handle.events()) == ["JobAccepted"]


async def test_after_a_failure_of_the_journal_the_next_event_is_taken() -> None:
    paper = ready(Paper())
    paper.broken = True
    handle = opened(JobHandle(paper))
    with pytest.raises((RuntimeFault, OSError), match="no paper"):
        await handle.record(JobAccepted, {})
    paper.broken = False
    await handle.record(JobAccepted, {})
    assert [event.kind for event in paper.written] == ["JobAccepted"]


async def test_a_cancelled_writer_still_writes_and_tells() -> None:
    """What happened has happened: a payload that ran is in the journal, whatever comes over the task that says so."""
    paper = Paper()
    handle = opened(JobHandle(paper))
    async with anyio.create_task_group() as group:
        group.start_soon(handle.record, JobAccepted, {})
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
        paper.ready.set()
    assert [event.kind for event in paper.written] == ["JobAccepted"]
    assert handle.stage is Stage.ACCEPTED


async def test_heartbeats_do_not_wait_for_the_journal() -> None:
    paper = Paper()
    handle = opened(JobHandle(paper))
    follower = handle.follow()
    async with anyio.create_task_group() as group:
        group.start_soon(handle.record, JobAccepted, {})
        await anyio.wait_all_tasks_blocked()
        beat(handle)
        with anyio.fail_after(5):
            assert (await anext(follower)).kind == "Heartbeat"
        paper.ready.set()


def test_haste_that_was_asked_for_before_there_was_a_payload_to_end_is_not_forgotten() -> None:
    """The second Ctrl-C came between the first one's kill and the payload's end, and the grace was kept in full."""
    handle, ended = JobHandle(), list[str]()
    handle.hurry()
    with handle.hurried_by(lambda: ended.append("at once")):
        assert ended == ["at once"]
