"""A node's journal: what came before is gone on with, what comes is recorded before it waits, and nothing is run twice."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Final, Literal

import anyio
from anyio import to_thread

from loadmaster.book import Book, Entry
from loadmaster.coordinator import Coordinator
from loadmaster.description import JobDescription
from loadmaster.dispatch import accept
from loadmaster.handle import JobHandle
from loadmaster.journal import NodeJournal
from loadmaster.leases import hold_again
from loadmaster.lifecycle import Stage
from loadmaster.logbook import History
from loadmaster.recovery import Resumed, Succession, resumed, tidy
from loadmaster.result import Status
from loadmaster.site import Site

RECORDED_AT_ONCE: Final = 200
"""So many new jobs go to the journal together; whoever comes meanwhile waits for some 20 ms."""

FORGETTING_SECONDS: Final = 3600.0


class Records:
    """The journal, for the jobs of a book. `lost`: what becomes of a job whose payload is gone with an agent."""

    def __init__(self, journal: NodeJournal, book: Book, site: Site, lost: Literal["rerun", "reschedule"]) -> None:
        self._journal = journal
        self._book = book
        self._site = site
        self._lost = lost
        self._later: dict[str, deque[Entry]] = {}  # by job id: another attempt is to end first
        book.at_end = self._begin_next_attempt

    def succession(self) -> Succession:
        """The journal, as one job has it."""
        return Succession(self._journal, lambda: self._lost == "rerun" and self._book.takes_jobs)

    async def resume(self, root: Path, coordinator: type[Coordinator]) -> tuple[JobHandle, ...]:
        """Go on with what is open. What runs has its slot again before anybody else is granted one."""

        def understood(histories: list[History]) -> list[tuple[Resumed, Succession]]:
            found = []
            for history in histories:
                succession = self.succession()
                if (each := resumed(history, succession, coordinator)) is not None:
                    found.append((each, succession))
            return found

        histories = await self._journal.open_jobs()
        await tidy(self._journal, root, histories)
        for each, succession in await to_thread.run_sync(understood, histories):
            job, handle = each.job, each.handle
            entry = self._book.enter(job, handle, each.coordinator, handle.attempt, succession)
            if job.job_id in self._book.entries:
                self._later.setdefault(job.job_id, deque()).append(entry)
                continue
            self._book.entries[job.job_id] = entry
            self._go_on_with(entry)
        return tuple(entry.handle for entry in self._book.entries.values())

    async def attempt(self, job: JobDescription) -> int:
        """Which attempt at a job a source means."""
        if job.job_id in self._book.entries:
            return 1
        attempt, status = (await self._journal.last([job.job_id])).get(job.job_id, (1, ""))
        return attempt + 1 if status == Status.RESCHEDULED else attempt

    async def work(self) -> None:
        """Have the journal take those that come, all of them at once; then they wait like the others."""
        new = self._book.new
        while True:
            rings = new.rings
            while self._book.unrecorded:
                await self._record_some()
            await new.wait_beyond(rings)

    async def forget(self) -> None:
        """Forget what ended long ago, now and then: nothing says when."""
        while True:
            await self._journal.forget()
            await anyio.sleep(FORGETTING_SECONDS)

    def close(self) -> None:
        """Nothing more is gone on with."""
        for waiting in self._later.values():
            for entry in waiting:
                self._book.close(entry)

    async def _record_some(self) -> None:
        unrecorded = self._book.unrecorded
        new = [unrecorded.popleft() for _ in range(min(len(unrecorded), RECORDED_AT_ONCE))]
        last = await self._journal.last([entry.job.job_id for entry in new])

        for entry in new:
            attempt, _ = last.get(entry.job.job_id, (0, ""))
            if attempt >= entry.handle.attempt:
                await self._recall(entry)
            else:
                await accept(entry, self._site)
        for entry in new:
            if not entry.recalled:
                await entry.handle.settle()  # of all of them, as a rule, with the first
                self._book.put_in_line(entry)
            if entry.recorded is not None:
                entry.recorded.set()

    async def _recall(self, entry: Entry) -> None:
        """A job that the journal knows: it has ended, and is not run again."""
        history = await self._journal.history(entry.job.job_id)
        entry.handle.recall(history.events if history is not None else ())
        entry.recalled = True
        self._book.close(entry)

    def _go_on_with(self, entry: Entry) -> None:
        if entry.handle.life.has_reached(Stage.STAGING_IN):
            hold_again(self._book, entry)
            self._book.go_on_with(entry)
        else:
            self._book.put_in_line(entry)

    def _begin_next_attempt(self, entry: Entry) -> None:
        """The next one to go on with, if an attempt was lost."""
        job_id = entry.job.job_id
        if entry.journal is not None and (accepted := entry.journal.follows) is not None:
            succession = self.succession()
            handle = JobHandle.resumed(succession, [accepted])
            following = self._book.enter(entry.job, handle, entry.coordinator, accepted.attempt, succession)
            self._book.begun_again += 1
            if (reason := entry.handle.kill_reason) is not None:  # it came while this was being written
                handle.kill(reason)
            self._later.setdefault(job_id, deque()).appendleft(following)
        if (waiting := self._later.get(job_id)) and self._book.open:
            self._book.entries[job_id] = following = waiting.popleft()
            self._go_on_with(following)
            if not waiting:
                del self._later[job_id]
