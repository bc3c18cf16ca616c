"""What we know of the jobs that DiracX is told about: what was said, what is still to be said, how they are doing.

State, and the decisions about it: no await, no request.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from loadmaster.dirac import JobStatus, Major, Statuses
from loadmaster.diracx.outbox import Filed, ParameterReport, Report, RescheduleReport, StatusReport
from loadmaster.events import Event, Heartbeat, JobAccepted, JobFinished, ParameterReported, PayloadStarted
from loadmaster.handle import JobHandle

TICK: Final = timedelta(milliseconds=1)
"""Between two statuses of a job: their times are what they are known by, and databases keep milliseconds."""

ENDED_BY_OTHERS: Final = frozenset({Major.KILLED, Major.DELETED})
"""A status that the server holds, and nobody here has said: an order to end the job."""

SOURCE_CHARACTERS: Final = 32
PARAMETER_CHARACTERS: Final = 8192

MIB: Final = 1024**2


@dataclass(eq=False, slots=True)
class Attempt:
    """One attempt at a job: its events as they become reports."""

    name: str
    """Of this attempt and no other, also after a restart."""
    statuses: Statuses = field(default_factory=Statuses)
    heard: int = 0
    """So many of its events have been heard."""
    reported: int = 0
    """So many of them are in reports already, of ours or of a process before us."""
    last: datetime | None = None
    """The time of its last status."""

    def reports(self, number: int, event: Event) -> list[Report]:
        """What is to be reported of the next event."""
        self.heard += 1
        said = self.statuses.advance(event)
        reports: list[Report] = [StatusReport(number, self._next_time(event.time), status) for status in said]
        if self.heard <= self.reported:
            return []
        self.reported = self.heard
        if parameters := _parameters(event):
            reports.append(ParameterReport(number, parameters))
        if isinstance(event, JobFinished):
            held = event.failure is not None and event.failure.kind == "HoldJob"
            if self.statuses.current.status == Major.RESCHEDULED and not held:  # that one waits for a person
                reports.append(RescheduleReport(number))
        return reports

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


def _parameters(event: Event) -> dict[str, str]:
    match event:
        case ParameterReported(name=name, value=value):
            return {clean(name)[:PARAMETER_CHARACTERS]: clean(value)[:PARAMETER_CHARACTERS]}
        case JobAccepted():
            return {"HostName": os.uname().nodename, "JobWrapperPID": str(os.getpid())}
        case PayloadStarted(pid=pid, containment=containment):
            return {"PayloadPID": str(pid), "PayloadContainment": containment}
        case _:
            return {}


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
    attempt: Attempt | None = None
    handle: JobHandle | None = None
    beat: Heartbeat | None = None
    """The newest."""
    beaten_at: float = float("-inf")
    asked_twice: bool = False
    """Whether statuses have been said again because the server took them for old ones."""
    question: bool = False
    """Whether the server may have something to say that we have missed."""
    unknown: bool = False
    """Whether the server does not have the job, or not for us."""
    tries: int = 0
    not_before: float = float("-inf")

    @property
    def lives(self) -> bool:
        """Whether there is a job here that may be killed."""
        return self.handle is not None and self.handle.result is None

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

    def next_statuses(self) -> list[Filed]:
        """The statuses that can be said at once: those before an order to reschedule."""
        found: list[Filed] = []
        for filed in self.statuses:
            if not isinstance(filed.report, StatusReport):
                break
            found.append(filed)
        return found

    def update(self, filed: list[Filed], skew: timedelta, now: datetime, source: str) -> dict[str, dict[str, str]]:
        """Statuses by their times, which are the server's and ever later; without any, a question: what do you hold?"""
        source = clean(source)[:SOURCE_CHARACTERS]
        if not filed:
            return {self._next_stamp(now).isoformat(): {"Source": source}}
        found = {}
        for each in filed:
            assert isinstance(each.report, StatusReport)  # noqa: S101 - `next_statuses` has seen to it
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
        """The statuses are with the server."""
        self.said = self.asked(filed)
        for each in filed:
            self.statuses.remove(each)
            self.stamps.pop(each, None)

    def say_again(self, filed: list[Filed], time: datetime) -> None:
        """The server took these for old, and has ignored them: they are to be said once more, as of that time."""
        self.asked_twice = True
        self.stamp = _later(time, self.stamp)
        for each in filed:
            del self.stamps[each]

    def heartbeat(self) -> dict[str, object]:
        """How the job is doing, in DiracX's words: seconds, and MB of 2**20 bytes."""
        load = os.getloadavg()[0]
        words: dict[str, object] = {"LoadAverage": round(load, 2)}
        beat = self.beat
        if beat is None:
            return words
        if (usage := beat.usage) is not None:
            words["MemoryUsed"] = round(usage.memory_bytes / MIB, 3)
            words["CPUConsumed"] = round(usage.cpu_seconds, 2)
            words["WallClockTime"] = round(usage.wall_seconds, 2)
            if usage.free_disk_bytes is not None:
                words["AvailableDiskSpace"] = round(usage.free_disk_bytes / MIB, 1)
        if beat.last_lines:
            lines = [clean(line) for line in beat.last_lines]
            words["StandardOutput"] = "\n".join((_banner(len(lines), beat.time), *lines))
        return words


def _banner(lines: int, time: datetime) -> str:
    return f"Last {lines} lines of application output from Watchdog on {time:%Y-%m-%d %H:%M:%S} [UTC]:"


def clean(text: str) -> str:
    """A text that any database takes: no surrogates, no control characters but tabs."""
    if text.isprintable() and text.isascii():
        return text
    return "".join(
        character if character.isprintable() or character == "\t" else "\ufffd"
        for character in text.encode("utf-8", "replace").decode("utf-8")
    )


def merged(filed: Mapping[int, list[Filed]]) -> dict[int, dict[str, str]]:
    """Parameters of jobs; of those that were told twice, the last."""
    found: dict[int, dict[str, str]] = {}
    for number, each in filed.items():
        for one in each:
            if isinstance(one.report, ParameterReport):
                found.setdefault(number, {}).update(one.report.parameters)
    return found
