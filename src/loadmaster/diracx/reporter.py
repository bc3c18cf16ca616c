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
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from math import inf
from random import random
from typing import Final

import anyio

from loadmaster.description import JobDescription
from loadmaster.diracx.client import SKEW_SECONDS, Command, DiracX, wait_seconds
from loadmaster.diracx.errors import DiracxError, DiracxRefused, DiracxUnavailable
from loadmaster.diracx.jobs import ENDED_BY_OTHERS, Attempt, Line, attempt_name, merged
from loadmaster.diracx.outbox import Filed, MemoryOutbox, Outbox, Report
from loadmaster.errors import RuntimeFault
from loadmaster.events import Event, Heartbeat, JobAccepted
from loadmaster.handle import JobHandle
from loadmaster.node import Node
from loadmaster.sources import JobSource
from loadmaster.tasks import single_error

log = logging.getLogger(__name__)

BEAT_SECONDS: Final = 5.0
"""Between two heartbeats of a job: so long a kill takes to arrive, at most."""

LEAST_BEAT_SECONDS: Final = 2.0
"""The server takes one a second, by the second of its own clock; one may be under way longer than the next."""

LINGER_SECONDS: Final = 0.25
"""Between two requests with statuses: jobs that begin together are told of together."""

FLUSH_SECONDS: Final = 60.0
"""How long the end may take: for the last statuses of jobs that have ended."""

LEAVE_SECONDS: Final = 5.0
"""The same when we are leaving in a hurry, cancelled or by an error."""

JOBS_AT_ONCE: Final = 100
"""In one request."""

MOST_WAITING: Final = 20_000
"""So many reports may wait before no more jobs should be begun: some 10 MB."""

WARN_EVERY: Final = 8
"""Of tries that failed, one in so many is told, after the first."""

_FOR_GOOD: Final = frozenset({400, 404, 409, 413, 422})
"""A refusal that the same request gets again, whenever it is tried."""


@asynccontextmanager
async def open_reporter(
    diracx: DiracX,
    *,
    outbox: Outbox | None = None,
    source: str = "JobWrapper",
    beat_seconds: float = BEAT_SECONDS,
    flush_seconds: float = FLUSH_SECONDS,
) -> AsyncIterator[Reporter]:
    """A reporter. Leaving the block delivers what is left, for `flush_seconds` at most, and says what was not.

    `outbox`: where reports wait, in memory if none is given; what a durable one has of an earlier process is delivered
    too. `source`: who says it, by custom `JobWrapper@<site>`.
    """
    reporter = Reporter(diracx, outbox or MemoryOutbox(), source, max(beat_seconds, LEAST_BEAT_SECONDS))
    await reporter.load()
    with single_error():
        async with anyio.create_task_group() as group:
            group.start_soon(reporter.work)
            seconds = LEAVE_SECONDS
            try:
                yield reporter
                seconds = flush_seconds
            finally:
                with anyio.move_on_after(seconds, shield=True):
                    await reporter.flush()
                reporter.stop()
    reporter.tell_what_is_left()


class Reporter:
    """One for all jobs of a pilot. Made by `open_reporter`."""

    def __init__(self, diracx: DiracX, outbox: Outbox, source: str, beat_seconds: float) -> None:
        self._diracx = diracx
        self._outbox = outbox
        self._source = source
        self._beat_seconds = beat_seconds
        self._lines: dict[int, Line] = {}
        self._waiting: dict[int, Line] = {}
        self._attempts: dict[tuple[str, int], Attempt] = {}
        self._reported: dict[str, int] = {}
        self._told_of_names = False
        self._news = anyio.Event()
        self._empty = anyio.Event()
        self._room = anyio.Event()
        self._working = anyio.CancelScope(shield=True)
        self._flushing = False
        self._next_beat = self._next_delivery = self._not_before = -inf
        self._tries = 0
        self._at_once = self._beats_at_once = JOBS_AT_ONCE
        self.refused: list[Report] = []
        """What the server will never take; each was told in the log."""

    def __repr__(self) -> str:
        return f"<Reporter {self._diracx.url}: {self.waiting} to be delivered>"

    @property
    def waiting(self) -> int:
        """How many reports are still to be delivered."""
        return sum(len(line.statuses) + len(line.parameters) for line in self._waiting.values())

    @property
    def undelivered(self) -> tuple[Report, ...]:
        """The reports that are still to be delivered."""
        lines = self._waiting.values()
        return tuple(filed.report for line in lines for filed in (*line.statuses, *line.parameters))

    # -- hearing ---------------------------------------------------------------------------------------------------------

    async def follow(self, handle: JobHandle) -> None:
        """Report one job, from its first event to its last."""
        async for event in handle.follow():
            await self._hear([event], lambda _: handle)

    async def listen(self, node: Node) -> None:
        """Report all jobs of a node, until its events end."""
        stream = node.events(transient=True)
        async for event in stream:
            await self._hear([event, *stream.take()], node.handle)

    async def _hear(self, events: Sequence[Event], handle_of: Callable[[str], JobHandle | None]) -> None:
        reports: list[Report] = []
        heard: dict[str, int] = {}
        for event in events:
            number = self._number(event.job_id)
            if number is None:
                continue
            line = self._lines.setdefault(number, Line(number))
            if isinstance(event, Heartbeat):
                line.beat = event
            if event.kept:
                line.handle = line.handle if line.lives else handle_of(event.job_id)
                for each in self._missed(event, line.handle):
                    attempt = self._attempts[event.job_id, event.attempt]
                    line.attempt = attempt
                    reports += attempt.reports(number, each)
                    heard[attempt.name] = attempt.heard
        if heard:
            await self._file(reports, heard)

    def _missed(self, event: Event, handle: JobHandle | None) -> list[Event]:
        """The event, and before the first one of an attempt all that came before it, if it was begun by another process."""
        key = event.job_id, event.attempt
        attempt = self._attempts.get(key)
        if isinstance(event, JobAccepted):
            name = attempt_name(event)
            if attempt is None or attempt.name != name:
                self._attempts[key] = Attempt(name, reported=self._reported.get(name, 0))
            return [event]
        if attempt is not None:
            return [event]
        history = [] if handle is None else [past for past in handle.history if past.attempt == event.attempt]
        if history and isinstance(history[0], JobAccepted):
            name = attempt_name(history[0])
            self._attempts[key] = Attempt(name, reported=self._reported.get(name, 0))
            return history[: next((at + 1 for at, past in enumerate(history) if past is event), len(history))]
        self._attempts[key] = Attempt(f"{event.job_id}/{event.attempt}")  # from here on, whatever was before
        return [event]

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
        self._take(filed)

    def _take(self, filed: Iterable[Filed]) -> None:
        for each in filed:
            line = self._lines.setdefault(each.report.job, Line(each.report.job))
            line.file(each)
            self._waiting[line.number] = line
        self._news.set()

    # -- for whoever has it open -----------------------------------------------------------------------------------------

    async def load(self) -> None:
        """Take up what an earlier process has left."""
        kept = await self._outbox.load()
        self._reported = dict(kept.heard)
        self._take(kept.filed)
        if kept.filed:
            log.info("%d reports of before are to be delivered", len(kept.filed))

    async def flush(self) -> None:
        """Wait until everything is delivered."""
        self._flushing = True
        self._news.set()
        await self._empty.wait()

    def stop(self) -> None:
        """Deliver no more."""
        self._working.cancel()

    def tell_what_is_left(self) -> None:
        """Say what was not delivered, and what becomes of it."""
        if self.waiting:
            jobs = ", ".join(str(number) for number in list(self._waiting)[:10])
            more = f" and {len(self._waiting) - 10} more" if len(self._waiting) > 10 else ""
            fate = "they are kept for the next time" if self._outbox.durable else "they are lost"
            log.warning("%d reports of jobs %s%s were not delivered: %s", self.waiting, jobs, more, fate)

    def paced(self, source: JobSource) -> JobSource:
        """The source, which gives no more jobs while too much waits to be delivered."""
        return _Paced(source, self)

    async def room(self) -> None:
        """Wait until there is room for the reports of another job."""
        while self.waiting >= MOST_WAITING:
            self._room = anyio.Event()
            await self._room.wait()

    # -- delivering ------------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Deliver and beat, one request at a time, until it is stopped."""
        try:
            with self._working:
                while True:
                    self._news = anyio.Event()
                    if not await self._do_something(anyio.current_time()):
                        with anyio.CancelScope(deadline=self._next_time()):
                            await self._news.wait()
        finally:
            self._empty.set()

    async def _do_something(self, now: float) -> bool:
        """Whether anything was done, so that it is worth looking again."""
        if self._flushing and not self._waiting:
            self._empty.set()
        if now < self._not_before:
            return False
        if now >= self._next_beat:
            self._next_beat = now + self._beat_seconds
            lines = [line for line in self._lines.values() if line.may_beat]
            for at in range(0, len(lines), self._beats_at_once):
                if self._not_before > now:
                    return True
                await self._beat(lines[at : at + self._beats_at_once])
            await self._forget()
            return True
        if (self._flushing or now >= self._next_delivery) and (lines := self._due(now)):
            self._next_delivery = now + LINGER_SECONDS
            await self._deliver(lines)
            return True
        return False

    def _due(self, now: float) -> list[Line]:
        due = (line for line in self._waiting.values() if line.not_before <= now)
        return [line for line, _ in zip(due, range(self._at_once), strict=False)]

    def _next_time(self) -> float:
        delivery = min((line.not_before for line in self._waiting.values()), default=inf)
        delivery = max(delivery, -inf if self._flushing else self._next_delivery)
        return max(self._not_before, min(self._next_beat, delivery))

    async def _deliver(self, lines: Sequence[Line]) -> None:
        """Say what is next of each; those that could not be told are tried again after the others."""
        statuses = [line for line in lines if line.next_statuses() or (line.question and not line.statuses)]
        told = {line.number for line in statuses}
        reschedule = [line for line in lines if line.statuses and line.number not in told]
        for some, say in (
            (statuses, self._say_statuses),
            ([line for line in lines if line.parameters], self._say_parameters),
            (reschedule, self._say_reschedule),
        ):
            if some and self._not_before <= anyio.current_time():
                await self._say(some, say)
        for line in lines:
            self._waiting.pop(line.number, None)
            line.question = line.question and line.lives
            if line.waits:
                self._waiting[line.number] = line
        if self.waiting < MOST_WAITING:
            self._room.set()

    async def _say(self, lines: Sequence[Line], say: Callable[[Sequence[Line]], Awaitable[None]]) -> None:
        """Say it of all at once. If that is refused, of the halves: the others should not wait for the one at fault."""
        try:
            await say(lines)
        except DiracxRefused as exc:
            if len(lines) > 1:
                half = len(lines) // 2
                await self._say(lines[:half], say)
                if self._not_before <= anyio.current_time():
                    await self._say(lines[half:], say)
            else:
                await self._refuse(lines[0], say, exc)
        except DiracxError as exc:
            self._put_off(lines, exc)
        else:
            self._tries = 0
            self._at_once = min(2 * self._at_once, JOBS_AT_ONCE)
            for line in lines:
                line.tries, line.not_before = 0, -inf

    async def _say_statuses(self, lines: Sequence[Line]) -> None:
        taken = {line: line.next_statuses() for line in lines}
        now, skew = self._diracx.now(), self._diracx.skew
        updates = {line.number: line.update(filed, skew, now, self._source) for line, filed in taken.items()}
        answer = await self._diracx.set_statuses(updates)
        for line, filed in taken.items():
            line.question = False
            if line.number in answer.unknown:
                line.unknown = True
                await self._give_up(line, [*line.statuses, *line.parameters], "DiracX has no such job")
            elif line.number not in answer.status:
                raise DiracxUnavailable("DiracX does not say what became of an update", answered=True)
            else:
                await self._compare(line, filed, answer.status[line.number])

    async def _compare(self, line: Line, filed: list[Filed], held: str | None) -> None:
        """What the server holds is not always what it was told, although it says yes."""
        asked = line.asked(filed).status
        if held is None and filed and not line.asked_twice:
            # It has heard of something later: it declared the job stalled meanwhile, or its clock is ahead of ours.
            line.say_again(filed, self._diracx.now() + timedelta(seconds=SKEW_SECONDS))
            return
        line.asked_twice = False
        line.delivered(filed)
        await self._drop(filed)
        if held is not None and held in ENDED_BY_OTHERS and held != asked:
            self._kill(line, f"DiracX holds it as {held}")
        elif asked and held != asked:
            log.warning("job %d: DiracX was told %s and holds %s", line.number, asked, held or "something later")

    async def _say_parameters(self, lines: Sequence[Line]) -> None:
        taken = {line: list(line.parameters) for line in lines}
        await self._diracx.set_parameters(merged({line.number: filed for line, filed in taken.items()}))
        for line, filed in taken.items():
            await self._done(line, filed)

    async def _say_reschedule(self, lines: Sequence[Line]) -> None:
        await self._diracx.reschedule([line.number for line in lines])
        for line in lines:
            await self._done(line, [line.statuses[0]])

    async def _refuse(self, line: Line, say: Callable[..., Awaitable[None]], exc: DiracxRefused) -> None:
        """One job's report is refused by itself: drop it if that is for good, else come back to it, ever later."""
        if exc.status not in _FOR_GOOD:
            self._put_off([line], exc)
        elif say == self._say_parameters:
            await self._give_up(line, list(line.parameters), str(exc))
        elif say == self._say_reschedule:
            await self._give_up(line, [line.statuses[0]], str(exc))
        else:
            line.question = False
            await self._give_up(line, line.next_statuses(), str(exc))

    async def _give_up(self, line: Line, filed: Sequence[Filed], why: str) -> None:
        if filed:
            log.warning("job %d: %d reports are refused: %s", line.number, len(filed), why)
        self.refused += [each.report for each in filed]
        await self._done(line, filed)

    async def _done(self, line: Line, filed: Sequence[Filed]) -> None:
        for each in filed:
            (line.statuses if each in line.statuses else line.parameters).remove(each)
        await self._drop(filed)

    async def _drop(self, filed: Sequence[Filed], over: Sequence[str] = ()) -> None:
        if not filed and not over:
            return
        try:
            with anyio.CancelScope(shield=True):
                await self._outbox.drop([each.number for each in filed], over)
        except RuntimeFault as exc:  # a full disk: they may be delivered twice, which changes nothing
            log.error("what is delivered could not be removed: %s", exc)  # noqa: TRY400 - as above

    def _put_off(self, lines: Sequence[Line], exc: DiracxError) -> None:
        """Not now. Whoever is in trouble by itself waits by itself; the others wait for the server."""
        now = anyio.current_time()
        retry_after = getattr(exc, "retry_after", None)
        of_this_job = isinstance(exc, DiracxRefused) or getattr(exc, "answered", False)
        if of_this_job and len(lines) == 1:
            line = lines[0]
            line.not_before = now + wait_seconds(line.tries, retry_after, random())  # noqa: S311 - no secret
            line.tries += 1
        elif of_this_job:
            self._at_once = max(1, len(lines) // 2)
        if not isinstance(exc, DiracxRefused):
            self._not_before = now + wait_seconds(self._tries, retry_after, random())  # noqa: S311
        if self._tries % WARN_EVERY == 0:
            log.warning("%s; %d reports wait", exc, self.waiting)
        self._tries += 1

    # -- beating -----------------------------------------------------------------------------------------------------------

    async def _beat(self, lines: Sequence[Line]) -> None:
        """Tell how jobs are doing, and hear what is wanted of them."""
        now = anyio.current_time()
        lines = [line for line in lines if now - line.beaten_at >= LEAST_BEAT_SECONDS / 2]
        if not lines:
            return
        for line in lines:
            line.beaten_at = now
        try:
            commands = await self._diracx.beat({line.number: line.heartbeat() for line in lines})
        except DiracxRefused as exc:
            if len(lines) == 1:
                lines[0].unknown = exc.status in _FOR_GOOD
                log.warning("job %d: no heartbeats: %s", lines[0].number, exc)
                return
            for half in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
                for line in half:
                    line.beaten_at = -inf  # refused as a whole: it has beaten for none of them
                await self._beat(half)
        except DiracxError as exc:
            self._beats_at_once = max(1, len(lines) // 2) if getattr(exc, "answered", False) else self._beats_at_once
            self._not_before = anyio.current_time() + wait_seconds(self._tries, None, random())  # noqa: S311 - no secret
            self._tries += 1
            for line in lines:  # a command comes once, and may have been in the answer that was lost
                line.question = True
                self._waiting[line.number] = line
        else:
            self._tries = 0
            self._beats_at_once = min(2 * self._beats_at_once, JOBS_AT_ONCE)
            self._obey(commands)

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            line = self._lines.get(command.job_id)
            if command.command == "Kill" and line is not None:
                said = command.arguments.strip()
                self._kill(line, f"DiracX orders it{f': {said}' if said else ''}")

    def _kill(self, line: Line, why: str) -> None:
        if line.handle is not None and line.handle.kill_reason is None and line.handle.kill(f"killed: {why}"):
            log.info("job %d: %s: it is killed", line.number, why)

    async def _forget(self) -> None:
        """Let go of jobs that are over, and told."""
        over = [line for line in self._lines.values() if not line.lives and not line.waits]
        for line in over:
            del self._lines[line.number]
        numbers = {line.number for line in over}
        keys = [key for key in self._attempts if self._number(key[0]) in numbers]
        names = [self._attempts.pop(key).name for key in keys]
        await self._drop([], names)


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
