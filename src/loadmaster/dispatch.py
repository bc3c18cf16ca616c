"""From its place in the line to its end: who may begin is begun, and what becomes of each is told."""

from __future__ import annotations

import logging
from typing import Protocol

import anyio
from anyio.abc import TaskGroup

from loadmaster.book import FOR_DISK, GIVEN_BACK, STAGING_IN, Book, Entry, phase_of
from loadmaster.coordinator import Coordinator
from loadmaster.description import JobDescription
from loadmaster.errors import JobError, JobWasKilled, PayloadHeld, RescheduleJob, WorkdirFault
from loadmaster.events import ComputingEnded, JobAccepted, JobFinished
from loadmaster.handle import JobHandle
from loadmaster.hooks import reference_of
from loadmaster.leases import Leases
from loadmaster.ledger import Slots
from loadmaster.lifecycle import Stage
from loadmaster.occupancy import Meter, idle_reasons
from loadmaster.result import Failure, JobResult, Phase
from loadmaster.site import Site

log = logging.getLogger(__name__)


class Run(Protocol):
    """How a job is run: `run_job`, with what is the same for all of a node's."""

    async def __call__(
        self, job: JobDescription, *, coordinator: type[Coordinator], slots: Slots, handle: JobHandle, attempt: int
    ) -> JobResult:
        """What came of it."""
        ...


class Dispatch:
    """Begins the jobs of a book, in those tasks, and sees each of them to its end."""

    def __init__(self, book: Book, run: Run, site: Site, tasks: TaskGroup, now: float) -> None:
        self.meter = Meter(now)
        self._site = site
        self._book = book
        self._run = run
        self._tasks = tasks

    async def work(self) -> None:
        """Begin who may begin, end who never will, and tell who waits for a change. The only task that does: once for
        all that has happened in a turn of the event loop."""
        book = self._book
        while True:
            with (
                anyio.CancelScope() as until_slow
            ):  # which ends early: to look once more costs less than to set it anew
                while not until_slow.cancel_called:
                    rings = book.news.rings
                    while book.unstarted:
                        await self._end_early(*book.unstarted.popleft())
                    now = anyio.current_time()
                    while book.going_on:
                        self._begin(book.going_on.popleft(), now)
                    while (entry := book.line.next(now)) is not None:
                        self._begin(entry, now)
                    self.look(now)
                    book.change.ring()
                    # Then a place becomes free: a source may be asked.
                    if (slow := book.line.next_slow(now)) < until_slow.deadline:
                        until_slow.deadline = slow
                    await book.news.wait_beyond(rings)

    def look(self, now: float) -> None:
        """What the cores do from now on."""
        ledger, book = self._book.ledger, self._book
        free = ledger.free_cores
        idle = (
            idle_reasons(
                ledger,
                for_disk=book.cores[FOR_DISK],
                for_inputs=book.cores[STAGING_IN],
                waiting=len(book.line) > 0,
            )
            if free > 0
            else {}
        )
        self.meter.look(now, ledger.cores - free, idle)

    def _begin(self, entry: Entry, now: float) -> None:
        book, stage = self._book, entry.handle.stage
        if not entry.handle.life.has_reached(Stage.EXITED):
            book.line.begin(entry, now)
        entry.scope = anyio.CancelScope()
        waits = book.ledger.disk_bytes is not None and entry.disk is None
        book.move(entry, FOR_DISK if waits else phase_of(stage))
        self._tasks.start_soon(self._carry, entry)

    async def _carry(self, entry: Entry) -> None:
        """From its disk to its end."""
        book, job, handle = self._book, entry.job, entry.handle
        why: JobError = RescheduleJob(GIVEN_BACK)
        try:
            with entry.scope or anyio.CancelScope():
                async with book.disk_of(entry):
                    if entry.phase == FOR_DISK:
                        book.move(entry, phase_of(handle.stage))
                    await self._run(
                        job,
                        coordinator=entry.coordinator,
                        slots=Leases(book, entry),
                        handle=handle,
                        attempt=handle.attempt,
                    )
        except (WorkdirFault, PayloadHeld) as exc:
            # Its payload may run: the next start is to look again.
            if isinstance(exc, PayloadHeld) or handle.stage in {Stage.GRANTED, Stage.RUNNING}:
                log.error("job %s: is left open in the journal: %s", job.job_id, exc)  # noqa: TRY400 - a sentence
                book.close(entry)
                return
            why = RescheduleJob(f"this node has no work directory for it: {exc}")
        except BaseException:
            book.close(entry)
            raise
        if handle.kill_reason is not None:
            why = JobWasKilled(handle.kill_reason)
        await self._end_early(entry, why)

    async def _end_early(self, entry: Entry, why: JobError) -> None:
        """The end of a job: its own, or if it has none, for that reason."""
        handle, record = entry.handle, entry.handle.record
        try:
            if handle.stage is Stage.NEW:
                await accept(entry, self._site)
                await handle.settle()
            await handle.keep_order()
            if handle.stage is not Stage.FINISHED:
                failure = Failure.of(why, Phase.STAGE_IN)
                if handle.stage not in {Stage.COMPUTED, Stage.STAGING_OUT}:
                    await record(ComputingEnded, failure)
                await record(JobFinished, handle.ends_as(failure), failure)
        finally:
            self._book.close(entry)


async def accept(entry: Entry, site: Site) -> None:
    """A job's first event, which is soon on disk."""
    await entry.handle.note(
        JobAccepted, entry.job.words(), reference_of(entry.coordinator),
        outputs=site.output_directory or "", site=site.file,
    )  # fmt: skip
