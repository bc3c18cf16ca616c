"""The doubles: without orders they do what the real ones do, with orders exactly that."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import anyio
import pytest

from loadmaster import RuntimeFault, StorageError
from loadmaster.errors import NoSpace, NotFound, StorageUnavailable
from loadmaster.events import StageInStarted
from loadmaster.names import file_url
from loadmaster.storage.base import FileInfo, Progress, Storage
from loadmaster.storage.local import LocalStorage
from loadmaster.testing import Faults, MemoryJournal, MemoryStorage, Operation

CONTENT = b"cargo" * 300_000
"""More than one block."""

ADLER32 = f"{zlib.adler32(CONTENT):08x}"


class Place:
    """A storage, and URLs in it."""

    def __init__(self, storage: Storage, base: str) -> None:
        self.storage = storage
        self.base = base

    def url(self, name: str) -> str:
        return f"{self.base}/{name}"

    async def upload(self, name: str, content: bytes = CONTENT) -> FileInfo:
        with descriptor(content) as source:
            return await self.storage.upload(source, self.url(name), Progress())

    async def download(self, name: str) -> tuple[FileInfo, bytes]:
        with descriptor() as target:
            info = await self.storage.download(self.url(name), target, Progress())
            return info, os.pread(target, 10_000_000, 0)


@contextmanager
def descriptor(content: bytes = b"") -> Iterator[int]:
    """An open file with something in it, positioned at its end."""
    number = os.memfd_create("test")
    try:
        os.write(number, content)
        yield number
    finally:
        os.close(number)


@pytest.fixture(params=["local", "memory", "faults around local", "faults around memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    kind = str(request.param)
    storage: Storage = LocalStorage() if "local" in kind else MemoryStorage()
    base = file_url(tmp_path / "se") if "local" in kind else "memory://se"
    return Place(Faults(storage) if "faults" in kind else storage, base)


# -- what every storage does ---------------------------------------------------------------------------------------


async def test_what_is_uploaded_can_be_downloaded_and_its_size_and_checksum_are_those_of_the_bytes(
    place: Place,
) -> None:
    expected = FileInfo(len(CONTENT), ADLER32)
    assert await place.upload("a") == expected
    assert await place.download("a") == (expected, CONTENT)
    assert (await place.storage.stat(place.url("a"))).size_bytes == len(CONTENT)


async def test_the_checksum_is_adler32_in_eight_hex_digits(place: Place) -> None:
    assert await place.upload("a", b"Wikipedia") == FileInfo(9, "11e60398")


async def test_an_empty_file_is_a_file(place: Place) -> None:
    assert await place.upload("empty", b"") == FileInfo(0, "00000001")
    assert await place.download("empty") == (FileInfo(0, "00000001"), b"")


async def test_an_upload_replaces_what_was_there(place: Place) -> None:
    await place.upload("a", b"old and longer")
    await place.upload("a", b"new")
    assert (await place.download("a"))[1] == b"new"


async def test_progress_ends_at_the_size_of_the_file(place: Place) -> None:
    up, down = Progress(), Progress()
    with descriptor(CONTENT) as source, descriptor() as target:
        await place.storage.upload(source, place.url("a"), up)
        await place.storage.download(place.url("a"), target, down)
    assert (up.done_bytes, down.done_bytes) == (len(CONTENT), len(CONTENT))


async def test_what_is_removed_is_not_found_any_more(place: Place) -> None:
    await place.upload("a")
    await place.storage.remove(place.url("a"))
    with pytest.raises(NotFound):
        await place.storage.stat(place.url("a"))
    with pytest.raises(NotFound):
        await place.storage.remove(place.url("a"))
    with pytest.raises(NotFound):
        await place.download("a")


async def test_a_cancelled_upload_leaves_what_was_there(place: Place) -> None:
    await place.upload("a", b"old")
    with anyio.CancelScope() as scope:
        scope.cancel()
        await place.upload("a", b"new")
    assert scope.cancelled_caught
    assert (await place.download("a"))[1] == b"old"


# -- faults --------------------------------------------------------------------------------------------------------


def faulty(**files: bytes) -> tuple[MemoryStorage, Faults, Place]:
    memory = MemoryStorage({f"memory://se/{name}": content for name, content in files.items()})
    faults = Faults(memory)
    return memory, faults, Place(faults, "memory://se")


async def test_the_third_upload_fails_and_only_that_one() -> None:
    memory, faults, place = faulty()
    faults.fail("upload", at=3)
    failed = []
    for name in "abcd":
        try:
            await place.upload(name)
        except StorageUnavailable as error:
            failed.append((name, error.url, error.retryable))
    assert failed == [("c", "memory://se/c", True)]
    assert sorted(memory.files) == ["memory://se/a", "memory://se/b", "memory://se/d"]
    assert faults.calls == [("upload", f"memory://se/{name}") for name in "abcd"]


@pytest.mark.parametrize("operation", ["stat", "download", "upload", "remove"])
async def test_every_call_of_an_operation_can_fail_with_an_error_of_ones_choice(operation: Operation) -> None:
    memory, faults, place = faulty(a=b"a")
    faults.fail(operation, error=lambda url: NoSpace(url, "the quota is full"))
    for _ in range(2):
        with pytest.raises(NoSpace, match="memory://se/a: the quota is full"):
            await asked(place, operation)
    assert memory.files == {"memory://se/a": b"a"}


async def asked(place: Place, operation: Operation) -> None:
    match operation:
        case "stat":
            await place.storage.stat(place.url("a"))
        case "download":
            await place.download("a")
        case "upload":
            await place.upload("a", b"other")
        case "remove":
            await place.storage.remove(place.url("a"))


async def test_a_lie_about_the_size_changes_nothing_but_the_answer() -> None:
    memory, faults, place = faulty(a=b"abc")
    faults.lie_about_size("stat")
    faults.lie_about_size("download", by_bytes=-3)
    faults.lie_about_size("upload", at=2)
    assert (await place.storage.stat(place.url("a"))).size_bytes == 4
    info, content = await place.download("a")
    assert (info.size_bytes, content) == (0, b"abc")
    assert (await place.upload("b", b"abc")).size_bytes == 3
    assert (await place.upload("b", b"abc")).size_bytes == 4
    assert memory.files["memory://se/b"] == b"abc"


async def test_wrong_bytes_are_as_many_and_come_with_their_own_checksum() -> None:
    memory, faults, place = faulty(a=b"abc")
    faults.corrupt("download")
    faults.corrupt("upload", at=1)
    right = await place.storage.stat(place.url("a"))
    info, content = await place.download("a")
    assert len(content) == 3
    assert content != b"abc"
    assert info.size_bytes == 3
    assert info.adler32 != right.adler32
    assert (await place.upload("b", b"abc")).adler32 == info.adler32
    assert memory.files["memory://se/b"] == content
    await place.upload("b", b"abc")
    assert memory.files["memory://se/b"] == b"abc"


@pytest.mark.parametrize("operation", ["stat", "download", "upload", "remove"])
async def test_a_call_that_hangs_is_seen_to_and_ends_only_by_cancellation(operation: Operation) -> None:
    memory, faults, place = faulty(a=b"a")
    hangs = faults.hang(operation)
    ended: list[str] = []

    async def ask() -> None:
        await asked(place, operation)
        ended.append(operation)

    async with anyio.create_task_group() as tg:
        tg.start_soon(ask)
        await hangs.wait()
        tg.cancel_scope.cancel()
    assert ended == []
    assert memory.files == {"memory://se/a": b"a"}


async def test_the_first_order_for_a_call_counts() -> None:
    _, faults, place = faulty(a=b"a")
    faults.fail("stat", at=1, error=lambda url: NoSpace(url, "first"))
    faults.fail("stat")
    with pytest.raises(NoSpace):
        await asked(place, "stat")
    with pytest.raises(StorageUnavailable):
        await asked(place, "stat")


async def test_operations_are_counted_apart() -> None:
    _, faults, place = faulty(a=b"a")
    faults.fail("stat", at=2)
    await asked(place, "stat")
    await asked(place, "download")
    with pytest.raises(StorageError):
        await asked(place, "stat")


def test_doubles_say_what_they_are() -> None:
    _, faults, _ = faulty(a=b"a")
    faults.fail("stat")
    assert repr(faults) == "<Faults of <MemoryStorage 1 files>: 1 orders, 0 calls>"
    assert repr(MemoryJournal()) == "<MemoryJournal 0 events>"


# -- the journal ---------------------------------------------------------------------------------------------------


async def test_a_journal_keeps_what_it_took_and_fails_where_it_was_told_to() -> None:
    journal = MemoryJournal()
    journal.fail_at(2)
    journal.fail_at(4, RuntimeFault("torn"))
    events = [StageInStarted("1", attempt, datetime.now(UTC)) for attempt in range(1, 6)]
    failed = []
    for event in events:
        try:
            await journal.append(event)
        except (OSError, RuntimeFault) as error:
            failed.append((event.attempt, type(error)))
    assert failed == [(2, OSError), (4, RuntimeFault)]
    assert [event.attempt for event in journal.events] == [1, 3, 5]
