"""The journal of a node: events are on disk before anybody is told, and what is on disk is gone on with after a crash.

    async with open_journal(directory) as journal:
        async with Node(journal=journal) as node: ...

Whoever appends while the disk is busy shares the next commit with all others who do, so a hundred jobs cost one sync. What
nobody waits for is written behind: the file has, at any time, a beginning of what all jobs together have said.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import anyio
from anyio import lowlevel, to_thread

from loadmaster.errors import JournalFault
from loadmaster.events import Event
from loadmaster.handle import JobHandle, KeepsState, Write
from loadmaster.logbook import History, Logbook, Record, state_name
from loadmaster.scribe import Scribe
from loadmaster.tasks import single_error

P = ParamSpec("P")
T = TypeVar("T")

RETENTION: Final = timedelta(days=7)
"""How long a job that has ended is known: as long as anybody may ask for it, or give it once more."""

FORGOTTEN_AT_ONCE: Final = 20
"""So many jobs are removed in one step: some 5 ms, for which an event may have to wait."""

DISK_SECONDS: Final = 60.0
"""A disk that does not take a line for that long will not take the next one either."""

LATE_SECONDS: Final = 0.05
"""An event nobody waits for is written with those that somebody does wait for, or so much later: each write by itself costs
half a millisecond of a processor (a thread is woken, and the loop by it), whatever is in it."""

COMPANY_SECONDS: Final = 0.005
"""Where several waited for the last write, the next is begun no sooner than that after it: more will come. Whoever is
alone waits for nobody."""


class _Batch(Write):
    """What goes to the disk together."""

    def __init__(self) -> None:
        self.groups: list[Sequence[Record]] = []
        self.told: list[Callable[[Exception | None], None]] = []
        self.begun = anyio.Event()
        self.wanted = anyio.Event()
        """Somebody waits for it."""
        self.waiting = 0
        """So many do."""
        self._done = anyio.Event()

    async def settled(self) -> None:
        self.waiting += 1
        self.wanted.set()
        await self._done.wait()

    def tell(self, errors: Iterable[Exception | None]) -> None:
        """Each what has become of his."""
        for told, error in zip(self.told, errors, strict=True):
            told(error)
        self._done.set()


class NodeJournal(KeepsState):
    """The journal of one node: `Journal` for all of its jobs. Made by `open_journal`; for use in one event loop."""

    def __init__(self, book: Logbook) -> None:
        self.directory = book.directory
        self._payloads = book.directory / "payloads"
        self.damage = book.damage
        """What was found to be missing when it was opened, in a sentence; None: nothing."""
        self._book = book
        self._scribe: Scribe | None = None
        self._turn = anyio.Lock(fast_acquire=True)
        self._gathering = _Batch()
        self._closed = self._abandoned = False

    def __repr__(self) -> str:
        return f"<NodeJournal {self.directory}>"

    async def append(self, event: Event) -> None:
        """Return when the event is on disk. Raises `JournalFault` when it is not: nothing of it is."""
        await self.append_all((event,))

    async def append_all(self, events: Sequence[Event]) -> None:
        """Return when all of them are on disk; after a crash all of them are there, or none. Raises `JournalFault`."""
        errors: list[Exception | None] = []
        await self.write_soon(events, errors.append).settled()
        if (error := errors[0]) is not None:
            raise error

    def write_soon(self, events: Sequence[Event], told: Callable[[Exception | None], None]) -> Write:
        """As `KeepsState` has it: what is on disk is, at any time, a beginning of what was given, by all jobs together."""
        self._check_open()
        batch = self._gathering
        batch.groups.append([Record.of(event) for event in events])
        batch.told.append(told)
        if len(batch.groups) == 1:
            batch.begun.set()
        return batch

    async def _write_on(self) -> None:
        """Write what comes, as soon as anybody waits for it, until the journal is closed."""
        try:
            # Not interrupted by a cancellation: those who are leaving have something to be written, too.
            with anyio.CancelScope(shield=True):  # bounded: `kept` ends it
                while not (self._abandoned or (self._closed and not self._gathering.groups)):
                    batch = self._gathering
                    if not batch.begun.is_set():
                        await batch.begun.wait()
                    if not batch.wanted.is_set():
                        with anyio.move_on_after(LATE_SECONDS):
                            await batch.wanted.wait()
                    await lowlevel.checkpoint()  # whoever comes in this turn of the loop comes along
                    if batch.groups:
                        await self._write(batch)
                        if batch.waiting > 1 and not self._closed:
                            await anyio.sleep(COMPANY_SECONDS)
        finally:
            self._closed = True
            self._give_up(JournalFault("the journal has been closed"))

    async def _write(self, batch: _Batch) -> None:
        errors: Sequence[Exception | None] | None = None
        fault: Exception | None = None
        try:
            with anyio.move_on_after(DISK_SECONDS):
                async with self._turn:
                    self._gathering = _Batch()
                    errors = await self._hand.do(lambda: self._book.add(batch.groups), abandon_on_cancel=True)
        except (sqlite3.Error, OSError, JournalFault) as exc:
            fault = exc
        finally:
            if errors is not None:
                batch.tell(errors)
            elif fault is not None:
                self._give_up(fault, batch)
            else:  # a thread still writes: nobody may use the file beside it
                self._abandoned = self._closed = True
                self._give_up(JournalFault(f"the disk has not answered for {DISK_SECONDS:.0f} s"), batch)

    def _give_up(self, cause: Exception, batch: _Batch | None = None) -> None:
        """Nothing of it is on disk, nor anything that was to come after it."""
        lost = [self._gathering] if batch is None or batch is self._gathering else [batch, self._gathering]
        self._gathering = _Batch()
        for each in lost:
            faults = [JournalFault(f"{self.directory}: {cause}") for _ in each.groups]
            for fault in faults:
                fault.__cause__ = cause
            each.tell(faults)

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
        return self._payloads / state_name(job_id, attempt)

    async def _ask(self, function: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
        async with self._turn:
            self._check_open()
            try:
                return await self._hand.do(lambda: function(*args, **kw))
            except (sqlite3.Error, OSError) as exc:
                self._book.met(exc)
                raise JournalFault(f"{self.directory}: {exc}") from exc

    @property
    def _hand(self) -> Scribe:
        """Who writes, while the journal is kept."""
        if self._scribe is None:
            raise JournalFault("the journal is not kept by anybody")
        return self._scribe

    def _check_open(self) -> None:
        if self._closed:
            raise JournalFault("the journal has been closed")

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """While it is open; all that was given to it is written before it is left."""
        self._scribe = scribe = Scribe()
        try:
            with single_error():
                async with anyio.create_task_group() as writing:
                    writing.start_soon(self._write_on)
                    try:
                        yield
                    finally:
                        self._closed = True
                        self._gathering.begun.set()
                        self._gathering.wanted.set()
        finally:
            with anyio.CancelScope(shield=True):  # bounded: each step in the turn is
                async with self._turn:
                    if self._abandoned:
                        scribe.dismiss()
                    else:
                        try:
                            await scribe.do(self._book.close)
                        finally:
                            await scribe.leave()


@asynccontextmanager
async def open_journal(directory: Path) -> AsyncIterator[NodeJournal]:
    """The journal in a directory on a local disk, made if need be. Raises `JournalFault`: another agent has it, the disk is
    full. What is damaged is kept aside, and what of it could be read is gone on with: `damage` says so."""
    journal = NodeJournal(await to_thread.run_sync(Logbook.open, directory))
    async with journal.kept():
        yield journal
