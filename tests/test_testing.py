"""The doubles: without orders they do what the real ones do, with orders exactly that."""

from __future__ import annotations

from datetime import UTC, datetime

import anyio
import pytest

from loadmaster import RuntimeFault, StorageError
from loadmaster.conformance import LocalBytes, Place
from loadmaster.errors import NoSpace, StorageUnavailable
from loadmaster.events import StageInStarted
from loadmaster.storage.base import FileInfo
from loadmaster.testing import Faults, MemoryJournal, MemoryStorage, Operation

CONTENT = b"cargo" * 300_000
"""More than one block."""


# -- faults --------------------------------------------------------------------------------------------------------


def faulty(**files: bytes) -> tuple[MemoryStorage, Faults, Place]:
    memory = MemoryStorage({f"memory://se/{name}": content for name, content in files.items()})
    faults = Faults(memory)
    return memory, faults, Place(faults, "memory://se", lambda: sorted(memory.files))


async def test_the_third_upload_fails_and_only_that_one() -> None:
    memory, faults, place = faulty()
    faults.fail("upload", at=3)
    failed = []
    for name in "abcd":
        try:
            await place.put(name, CONTENT)
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
            await place.get("a")
        case "upload":
            await place.put("a", b"other")
        case "remove":
            await place.storage.remove(place.url("a"))


async def test_a_lie_about_the_size_changes_nothing_but_the_answer() -> None:
    memory, faults, place = faulty(a=b"abc")
    faults.lie_about_size("stat")
    faults.lie_about_size("download", by_bytes=-3)
    faults.lie_about_size("upload", at=2)
    assert (await place.storage.stat(place.url("a"))).size_bytes == 4
    down = place.download("a", local := LocalBytes())
    await place.move(down)
    assert (down.result.size_bytes, local.content, local.kept) == (0, b"abc", down.result)  # type: ignore[union-attr]
    assert (await place.put("b", b"abc")).size_bytes == 3
    assert (await place.put("b", b"abc")).size_bytes == 4
    assert memory.files["memory://se/b"] == b"abc"


async def test_wrong_bytes_are_as_many_and_come_with_their_own_checksum() -> None:
    memory, faults, place = faulty(a=b"abc")
    faults.corrupt("download")
    faults.corrupt("upload", at=1)
    right = await place.storage.stat(place.url("a"))
    down = place.download("a", local := LocalBytes())
    await place.move(down)
    info, content = down.result, local.content
    assert isinstance(info, FileInfo)
    assert local.kept == info
    assert len(content) == 3
    assert content != b"abc"
    assert info.size_bytes == 3
    assert info.checksum != right.checksum
    assert (await place.put("b", b"abc")).checksum == info.checksum
    assert memory.files["memory://se/b"] == content
    await place.put("b", b"abc")
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
