"""What jobs have left to be done: done by a node beside them, as often as it takes, by the next node if need be."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread
from hypothesis import given
from hypothesis import strategies as st

from conftest import sh, until
from loadmaster import JobDescription, JobResult, Ledger, Node, Site, Status, pending
from loadmaster.errors import AccessDenied, AlreadyExists, NoSpace, NotFound, StorageUnavailable
from loadmaster.events import Event, FailoverRequested, OperationDone, RegistrationRequested
from loadmaster.journal import open_journal
from loadmaster.lifecycle import Lifecycle
from loadmaster.logbook import Logbook
from loadmaster.logfile import UPGRADES
from loadmaster.operations import Operations, may_succeed_later, ring
from loadmaster.pending import Backoff, Operation
from loadmaster.staging.engine import Transfers, open_transfers
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica
from loadmaster.storage.catalog import SqliteCatalog
from loadmaster.testing import Faults, MemoryStorage

SOON = Backoff(first_seconds=0.02, most_seconds=0.2)
LATER = Backoff(first_seconds=3600.0, most_seconds=3600.0)

LFN = "/vo/user/a/ann/0/7/o.txt"
WANTED = f"disk://disk{LFN}"


class Catalog(SqliteCatalog):
    """One that is down now and then."""

    fails = 0

    async def register(self, entry: CatalogEntry) -> None:
        if self.fails:
            self.fails -= 1
            raise StorageUnavailable(str(self.path), "is down")
        await super().register(entry)


class Place:
    """A site with a disk that fails on order, a buffer for when it does, and a journal."""

    def __init__(self, tmp_path: Path, root: Path) -> None:
        self.book, self.root = tmp_path / "journal", root
        self.files = MemoryStorage()
        self.disk = Faults(self.files)
        self.catalog = Catalog(tmp_path / "catalog.sqlite")
        self.buffer = tmp_path / "buffer"
        self.heard: list[Event] = []
        self.site = Site(
            storage_elements={"DISK": "disk://disk", "BUFFER": str(self.buffer)},
            default_se=["DISK"], failover_se=["BUFFER"], vo="vo", retries=0, retry_seconds=0.001,
        )  # fmt: skip

    @asynccontextmanager
    async def moving(self) -> AsyncIterator[Transfers]:
        async with open_transfers(self.site, storages={"disk": self.disk}, catalog=self.catalog) as transfers:
            yield transfers

    @asynccontextmanager
    async def node(self, backoff: Backoff = SOON) -> AsyncIterator[Node]:
        async with (
            self.moving() as transfers,
            Node(transfers=transfers, ledger=Ledger(2), root=self.root, journal=self.book, backoff=backoff) as node,
        ):
            yield node

    async def run(self, node: Node, job_id: str = "7", **words: Any) -> JobResult:
        words = {**sh("echo cargo > o.txt"), "output_data": ["o.txt"], "owner": "ann", **words}
        return await node.submit(JobDescription(job_id=job_id, **words)).wait()

    async def failed_over(self, backoff: Backoff = LATER) -> None:
        """A journal with one job that has left something to be done."""
        self.disk.fail("upload", at=1)
        async with self.node(backoff) as node:
            assert (await self.run(node)).status is Status.COMPLETED
        assert len(await self.left()) == 1

    async def left(self) -> list[Operation]:
        def look() -> list[Operation]:
            with Logbook.look(self.book) as book:
                return book.ask(pending.every)

        return await to_thread.run_sync(look)

    async def result(self, job_id: str = "7") -> JobResult:
        async with open_journal(self.book) as journal:
            history = await journal.history(job_id)
            assert history is not None
            result = Lifecycle.of(history.events).result()
            assert history.status == result.status  # what the list of jobs says
            return result

    def is_where_it_was_wanted(self) -> bool:
        assert not [path for path in self.buffer.rglob("*") if path.is_file()], "it is at the buffer, too"
        return self.files.files == {WANTED: b"cargo\n"}

    async def replicas(self) -> list[tuple[str, str | None]]:
        known = await self.catalog.lookup([LFN])
        return [(each.url, each.storage_element) for each in known[LFN].replicas] if known else []


@pytest.fixture
def place(tmp_path: Path, root: Path) -> Place:
    return Place(tmp_path, root)


async def test_a_file_that_failed_over_is_moved_when_its_place_is_back_and_the_job_is_done(place: Place) -> None:
    place.disk.fail("upload", at=1)
    place.disk.fail("upload", at=2)
    async with place.node() as node:
        stream = node.events()
        assert (await place.run(node)).status is Status.COMPLETED
        with anyio.fail_after(20):
            async for event in stream:
                if isinstance(event, OperationDone):
                    break
        assert await node.pending() == []
        await until(lambda: node.statistics().operations_done == 1 and node.statistics().pending == 0)
    assert place.is_where_it_was_wanted()
    assert await place.replicas() == [(WANTED, "DISK")]
    result = await place.result()
    assert (result.status, result.pending) == (Status.DONE, ())
    assert [operation for operation, _ in place.disk.calls].count("upload") == 3


async def test_it_survives_the_node_and_nobody_waits_for_it(place: Place) -> None:
    await place.failed_over()
    (left,) = await place.left()
    assert (left.is_move, left.tries, left.error) == (True, 0, "")
    assert left.what in (await place.result()).pending
    async with place.node() as node:
        await until(lambda: node.statistics().operations_done == 1, 20)
    assert place.is_where_it_was_wanted()
    assert await place.left() == []


async def test_what_cannot_be_done_is_tried_with_growing_waits_and_its_error_is_kept(place: Place) -> None:
    place.disk.fail("upload")
    async with place.node() as node:
        assert (await place.run(node)).status is Status.COMPLETED

        async def tried() -> int:
            return (await node.pending())[0].tries

        with anyio.fail_after(20):
            while await tried() < 3:
                await anyio.sleep(0.02)
    (left,) = await place.left()
    assert "disk://disk" in left.error
    assert left.due is not None
    assert (await place.result()).status is Status.COMPLETED


async def test_what_never_can_is_stuck_until_somebody_says_so(place: Place) -> None:
    await place.failed_over()
    place.files.files[WANTED] = b"somebody else's"
    async with place.node() as node:
        await until(lambda: node.statistics().stuck == 1, 20)
        (left,) = await node.pending()
        assert left.due is None
        assert "has 15 bytes" in left.error
        del place.files.files[WANTED]

        def again() -> None:
            with Logbook.beside(place.book) as database:
                assert pending.retry(database, [left.number]) == 1
            assert ring(place.book)

        await to_thread.run_sync(again)  # as an administrator does beside the agent
        await until(lambda: node.statistics().operations_done == 1, 20)
    assert place.is_where_it_was_wanted()
    assert not ring(place.book)


async def test_what_is_dropped_beside_the_agent_is_not_done_and_the_job_stays_completed(place: Place) -> None:
    await place.failed_over()
    async with place.node(LATER) as node:
        await until(lambda: node.statistics().pending == 1)

        def drop() -> None:
            with Logbook.beside(place.book) as database:
                for each in pending.every(database):
                    assert pending.drop(database, each, "not wanted", datetime.now(UTC)) is not None
                    assert pending.drop(database, each, "again", datetime.now(UTC)) is None
            ring(place.book)

        await to_thread.run_sync(drop)
        await until(lambda: node.statistics().pending == 0)
        assert await place.run(node, "8") is not None  # the agent goes on writing
    result = await place.result()
    assert (result.status, result.pending) == (Status.COMPLETED, ())
    assert (place.buffer / LFN[1:]).read_bytes() == b"cargo\n"


async def test_a_catalog_that_is_down_leaves_a_registration_and_no_failed_job(place: Place) -> None:
    place.catalog.fails = 1
    async with place.node(LATER) as node:
        result = await place.run(node)
    assert (result.status, result.pending) == (Status.COMPLETED, (f"register LFN:{LFN} at {WANTED}",))
    async with place.node() as node:
        await until(lambda: node.statistics().operations_done == 1, 20)
    assert await place.replicas() == [(WANTED, "DISK")]
    assert (await place.result()).status is Status.DONE


async def test_of_one_file_a_registration_is_done_before_the_move_that_follows(place: Place) -> None:
    """The other way round, the catalog would be told of a replica that is there no more."""
    place.disk.fail("upload", at=1)
    place.catalog.fails = 2
    async with place.node(LATER) as node:
        assert len((await place.run(node)).pending) == 2
    first, second = await place.left()
    assert isinstance(first.request, RegistrationRequested)
    assert isinstance(second.request, FailoverRequested)
    async with place.node() as node:
        await until(lambda: node.statistics().operations_done == 2, 30)
    assert place.is_where_it_was_wanted()
    assert await place.replicas() == [(WANTED, "DISK")]


class Silent(MemoryStorage):
    """One that does not tell checksums, as most do not."""

    async def stat(self, url: str) -> FileInfo:
        return FileInfo((await super().stat(url)).size_bytes)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("step", ["copied", "registered", "unregistered", "removed"])
async def test_wherever_a_try_was_cut_the_next_one_ends_the_same(place: Place, step: str, silent: bool) -> None:
    if silent:
        place.files = Silent()
        place.disk = Faults(place.files)
    await place.failed_over()
    (left,) = await place.left()
    at_buffer = place.buffer / LFN[1:]
    place.files.files[WANTED] = b"cargo\n"
    known = (await place.catalog.lookup([LFN]))[LFN]
    if step != "copied":
        await place.catalog.register(CatalogEntry(LFN, known.info, (Replica(WANTED, "DISK"),)))
    if step in {"unregistered", "removed"}:
        await place.catalog.unregister(LFN, known.replicas[0])
    if step == "removed":
        at_buffer.unlink()
    async with place.moving() as transfers, open_journal(place.book) as journal:
        assert await Operations(journal, transfers, place.heard.append, SOON).try_all(await place.left()) == []
    assert isinstance(place.heard[0], OperationDone)
    assert place.is_where_it_was_wanted()
    assert await place.replicas() == [(WANTED, "DISK")]
    if step == "removed" or not silent:  # nothing was sent again
        assert [operation for operation, _ in place.disk.calls].count("upload") == 1
    assert left.what == place.heard[0].what


async def test_a_file_goes_from_server_to_server_through_this_machine_and_leaves_nothing_there(
    tmp_path: Path, root: Path
) -> None:
    place = Place(tmp_path, root)
    other = MemoryStorage()
    place.site = place.site.model_copy(update={"storage_elements": {"DISK": "disk://disk", "BUFFER": "other://buffer"}})
    place.disk.fail("upload", at=1)
    async with (
        open_transfers(place.site, storages={"disk": place.disk, "other": other}, catalog=place.catalog) as transfers,
        Node(transfers=transfers, ledger=Ledger(1), root=root, journal=place.book, backoff=SOON) as node,
    ):
        assert (await place.run(node)).status is Status.COMPLETED
        await until(lambda: node.statistics().operations_done == 1, 20)
    assert place.files.files == {WANTED: b"cargo\n"}
    assert other.files == {}
    assert [path.name for path in (place.book / "moving").iterdir()] == []


async def test_a_file_that_is_gone_from_where_it_was_safe_is_told_and_not_tried_for_ever(place: Place) -> None:
    await place.failed_over()
    (place.buffer / LFN[1:]).unlink()
    async with place.moving() as transfers, open_journal(place.book) as journal:
        (left,) = await Operations(journal, transfers, place.heard.append, SOON).try_all(await place.left())
    assert (left.tries, left.due) == (1, None)
    assert left.file is not None
    assert left.error.startswith(left.file.url)
    assert place.heard == []


async def test_a_job_is_not_forgotten_while_it_has_something_left_to_be_done(place: Place) -> None:
    await place.failed_over()
    async with open_journal(place.book) as journal:
        assert await journal.forget(timedelta(seconds=-1)) == 0
        for each in await journal.change(pending.every):
            await journal.change(partial(pending.drop, operation=each, reason="", now=datetime.now(UTC)))
        assert await journal.forget(timedelta(seconds=-1)) == 1


async def test_a_salvaged_journal_still_has_what_is_to_be_done(place: Place) -> None:
    await place.failed_over()

    def damage() -> None:
        path = max(place.book.glob("journal.*.db"))
        with sqlite3.connect(path) as database:  # all of it in the one file
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        database.close()
        content = bytearray(path.read_bytes())
        content[-100:] = b""  # cut short
        path.write_bytes(content)

    await to_thread.run_sync(damage)
    async with open_journal(place.book) as journal:
        assert journal.damage is not None
        events = await journal.history("7")
        assert events is not None
        wanted = [each for each in events.events if isinstance(each, FailoverRequested)]
        assert [each.request for each in await journal.change(pending.every)] == wanted


async def test_a_journal_of_before_there_were_operations_has_them_from_then_on(place: Place) -> None:
    await place.failed_over()
    wanted = [each.request for each in await place.left()]

    def make_old() -> None:
        with Logbook.beside(place.book) as database:
            old = database.execute("SELECT number, job, kind, facts FROM events").fetchall()
        for path in place.book.glob("journal.*"):
            path.unlink()
        with closing(sqlite3.connect(place.book / "journal.0.db")) as database:
            for script in UPGRADES[:2]:
                database.executescript(script)
            database.executemany("INSERT INTO events (number, job, kind, facts) VALUES (?, ?, ?, ?)", old)
            database.commit()
            database.execute("PRAGMA user_version = 2")

    await to_thread.run_sync(make_old)
    async with open_journal(place.book) as journal:
        assert [each.request for each in await journal.change(pending.every)] == wanted


async def test_operations_of_a_job_that_still_delivers_wait_for_its_end(place: Place) -> None:
    place.disk.fail("upload", at=1)
    hangs = place.disk.hang("upload", at=2)
    words = {**sh("echo a > a.txt; echo bb > b.txt"), "output_data": ["a.txt", "b.txt"], "owner": "ann"}
    with anyio.CancelScope() as host:
        async with place.node() as node:
            node.submit(JobDescription(job_id="7", **words))
            with anyio.fail_after(20):
                await hangs.wait()
                while not (found := await node.pending()):
                    await anyio.sleep(0.02)
            await anyio.sleep(0.3)  # far longer than it would be waited for
            assert (await node.pending(), found[0].tries) == (found, 0)
            host.cancel()
            await anyio.sleep_forever()
    (place.root / "7").chmod(0o1700)
    shutil.rmtree(place.root / "7")


def test_what_somebody_may_put_right_is_tried_again() -> None:
    assert may_succeed_later(StorageUnavailable("u", "down"))
    assert may_succeed_later(NoSpace("u", "full"))
    assert may_succeed_later(AccessDenied("u", "expired"))
    assert not may_succeed_later(NotFound("u", "gone"))
    assert not may_succeed_later(AlreadyExists("u", "other content"))


@given(st.integers(1, 10_000), st.floats(0, 1), st.floats(0.001, 1e6), st.floats(0.001, 1e6))
def test_waits_grow_and_are_bounded(tries: int, chance: float, first: float, most: float) -> None:
    backoff = Backoff(first, most)
    wait = pending.wait_seconds(backoff, tries, lambda: chance)
    assert 0 < wait <= most
    assert pending.wait_seconds(backoff, tries + 1, lambda: chance) >= wait
    assert pending.wait_seconds(backoff, tries, lambda: chance, 1e12) <= max(wait, most)


def test_a_clock_that_was_set_back_delays_nothing_beyond_the_longest_wait() -> None:
    now = datetime(2024, 1, 1, tzinfo=UTC)
    assert pending.sleep_seconds(None, SOON, now) is None
    assert pending.sleep_seconds(now + timedelta(days=9), SOON, now) == SOON.most_seconds
    assert pending.sleep_seconds(now - timedelta(days=9), SOON, now) == 0.0
