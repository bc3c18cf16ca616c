"""Bringing reports to a DiracX server, in bulk and in their order, for as long as it takes; and hearing what it orders.

One request at a time. What fails for all waits for the server; what fails for one job waits by itself:

    no answer            everything waits, ever longer
    5xx, for many        half as many at once, after a while; the other kinds of request go on
    5xx, for one         this job waits, ever longer
    4xx, for many        the halves are asked by themselves, at once: one unknown job refuses them all
    4xx, for one         never to be taken: said in the log, and dropped. 403 may pass, and is tried again
    it says yes          and holds something else: it is said again, or it is an order to kill, or it is told in the log
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from math import inf
from types import MappingProxyType
from typing import Final, TypeAlias

import anyio

from loadmaster.diracx.client import SKEW_SECONDS, Command, DiracX
from loadmaster.diracx.errors import DiracxError, DiracxRefused, DiracxUnavailable
from loadmaster.diracx.jobs import ENDED_BY_OTHERS, Kind, Line, merged
from loadmaster.diracx.outbox import Filed, Outbox, Report
from loadmaster.diracx.pace import Pace, any_chance
from loadmaster.errors import RuntimeFault

log = logging.getLogger(__name__)

LEAST_BEAT_SECONDS: Final = 2.0
"""The server takes one a second, by the second of its own clock; one may be under way longer than the next."""

LINGER_SECONDS: Final = 0.25
"""Between two requests of a kind: jobs that begin together are told of together."""

JOBS_AT_ONCE: Final = 100
"""In one request."""

WARN_EVERY: Final = 8
"""Of tries that failed one after the other, one in so many is told."""

_FOR_GOOD: Final = frozenset({400, 404, 409, 413, 422})
"""A refusal that the same request gets again, whenever it is tried."""

Batch: TypeAlias = Mapping[Line, list[Filed]]


class Deliveries:
    """The lines of all jobs, and the one task that brings to the server what waits in them."""

    def __init__(self, diracx: DiracX, outbox: Outbox, source: str, beat_seconds: float) -> None:
        self.refused: list[Report] = []
        """What the server will never take; each was told in the log."""
        self._diracx = diracx
        self._outbox = outbox
        self._source = source
        self._beat_seconds = max(beat_seconds, LEAST_BEAT_SECONDS)
        self._lines: dict[int, Line] = {}
        self._waiting: dict[int, Line] = {}
        self._news, self._delivered, self._empty = anyio.Event(), anyio.Event(), anyio.Event()
        self._working = anyio.CancelScope(shield=True)
        self._flushing = False
        self._server = Pace()
        self._paces = {kind: Pace() for kind in Kind}
        self._at_once = dict.fromkeys(Kind, JOBS_AT_ONCE)
        self._beats_at_once = JOBS_AT_ONCE
        self._next_beat = self._next_delivery = -inf
        self._say = MappingProxyType(
            {Kind.STATUSES: self._statuses, Kind.PARAMETERS: self._parameters, Kind.RESCHEDULE: self._reschedule}
        )

    @property
    def waiting(self) -> tuple[Report, ...]:
        """The reports that are still to be delivered."""
        lines = self._waiting.values()
        return tuple(filed.report for line in lines for filed in (*line.statuses, *line.parameters))

    @property
    def count(self) -> int:
        """How many they are."""
        return sum(len(line.statuses) + len(line.parameters) for line in self._waiting.values())

    def line(self, number: int) -> Line:
        """Of a job, by its number."""
        return self._lines.setdefault(number, Line(number))

    def take(self, filed: Iterable[Filed]) -> None:
        """Have reports delivered."""
        for each in filed:
            line = self.line(each.report.job)
            line.file(each)
            self._waiting[line.number] = line
        self._news.set()

    async def some_delivered(self) -> None:
        """Wait until fewer are waiting."""
        await self._delivered.wait()

    async def flush(self) -> None:
        """Wait until everything is delivered."""
        self._flushing = True
        self._news.set()
        await self._empty.wait()

    def stop(self) -> None:
        """Deliver no more."""
        self._working.cancel()

    # -- the task --------------------------------------------------------------------------------------------------------

    async def work(self) -> None:
        """Deliver and beat, until it is stopped. A cancellation from outside does not stop it."""
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
        if now < self._server.not_before:
            return False
        if now >= self._next_beat:
            self._next_beat = now + self._beat_seconds
            await self._beat_all()
            await self._forget()
            return True
        if self._flushing or now >= self._next_delivery:
            for kind in Kind:
                if lines := self._due(kind, now):
                    self._next_delivery = now + LINGER_SECONDS
                    await self._deliver(kind, lines)
                    return True
        return False

    def _due(self, kind: Kind, now: float) -> list[Line]:
        if self._paces[kind].not_before > now:
            return []
        due = (line for line in self._waiting.values() if line.paces[kind].not_before <= now and line.wants(kind))
        return [line for line, _ in zip(due, range(self._at_once[kind]), strict=False)]

    def _next_time(self) -> float:
        if self._server.not_before > anyio.current_time():
            return self._server.not_before
        times = [
            max(line.paces[kind].not_before, self._paces[kind].not_before)
            for line in self._waiting.values() for kind in Kind if line.wants(kind)
        ]  # fmt: skip
        delivery = max(min(times, default=inf), -inf if self._flushing else self._next_delivery)
        return min(self._next_beat, delivery)

    # -- saying ----------------------------------------------------------------------------------------------------------

    async def _deliver(self, kind: Kind, lines: Sequence[Line]) -> None:
        await self._tell(kind, lines)
        for line in lines:  # those for whom something is left come after the others
            self._waiting.pop(line.number, None)
            line.question = line.question and line.lives
            if line.waits:
                self._waiting[line.number] = line
        self._delivered.set()
        self._delivered = anyio.Event()

    async def _tell(self, kind: Kind, lines: Sequence[Line]) -> None:
        try:
            await self._say[kind]({line: line.next(kind) for line in lines})
        except DiracxRefused as exc:
            if len(lines) == 1:
                await self._refuse(kind, lines[0], exc)
                return
            for half in (lines[: len(lines) // 2], lines[len(lines) // 2 :]):
                now = anyio.current_time()
                if max(self._server.not_before, self._paces[kind].not_before) <= now:
                    await self._tell(kind, half)
        except DiracxError as exc:
            self._put_off(kind, lines, exc)
        else:
            self._server.reset()
            self._paces[kind].reset()
            self._at_once[kind] = min(2 * self._at_once[kind], JOBS_AT_ONCE)
            for line in lines:
                line.paces[kind].reset()

    async def _statuses(self, batch: Batch) -> None:
        now, skew = self._diracx.now(), self._diracx.skew
        updates = {line.number: line.update(filed, skew, now, self._source) for line, filed in batch.items()}
        answer = await self._diracx.set_statuses(updates)
        for line, filed in batch.items():
            line.question = False
            if line.number in answer.unknown:
                line.unknown = True
                await self._give_up(line, [*line.statuses, *line.parameters], "DiracX has no such job")
            elif line.number in answer.status:
                await self._compare(line, filed, answer.status[line.number])
            else:
                raise DiracxUnavailable("DiracX does not say what became of an update", answered=True)

    async def _compare(self, line: Line, filed: list[Filed], held: str | None) -> None:
        """What the server holds is not always what it was told, although it says yes."""
        asked = line.asked(filed).status
        if held is None and filed and not line.asked_twice:
            # It has heard of something later: it declared the job stalled meanwhile, or its clock is ahead of ours.
            line.say_again(filed, self._diracx.now() + timedelta(seconds=SKEW_SECONDS))
            return
        line.asked_twice = False
        await self._done(line, filed)
        if held is not None and held in ENDED_BY_OTHERS and held != asked:
            self._kill(line, f"DiracX holds it as {held}")
        elif asked and held != asked:
            log.warning("job %d: DiracX was told %s and holds %s", line.number, asked, held or "something later")

    async def _parameters(self, batch: Batch) -> None:
        await self._diracx.set_parameters({line.number: merged(filed) for line, filed in batch.items()})
        for line, filed in batch.items():
            await self._done(line, filed)

    async def _reschedule(self, batch: Batch) -> None:
        await self._diracx.reschedule([line.number for line in batch])
        for line, filed in batch.items():
            await self._done(line, filed)

    async def _refuse(self, kind: Kind, line: Line, exc: DiracxRefused) -> None:
        """What is refused of one job by itself: dropped if that is for good."""
        if exc.status not in _FOR_GOOD:
            self._put_off(kind, [line], exc)
            return
        if kind is Kind.PARAMETERS and len(line.parameters) > 1 and not line.one_by_one:
            line.one_by_one = True  # one of them is at fault
            return
        line.question = False
        await self._give_up(line, line.next(kind), str(exc))

    async def _give_up(self, line: Line, filed: Sequence[Filed], why: str) -> None:
        if filed:
            log.warning("job %d: %d reports are refused: %s", line.number, len(filed), why)
        self.refused += [each.report for each in filed]
        await self._done(line, list(filed))

    async def _done(self, line: Line, filed: list[Filed]) -> None:
        line.delivered(filed)
        line.one_by_one = line.one_by_one and bool(line.parameters)
        await self._drop([each.number for each in filed])

    async def _drop(self, numbers: Sequence[int], over: Sequence[str] = ()) -> None:
        if not numbers and not over:
            return
        try:
            with anyio.CancelScope(shield=True):
                await self._outbox.drop(numbers, over)
        except RuntimeFault as exc:  # a full disk: they may be delivered twice, which changes nothing
            log.error("what is delivered could not be removed: %s", exc)  # noqa: TRY400 - a sentence, no traceback

    def _put_off(self, kind: Kind, lines: Sequence[Line], exc: DiracxError) -> None:
        """Not now. Whoever is in trouble by itself waits by itself."""
        now, retry_after = anyio.current_time(), getattr(exc, "retry_after", None)
        answered = isinstance(exc, DiracxRefused) or getattr(exc, "answered", False)
        pace = self._paces[kind] if answered else self._server
        if answered and len(lines) == 1:
            lines[0].paces[kind].put_off(now, retry_after, any_chance())
        if answered:
            self._at_once[kind] = max(1, len(lines) // 2)
        if pace.tries % WARN_EVERY == 0:
            log.warning("%s; %d reports wait", exc, self.count)
        pace.put_off(now, retry_after, any_chance())

    # -- beating -----------------------------------------------------------------------------------------------------------

    async def _beat_all(self) -> None:
        lines = [line for line in self._lines.values() if line.may_beat]
        while lines and self._server.not_before <= anyio.current_time():
            await self._beat(lines[: self._beats_at_once])
            lines = lines[self._beats_at_once :]

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
            if getattr(exc, "answered", False):
                self._beats_at_once = max(1, len(lines) // 2)
            else:
                self._server.put_off(anyio.current_time(), None, any_chance())
            for line in lines:  # a command comes once, and may have been in the answer that was lost
                line.question = True
                self._waiting[line.number] = line
        else:
            self._server.reset()
            self._beats_at_once = min(2 * self._beats_at_once, JOBS_AT_ONCE)
            self._obey(commands)

    def _obey(self, commands: Iterable[Command]) -> None:
        for command in commands:
            line = self._lines.get(command.job_id)
            if command.command == "Kill" and line is not None:
                said = " ".join(command.arguments.split())[:200]
                self._kill(line, f"DiracX orders it{f': {said}' if said else ''}")

    def _kill(self, line: Line, why: str) -> None:
        if line.handle is not None and line.handle.kill_reason is None and line.handle.kill(f"killed: {why}"):
            log.info("job %d: %s: it is killed", line.number, why)

    async def _forget(self) -> None:
        """Let go of jobs that are over, and told."""
        over = [line for line in self._lines.values() if line.is_over]
        for line in over:
            del self._lines[line.number]
        await self._drop([], [attempt.name for line in over for attempt in line.attempts.values()])
