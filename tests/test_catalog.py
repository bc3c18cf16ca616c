"""Logical files in one SQLite file: many processes may share it, and a file's content never changes."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest

from loadmaster.errors import AlreadyExists, StorageUnavailable
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica, Unregisters
from loadmaster.storage.catalog import SqliteCatalog
from loadmaster.storage.checksums import Checksum


@pytest.fixture
def catalog(tmp_path: Path) -> SqliteCatalog:
    return SqliteCatalog(tmp_path / "d" / "catalog.sqlite")


def entry(lfn: str, *urls: str, size: int = 3, adler32: str | None = "024d0127") -> CatalogEntry:
    checksum = Checksum("adler32", adler32) if adler32 else None
    return CatalogEntry(lfn, FileInfo(size, checksum), tuple(Replica(url, "DISK") for url in urls))


async def test_what_was_registered_is_found(catalog: SqliteCatalog) -> None:
    a, b = entry("/vo/a", "file:///1", "file:///2"), entry("/vo/b", size=0, adler32=None)
    await catalog.register(a)
    await catalog.register(b)
    assert await catalog.lookup(["/vo/a", "/vo/b", "/vo/c"]) == {"/vo/a": a, "/vo/b": b}
    assert await SqliteCatalog(catalog.path).lookup(["/vo/a"]) == {"/vo/a": a}


async def test_what_was_unregistered_has_a_replica_less(catalog: SqliteCatalog) -> None:
    await catalog.register(entry("/vo/a", "file:///1", "file:///2"))
    await catalog.unregister("/vo/a", Replica("file:///1", "DISK"))
    await catalog.unregister("/vo/a", Replica("file:///1", "DISK"))
    assert (await catalog.lookup(["/vo/a"])) == {"/vo/a": entry("/vo/a", "file:///2")}
    assert isinstance(catalog, Unregisters)


async def test_an_empty_catalog_knows_nothing(catalog: SqliteCatalog) -> None:
    assert await catalog.lookup([]) == {}
    assert await catalog.lookup(["/vo/a"]) == {}


async def test_another_replica_joins_the_first(catalog: SqliteCatalog) -> None:
    for url in ("file:///2", "file:///1", "file:///2"):
        await catalog.register(entry("/vo/a", url))
    found = (await catalog.lookup(["/vo/a"]))["/vo/a"]
    assert [replica.url for replica in found.replicas] == ["file:///1", "file:///2"]


@pytest.mark.parametrize("other", [{"size": 4}, {"adler32": "00000001"}, {"adler32": None}])
async def test_other_content_is_refused_and_nothing_of_it_is_kept(
    catalog: SqliteCatalog, other: dict[str, Any]
) -> None:
    first = entry("/vo/a", "file:///1")
    await catalog.register(first)
    with pytest.raises(AlreadyExists, match=r"LFN:/vo/a: .*other content"):
        await catalog.register(entry("/vo/a", "file:///2", **other))
    assert await catalog.lookup(["/vo/a"]) == {"/vo/a": first}


async def test_thousands_of_names_are_looked_up_at_once(catalog: SqliteCatalog) -> None:
    await catalog.register(entry("/vo/0", "file:///0"))
    await catalog.register(entry("/vo/2999", "file:///2999"))
    found = await catalog.lookup([f"/vo/{number}" for number in range(3000)])
    assert set(found) == {"/vo/0", "/vo/2999"}


@pytest.mark.parametrize("lfn", ["/vo/it's; DROP TABLE files", '/vo/"', "/vo/日本", "/vo/%_", "/vo/" + "x" * 1000])
async def test_names_are_data(catalog: SqliteCatalog, lfn: str) -> None:
    await catalog.register(entry(lfn, f"file://{lfn}"))
    assert (await catalog.lookup([lfn]))[lfn].replicas[0].url == f"file://{lfn}"


async def test_many_may_register_at_once_and_whoever_looks_sees_whole_entries(catalog: SqliteCatalog) -> None:
    lfns = [f"/vo/{number}" for number in range(60)]
    seen: list[CatalogEntry] = []
    async with anyio.create_task_group() as group:
        for lfn in lfns:
            group.start_soon(catalog.register, entry(lfn, f"file://{lfn}"))
        for _ in range(20):
            seen += (await catalog.lookup(lfns)).values()
    assert all(len(found.replicas) == 1 for found in seen)
    assert set(await catalog.lookup(lfns)) == set(lfns)


async def test_of_many_who_register_different_content_one_wins(catalog: SqliteCatalog) -> None:
    refused: list[AlreadyExists] = []

    async def register(size: int) -> None:
        try:
            await catalog.register(entry("/vo/a", f"file:///{size}", size=size))
        except AlreadyExists as exc:
            refused.append(exc)

    async with anyio.create_task_group() as group:
        for size in range(10):
            group.start_soon(register, size)
    assert len(refused) == 9
    found = (await catalog.lookup(["/vo/a"]))["/vo/a"]
    assert [replica.url for replica in found.replicas] == [f"file:///{found.info.size_bytes}"]


async def test_another_process_that_writes_is_waited_for(catalog: SqliteCatalog) -> None:
    await catalog.register(entry("/vo/a", "file:///a"))
    script = (
        "import sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None); c.execute('BEGIN EXCLUSIVE')\n"
        "print('ready', flush=True); sys.stdin.readline(); c.execute('COMMIT')"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", script, str(catalog.path)], text=True, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == "ready\n"
        async with anyio.create_task_group() as group:
            group.start_soon(catalog.register, entry("/vo/b", "file:///b"))
            await anyio.wait_all_tasks_blocked()
            other.communicate("\n")
    assert set(await catalog.lookup(["/vo/a", "/vo/b"])) == {"/vo/a", "/vo/b"}


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"not a database at all" * 100), Path.mkdir])
async def test_a_catalog_that_is_none_is_unavailable_and_named(tmp_path: Path, spoil: Callable[[Path], object]) -> None:
    spoil(tmp_path / "spoilt")
    with pytest.raises(StorageUnavailable, match="spoilt: the catalog cannot be used"):
        await SqliteCatalog(tmp_path / "spoilt").lookup(["/vo/a"])


async def test_a_file_somebody_else_may_read_with_plain_sqlite(catalog: SqliteCatalog) -> None:
    await catalog.register(entry("/vo/a", "file:///a"))
    connection = sqlite3.connect(catalog.path)
    assert connection.execute("SELECT lfn, url, storage_element FROM replicas").fetchall() == [
        ("/vo/a", "file:///a", "DISK")
    ]
    connection.close()


async def test_a_catalog_of_the_first_release_is_read_and_written_on(catalog: SqliteCatalog) -> None:
    catalog.path.parent.mkdir()
    connection = sqlite3.connect(catalog.path)
    connection.execute(
        "CREATE TABLE files (lfn TEXT PRIMARY KEY, size_bytes INTEGER NOT NULL, adler32 TEXT) WITHOUT ROWID"
    )
    connection.execute("INSERT INTO files VALUES ('/vo/a', 3, '024d0127')")
    connection.commit()
    connection.close()
    await catalog.register(entry("/vo/a", "file:///1"))
    await catalog.register(entry("/vo/b", "file:///2"))
    assert await catalog.lookup(["/vo/a", "/vo/b"]) == {
        "/vo/a": entry("/vo/a", "file:///1"),
        "/vo/b": entry("/vo/b", "file:///2"),
    }
