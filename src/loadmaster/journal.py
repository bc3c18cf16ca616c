"""The journal of a node: events are on disk before anybody is told, and what is on disk is gone on with after a crash.

    async with open_journal(directory) as journal:
        async with Node(journal=journal) as node: ...

Whoever appends while the disk is busy shares the next commit with all others who do, so a hundred jobs cost one sync.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import anyio
from anyio import lowlevel, to_thread

from loadmaster.errors import JournalFault
from loadmaster.events import Event
from loadmaster.handle import JobHandle, KeepsState
from loadmaster.logbook import History, Logbook, Record

P = ParamSpec("P")
T = TypeVar("T")

RETENTION: Final = timedelta(days=7)
"""How long a job that has ended is known: as long as anybody may ask for it, or give it once more."""

FORGOTTEN_AT_ONCE: Final = 20
"""So many jobs are removed in one step: some 5 ms, for which an event may have to wait."""

DISK_SECONDS: Final = 60.0
"""A disk that does not take a line for that long will not take the next one either."""

NAME_BYTES: Final = 100


@dataclass(eq=False, slots=True)
class _Batch:
    """What goes to the disk together."""

    groups: list[Sequence[Record]] = field(default_factory=list)
    errors: list[Exception | None] = field(default_factory=list)
    fault: Exception | None = None
    done: anyio.Event = field(default_factory=anyio.Event)


class NodeJournal(KeepsState):
    """The journal of one node: `Journal` for all of its jobs. Made by `open_journal`; for use in one event loop."""

    def __init__(self, book: Logbook) -> None:
        self.directory = book.directory
        self.damage = book.damage
        """What was found to be missing when it was opened, in a sentence; None: nothing."""
        self._book = book
        self._turn = anyio.Lock(fast_acquire=True)
        self._gathering = _Batch()
        self._closed = False

    def __repr__(self) -> str:
        return f"<NodeJournal {self.directory}>"

    async def append(self, event: Event) -> None:
        """Return when the event is on disk. Raises `JournalFault` when it is not: nothing of it is."""
        await self.append_all((event,))

    async def append_all(self, events: Sequence[Event]) -> None:
        """Return when all of them are on disk; after a crash all of them are there, or none. Raises `JournalFault`."""
        batch = self._gathering
        place = len(batch.groups)
        batch.groups.append([Record.of(event) for event in events])
        if place == 0:  # the first to come has it written, when the batch before it has been
            await self._write(batch)
        else:
            await batch.done.wait()
        if batch.fault is not None:
            raise JournalFault(f"{self.directory}: {batch.fault}") from batch.fault
        if (error := batch.errors[place]) is not None:
            raise error

    async def _write(self, batch: _Batch) -> None:
        # Not interrupted by a cancellation of whoever came first: others wait for this too.
        with anyio.move_on_after(DISK_SECONDS, shield=True):
            try:
                async with self._turn:
                    await lowlevel.checkpoint()  # whoever comes in this turn of the loop comes along
                    self._gathering = _Batch()
                    self._check_open()
                    batch.errors = await to_thread.run_sync(self._book.add, batch.groups, abandon_on_cancel=True)
            except (sqlite3.Error, OSError, JournalFault) as exc:
                batch.fault = exc
            else:
                batch.done.set()
                return
        if batch.fault is None:
            batch.fault = JournalFault(f"the disk has not answered for {DISK_SECONDS:.0f} s")
            self._closed = True  # a thread still writes: nobody may use the file beside it
        if self._gathering is batch:
            self._gathering = _Batch()
        batch.done.set()

    async def open_jobs(self) -> list[History]:
        """The jobs that have not ended, with their events, in the order in which they were accepted."""
        return await self._ask(self._book.open_jobs)

    async def history(self, job_id: str, attempt: int | None = None) -> History | None:
        """What is known of an attempt at a job, of the last one if none is named; None if nothing is."""
        return await self._ask(self._book.history, job_id, attempt)

    async def handle(self, job_id: str, attempt: int = 1) -> JobHandle:
        """A handle for `run_job`, with what is known of that attempt at the job; it records here."""
        history = await self.history(job_id, attempt)
        return JobHandle.resumed(self, history.events if history is not None else ())

    async def last(self, job_ids: Iterable[str]) -> dict[str, tuple[int, str | None]]:
        """The last attempt at each of these jobs that is known, and how it ended; None: it has not."""
        return await self._ask(self._book.last, job_ids)

    async def ended(self) -> dict[str, int]:
        """How many jobs have ended, by their status."""
        return await self._ask(self._book.ended)

    async def forget(self, older_than: timedelta = RETENTION) -> int:
        """Remove the jobs that ended longer ago than that, in small steps between which events are written; how many."""
        forgotten, before = 0, datetime.now(UTC) - older_than
        while count := await self._ask(lambda: self._book.forget(before, jobs=FORGOTTEN_AT_ONCE)):
            forgotten += count
        return forgotten

    async def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What a piece of work in the journal's file returns, as one transaction in a thread; on disk when it returns."""
        return await self._ask(self._book.change, work)

    def state_directory(self, job_id: str, attempt: int) -> Path:
        """Where that is kept of a payload which outlives an agent."""
        return self.directory / "payloads" / state_name(job_id, attempt)

    async def _ask(self, function: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
        async with self._turn:
            self._check_open()
            try:
                return await to_thread.run_sync(lambda: function(*args, **kw))
            except (sqlite3.Error, OSError) as exc:
                raise JournalFault(f"{self.directory}: {exc}") from exc

    def _check_open(self) -> None:
        if self._closed:
            raise JournalFault("the journal has been closed")

    async def _close(self) -> None:
        with anyio.CancelScope(shield=True):  # bounded: each step in the turn is
            async with self._turn:
                abandoned, self._closed = self._closed, True
                if not abandoned:
                    await to_thread.run_sync(self._book.close)


def state_name(job_id: str, attempt: int) -> str:
    """What the directory of a payload's state is called: never too long, never the same for two."""
    if len(os.fsencode(job_id)) > NAME_BYTES:
        job_id = sha256(job_id.encode(errors="surrogatepass")).hexdigest()
    return f"{attempt}.{job_id}"


@asynccontextmanager
async def open_journal(directory: Path) -> AsyncIterator[NodeJournal]:
    """The journal in a directory on a local disk, made if need be. Raises `JournalFault`: another agent has it, the disk is
    full. What is damaged is kept aside, and what of it could be read is gone on with: `damage` says so."""
    journal = NodeJournal(await to_thread.run_sync(Logbook.open, directory))
    try:
        yield journal
    finally:
        await journal._close()
