"""A catalog of logical files in one SQLite file, for sites and users that have no other."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, TypeVar

from anyio import to_thread

from loadmaster.errors import AlreadyExists, StorageUnavailable
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica
from loadmaster.storage.checksums import Checksum

T = TypeVar("T")

BUSY_SECONDS: Final = 30.0
"""How long to wait for another process that writes."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS files (lfn TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, checksum TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replicas (
    lfn TEXT NOT NULL REFERENCES files, url TEXT NOT NULL, storage_element TEXT, PRIMARY KEY (lfn, url)
) WITHOUT ROWID;
"""

_BATCH: Final = 500
"""Names in one question: SQLite takes 999 variables at least."""


class SqliteCatalog:
    """LFN -> size, checksum and replicas. Each call opens the file anew, so any number of processes may share it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return f"<SqliteCatalog {self.path}>"

    async def lookup(self, lfns: Sequence[str]) -> Mapping[str, CatalogEntry]:
        """The entries of those that are known, replicas in the order of their registration's URL.

        A file that is not there knows nothing, and is not made for being asked.
        """

        def ask(connection: sqlite3.Connection) -> dict[str, CatalogEntry]:
            connection.execute("BEGIN")  # both questions see the same state
            found: dict[str, CatalogEntry] = {}
            for start in range(0, len(lfns), _BATCH):
                batch = lfns[start : start + _BATCH]
                places = ",".join("?" * len(batch))
                replicas: dict[str, list[Replica]] = {}
                query = f"SELECT lfn, url, storage_element FROM replicas WHERE lfn IN ({places}) ORDER BY url"  # noqa: S608 - only question marks
                for lfn, url, element in connection.execute(query, batch):
                    replicas.setdefault(lfn, []).append(Replica(url, element))
                query = f"SELECT lfn, size_bytes, checksum FROM files WHERE lfn IN ({places})"  # noqa: S608 - likewise
                for lfn, size, checksum in connection.execute(query, batch):
                    found[lfn] = CatalogEntry(lfn, _info(size, checksum), tuple(replicas.get(lfn, ())))
            return found

        return await self._in_thread(ask, absent={}) if lfns else {}

    async def register(self, entry: CatalogEntry) -> None:
        """Add the file and its replicas in one transaction."""

        def add(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            known = connection.execute("SELECT size_bytes, checksum FROM files WHERE lfn = ?", [entry.lfn]).fetchone()
            if known is None:
                row = (entry.lfn, entry.info.size_bytes, str(entry.info.checksum) if entry.info.checksum else None)
                connection.execute("INSERT INTO files VALUES (?, ?, ?)", row)
            elif _info(*known) != entry.info:
                raise AlreadyExists(
                    f"LFN:{entry.lfn}",
                    f"is already in {self.path} with other content ({known[0]} bytes, {known[1]})",
                )
            rows = [(entry.lfn, replica.url, replica.storage_element) for replica in entry.replicas]
            connection.executemany("INSERT OR REPLACE INTO replicas VALUES (?, ?, ?)", rows)

        await self._in_thread(add)

    async def unregister(self, lfn: str, replica: Replica) -> None:
        """Have a file known without this replica. None is no fault."""

        def remove(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM replicas WHERE lfn = ? AND url = ?", [lfn, replica.url])

        await self._in_thread(remove)

    async def _in_thread(self, work: Callable[[sqlite3.Connection], T], absent: T | None = None) -> T:
        """`absent`: the answer when there is no file; without one, it is made."""

        def job() -> T:
            try:
                if absent is not None and not self.path.exists():
                    return absent
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS)) as connection, connection:
                    connection.executescript(_SCHEMA)
                    _renew(connection)
                    return work(connection)
            except (sqlite3.Error, OSError) as exc:
                raise StorageUnavailable(str(self.path), f"the catalog cannot be used: {exc}") from exc

        return await to_thread.run_sync(job)


def _renew(connection: sqlite3.Connection) -> None:
    """The first release had a column for one algorithm; its values are read as they are."""
    if any(column[1] == "adler32" for column in connection.execute("PRAGMA table_info(files)")):
        with suppress(sqlite3.OperationalError):  # another process was faster
            connection.execute("ALTER TABLE files RENAME COLUMN adler32 TO checksum")


def _info(size_bytes: int, checksum: str | None) -> FileInfo:
    return FileInfo(size_bytes, Checksum.parse(checksum) if checksum else None)
