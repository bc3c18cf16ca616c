"""The journal of a node: on disk when it says so, one sync for many, nobody's cancellation is another's loss."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from anyio import lowlevel

from conftest import until
from following import kinds
from lives import LONG_AGO, a_life
from loadmaster import JobDescription, JobExecutionCoordinator, JobHandle, RuntimeFault, Site, run_job
from loadmaster.errors import IllegalEvent, JournalFault
from loadmaster.events import Event, JobAccepted, PayloadPrepared, StageInEnded, StageInStarted
from loadmaster.handle import KeepsState
from loadmaster.journal import NodeJournal, open_journal
from loadmaster.lifecycle import Stage
from loadmaster.logbook import Logbook, Record, state_name
from loadmaster.logfile import NAME, PAGE_BYTES


async def there(directory: Path, job_id: str) -> list[str]:
    """What events of a job are on disk."""
    return kinds(await anyio.to_thread.run_sync(on_disk, directory, job_id))


def on_disk(directory: Path, job_id: str) -> Sequence[Event]:
    with Logbook.look(directory) as book:
        history = book.history(job_id)
        return history.events if history else ()


async def test_damage_that_is_met_while_reading_is_looked_for_at_the_next_start(tmp_path: Path) -> None:
    """A node stopped at the first job that could not be read, and the next one, and every one after it."""
    names = [f"{number:03}" for number in range(60)]
    async with open_journal(tmp_path) as journal:
        for name in names:
            await journal.append_all(a_life(name))
    path = tmp_path / NAME.format(0)
    path.write_bytes(spoilt(path.read_bytes()))
    read = 0
    with pytest.raises(JournalFault, match="malformed"):
        async with open_journal(tmp_path) as journal:
            assert journal.damage is None, "it is not looked for in order to find nothing at each start"
            for name in names:
                await journal.history(name)
                read += 1
    async with open_journal(tmp_path) as journal:
        assert journal.damage is not None
        assert "journal.0.db is damaged" in journal.damage
        assert await journal.history("000") is not None
    assert sorted(path.name for path in tmp_path.glob("journal.*.db")) == ["journal.0.db", "journal.1.db"]
    assert 0 < read < len(names)


def spoilt(content: bytes) -> bytes:
    """Without the page that has the last of the events, which no opening looks at."""
    pages = range(0, len(content), PAGE_BYTES)
    page = max(at for at in pages if content[at] == 0x0D and b"JobFinished" in content[at : at + PAGE_BYTES])
    return content[:page] + b"\xff" * PAGE_BYTES + content[page + PAGE_BYTES :]


async def test_an_event_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        for number, event in enumerate(a_life("7"), 1):
            await journal.append(event)
            assert len(await anyio.to_thread.run_sync(on_disk, tmp_path, "7")) == number


class Slow(Logbook):
    """A disk that holds its first write until it is let go."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.held, self.sizes = threading.Event(), list[int]()

    def add(self, groups: Sequence[Sequence[Record]]) -> list[Exception | None]:
        self.sizes.append(len(groups))
        if len(self.sizes) == 1:
            assert self.held.wait(30)
        return super().add(groups)


@pytest.fixture
def slow(tmp_path: Path) -> Slow:
    return Slow.open(tmp_path)  # type: ignore[return-value]


async def test_all_who_come_while_the_disk_is_busy_share_the_next_write(slow: Slow) -> None:
    journal = NodeJournal(slow)
    async with journal.kept(), anyio.create_task_group() as group:
        group.start_soon(journal.append, a_life("first")[0])
        await anyio.wait_all_tasks_blocked()
        for number in range(100):
            group.start_soon(journal.append, a_life(str(number))[0])
        await anyio.wait_all_tasks_blocked()
        slow.held.set()
    assert slow.sizes == [1, 100]


async def test_where_several_waited_the_next_ones_wait_for_each_other(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadmaster.journal.COMPANY_SECONDS", 1)
    slow.held.set()
    journal = NodeJournal(slow)
    async with journal.kept():
        for names in ("alone", "ab", "cd"):
            async with anyio.create_task_group() as group:
                for name in (names,) if names == "alone" else names:
                    group.start_soon(journal.append, a_life(name)[0])
                    if names == "cd":
                        await anyio.wait_all_tasks_blocked()
    assert slow.sizes == [1, 2, 2]


async def test_a_cancelled_writer_costs_nobody_else_his_event(slow: Slow, tmp_path: Path) -> None:
    journal = NodeJournal(slow)
    async with journal.kept(), anyio.create_task_group() as group:
        group.start_soon(journal.append, a_life("first")[0])
        await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as cancelled:
            cancelled.start_soon(journal.append, a_life("leads")[0])
            await anyio.wait_all_tasks_blocked()
            group.start_soon(journal.append, a_life("follows")[0])
            await anyio.wait_all_tasks_blocked()
            cancelled.cancel_scope.cancel()
            slow.held.set()
    assert await anyio.to_thread.run_sync(on_disk, tmp_path, "follows")
    assert await anyio.to_thread.run_sync(on_disk, tmp_path, "leads")


async def test_one_refused_event_is_one_jobs_fault(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        for event in a_life("7"):
            await journal.append(event)
        refused = list[str]()

        async def again() -> None:
            try:
                await journal.append(a_life("7")[0])
            except JournalFault as fault:
                refused.append(str(fault))

        async with anyio.create_task_group() as group:
            group.start_soon(journal.append, a_life("8")[0])
            group.start_soon(again)
            group.start_soon(journal.append, a_life("9")[0])
        assert refused == ["job 7, attempt 1 is in the journal already"]
        assert {job.job_id for job in await journal.open_jobs()} == {"8", "9"}


# -- written behind ----------------------------------------------------------------------------------------------


async def opened(journal: NodeJournal) -> JobHandle:
    """The handle of a job that has been accepted."""
    handle = JobHandle(journal)
    handle.open("7", 1)
    await handle.record(JobAccepted, {})
    return handle


async def test_what_is_noted_is_told_once_it_is_on_disk_and_nobody_has_to_wait_for_that(slow: Slow) -> None:
    slow.held.set()
    journal = NodeJournal(slow)
    async with journal.kept():
        handle = await opened(journal)
        slow.sizes.clear()  # the next write is held
        slow.held.clear()
        await handle.note(StageInStarted)
        await until(lambda: bool(slow.sizes))
        await anyio.wait_all_tasks_blocked()
        assert (handle.stage, len(handle.history)) == (Stage.ACCEPTED, 1)
        assert handle.life.stage is Stage.STAGING_IN
        slow.held.set()
        await until(lambda: handle.stage is Stage.STAGING_IN)
        assert len(handle.history) == 2


async def test_what_was_noted_shares_the_write_of_what_somebody_waits_for(
    slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadmaster.journal.LATE_SECONDS", 60)
    slow.held.set()
    journal = NodeJournal(slow)
    async with journal.kept():
        handle = await opened(journal)
        await handle.note(StageInStarted)
        await handle.note(StageInEnded)
        await handle.record(PayloadPrepared, "true", {})
        assert kinds(handle.history) == ["JobAccepted", "StageInStarted", "StageInEnded", "PayloadPrepared"]
    assert slow.sizes == [1, 3]


async def test_what_a_hook_of_a_community_has_sent_is_on_disk_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may tell somebody outside; nothing of ours goes on from there before it is written."""
    monkeypatch.setattr("loadmaster.journal.LATE_SECONDS", 60)
    seen = list[str]()

    class Tells(JobExecutionCoordinator):
        async def stageOut(self) -> None:
            await super().stageOut()
            seen.extend(await there(tmp_path / "journal", "7"))

    job = JobDescription(executable="/bin/echo", arguments=["7"], job_id="7", output_data=["std.out"])
    site = Site(output_directory=str(tmp_path / "out"))
    async with open_journal(tmp_path / "journal") as journal:
        result = await run_job(job, coordinator=Tells, site=site, journal=journal, root=tmp_path)
    assert result.status == "Done"
    assert seen[-1] == "FileStagedOut"


async def test_what_was_noted_is_on_disk_when_the_journal_is_left(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        handle = await opened(journal)
        await handle.note(StageInStarted)
    assert kinds(handle.history) == await there(tmp_path, "7") == ["JobAccepted", "StageInStarted"]


async def test_out_of_order_is_refused_at_once_with_nothing_written(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        handle = await opened(journal)
        with pytest.raises(IllegalEvent, match="StageInEnded cannot come while the job is accepted"):
            await handle.note(StageInEnded)
        await handle.record(StageInStarted)
    assert await there(tmp_path, "7") == ["JobAccepted", "StageInStarted"]


class Refuses(Logbook):
    """A disk that refuses one write, which it holds until it is let go."""

    held, refusing = threading.Event(), False

    def add(self, groups: Sequence[Sequence[Record]]) -> list[Exception | None]:
        if self.refusing:
            self.refusing = False
            assert self.held.wait(30)
            raise OSError("database or disk is full")
        return super().add(groups)


async def test_nothing_is_written_that_comes_after_what_was_refused(tmp_path: Path) -> None:
    """What is on disk is a beginning of what there was: an end without its start would be nobody's history."""
    book = await anyio.to_thread.run_sync(Refuses.open, tmp_path)
    assert isinstance(book, Refuses)
    book.held = threading.Event()
    journal = NodeJournal(book)
    async with journal.kept():
        handle = await opened(journal)
        book.refusing = True
        async with anyio.create_task_group() as group:

            async def started() -> None:
                with pytest.raises(JournalFault, match="full"):
                    await handle.record(StageInStarted)

            group.start_soon(started)
            await until(lambda: not book.refusing)
            await handle.note(StageInEnded)
            book.held.set()
        for _ in range(2):
            with pytest.raises(JournalFault, match="full"):
                await handle.record(PayloadPrepared, "true", {})
        with pytest.raises(JournalFault, match="full"):
            await handle.settle()
        assert handle.stage is Stage.ACCEPTED
        await journal.append(a_life("8")[0])  # the disk has room again, for others
    assert await there(tmp_path, "7") == kinds(handle.history) == ["JobAccepted"]
    assert await there(tmp_path, "8") == ["JobAccepted"]


async def test_an_order_to_end_is_on_disk_before_it_is_obeyed(slow: Slow) -> None:
    slow.held.set()
    journal = NodeJournal(slow)
    async with journal.kept(), anyio.create_task_group() as tasks:
        handle = await opened(journal)
        slow.sizes.clear()
        slow.held.clear()
        handle.begin(tasks, lambda: None)
        handle.kill("unwanted")
        await until(lambda: bool(slow.sizes))  # on its way
        with handle.computing():
            await anyio.wait_all_tasks_blocked()
            await lowlevel.checkpoint()
            assert handle.stage is Stage.ACCEPTED
            slow.held.set()
            await anyio.sleep_forever()
        assert kinds(handle.history) == ["JobAccepted", "KillOrdered"]


async def test_a_full_disk_is_said_and_what_comes_later_is_kept(small_disk: Path) -> None:
    async with open_journal(small_disk / "journal") as journal:
        big = {"executable": "x" * 300_000}
        await journal.append(JobAccepted("7", 1, LONG_AGO, big))
        with pytest.raises(JournalFault, match="full"):
            for number in range(10):
                await journal.append(JobAccepted(f"big{number}", 1, LONG_AGO, big))
        await journal.append(StageInStarted("7", 1, LONG_AGO))
        history = await journal.history("7")
        assert history is not None
        assert len(history.events) == 2


async def test_a_closed_journal_takes_nothing(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        pass
    with pytest.raises(JournalFault, match="closed"):
        await journal.append(a_life("7")[0])
    with pytest.raises(JournalFault, match="closed"):
        await journal.open_jobs()


async def test_what_was_open_when_it_was_left_is_there_when_it_is_opened_again(tmp_path: Path) -> None:
    life = a_life("7")
    async with open_journal(tmp_path) as journal:
        for event in (*life[:6], *a_life("8")):
            await journal.append(event)
    async with open_journal(tmp_path) as journal:
        assert journal.damage is None
        (job,) = await journal.open_jobs()
        assert (job.job_id, list(job.events)) == ("7", life[:6])
        assert await journal.ended() == {"Done": 1}


async def test_some_events_go_together_or_not_at_all(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        for event in (*a_life("7")[:-1], *a_life("8")):
            await journal.append(event)
        with pytest.raises(JournalFault):
            await journal.append_all([a_life("7")[-1], a_life("8")[3]])
        assert [job.job_id for job in await journal.open_jobs()] == ["7"]
        await journal.append_all([a_life("7")[-1], a_life("7", 2)[0]])
        assert [(job.job_id, job.attempt) for job in await journal.open_jobs()] == [("7", 2)]


async def test_the_past_is_forgotten_while_events_are_written(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        for number in range(70):
            await journal.append_all(a_life(str(number)))
        await journal.append_all(a_life("young", began=datetime.now(UTC)))
        async with anyio.create_task_group() as group:
            group.start_soon(journal.forget, timedelta(days=1))
            group.start_soon(journal.append, a_life("open")[0])
        assert await journal.ended() == {"Done": 1}
        assert [job.job_id for job in await journal.open_jobs()] == ["open"]


async def test_others_may_keep_something_in_the_same_file(tmp_path: Path) -> None:
    def work(database: sqlite3.Connection) -> int:
        database.execute("CREATE TABLE notes (note TEXT)")
        database.execute("INSERT INTO notes VALUES ('remember the milk')")
        return 42

    async with open_journal(tmp_path) as journal:
        assert await journal.change(work) == 42
        with pytest.raises(JournalFault, match="exists"):
            await journal.change(work)
        found = await journal.change(lambda database: database.execute("SELECT note FROM notes").fetchall())
    assert found == [("remember the milk",)]


async def test_it_has_a_place_for_what_outlives_an_agent(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        assert isinstance(journal, KeepsState)
        assert journal.state_directory("7", 2) == tmp_path / "payloads" / "2.7"
    assert len(state_name("x" * 255, 1)) < 100


async def test_a_handle_is_made_from_what_it_has(tmp_path: Path) -> None:
    async with open_journal(tmp_path) as journal:
        handle = JobHandle(journal)
        handle.open("7", 1)
        await handle.record(JobAccepted, {"executable": "/bin/true"})
        await handle.record(StageInStarted)
    async with open_journal(tmp_path) as journal:
        (job,) = await journal.open_jobs()
        handle = JobHandle.resumed(journal, job.events)
        assert (handle.job_id, handle.attempt, handle.stage) == ("7", 1, Stage.STAGING_IN)
        with pytest.raises(RuntimeFault, match="already used for job 7"):
            handle.open("8", 1)
        handle = JobHandle.resumed(journal, job.events)
        handle.open("7", 1)
        with pytest.raises(RuntimeFault, match="already used for job 7"):
            handle.open("7", 1)
