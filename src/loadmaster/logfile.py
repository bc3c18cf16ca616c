"""The file of a journal, as an SQLite database: which one counts, how it is made, and what can be saved of a damaged one.

A write-ahead log, synced with each commit: what was committed survives the process and the machine. What a crash tears is
the end of that log, which SQLite leaves out when it opens it next. A file that is damaged beyond that (cut short, half of it
gone) stays as it is, with its number; what can be read of it in order, up to the first event that cannot, begins the next.

What is in here blocks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import sqlite3
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final
from urllib.parse import quote

from loadmaster.errors import JournalFault

log = logging.getLogger(__name__)

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

PAGE_BYTES: Final = 4096

NAME: Final = "journal.{}.db"

_MAGIC: Final = b"SQLite format 3\0"

_DAMAGED: Final = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def locked(directory: Path) -> int:
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


def generations(directory: Path) -> list[int]:
    """The numbers of the files there are. Raises OSError."""
    names = (name.split(".") for name in os.listdir(directory))
    return [
        int(parts[1])
        for parts in names
        if len(parts) == 3 and f"{parts[0]}.{{}}.{parts[2]}" == NAME and parts[1].isdecimal()
    ]


def latest(directory: Path) -> Path:
    """The file that counts. Raises `JournalFault` when there is none, or it cannot be seen."""
    try:
        number = max(generations(directory), default=None)
    except FileNotFoundError:
        number = None
    except OSError as exc:
        raise JournalFault(f"{directory}: cannot read the journal: {exc.strerror}") from exc
    if number is None:
        raise JournalFault(f"{directory}: there is no journal in it")
    return directory / NAME.format(number)


# -- for those who do not have it --------------------------------------------------------------------------------------


@contextmanager
def changed_beside(directory: Path) -> Iterator[sqlite3.Connection]:
    """A transaction in the file beside the agent that has it. Raises `JournalFault`."""
    path = latest(directory)
    try:
        database = sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, isolation_level=None, timeout=30)
        try:
            database.execute("PRAGMA synchronous = FULL")
            if database.execute("PRAGMA user_version").fetchone()[0] != len(UPGRADES):
                raise JournalFault(f"{directory}: was written by another version of loadmaster: have that one do it")
            database.execute("BEGIN IMMEDIATE")
            yield database
            database.execute("COMMIT")
        finally:
            database.close()  # which takes back what was not committed
    except sqlite3.Error as exc:
        raise JournalFault(f"{directory}: cannot change the journal: {exc}") from exc


@contextmanager
def seen(directory: Path) -> Iterator[sqlite3.Connection]:
    """The file, to be read only, also while an agent writes to it, and where nothing can be written. Raises
    `JournalFault`."""
    path = latest(directory)
    try:
        with ExitStack() as stack:
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))  # whose reason is better than SQLite's
                database = _seen(path, stack)
            except OSError as exc:
                raise JournalFault(f"{directory}: cannot read the journal: {exc.strerror}") from exc
            yield database
    except sqlite3.Error as exc:
        raise JournalFault(f"{directory}: cannot read the journal: {exc}") from exc


def _seen(path: Path, stack: ExitStack) -> sqlite3.Connection:
    try:
        return _readable_at(path, "mode=ro", stack)
    except sqlite3.OperationalError:
        if os.access(path.parent, os.W_OK) or Path(f"{path}-shm").exists():
            raise
    # On a read-only mount SQLite has no place for what its readers share. What is in the log alone it would leave out.
    if not frames(path):
        return _readable_at(path, "immutable=1", stack)
    copy = Path(stack.enter_context(TemporaryDirectory(prefix="loadmaster-"))) / path.name
    for suffix in ("", "-wal"):
        shutil.copyfile(f"{path}{suffix}", f"{copy}{suffix}")
    return _readable_at(copy, "mode=rw", stack)


def _readable_at(path: Path, how: str, stack: ExitStack) -> sqlite3.Connection:
    database = sqlite3.connect(f"file:{quote(str(path))}?{how}", uri=True, isolation_level=None)
    try:
        database.execute("SELECT count(*) FROM jobs WHERE status IS NULL").fetchone()
    except sqlite3.Error:
        database.close()
        raise
    stack.callback(database.close)
    return database


# -- the database ----------------------------------------------------------------------------------------------------


def _connected(path: Path) -> sqlite3.Connection:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    os.close(descriptor)  # SQLite gives its other files the mode of this one
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=30)


def prepared(path: Path, *, suspect: bool) -> sqlite3.Connection:
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
    """What SQLite would raise if it had seen it by itself."""
    error = sqlite3.DatabaseError(said)
    error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
    return error


def is_damage(error: sqlite3.DatabaseError) -> bool:
    """Whether it is the file, and not the disk, that something is wrong with."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF in _DAMAGED


def told(error: sqlite3.DatabaseError) -> str:
    """What is wrong with a damaged file, for a sentence: SQLite's own words are for those who know its pages."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return "it is no database" if code & 0xFF == sqlite3.SQLITE_NOTADB else "parts of it do not belong together"


def _sizes(path: Path) -> tuple[int, int]:
    """How large the file is, and how large its own first page says it is; that may say nothing."""
    with path.open("rb") as file:
        header = file.read(100)
        size = os.fstat(file.fileno()).st_size
    if len(header) < 100:
        return size, PAGE_BYTES
    if not header.startswith(_MAGIC):  # what it says is nothing: a truncation to that failed, for ever
        return size, size
    page, pages = struct.unpack(">H", header[16:18])[0], struct.unpack(">I", header[28:32])[0]
    return size, pages * (65536 if page == 1 else page)


def _is_short(path: Path) -> bool:
    """Whether the file is shorter than it says, or nothing beside a log of its changes."""
    try:
        size, said = _sizes(path)
    except FileNotFoundError:
        return False
    return size < said and (size > 0 or Path(f"{path}-wal").exists())


def frames(path: Path) -> int:
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


def salvage(damaged: Path, whole: Path) -> int:
    """Copy what can be read of a damaged file, in order, into a new one that is there all at once; how many events."""
    beside = whole.with_name(f".{whole.name}.part")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{beside}{suffix}").unlink(missing_ok=True)
    target, count = prepared(beside, suspect=False), 0
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
    sync_directory(whole.parent)
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
        log.info("%s: cannot be read any further: %s", damaged, exc)  # the journal's `damage` has it for everybody
    finally:
        for suffix in ("", "-wal", "-shm", "-journal"):
            Path(f"{copy}{suffix}").unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Have the names in it on disk."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
