"""What DiracX has to be told and has not been yet: reports, in their order, kept until they are delivered.

`MemoryOutbox` forgets them with the process. `FileOutbox` has them on disk: they survive a kill, and the next process
delivers them. An outbox also remembers how many events of each attempt it has reports of, so that a history that is read
again, after a restart, is not reported again.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeAlias, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from loadmaster.dirac import JobStatus
from loadmaster.errors import RuntimeFault
from loadmaster.logfile import sync_directory

T = TypeVar("T")

Value: TypeAlias = str | int | float


@dataclass(frozen=True, slots=True)
class StatusReport:
    """What is said of a job, and when it came to be so."""

    job: int
    time: datetime
    said: JobStatus


@dataclass(frozen=True, slots=True)
class ParameterReport:
    """Facts about a job, by their names."""

    job: int
    parameters: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class RescheduleReport:
    """A job is to run again."""

    job: int


Report: TypeAlias = StatusReport | ParameterReport | RescheduleReport


@dataclass(frozen=True, slots=True)
class Filed:
    """A report in an outbox, with the number it has there."""

    number: int
    report: Report


@dataclass(frozen=True, slots=True)
class Kept:
    """What an outbox has: reports in their order, and of each attempt how many events have been reported."""

    filed: Sequence[Filed] = ()
    heard: Mapping[str, int] = field(default_factory=dict)
    over: frozenset[str] = frozenset()
    """Attempts of which nothing more will come."""


class Outbox(Protocol):
    """Where reports are until they are delivered. What has been put is there when `put` returns."""

    durable: bool
    """Whether the reports survive the process."""

    async def load(self) -> Kept:
        """All there is; called once, before anything is put."""
        ...

    async def put(self, reports: Sequence[Report], heard: Mapping[str, int]) -> list[Filed]:
        """Add reports, and what they are made of: the attempt's name and how many of its events are reported now."""
        ...

    async def drop(self, numbers: Iterable[int], over: Iterable[str] = ()) -> None:
        """Remove reports that are delivered, or never will be; `over`: attempts of which nothing more will come."""
        ...


class MemoryOutbox:
    """An outbox that dies with the process."""

    durable = False

    def __init__(self) -> None:
        self._numbers = count(1)

    def __repr__(self) -> str:
        return "<MemoryOutbox>"

    async def load(self) -> Kept:
        """Nothing."""
        return Kept()

    async def put(self, reports: Sequence[Report], heard: Mapping[str, int]) -> list[Filed]:
        """Whoever delivers them has them; there is nothing to add."""
        return [Filed(next(self._numbers), report) for report in reports]

    async def drop(self, numbers: Iterable[int], over: Iterable[str] = ()) -> None:
        """Nothing to remove."""


SCHEMA: Final = 1

KEPT_SECONDS: Final = 8 * 86400.0
"""An attempt that is over is known for longer than the journal knows it, from which it may be heard again."""

MADE: Final = "made"
"""Among the attempts: when the outbox was made, in microseconds since 1970. No attempt is called so."""

_TABLES: Final = """
CREATE TABLE reports (number INTEGER PRIMARY KEY AUTOINCREMENT, report TEXT NOT NULL);
CREATE TABLE heard (attempt TEXT PRIMARY KEY, events INTEGER NOT NULL, over REAL) WITHOUT ROWID;
"""


class FileOutbox:
    """An outbox in a SQLite file on a local disk; one process has it at a time. `async with` opens and closes it.

    Raises `RuntimeFault` when the file cannot be used, or cannot be written to (a full disk): then nothing was put.
    """

    durable = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._threads = CapacityLimiter(1)  # one at a time: a connection has one transaction
        self._connection: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<FileOutbox {self._path}>"

    async def __aenter__(self) -> Self:
        self._connection = await self._run(lambda: _opened(self._path))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with anyio.CancelScope(shield=True):  # local, and short: what is in the log goes into the file
                await to_thread.run_sync(connection.close, limiter=self._threads)

    async def load(self) -> Kept:
        """All there is."""
        return await self._run(self._load)

    async def put(self, reports: Sequence[Report], heard: Mapping[str, int]) -> list[Filed]:
        """They are on disk when this returns."""
        return await self._run(lambda: self._put(reports, heard))

    async def drop(self, numbers: Iterable[int], over: Iterable[str] = ()) -> None:
        """They are gone for good when this returns."""
        now = time.time()
        await self._run(lambda: self._drop([(number,) for number in numbers], [(now, attempt) for attempt in over]))

    async def _run(self, work: Callable[[], T]) -> T:
        try:
            return await to_thread.run_sync(work, limiter=self._threads)
        except (sqlite3.Error, OSError) as exc:
            raise RuntimeFault(f"{self._path}: {exc}") from exc

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise RuntimeFault(f"{self._path}: the outbox is not open")
        return self._connection

    def _load(self) -> Kept:
        rows = self._db.execute("SELECT number, report FROM reports ORDER BY number")
        filed = [Filed(number, _read(text)) for number, text in rows]
        over = frozenset(name for (name,) in self._db.execute("SELECT attempt FROM heard WHERE over IS NOT NULL"))
        return Kept(filed, dict(self._db.execute("SELECT attempt, events FROM heard")), over)

    def _put(self, reports: Sequence[Report], heard: Mapping[str, int]) -> list[Filed]:
        with self._db as db:
            numbers = [
                db.execute("INSERT INTO reports (report) VALUES (?)", (_written(report),)).lastrowid
                for report in reports
            ]
            db.executemany("INSERT OR REPLACE INTO heard (attempt, events) VALUES (?, ?)", heard.items())
        return [Filed(number or 0, report) for number, report in zip(numbers, reports, strict=True)]

    def _drop(self, numbers: list[tuple[int]], over: list[tuple[float, str]]) -> None:
        with self._db as db:
            db.executemany("DELETE FROM reports WHERE number = ?", numbers)
            db.executemany("UPDATE heard SET over = ? WHERE attempt = ?", over)


def _opened(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path, timeout=0.0, check_same_thread=False)
    try:
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT")
            with connection:
                connection.execute("INSERT INTO heard (attempt, events) VALUES (?, ?)", (MADE, time.time_ns() // 1000))
            sync_directory(path.parent)  # or the power takes the file back, with all that was put into it
        elif version != SCHEMA:
            raise sqlite3.DatabaseError(f"is of version {version}, and we know {SCHEMA}")
        with connection:  # a write, so that the lock is taken now
            connection.execute("DELETE FROM heard WHERE over < ?", (time.time() - KEPT_SECONDS,))
    except BaseException as exc:
        connection.close()
        if isinstance(exc, sqlite3.OperationalError) and "locked" in str(exc):
            raise sqlite3.OperationalError("another process has this outbox") from exc
        raise
    return connection


def _written(report: Report) -> str:
    match report:
        case StatusReport(job, time, said):
            words: dict[str, Any] = {"status": [said.status, said.minor, said.application], "time": time.isoformat()}
        case ParameterReport(job, parameters):
            words = {"parameters": dict(parameters)}
        case RescheduleReport(job):
            words = {"reschedule": True}
    return json.dumps({"job": job, **words})


def _read(text: str) -> Report:
    words = json.loads(text)
    if "status" in words:
        return StatusReport(words["job"], datetime.fromisoformat(words["time"]), JobStatus(*words["status"]))
    if "parameters" in words:
        return ParameterReport(words["job"], words["parameters"])
    return RescheduleReport(words["job"])
