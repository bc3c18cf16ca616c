"""Telling DiracX what becomes of jobs, and doing what it says.

    async with open_diracx(preferences) as diracx, open_reporter(diracx, outbox=outbox) as reporter, node:
        group.start_soon(reporter.listen, node)        # or `reporter.follow(handle)`, for one job

What is said of a job goes into an outbox, in its order, and from there in bulk to the server, again and again until it has
it: through outages, restarts, expired tokens. Only heartbeats are not kept: the newest replaces the one before. A kill that
the server orders, by its answer to a heartbeat or by holding the job as Killed, kills the job.

    events ─▶ reports ─▶ outbox ─▶ lines, one a job ─▶ one request for many ─▶ server
                                       ▲                        │
                                       └── kill, say it again ──┘
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.description import ComputingElement, JobDescription
from loadmaster.dirac import Parameters, node_parameters
from loadmaster.diracx.client import DiracX
from loadmaster.diracx.delivery import Deliveries
from loadmaster.diracx.jobs import Attempt, Line, attempt_name
from loadmaster.diracx.outbox import Filed, MemoryOutbox, Outbox, ParameterReport, Report, Value
from loadmaster.errors import JournalFault, RuntimeFault
from loadmaster.events import ComputingEnded, Event, Heartbeat, JobAccepted, JobFinished
from loadmaster.handle import JobHandle
from loadmaster.node import Node
from loadmaster.sources import JobSource
from loadmaster.streams import EventStream
from loadmaster.tasks import single_error

log = logging.getLogger(__name__)

BEAT_SECONDS: Final = 5.0
"""Between two heartbeats of a job: so long a kill takes to arrive, at most."""

FLUSH_SECONDS: Final = 60.0
"""How long the end may take: for the last statuses of jobs that have ended."""

LEAVE_SECONDS: Final = 5.0
"""The same when we are leaving in a hurry, cancelled or by an error."""

MOST_WAITING: Final = 20_000
"""So many reports may wait before no more jobs should be begun: some 10 MB."""


@asynccontextmanager
async def open_reporter(
    diracx: DiracX,
    *,
    outbox: Outbox | None = None,
    ce: ComputingElement | None = None,
    beat_seconds: float = BEAT_SECONDS,
    flush_seconds: float = FLUSH_SECONDS,
) -> AsyncIterator[Reporter]:
    """A reporter. Leaving the block delivers what is left, for `flush_seconds` at most, and says what was not.

    `outbox`: where reports wait, in memory if none is given; what a durable one has of an earlier process is delivered
    too. `ce`: where we are, for the jobs' parameters and for who says it: `JobWrapper@<site>`.
    """
    ce = ce or ComputingElement()
    source = f"JobWrapper@{ce.site}" if ce.site else "JobWrapper"
    outbox = outbox or MemoryOutbox()
    deliveries = Deliveries(diracx, outbox, source, beat_seconds)
    reporter = Reporter(deliveries, outbox, ce, await to_thread.run_sync(node_parameters, os.environ))
    await reporter.load()
    with single_error():
        async with anyio.create_task_group() as group:
            group.start_soon(deliveries.work)
            seconds = LEAVE_SECONDS
            try:
                yield reporter
                with anyio.move_on_after(flush_seconds):
                    await deliveries.flush()
                seconds = 0.0
            finally:
                with anyio.move_on_after(seconds, shield=True):
                    await deliveries.flush()
                deliveries.stop()
    reporter.tell_what_is_left()


class Reporter:
    """One for all jobs of a pilot. Made by `open_reporter`."""

    def __init__(self, deliveries: Deliveries, outbox: Outbox, ce: ComputingElement, of_node: dict[str, Value]) -> None:
        self._deliveries = deliveries
        self._outbox = outbox
        self._ce, self._of_node = ce, of_node
        self._reported: dict[str, int] = {}
        self._unfinished: list[str] = []
        self._told_of_names = False

    def __repr__(self) -> str:
        return f"<Reporter {self.waiting} to be delivered>"

    @property
    def waiting(self) -> int:
        """How many reports are still to be delivered."""
        return self._deliveries.count

    @property
    def undelivered(self) -> tuple[Report, ...]:
        """The reports that are still to be delivered."""
        return self._deliveries.waiting

    @property
    def refused(self) -> tuple[Report, ...]:
        """What the server will never take; each was told in the log."""
        return tuple(self._deliveries.refused)

    # -- hearing ---------------------------------------------------------------------------------------------------------

    async def follow(self, handle: JobHandle) -> None:
        """Report one job, from its first event to its last."""
        async for event in handle.follow():
            await self._hear([event], partial(_the_same, handle))

    async def listen(self, node: Node) -> None:
        """Report all jobs of a node, until its events end; first those that its journal has from another process.

        To be started when the node has been entered.
        """
        stream = node.events(transient=True)
        resumed = [(handle.history[-1:], handle) for handle in node.resumed]  # as of now: the rest is in the stream
        meanwhile: list[Event] = []
        if node.journal is not None and self._outbox.durable:
            meanwhile = await self._catch_up(node, node.journal.directory, stream)
        for last, handle in resumed:
            await self._hear(last, partial(_the_same, handle))
        if meanwhile:
            await self._hear(meanwhile, node.handle)
        async for event in stream:
            await self._hear([event, *stream.take()], node.handle)

    async def _hear(self, events: Sequence[Event], handle_of: Callable[[str], JobHandle | None]) -> None:
        reports: list[Report] = []
        heard: dict[str, int] = {}
        lines: list[Line] = []
        for event in events:
            number = self._number(event.job_id)
            if number is None:
                continue
            line = self._deliveries.line(number)
            if isinstance(event, Heartbeat):
                line.beat = event
            if event.kept:
                if line.handle is None or not line.lives or line.handle.attempt < event.attempt:
                    line.handle = handle_of(event.job_id)
                if _is_stranger(event, line):
                    continue
                for each in self._missed(event, line):
                    attempt = line.attempts[each.attempt]
                    if attempt.heard < attempt.reported:  # by another process, and told to the server as far as it goes
                        line.said = attempt.statuses.current
                    found = attempt.reports(number, each)
                    if isinstance(each, JobAccepted) and found:
                        found.append(ParameterReport(number, self._of_node))
                    reports += found
                    heard[attempt.name] = attempt.heard
                    lines.append(line)
                    line.filing += 1
        if heard:
            await self._file(reports, heard)
        for line in lines:
            line.filing -= 1

    async def _catch_up(self, node: Node, directory: Path, stream: EventStream) -> list[Event]:
        """Report what has happened to jobs that ended in the moment in which a process was killed, or its machine. Returns
        what has come meanwhile of those that are here."""
        from loadmaster.diracx.unheard import MARK, unheard  # with sqlite3

        look = partial(unheard, directory, self._reported, self._unfinished, now=datetime.now(UTC))
        try:
            mark, found = await to_thread.run_sync(look)
        except JournalFault as exc:
            log.error("what the journal has that was not reported is not known: %s", exc)  # noqa: TRY400 - a sentence
            return []
        await self._file([], {MARK: mark})
        meanwhile = stream.take()
        ours = {(event.job_id, event.attempt) for event in meanwhile}
        ours |= {(handle.job_id or "", handle.attempt) for handle in node.resumed}
        for each in found:
            here = node.handle(each.job_id)
            if (each.job_id, each.attempt) not in ours and (here is None or here.attempt != each.attempt):
                past = JobHandle.resumed(None, each.events)
                await self._hear(past.history[-1:], partial(_the_same, past))
        return meanwhile

    def _missed(self, event: Event, line: Line) -> list[Event]:
        """The event; before the first one of an attempt all that came before it, if it was begun by another process."""
        if isinstance(event, JobAccepted):
            self._begin(line, event.attempt, attempt_name(event))
            return [event]
        if event.attempt in line.attempts:
            return [event]
        past = () if line.handle is None else line.handle.history
        history = [each for each in past if each.attempt == event.attempt]
        if not history or not isinstance(history[0], JobAccepted):
            self._begin(line, event.attempt, f"{event.job_id}/{event.attempt}")  # from here on, whatever was before
            return [event]
        self._begin(line, event.attempt, attempt_name(history[0]))
        return history[: next((at + 1 for at, each in enumerate(history) if each is event), len(history))]

    def _begin(self, line: Line, attempt: int, name: str) -> None:
        if attempt not in line.attempts or line.attempts[attempt].name != name:
            agent = Parameters(self._ce, pid=os.getpid())
            known = (
                len(line.handle.history) if line.handle is not None else 0
            )  # less, if a journal was damaged meanwhile
            reported = min(self._reported.get(name, 0), known)
            line.attempts[attempt] = Attempt(name, agent, reported=reported)

    def _number(self, job_id: str) -> int | None:
        if job_id.isascii() and job_id.isdecimal() and 0 < int(job_id) < 2**63:
            return int(job_id)
        if not self._told_of_names:
            self._told_of_names = True
            log.warning("job %s: is not reported: DiracX knows jobs by numbers", job_id)
        return None

    async def _file(self, reports: Sequence[Report], heard: dict[str, int]) -> None:
        """Keep reports, and have them delivered."""
        try:
            with anyio.CancelScope(shield=True):  # a local disk; what is on it is known to be
                filed = await self._outbox.put(reports, heard)
        except RuntimeFault as exc:
            log.error("reports are kept in memory only: %s", exc)  # noqa: TRY400 - a sentence, no traceback
            filed = [Filed(0, report) for report in reports]
        self._deliveries.take(filed)

    # -- for whoever has it open -----------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take up what an earlier process has left."""
        kept = await self._outbox.load()
        self._reported = dict(kept.heard)
        self._unfinished = [name for name in kept.heard if "/" in name and name not in kept.over]
        self._deliveries.take(kept.filed)
        if kept.filed:
            log.info("%d reports of before are to be delivered", len(kept.filed))

    def tell_what_is_left(self) -> None:
        """Say what was not delivered, and what becomes of it."""
        if self.waiting:
            jobs = list(dict.fromkeys(str(report.job) for report in self.undelivered))
            more = f" and {len(jobs) - 10} more" if len(jobs) > 10 else ""
            fate = "they are kept for the next time" if self._outbox.durable else "they are lost"
            told = ", ".join(jobs[:10])
            log.warning("%d reports of jobs %s%s were not delivered: %s", self.waiting, told, more, fate)

    def paced(self, source: JobSource) -> JobSource:
        """The source, which gives no more jobs while too much waits to be delivered."""
        return _Paced(source, self)

    async def room(self) -> None:
        """Wait until there is room for the reports of another job."""
        while self.waiting >= MOST_WAITING:
            await self._deliveries.some_delivered()


def _the_same(handle: JobHandle, job_id: str) -> JobHandle:
    return handle


def _is_stranger(event: Event, line: Line) -> bool:
    """Whether it is an event of another job of the same number, which a node refuses while it has the first.

    That one's failure is not the job's, and would end it at the server.
    """
    first = line.handle.first if line.handle is not None and line.lives else None
    if isinstance(event, JobAccepted):
        line.stranger = first is not None and first is not event and first.attempt == event.attempt
        return line.stranger
    if line.stranger and isinstance(event, ComputingEnded | JobFinished):
        refused = event.failure is not None and event.failure.kind == "InvalidJob"
        line.stranger = not (refused and isinstance(event, JobFinished))
        return refused
    return False


class _Paced:
    """A source that waits for its jobs' reports to be delivered."""

    def __init__(self, source: JobSource, reporter: Reporter) -> None:
        self._source, self._reporter = source, reporter

    async def next(self, free: int) -> JobDescription | None:
        """The other's next, once there is room."""
        await self._reporter.room()
        return await self._source.next(free)

    async def accepted(self, job: JobDescription) -> None:
        await self._source.accepted(job)

    async def give_back(self, job: JobDescription) -> None:
        await self._source.give_back(job)
