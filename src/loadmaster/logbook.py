"""The file of a journal: an SQLite database that one agent writes to and everybody may read. What is in here blocks.

    <directory>/lock                whose journal it is; the kernel drops the lock with the process
    <directory>/journal.<n>.db      the events, in the order in which they came; the highest number counts
    <directory>/payloads/           what outlives an agent of the payloads it has started

A write-ahead log, synced with each commit: what was committed survives the process and the machine. What a crash tears is
the end of that log, which SQLite leaves out when it opens it next. A file that is damaged beyond that (cut short, half of it
gone) stays as it is, with its number; what can be read of it in order, up to the first event that cannot, begins the next.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import sqlite3
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from loadmaster.errors import JournalFault
from loadmaster.events import Event, dumps, loads

log = logging.getLogger(__name__)

T = TypeVar("T")

UPGRADES: Final = (
    """
    CREATE TABLE events (number INTEGER PRIMARY KEY, job INTEGER NOT NULL, kind TEXT NOT NULL, facts TEXT NOT NULL);
    CREATE INDEX events_of_job ON events (job);
    CREATE TABLE jobs (
        number INTEGER PRIMARY KEY, job_id TEXT NOT NULL, attempt INTEGER NOT NULL, status TEXT, ended TEXT,
        UNIQUE (job_id, attempt)
    );
    CREATE INDEX open_jobs ON jobs (number) WHERE status IS NULL;
    CREATE TRIGGER job_accepted AFTER INSERT ON events WHEN NEW.kind = 'JobAccepted' BEGIN
        INSERT INTO jobs (number, job_id, attempt)
        VALUES (NEW.job, json_extract(NEW.facts, '$.job_id'), json_extract(NEW.facts, '$.attempt'));
    END;
    CREATE TRIGGER job_finished AFTER INSERT ON events WHEN NEW.kind = 'JobFinished' BEGIN
        UPDATE jobs SET status = json_extract(NEW.facts, '$.status'), ended = json_extract(NEW.facts, '$.time')
        WHERE number = NEW.job;
    END;
    """,
    "CREATE INDEX ended_jobs ON jobs (ended) WHERE status IS NOT NULL;",
    """
    CREATE TABLE operations (
        number INTEGER PRIMARY KEY, job INTEGER NOT NULL, subject TEXT NOT NULL, tries INTEGER NOT NULL DEFAULT 0,
        due REAL, error TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX operations_of_job ON operations (job);
    CREATE INDEX operations_of_subject ON operations (subject, number);
    CREATE INDEX due_operations ON operations (due) WHERE due IS NOT NULL;
    INSERT INTO operations (number, job, subject, due)
    SELECT number, job, coalesce(json_extract(facts, '$.file.lfn'), json_extract(facts, '$.file.url')), 0
    FROM events WHERE kind = 'FailoverRequested';
    CREATE TRIGGER operation_requested AFTER INSERT ON events
    WHEN NEW.kind IN ('FailoverRequested', 'RegistrationRequested') BEGIN
        INSERT INTO operations (number, job, subject, due) VALUES (
            NEW.number, NEW.job,
            coalesce(json_extract(NEW.facts, '$.file.lfn'), json_extract(NEW.facts, '$.file.url')),
            coalesce(CAST(strftime('%s', json_extract(NEW.facts, '$.time')) AS REAL), 0)
        );
    END;
    CREATE TRIGGER operation_ended AFTER INSERT ON events
    WHEN NEW.kind IN ('OperationDone', 'OperationDropped') BEGIN
        DELETE FROM operations WHERE number = json_extract(NEW.facts, '$.operation');
        UPDATE jobs SET status = 'Done' WHERE number = NEW.job AND status = 'Completed'
        AND NOT EXISTS (SELECT 1 FROM operations WHERE job = NEW.job)
        AND NOT EXISTS (SELECT 1 FROM events WHERE job = NEW.job AND kind = 'OperationDropped');
    END;
    """,
    "CREATE TABLE agents (number INTEGER PRIMARY KEY, pid INTEGER NOT NULL, host TEXT NOT NULL, began TEXT NOT NULL,"
    " closed TEXT);",
    """
    CREATE TRIGGER removal_requested AFTER INSERT ON events WHEN NEW.kind = 'RemovalRequested' BEGIN
        INSERT INTO operations (number, job, subject, due) VALUES (
            NEW.number, NEW.job, 'uploads to ' || json_extract(NEW.facts, '$.url'),
            coalesce(CAST(strftime('%s', json_extract(NEW.facts, '$.time')) AS REAL), 0)
        );
    END;
    """,
)
"""What makes each version of the file out of the one before; the first one out of nothing. Only ever added to."""

ROWS_AT_ONCE: Final = 300
"""A statement takes so many rows of three values: SQLite before 3.32 has at most 999."""

PAGE_BYTES: Final = 4096

NAME: Final = "journal.{}.db"

_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


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
            lock = _locked(directory)
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
        number = max(_generations(directory), default=0)
        damaged, whole = (directory / NAME.format(each) for each in (number, number + 1))
        frames = _frames(damaged)
        try:
            book = cls._of(directory, damaged, lock, suspect=(directory / "suspect").exists())
            if frames > book._valid_frames():
                book.damage = "the end of the last write was torn, and is left out"
        except sqlite3.DatabaseError as exc:
            if not _is_damage(exc):
                raise
            saved = _salvage(damaged, whole)
            book = cls._of(directory, whole, lock, suspect=False)
            book.damage = f"{damaged.name} is damaged ({exc}) and kept aside; {saved} events could be read up to there"
        book._note_agent()
        with suppress(FileNotFoundError):
            (directory / "suspect").unlink()
        (directory / "payloads").mkdir(mode=0o700, exist_ok=True)
        _sync_directory(directory)
        if book.damage is not None:
            log.warning("%s: %s", directory, book.damage)
        return book

    @classmethod
    def _of(cls, directory: Path, path: Path, lock: int, *, suspect: bool) -> Logbook:
        database = _prepared(path, suspect=suspect)
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
        number = max(_generations(directory), default=None)
        if number is None:
            raise JournalFault(f"{directory}: there is no journal in it")
        try:
            name = quote(str(directory / NAME.format(number)))
            database = sqlite3.connect(f"file:{name}?mode=rw", uri=True, isolation_level=None, timeout=30)
            try:
                database.execute("PRAGMA synchronous = FULL")
                if database.execute("PRAGMA user_version").fetchone()[0] != len(UPGRADES):
                    raise JournalFault(
                        f"{directory}: was written by another version of loadmaster: have that one do it"
                    )
                database.execute("BEGIN IMMEDIATE")
                yield database
                database.execute("COMMIT")
            finally:
                database.close()  # which takes back what was not committed
        except sqlite3.Error as exc:
            raise JournalFault(f"{directory}: cannot change the journal: {exc}") from exc

    @classmethod
    @contextmanager
    def look(cls, directory: Path) -> Iterator[Logbook]:
        """The journal of a directory to be read only, also while an agent writes to it. Raises `JournalFault`."""
        number = max(_generations(directory), default=None)
        if number is None:
            raise JournalFault(f"{directory}: there is no journal in it")
        try:
            database = sqlite3.connect(
                f"file:{quote(str(directory / NAME.format(number)))}?mode=ro", uri=True, isolation_level=None
            )
            book = cls(directory, database, -1)
        except sqlite3.Error as exc:
            raise JournalFault(f"{directory}: cannot read the journal: {exc}") from exc
        try:
            yield book
        except sqlite3.Error as exc:
            raise JournalFault(f"{directory}: cannot read the journal: {exc}") from exc
        finally:
            database.close()

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
            if _is_damage(exc):
                (self.directory / "suspect").touch()
            raise

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


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _second(pair: tuple[tuple[str, int], int]) -> int:
    return pair[1]


def _insertion(rows: int) -> str:
    return f"INSERT INTO events (job, kind, facts) VALUES {', '.join(['(?, ?, ?)'] * rows)}"  # noqa: S608 - no values in it


def _locked(directory: Path) -> int:
    """A descriptor that holds the journal for this process. Raises `JournalFault` that names who has it."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        os.close(descriptor)
        raise JournalFault(f"{directory}: this journal is in use by {owner}") from exc
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(descriptor, 0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode(), 0)
    return descriptor


def _generations(directory: Path) -> list[int]:
    names = (path.name.split(".") for path in directory.glob(NAME.format("*")))
    return [int(number) for _, number, _ in names if number.isdecimal()]


# -- the database ----------------------------------------------------------------------------------------------------


def _connected(path: Path) -> sqlite3.Connection:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.close(descriptor)  # SQLite gives its other files the mode of this one
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)


def _prepared(path: Path, *, suspect: bool) -> sqlite3.Connection:
    """The database, in its latest version. Raises `JournalFault` for one of a version to come."""
    short = _is_short(path)
    database = _connected(path)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = FULL")
        version: int = database.execute("PRAGMA user_version").fetchone()[0]
        if version > len(UPGRADES):
            raise JournalFault(f"{path}: was written by a later loadmaster (version {version} of the file)")
        if (short or suspect) and (said := database.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise _damage(said)
        for number, script in enumerate(UPGRADES[version:], version + 1):
            database.executescript(f"BEGIN IMMEDIATE; {script} PRAGMA user_version = {number}; COMMIT")
    except BaseException:
        database.close()
        raise
    return database


def _damage(said: str) -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError(said.splitlines()[0])
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _DAMAGED


def _sizes(path: Path) -> tuple[int, int]:
    """How large the file is, and how large its own first page says it is; that may say nothing."""
    with path.open("rb") as file:
        header = file.read(100)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 100:
        return size, PAGE_BYTES
    page, pages = struct.unpack(">H", header[16:18])[0], struct.unpack(">I", header[28:32])[0]
    return size, pages * (65536 if page == 1 else page)


def _is_short(path: Path) -> bool:
    """Whether the file is shorter than it says, or nothing beside a log of its changes."""
    try:
        size, said = _sizes(path)
    except FileNotFoundError:
        return False
    return size < said and (size > 0 or Path(f"{path}-wal").exists())


def _frames(path: Path) -> int:
    """How many frames of its latest generation the log has, whole or not."""
    try:
        with Path(f"{path}-wal").open("rb") as file:
            header = file.read(32)
            if len(header) < 32:
                return 0
            page = struct.unpack(">I", header[8:12])[0]
            frames = 0
            while len(frame := os.pread(file.fileno(), 16, 32 + frames * (24 + page))) == 16:
                if frame[8:16] != header[16:24]:
                    break
                frames += 1
            return frames
    except FileNotFoundError:
        return 0


def _salvage(damaged: Path, whole: Path) -> int:
    """Copy what can be read of a damaged file, in order, into a new one that is there all at once; how many events."""
    beside = whole.with_name(f".{whole.name}.part")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{beside}{suffix}").unlink(missing_ok=True)
    target, count = _prepared(beside, suspect=False), 0
    try:
        target.execute("BEGIN")
        for row in _readable(damaged):
            with suppress(sqlite3.IntegrityError):
                target.execute("INSERT INTO events (number, job, kind, facts) VALUES (?, ?, ?, ?)", row)
                count += 1
        target.execute("COMMIT")
        target.execute("PRAGMA journal_mode = DELETE")  # all of it in one file, which can be renamed
    finally:
        target.close()
    descriptor = os.open(beside, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(beside, whole)
    _sync_directory(whole.parent)
    return count


def _readable(damaged: Path) -> Iterator[tuple[int, int, str, str]]:
    """The events of a damaged file up to the first that cannot be read. The file stays as it is: a copy is looked at."""
    copy = damaged.with_name(f".{damaged.name}.copy")
    for suffix in ("", "-wal"):
        with suppress(FileNotFoundError):
            Path(f"{copy}{suffix}").write_bytes(Path(f"{damaged}{suffix}").read_bytes())
    size, said = _sizes(copy)
    if (
        size < said
    ):  # as it is, SQLite would look at none of it; and without a first page not at the log, which may have it
        os.truncate(copy, said)
    try:
        database = sqlite3.connect(copy, isolation_level=None)
        try:
            for number, job, kind, facts in database.execute(
                "SELECT number, job, kind, facts FROM events ORDER BY number"
            ):
                if not isinstance(json.loads(facts), dict) or not isinstance(job, int):
                    return
                yield number, job, str(kind), facts
        finally:
            database.close()
    except (sqlite3.Error, ValueError, TypeError) as exc:
        log.warning("%s: cannot be read any further: %s", damaged, exc)
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
