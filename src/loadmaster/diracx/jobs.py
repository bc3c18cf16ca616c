"""What we know of the jobs that DiracX is told about: what was said, what is still to be said, how they are doing.

State, and the decisions about it: no await, no request.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, auto
from itertools import islice, takewhile
from math import inf
from typing import Final

from loadmaster.dirac import JobStatus, Major, Parameters, Statuses, heartbeat
from loadmaster.dirac.report import final_output
from loadmaster.diracx.outbox import Filed, ParameterReport, Report, RescheduleReport, StatusReport, Value
from loadmaster.diracx.pace import Pace
from loadmaster.events import Event, Heartbeat, JobFinished, PayloadExited, PayloadStarted, SlotGranted
from loadmaster.handle import JobHandle

TICK: Final = timedelta(milliseconds=1)
"""Between two statuses of a job: their times are what they are known by, and databases keep milliseconds."""

ENDED_BY_OTHERS: Final = frozenset({Major.KILLED, Major.DELETED})
"""A status that the server holds, and nobody here has said: an order to end the job."""

SOURCE_CHARACTERS: Final = 32
PARAMETER_CHARACTERS: Final = 8192


@dataclass(eq=False, slots=True)
class Attempt:
    """One attempt at a job: its events as they become reports."""

    name: str
    """Of this attempt and no other, also after a restart."""
    parameters: Parameters = field(default_factory=Parameters)
    statuses: Statuses = field(default_factory=Statuses)
    cores: int = 1
    heard: int = 0
    """So many of its events have been heard."""
    reported: int = 0
    """So many of them are in reports already, of ours or of a process before us."""
    last: datetime | None = None
    """The time of its last status."""
    over: bool = False
    """Whether its end has been heard."""

    def reports(self, number: int, event: Event) -> list[Report]:
        """What is to be reported of the next event."""
        self.heard += 1
        reports: list[Report] = [
            StatusReport(number, self._next_time(event.time), said) for said in self.statuses.advance(event)
        ]
        if parameters := self._parameters(event):
            reports.append(ParameterReport(number, parameters))
        match event:
            case SlotGranted(cores=cores):
                self.cores = cores
            case JobFinished(failure=failure):
                self.over = True
                held = failure is not None and failure.kind == "HoldJob"  # that one waits for a person
                if self.statuses.current.status == Major.RESCHEDULED and not held:
                    reports.append(RescheduleReport(number))
        if self.heard <= self.reported:
            return []
        self.reported = self.heard
        return reports

    def _parameters(self, event: Event) -> dict[str, Value]:
        said = self.parameters.advance(event)
        match event:
            case PayloadStarted(containment=containment):
                said["PayloadContainment"] = containment
            case PayloadExited(last_lines=lines) if lines:
                said |= final_output(event)
        return {
            clean(name)[:PARAMETER_CHARACTERS]: clean(value, "\t\n")[:PARAMETER_CHARACTERS]
            if isinstance(value, str)
            else value
            for name, value in said.items()
        }

    def _next_time(self, time: datetime) -> datetime:
        self.last = _later(time, self.last)
        return self.last


def _later(time: datetime, last: datetime | None) -> datetime:
    """The time as a database keeps it, and later than the last one: it is what a status is known by."""
    time = time.replace(microsecond=time.microsecond // 1000 * 1000)
    return time if last is None else max(time, last + TICK)


def attempt_name(accepted: Event) -> str:
    """A name for an attempt; two attempts of the same number, one after the other, have two."""
    return f"{accepted.job_id}/{accepted.attempt}/{accepted.time.isoformat()}"


class Kind(Enum):
    """What is said in requests of its own."""

    STATUSES = auto()
    PARAMETERS = auto()
    RESCHEDULE = auto()


@dataclass(eq=False, slots=True)
class Line:
    """What goes to DiracX about one job, in order."""

    number: int
    """DiracX's, of the job."""
    statuses: deque[Filed] = field(default_factory=deque)
    """Statuses, and orders to reschedule: to be delivered in this order."""
    parameters: deque[Filed] = field(default_factory=deque)
    said: JobStatus = field(default_factory=JobStatus)
    """As delivered."""
    stamp: datetime | None = None
    """The last time that was sent."""
    stamps: dict[Filed, datetime] = field(default_factory=dict)
    """Under which a status was sent. The server may have it, though we do not know: then it is the same one again."""
    attempts: dict[int, Attempt] = field(default_factory=dict)
    """By their numbers; the last is under way."""
    handle: JobHandle | None = None
    beat: Heartbeat | None = None
    """The newest."""
    beaten_at: float = -inf
    asked_twice: bool = False
    """Whether statuses have been said again because the server took them for old ones."""
    question: bool = False
    """Whether the server may have something to say that we have missed."""
    unknown: bool = False
    """Whether the server does not have the job, or not for us."""
    filing: int = 0
    """Reports of it are on their way into the outbox."""
    stranger: bool = False
    """Whether another job of the same number came to the node, and is being refused there."""
    one_by_one: bool = False
    """Whether its parameters are said report by report, because one of them is refused."""
    paces: dict[Kind, Pace] = field(default_factory=lambda: {kind: Pace() for kind in Kind})

    @property
    def lives(self) -> bool:
        """Whether there is a job here that may be killed."""
        return self.handle is not None and self.handle.result is None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it, and all is told."""
        heard = all(attempt.over for attempt in self.attempts.values())
        return heard and not self.lives and not self.waits and not self.filing

    @property
    def waits(self) -> bool:
        """Whether there is anything to be delivered."""
        return bool(self.statuses or self.parameters or self.question)

    @property
    def may_beat(self) -> bool:
        """A job beats once the server knows that it runs, and has heard the rest: a beat turns Matched into Running, and
        what is older than that is then ignored."""
        return self.lives and not self.unknown and not self.statuses and bool(self.said.status)

    def file(self, filed: Filed) -> None:
        """One more report."""
        (self.parameters if isinstance(filed.report, ParameterReport) else self.statuses).append(filed)

    def next(self, kind: Kind) -> list[Filed]:
        """What can be said at once. Statuses and orders to reschedule come in their order, parameters when they like."""
        if kind is Kind.PARAMETERS:
            return list(islice(self.parameters, 1 if self.one_by_one else None))
        wanted = StatusReport if kind is Kind.STATUSES else RescheduleReport
        found = list(takewhile(lambda filed: isinstance(filed.report, wanted), self.statuses))
        return found[:1] if kind is Kind.RESCHEDULE else found

    def wants(self, kind: Kind) -> bool:
        """Whether a request of this kind has something to do for it."""
        if kind is Kind.PARAMETERS:
            return bool(self.parameters)
        if not self.statuses:
            return kind is Kind.STATUSES and self.question
        return isinstance(self.statuses[0].report, RescheduleReport) == (kind is Kind.RESCHEDULE)

    def update(self, filed: list[Filed], skew: timedelta, now: datetime, source: str) -> dict[str, dict[str, str]]:
        """Statuses by their times, which are the server's and ever later; without any, a question: what do you hold?"""
        source = clean(source)[:SOURCE_CHARACTERS]
        if not filed:
            return {self._next_stamp(now).isoformat(): {"Source": source}}
        found = {}
        for each in filed:
            assert isinstance(each.report, StatusReport)  # noqa: S101 - `next` has seen to it
            if each not in self.stamps:
                self.stamps[each] = self._next_stamp(each.report.time + skew)
            words = each.report.said.to_dirac(source)
            found[self.stamps[each].isoformat()] = {name: clean(text) for name, text in words.items()}
        return found

    def _next_stamp(self, time: datetime) -> datetime:
        self.stamp = _later(time, self.stamp)
        return self.stamp

    def asked(self, filed: list[Filed]) -> JobStatus:
        """The job's whole status, as it should be with the server once these are said."""
        status = self.said
        for each in filed:
            if isinstance(each.report, StatusReport):
                status = each.report.said.over(status)
        return status

    def delivered(self, filed: list[Filed]) -> None:
        """These are with the server, or never will be."""
        self.said = self.asked(filed)
        for each in filed:
            if isinstance(each.report, ParameterReport):
                self.parameters.remove(each)
            else:
                self.statuses.remove(each)
                self.stamps.pop(each, None)

    def say_again(self, filed: list[Filed], time: datetime) -> None:
        """The server took these for old, and has ignored them: they are to be said once more, as of that time."""
        self.asked_twice = True
        self.stamp = _later(time, self.stamp)
        for each in filed:
            del self.stamps[each]

    def heartbeat(self) -> dict[str, object]:
        """How the job is doing, in DiracX's words and units."""
        load = round(os.getloadavg()[0], 2)
        if self.beat is None:
            return {"LoadAverage": load}
        attempt = self.attempts.get(self.beat.attempt)
        cores = 1 if attempt is None else attempt.cores
        changing, fixed = heartbeat(self.beat, cores=cores, load_average=load)
        words: dict[str, object] = {name: round(value, 3) for name, value in changing.items()}
        if self.beat.last_lines:
            words |= {name: clean(text, "\t\n") for name, text in fixed.items()}
        return words


def clean(text: str, but: str = "\t") -> str:
    """A text that any database takes: no surrogates, and no control characters but those."""
    if text.isprintable() and text.isascii():
        return text
    return "".join(
        character if character.isprintable() or character in but else "\ufffd"
        for character in text.encode("utf-8", "replace").decode("utf-8")
    )


def merged(filed: Iterable[Filed]) -> dict[str, Value]:
    """The parameters in reports; of those that were told twice, the last."""
    found: dict[str, Value] = {}
    for each in filed:
        if isinstance(each.report, ParameterReport):
            found |= each.report.parameters
    return found
