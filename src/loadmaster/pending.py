"""What jobs have left to be done: files that are safe but not where they were wanted, files no catalog took, and what is
left of uploads that were broken off.

    FailoverRequested, RegistrationRequested, RemovalRequested ──▶ waiting ─due─▶ tried ──▶ OperationDone
                                                    ▲             │
                                                    └─ may later ─┤
                                                                  └─ never ──▶ stuck ─(an administrator)─▶ waiting, or
                                                                                                      OperationDropped

An operation is a row beside the journal's events, made and removed in the transaction of the event that says so. It is
named by that event's number, and has the event's facts; beyond them it only knows of its tries. The functions that take a
database block; an agent has them called by its journal, an administrator's command by `Logbook.beside`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from loadmaster.events import (
    FailoverRequested,
    JobAccepted,
    OperationDone,
    OperationDropped,
    RegistrationRequested,
    RemovalRequested,
    dumps,
    loads,
)
from loadmaster.lifecycle import move_line, register_line, removal_line
from loadmaster.result import StoredFile

FIRST_SECONDS: Final = 300.0
"""What was down when the job ended needs some time (DIRAC gives it 45 minutes)."""

MOST_SECONDS: Final = 6 * 3600.0
"""However long it has been down, it is tried a few times a day."""

TEXT: Final = 1000
"""So much of an error is kept."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """When something is tried that has failed: never given up, for as long as it may succeed later."""

    first_seconds: float = FIRST_SECONDS
    """From the job's event until the first try; each next wait may be twice as long."""
    most_seconds: float = MOST_SECONDS


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing that is left to be done, for a job that has ended."""

    number: int
    """Its name in this journal."""
    job_id: str
    attempt: int
    request: FailoverRequested | RegistrationRequested | RemovalRequested
    tries: int = 0
    due: datetime | None = None
    """When it is tried next; None: not before an administrator says so."""
    error: str = ""
    """What went wrong the last time."""

    @property
    def is_move(self) -> bool:
        """Whether it is about a file's bytes, not only its name."""
        return isinstance(self.request, FailoverRequested)

    @property
    def file(self) -> StoredFile | None:
        """The file it is about; None where it is about none that is whole."""
        return None if isinstance(self.request, RemovalRequested) else self.request.file

    @property
    def what(self) -> str:
        """The operation in a line, as it stands in the job's result."""
        if isinstance(self.request, RemovalRequested):
            return removal_line(self.request.url)
        file = self.request.file
        if isinstance(self.request, FailoverRequested):
            return move_line(file, self.request.wanted)
        return register_line(file)

    @property
    def lost_if_dropped(self) -> str:
        """What nobody will do any more, in a sentence."""
        if isinstance(self.request, RemovalRequested):
            return f"what job {self.job_id} may have left of uploads to {self.request.url} stays there"
        file = self.request.file
        if isinstance(self.request, FailoverRequested):
            return f"{file.name} of job {self.job_id} stays at {file.url}; nobody moves it to {self.request.wanted}"
        return f"{file.name} of job {self.job_id} stays at {file.url}; no catalog will know it as LFN:{file.lfn}"


# -- decisions ---------------------------------------------------------------------------------------------------


def wait_seconds(backoff: Backoff, tries: int, chance: Callable[[], float], retry_after: float | None = None) -> float:
    """How long after a try it is tried again: doubling, by chance between half of it and all, not before a storage wants."""
    full = min(backoff.most_seconds, backoff.first_seconds * 2.0 ** min(max(tries - 1, 0), 60))
    return max(full * (0.5 + 0.5 * chance()), min(retry_after or 0.0, backoff.most_seconds))


def sleep_seconds(due: datetime | None, backoff: Backoff, now: datetime) -> float | None:
    """How long nothing is to be done, if nothing happens; None: for ever. A clock that was set back makes it no longer
    than the longest wait."""
    return None if due is None else min(max((due - now).total_seconds(), 0.0), backoff.most_seconds)


# -- the rows ----------------------------------------------------------------------------------------------------

_COLUMNS: Final = (
    "SELECT o.number, j.job_id, j.attempt, e.facts, o.tries, o.due, o.error"
    " FROM operations o JOIN jobs j ON j.number = o.job JOIN events e ON e.number = o.number"
)

# Only of jobs that have ended: before that, what a job does next decides about its files. And of one file's operations
# only the first: what comes after it counts on it.
_MAY_BEGIN: Final = (
    " WHERE o.due IS NOT NULL AND j.status IS NOT NULL"
    " AND NOT EXISTS (SELECT 1 FROM operations p WHERE p.subject = o.subject AND p.number < o.number)"
)

_DUE: Final = "(o.due + CASE o.tries WHEN 0 THEN ? ELSE 0 END)"


def every(database: sqlite3.Connection) -> list[Operation]:
    """All there are, in the order in which they came; also of jobs that still deliver."""
    return [_operation(row) for row in database.execute(f"{_COLUMNS} ORDER BY o.number")]


def count(database: sqlite3.Connection) -> tuple[int, int]:
    """How many there are, and how many of them are stuck."""
    all_, waiting = database.execute("SELECT count(*), count(due) FROM operations").fetchone()
    return all_, all_ - waiting


def due(
    database: sqlite3.Connection, now: datetime, backoff: Backoff, busy: Iterable[int], most: int
) -> tuple[list[Operation], datetime | None]:
    """Those that may begin now, at most so many; and when the next one may, of all that are not busy."""
    taken = sorted(busy)
    others = f"{_MAY_BEGIN} AND o.number NOT IN ({', '.join('?' * len(taken))})"
    rows = database.execute(
        f"{_COLUMNS}{others} AND {_DUE} <= ? ORDER BY {_DUE}, o.number LIMIT ?",
        (*taken, backoff.first_seconds, now.timestamp(), backoff.first_seconds, most),
    ).fetchall()
    (following,) = database.execute(
        f"SELECT min({_DUE}) FROM operations o JOIN jobs j ON j.number = o.job{others} AND {_DUE} > ?",  # noqa: S608
        (backoff.first_seconds, *taken, backoff.first_seconds, now.timestamp()),
    ).fetchone()
    return [_operation(row) for row in rows], None if following is None else datetime.fromtimestamp(following, UTC)


def begin(database: sqlite3.Connection, number: int, next_due: datetime) -> bool:
    """Note that it is tried, before it is: what kills its agent is not tried at once by the next. False: it is gone."""
    done = database.execute(
        "UPDATE operations SET tries = tries + 1, due = ? WHERE number = ? AND due IS NOT NULL",
        (next_due.timestamp(), number),
    )
    return done.rowcount == 1


def failed(database: sqlite3.Connection, number: int, error: str, next_due: datetime | None) -> None:
    """Note what went wrong, and when it is tried again; None: not by itself."""
    moment = None if next_due is None else next_due.timestamp()
    database.execute("UPDATE operations SET error = ?, due = ? WHERE number = ?", (error[:TEXT], moment, number))


def done(database: sqlite3.Connection, operation: Operation, now: datetime) -> OperationDone | None:
    """Have it done, with the event that says so, which is returned; None: somebody has dropped it meanwhile."""
    event = OperationDone(operation.job_id, operation.attempt, now, operation.number, operation.what)
    return event if _end(database, operation.number, event) else None


def drop(database: sqlite3.Connection, operation: Operation, reason: str, now: datetime) -> OperationDropped | None:
    """Have nobody do it any more, with the event that says so, which is returned; None: it is gone already."""
    event = OperationDropped(operation.job_id, operation.attempt, now, operation.number, operation.what, reason)
    return event if _end(database, operation.number, event) else None


def retry(database: sqlite3.Connection, numbers: Iterable[int]) -> int:
    """Have these tried at once, also those that are stuck; how many there were."""
    rows = [(number,) for number in numbers]
    return sum(database.execute("UPDATE operations SET due = 0 WHERE number = ?", row).rowcount for row in rows)


def descriptions(
    database: sqlite3.Connection, jobs: Iterable[tuple[str, int | None]]
) -> dict[tuple[str, int], JobAccepted]:
    """What is known of these attempts at jobs, of the last one where none is named."""
    found: dict[tuple[str, int], JobAccepted] = {}
    for key in dict.fromkeys(jobs):
        row = database.execute(
            "SELECT e.facts FROM events e JOIN jobs j ON j.number = e.job WHERE j.job_id = ?"
            " AND j.attempt = coalesce(?, j.attempt) ORDER BY j.attempt DESC, e.number LIMIT 1",
            key,
        ).fetchone()
        if row is not None and isinstance(event := loads(row[0]), JobAccepted):
            found[event.job_id, event.attempt] = event
    return found


def _end(database: sqlite3.Connection, number: int, event: OperationDone | OperationDropped) -> bool:
    found = database.execute("SELECT job FROM operations WHERE number = ?", (number,)).fetchone()
    if found is None:
        return False
    row = (found[0], event.kind, dumps(event))
    database.execute("INSERT INTO events (job, kind, facts) VALUES (?, ?, ?)", row)  # the row goes with it: a trigger
    return True


def _operation(row: tuple[int, str, int, str, int, float | None, str]) -> Operation:
    number, job_id, attempt, facts, tries, moment, error = row
    request = loads(facts)
    if not isinstance(request, FailoverRequested | RegistrationRequested | RemovalRequested):
        raise TypeError(f"operation {number} is of a {request.kind}")
    when = None if moment is None else datetime.fromtimestamp(moment, UTC)
    return Operation(number, job_id, attempt, request, tries, when, error)
