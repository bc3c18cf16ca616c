"""The events of a node, in a file that one agent writes to and everybody may read. What is in here blocks.

    <directory>/lock                whose journal it is; the kernel drops the lock with the process
    <directory>/journal.<n>.db      the events, in the order in which they came; the highest number counts
    <directory>/payloads/           what outlives an agent of the payloads it has started

What the file is, and what becomes of a damaged one: `loadmaster.logfile`.
"""

from __future__ import annotations

import logging
import os
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Final, TypeVar

from loadmaster.errors import JournalFault
from loadmaster.events import Event, dumps, loads
from loadmaster.logfile import (
    NAME,
    changed_beside,
    frames,
    generations,
    is_damage,
    locked,
    prepared,
    salvage,
    seen,
    sync_directory,
    told,
)

log = logging.getLogger(__name__)

T = TypeVar("T")

ROWS_AT_ONCE: Final = 300
"""A statement takes so many rows of three values: SQLite before 3.32 has at most 999."""

NAME_BYTES: Final = 100
DIGEST_LENGTH: Final = 64


@dataclass(frozen=True, slots=True)
class Record:
    """An event as it is written."""

    job_id: str
    attempt: int
    kind: str
    text: str

    @classmethod
    def of(cls, event: Event) -> Record:
        """What is written of an event."""
        return cls(event.job_id, event.attempt, event.kind, dumps(event))


@dataclass(frozen=True, slots=True)
class History:
    """What is known of one attempt at a job. `status` is None while it is open."""

    job_id: str
    attempt: int
    status: str | None
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class JobLine:
    """One attempt at a job, as a list has it; its last event only."""

    job_id: str
    attempt: int
    status: str | None
    accepted: Event
    last: Event


@dataclass(frozen=True, slots=True)
class Agent:
    """A process that has had the journal. `closed` is when it left in order; None: it has it still, or has died."""

    pid: int
    host: str
    began: datetime
    closed: datetime | None


class Logbook:
    """An open file of events. For one thread at a time."""

    def __init__(self, directory: Path, database: sqlite3.Connection, lock: int) -> None:
        self.directory = directory
        self.damage: str | None = None
        """What was found to be missing when it was opened, in a sentence."""
        self._db = database
        self._lock = lock
        self._agent: int | None = None
        self._numbers = {
            (job_id, attempt): number
            for number, job_id, attempt in database.execute(
                "SELECT number, job_id, attempt FROM jobs WHERE status IS NULL"
            )
        }
        self._jobs: int = database.execute("SELECT coalesce(max(number), 0) FROM jobs").fetchone()[0]

    def __repr__(self) -> str:
        return f"<Logbook {self.directory}: {len(self._numbers)} open>"

    @classmethod
    def open(cls, directory: Path) -> Logbook:
        """The journal of a directory, made if need be, for this process alone. Raises `JournalFault`."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = locked(directory)
        except OSError as exc:
            raise JournalFault(f"{directory}: cannot open the journal: {exc.strerror}") from exc
        try:
            return cls._opened(directory, lock)
        except BaseException as exc:
            os.close(lock)
            if isinstance(exc, OSError | sqlite3.Error):
                raise JournalFault(f"{directory}: cannot open the journal: {exc}") from exc
            raise

    @classmethod
    def _opened(cls, directory: Path, lock: int) -> Logbook:
        number = max(generations(directory), default=0)
        damaged, whole = (directory / NAME.format(each) for each in (number, number + 1))
        written, emptied = frames(damaged), _was_emptied(directory, damaged)
        try:
            book = cls._of(directory, damaged, lock, suspect=(directory / "suspect").exists())
            if written > book._valid_frames():
                book.damage = "the end of the last write was torn, and is left out"
            elif emptied:
                book.damage = f"{damaged.name} had been emptied: what it had is lost"
        except sqlite3.DatabaseError as exc:
            if not is_damage(exc):
                raise
            log.info("%s: %s", damaged, exc)
            saved = salvage(damaged, whole)
            book = cls._of(directory, whole, lock, suspect=False)
            book.damage = (
                f"{damaged.name} is damaged ({told(exc)}) and kept aside; {saved} events could be read up to there"
            )
        book._note_agent()
        with suppress(FileNotFoundError):
            (directory / "suspect").unlink()
        (directory / "payloads").mkdir(mode=0o700, exist_ok=True)
        sync_directory(directory)
        if unknown := book._unexplained():
            lost = f"it has lost what it had of {len(unknown)} payloads that were started: {', '.join(unknown[:3])}"
            book.damage = lost if book.damage is None else f"{book.damage}; {lost}"
        if book.damage is not None:
            log.warning("%s: %s", directory, book.damage)
        return book

    @classmethod
    def _of(cls, directory: Path, path: Path, lock: int, *, suspect: bool) -> Logbook:
        database = prepared(path, suspect=suspect)
        try:
            return cls(directory, database, lock)
        except BaseException:
            database.close()
            raise

    @classmethod
    @contextmanager
    def beside(cls, directory: Path) -> Iterator[sqlite3.Connection]:
        """A transaction in the journal of a directory beside the agent that has it, for what an administrator changes.

        Raises `JournalFault`.
        """
        with changed_beside(directory) as database:
            yield database

    @classmethod
    @contextmanager
    def look(cls, directory: Path) -> Iterator[Logbook]:
        """The journal of a directory to be read only, also while an agent writes to it. Raises `JournalFault`."""
        with seen(directory) as database:
            yield cls(directory, database, -1)

    def close(self) -> None:
        """Let go of it, in order."""
        try:
            with suppress(sqlite3.Error):  # a full disk: it will look as if we had died
                self._db.execute("UPDATE agents SET closed = ? WHERE number = ?", (_now(), self._agent))
            self._db.close()
        finally:
            os.close(self._lock)

    def _note_agent(self) -> None:
        """That this process has it from now on: so that a person can be told who went on with a job."""
        with suppress(sqlite3.OperationalError):  # a full disk: it is not what a journal is for
            values = os.getpid(), socket.gethostname(), _now()
            self._agent = self._db.execute("INSERT INTO agents (pid, host, began) VALUES (?, ?, ?)", values).lastrowid

    def _valid_frames(self) -> int:
        return int(self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()[1])

    def _unexplained(self) -> list[str]:
        """The states of payloads of which no job is known: whoever was emptied or removed beside them, it was not us. One
        that only waited for its slot was ready, and not started."""
        payloads = self.directory / "payloads"
        names = (name for name in sorted(os.listdir(payloads)) if _may_have_started(payloads / name))
        return [ascii(name) for name in names if not self._explains(name)]

    def _explains(self, name: str) -> bool:
        """Whether the state of a payload that has this name is of a job that is known to have been given a slot."""
        attempt, _, job_id = name.partition(".")
        if not (attempt.isdecimal() and len(attempt) < 10):
            return False
        query = "SELECT number, status FROM jobs WHERE job_id = ? AND attempt = ?"
        found = self._db.execute(query, (job_id, int(attempt))).fetchone() or self._with_long_name(name, int(attempt))
        if found is None:
            return False
        number, status = found
        granted = "SELECT 1 FROM events WHERE job = ? AND kind = 'SlotGranted'"
        return status is not None or self._db.execute(granted, (number,)).fetchone() is not None

    def _with_long_name(self, name: str, attempt: int) -> tuple[int, str | None] | None:
        if len(name) < DIGEST_LENGTH:  # to go through all of them takes its time
            return None
        query = "SELECT number, job_id, status FROM jobs WHERE attempt = ? AND length(job_id) >= ?"
        for number, job_id, status in self._db.execute(query, (attempt, NAME_BYTES // 4)):
            if state_name(job_id, attempt) == name:
                return number, status
        return None

    # -- writing -----------------------------------------------------------------------------------------------------

    def add(self, groups: Sequence[Sequence[Record]]) -> list[Exception | None]:
        """Have them on disk when it returns: each group whole or not at all. For each, what was wrong with it.

        Raises what the disk says, with nothing written.
        """
        try:
            return self._add(groups)
        except sqlite3.IntegrityError:  # somebody's job is there already: the others' events must not suffer for it
            return [error for group in groups for error in self._alone(group)]
        except sqlite3.DatabaseError as exc:
            self.met(exc)
            raise

    def met(self, error: Exception) -> None:
        """Have all of the file looked at by whoever opens it next, if this is what a damaged one says."""
        if isinstance(error, sqlite3.DatabaseError) and is_damage(error):
            with suppress(OSError):  # a full disk: it is met again
                (self.directory / "suspect").touch()

    def _alone(self, group: Sequence[Record]) -> list[Exception | None]:
        try:
            return self._add([group])
        except sqlite3.IntegrityError:
            job = group[0]
            return [JournalFault(f"job {job.job_id}, attempt {job.attempt} is in the journal already")]

    def _add(self, groups: Sequence[Sequence[Record]]) -> list[Exception | None]:
        numbers, jobs = dict[tuple[str, int], int](), self._jobs
        rows: list[tuple[int, str, str]] = []
        errors: list[Exception | None] = []
        for group in groups:
            error: Exception | None = None
            before = len(rows)
            for record in group:
                key = record.job_id, record.attempt
                if record.kind == "JobAccepted":
                    jobs += 1
                    numbers[key] = jobs
                number = numbers.get(key) or self._numbers.get(key)
                if number is None:
                    error = JournalFault(f"job {key[0]}, attempt {key[1]} is not open in the journal")
                    del rows[before:]
                    break
                rows.append((number, record.kind, record.text))
            errors.append(error)
        self._insert(rows)
        self._jobs = jobs
        self._numbers |= numbers
        for group, error in zip(groups, errors, strict=True):
            for record in group:
                if error is None and record.kind == "JobFinished":
                    self._numbers.pop((record.job_id, record.attempt), None)
        return errors

    def _insert(self, rows: Sequence[tuple[int, str, str]]) -> None:
        # One statement for all, and no transaction around it where it is the only one: each step of the database lets go
        # of the interpreter's lock, and a busy loop gives it back only after 5 ms. A hundred steps would be half a second.
        if len(rows) <= ROWS_AT_ONCE:
            if rows:
                self._db.execute(_insertion(len(rows)), [value for row in rows for value in row])
            return
        with self._transaction():
            for start in range(0, len(rows), ROWS_AT_ONCE):
                some = rows[start : start + ROWS_AT_ONCE]
                self._db.execute(_insertion(len(some)), [value for row in some for value in row])

    def change(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """What a piece of work of somebody else's in this file returns, as one transaction."""
        with self._transaction():
            return work(self._db)

    def ask(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """The same for one that only reads."""
        return work(self._db)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):  # a full disk has rolled it back already
                self._db.execute("ROLLBACK")
            raise

    def forget(self, before: datetime, *, jobs: int) -> int:
        """Remove some of the jobs that had ended before then and have nothing left to be done; how many they were."""

        def work(database: sqlite3.Connection) -> int:
            old = database.execute(
                "SELECT number FROM jobs WHERE status IS NOT NULL AND ended < ?"
                " AND NOT EXISTS (SELECT 1 FROM operations WHERE job = jobs.number) ORDER BY ended LIMIT ?",
                (before.isoformat(), jobs),
            ).fetchall()
            database.executemany("DELETE FROM events WHERE job = ?", old)
            database.executemany("DELETE FROM jobs WHERE number = ?", old)
            replaced = "SELECT max(number) FROM agents WHERE began < ?"
            database.execute(f"DELETE FROM agents WHERE number < ({replaced})", (before.isoformat(),))  # noqa: S608 - a constant
            return len(old)

        return self.change(work)

    # -- reading -----------------------------------------------------------------------------------------------------

    def open_jobs(self) -> list[History]:
        """The jobs that have not ended, in the order in which they were accepted."""
        rows: dict[int, list[tuple[int, str]]] = {}
        query = (
            "SELECT job, number, facts FROM events WHERE job IN (SELECT number FROM jobs WHERE status IS NULL)"
            " ORDER BY job, number"
        )
        for job, number, text in self._db.execute(query):
            rows.setdefault(job, []).append((number, text))
        return [self._history(*key, None, rows[job]) for key, job in sorted(self._numbers.items(), key=_second)]

    def history(self, job_id: str, attempt: int | None = None) -> History | None:
        """What is known of an attempt at a job, of the last one if none is named; None if nothing is."""
        found = self._db.execute(
            "SELECT number, attempt, status FROM jobs WHERE job_id = ? AND attempt = coalesce(?, attempt)"
            " ORDER BY attempt DESC LIMIT 1",
            (job_id, attempt),
        ).fetchone()
        if found is None:
            return None
        rows = self._db.execute("SELECT number, facts FROM events WHERE job = ? ORDER BY number", found[:1]).fetchall()
        return self._history(job_id, found[1], found[2], rows)

    def last(self, job_ids: Iterable[str]) -> dict[str, tuple[int, str | None]]:
        """The last attempt at each of these jobs that is known, and how it ended; None: it has not."""
        found: dict[str, tuple[int, str | None]] = {}
        for job_id in job_ids:
            query = "SELECT attempt, status FROM jobs WHERE job_id = ? ORDER BY attempt DESC LIMIT 1"
            for attempt, status in self._db.execute(query, (job_id,)):
                found[job_id] = attempt, status
        return found

    def _history(self, job_id: str, attempt: int, status: str | None, rows: Iterable[tuple[int, str]]) -> History:
        """Up to the first event that cannot be read. What comes after that one goes, for more is to be written there."""
        events: list[Event] = []
        for number, text in rows:
            try:
                events.append(loads(text))
            except ValueError as exc:
                log.warning("%s: job %s: an event cannot be read, nor what came after: %s", self.directory, job_id, exc)
                if status is None and self._lock >= 0:
                    job = self._numbers[job_id, attempt]
                    self._db.execute("DELETE FROM events WHERE job = ? AND number >= ?", (job, number))
                break
        return History(job_id, attempt, status, tuple(events))

    def counts(self) -> tuple[int, dict[str, int]]:
        """How many jobs are open, and how many have ended how: each counts once, as its last attempt stands."""
        found: dict[str | None, int] = dict(
            self._db.execute(
                "SELECT status, count(*) FROM jobs WHERE NOT EXISTS"
                " (SELECT 1 FROM jobs later WHERE later.job_id = jobs.job_id AND later.attempt > jobs.attempt)"
                " GROUP BY status"
            ).fetchall()
        )
        still_open = found.pop(None, 0)
        return still_open, {status: count for status, count in found.items() if status is not None}

    def ended(self) -> dict[str, int]:
        """How many jobs ended how."""
        return self.counts()[1]

    def agents(self) -> list[Agent]:
        """The processes that have had it, one after the other; none in a journal of an earlier version."""
        if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'agents'").fetchone() is None:
            return []
        return [
            Agent(pid, host, datetime.fromisoformat(began), datetime.fromisoformat(closed) if closed else None)
            for pid, host, began, closed in self._db.execute(
                "SELECT pid, host, began, closed FROM agents ORDER BY number"
            )
        ]

    def lines(self, *, last: int) -> list[JobLine]:
        """The jobs that have not ended, then those that ended last: so many of them."""
        return [
            JobLine(job_id, attempt, status, loads(first), loads(latest))
            for job_id, attempt, status, first, latest in self._db.execute(
                "SELECT job_id, attempt, status,"
                " (SELECT facts FROM events WHERE job = jobs.number ORDER BY number LIMIT 1),"
                " (SELECT facts FROM events WHERE job = jobs.number ORDER BY number DESC LIMIT 1)"
                " FROM (SELECT * FROM (SELECT * FROM jobs WHERE status IS NULL ORDER BY number)"
                " UNION ALL SELECT * FROM (SELECT * FROM jobs WHERE status IS NOT NULL ORDER BY ended DESC LIMIT ?)) jobs",
                (last,),
            )
        ]


def _was_emptied(directory: Path, file: Path) -> bool:
    """Whether there is nothing in a file that once was a journal. Who made it may have died before he wrote to it; he had
    not come to its payloads then."""
    try:
        return os.stat(file).st_size == 0 and (directory / "payloads").is_dir()
    except FileNotFoundError:
        return False


def _may_have_started(state: Path) -> bool:
    """Whether anybody has come to a payload's state to start it: he takes a lock there before he does."""
    try:
        os.lstat(state / "lock")
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def state_name(job_id: str, attempt: int) -> str:
    """What the directory of a payload's state is called: never too long, never the same for two."""
    if len(os.fsencode(job_id)) > NAME_BYTES:
        job_id = sha256(job_id.encode(errors="surrogatepass")).hexdigest()
    return f"{attempt}.{job_id}"


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _second(pair: tuple[tuple[str, int], int]) -> int:
    return pair[1]


def _insertion(rows: int) -> str:
    return f"INSERT INTO events (job, kind, facts) VALUES {', '.join(['(?, ?, ?)'] * rows)}"  # noqa: S608 - no values in it
