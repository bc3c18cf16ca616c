"""What every storage promises, as tests for pytest: a third party's storage has them by one class.

    class TestMine(StorageConformance):
        @pytest.fixture
        async def place(self):                      # or a plain fixture, if nothing needs to be awaited
            async with open_mine(StorageOptions(...)) as storage:
                yield Place(storage, "mine://host/empty-directory", names=lambda: sorted(...))

The tests are asynchronous: run them with anyio's plugin in its `auto` mode, or with pytest-asyncio's.
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from loadmaster.errors import CannotCopy, ChecksumMismatch, NoSpace, NotFound, StorageError
from loadmaster.names import join_url
from loadmaster.storage.base import Ability, Clears, Direction, FileInfo, Held, Step, Storage, Transfer
from loadmaster.storage.checksums import Checksum

LARGE_BYTES = 8 * 1024**3
"""Of a sparse file: far more than a storage can take before it is cancelled, and nothing on the source's disk."""

NAMES = [
    "n" * 200, "ü" * 100, "a b", "100%", "a%20b", "what?", "#1", "a+b&c=d;e", "'\"", "日本", "~", "-rf", "a:b@c", "[x]",
]  # fmt: skip
"""All of them are names of files, and come back as they went."""


class LocalBytes:
    """The local end of a transfer, in memory. What becomes of it is written down."""

    def __init__(self, content: bytes = b"", *, size_bytes: int | None = None, device: str | None = None) -> None:
        """`size_bytes`: so long, if need be with zeros that nobody has to keep; `device`: this is opened instead."""
        self._device = device
        self._file = os.memfd_create("loadmaster")
        os.write(self._file, content)
        if size_bytes is not None:
            os.ftruncate(self._file, size_bytes)
        self.calls: list[str] = []
        self.kept: FileInfo | None = None
        self.refuses: Exception | None = None
        """Raised by `keep`."""
        self.cannot_open: Exception | None = None

    def __del__(self) -> None:
        os.close(self._file)

    @property
    def content(self) -> bytes:
        return os.pread(self._file, os.fstat(self._file).st_size, 0)

    def resize(self, size_bytes: int) -> None:
        os.ftruncate(self._file, size_bytes)

    def open(self) -> int:
        self.calls.append("open")
        if self.cannot_open is not None:
            raise self.cannot_open
        return os.open(self._device or f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_CLOEXEC)

    def keep(self, descriptor: int, info: FileInfo) -> None:
        self.calls.append("keep")
        if self.refuses is not None:
            raise self.refuses
        self.kept = info

    def discard(self) -> None:
        self.calls.append("discard")


@dataclass(frozen=True)
class Place:
    """A storage, an empty directory of it, and a look behind it."""

    storage: Storage
    base: str
    names: Callable[[], list[str]]
    """Everything that is there, partial files included, sorted; names below the base."""

    def url(self, name: str) -> str:
        """The URL of a name below the base."""
        return join_url(self.base, name)

    def upload(self, name: str, local: LocalBytes, algorithm: str = "adler32") -> Transfer:
        return Transfer(Direction.UPLOAD, self.url(name), local, algorithm)

    def download(self, name: str, local: LocalBytes, algorithm: str = "adler32") -> Transfer:
        return Transfer(Direction.DOWNLOAD, self.url(name), local, algorithm)

    def copy(self, source: str, name: str, local: LocalBytes, algorithm: str = "adler32") -> Transfer:
        return Transfer(Direction.COPY, self.url(name), local, algorithm, source=self.url(source))

    async def move(self, *transfers: Transfer) -> None:
        """Move them, and see that each is told once, in this thread, with its result."""
        told: list[Transfer] = []
        here = threading.get_ident()

        def ended(some: Sequence[Transfer]) -> None:
            assert threading.get_ident() == here
            assert all(transfer.result is not None for transfer in some)
            told.extend(some)

        await self.storage.move(transfers, ended)
        assert sorted(map(id, told)) == sorted(map(id, transfers))

    async def put(self, name: str, content: bytes) -> FileInfo:
        """Upload; raises what came of it if that is an error."""
        return await self._done(self.upload(name, LocalBytes(content)))

    async def get(self, name: str) -> bytes:
        """Download; raises what came of it if that is an error."""
        local = LocalBytes()
        await self._done(self.download(name, local))
        return local.content

    async def _done(self, transfer: Transfer) -> FileInfo:
        await self.move(transfer)
        if isinstance(transfer.result, FileInfo):
            return transfer.result
        assert transfer.result is not None
        raise transfer.result


def digest(algorithm: str, content: bytes) -> str:
    """A checksum as we write it, by the standard library."""
    if algorithm == "adler32":
        return f"adler32:{zlib.adler32(content):08x}"
    return f"{algorithm}:{hashlib.new(algorithm, content).hexdigest()}"


@asynccontextmanager
async def under_way(place: Place, transfer: Transfer) -> AsyncIterator[anyio.CancelScope]:
    """A transfer that has begun; cancel what is given."""
    async with anyio.create_task_group() as group:
        group.start_soon(place.storage.move, [transfer], lambda _: None)
        with anyio.fail_after(20):
            while transfer.done_bytes == 0:
                await anyio.sleep(0.002)  # bytes have no edge to wait for
        yield group.cancel_scope


class StorageConformance:
    """The tests. Needs a fixture `place`."""

    @pytest.mark.parametrize("size", [0, 1, 4096, 1024 * 1024, 3 * 1024 * 1024 + 7])
    async def test_what_went_in_comes_out(self, place: Place, size: int) -> None:
        data = os.urandom(size)
        up = place.upload("file", LocalBytes(data))
        await place.move(up)
        down = place.download("file", local := LocalBytes())
        await place.move(down)
        assert local.content == data
        assert up.result == down.result == local.kept
        assert isinstance(up.result, FileInfo)
        assert (up.result.size_bytes, str(up.result.checksum)) == (size, digest("adler32", data))
        assert up.done_bytes == down.done_bytes == size
        assert up.begun
        assert down.begun
        assert place.names() == ["file"]

    @pytest.mark.parametrize("algorithm", ["md5", "sha256"])
    async def test_the_checksum_is_by_the_algorithm_that_is_asked_for(self, place: Place, algorithm: str) -> None:
        data = os.urandom(100_000)
        up = place.upload("file", LocalBytes(data), algorithm)
        await place.move(up)
        down = place.download("file", LocalBytes(), algorithm)
        await place.move(down)
        for transfer in (up, down):
            assert isinstance(transfer.result, FileInfo)
            assert str(transfer.result.checksum) == digest(algorithm, data)

    async def test_what_is_there_has_its_size_and_the_right_checksum_or_none(self, place: Place) -> None:
        await place.put("d/e/file", b"content")
        found = await place.storage.stat(place.url("d/e/file"))
        assert found.size_bytes == 7
        if found.checksum is not None:
            assert str(found.checksum) == digest(found.checksum.algorithm, b"content")
        assert place.names() == ["d/e/file"]

    async def test_nothing_to_move_is_no_error(self, place: Place) -> None:
        await place.move()

    async def test_many_are_moved_by_one_call_and_each_has_its_own_end(self, place: Place) -> None:
        contents = {f"d{number % 7}/f{number}": f"{number} ".encode() * (number * 10) for number in range(200)}
        await place.move(*(place.upload(name, LocalBytes(content)) for name, content in contents.items()))
        assert place.names() == sorted(contents)
        wanted = [name for number, name in enumerate(contents) for name in ([name, f"no{number}"][: 1 + number % 2])]
        locals_ = {name: LocalBytes() for name in wanted}
        downs = [place.download(name, local) for name, local in locals_.items()]
        await place.move(*downs)
        for name, transfer in zip(wanted, downs, strict=True):
            if name in contents:
                assert locals_[name].content == contents[name]
                assert isinstance(transfer.result, FileInfo)
                assert str(transfer.result.checksum) == digest("adler32", contents[name])
                assert locals_[name].calls == ["open", "keep"]
            else:
                assert isinstance(transfer.result, NotFound)
                assert locals_[name].kept is None
                assert locals_[name].calls[-1] == "discard"

    async def test_many_calls_at_once_do_not_mix(self, place: Place) -> None:
        back: dict[str, bytes] = {}

        async def there_and_back(number: int) -> None:
            data = f"{number} ".encode() * 50_000
            await place.put(f"f{number:02}", data)
            back[f"f{number:02}"] = await place.get(f"f{number:02}")
            assert back[f"f{number:02}"] == data

        async with anyio.create_task_group() as group:
            for number in range(20):
                group.start_soon(there_and_back, number)
        assert place.names() == sorted(back)
        assert len(back) == 20

    async def test_an_upload_replaces_what_was_there(self, place: Place) -> None:
        for data in (b"a longer content", b"new"):
            await place.put("file", data)
        assert await place.get("file") == b"new"
        assert place.names() == ["file"]

    async def test_what_is_not_there_is_not_found(self, place: Place) -> None:
        for name in ("nowhere", "no/where"):
            with pytest.raises(NotFound, match=r"nowhere|no/where") as stat:
                await place.storage.stat(place.url(name))
            with pytest.raises(NotFound):
                await place.get(name)
            with pytest.raises(NotFound):
                await place.storage.remove(place.url(name))
            assert stat.value.url == place.url(name)
            assert not stat.value.retryable

    async def test_what_is_removed_is_not_there(self, place: Place) -> None:
        await place.put("file", b"content")
        await place.storage.remove(place.url("file"))
        assert place.names() == []
        with pytest.raises(NotFound):
            await place.storage.stat(place.url("file"))

    @pytest.mark.parametrize("name", NAMES)
    async def test_names_are_kept_as_they_are(self, place: Place, name: str) -> None:
        await place.put(name, b"content")
        assert place.names() == [name]
        assert await place.get(name) == b"content"

    async def test_a_name_that_is_too_long_is_a_storage_error_if_it_is_any(self, place: Place) -> None:
        url = f"{place.base}/{'n' * 2000}/file"
        transfer = Transfer(Direction.UPLOAD, url, LocalBytes(b"content"))
        await place.move(transfer)
        if isinstance(transfer.result, StorageError):
            assert place.names() == []
        else:
            assert (await place.storage.stat(url)).size_bytes == 7

    async def test_a_local_file_that_cannot_be_opened_is_this_ones_end_and_no_others(self, place: Place) -> None:
        await place.put("a", b"content")
        closed = LocalBytes()
        closed.cannot_open = PermissionError(13, "Permission denied")
        shut, good = place.download("a", closed), place.download("a", LocalBytes())
        await place.move(shut, good)
        assert isinstance(shut.result, StorageError)
        assert "Permission denied" in str(shut.result)
        assert isinstance(good.result, FileInfo)
        gone = LocalBytes()
        gone.cannot_open = FileNotFoundError(2, "No such file or directory")
        shut, good = place.upload("b", gone), place.upload("c", LocalBytes())
        await place.move(shut, good)
        assert isinstance(shut.result, StorageError)
        assert isinstance(good.result, FileInfo)
        assert place.names() == ["a", "c"]

    async def test_what_is_not_kept_is_discarded_and_the_reason_is_the_result(self, place: Place) -> None:
        await place.put("a", b"content")
        local = LocalBytes()
        local.refuses = ChecksumMismatch(place.url("a"), "not this")
        transfer = place.download("a", local)
        await place.move(transfer)
        assert transfer.result is local.refuses
        assert local.calls == ["open", "keep", "discard"]

    async def test_a_full_disk_of_ours_is_not_the_storages_fault(self, place: Place) -> None:
        await place.put("a", b"content")
        transfer = place.download("a", LocalBytes(device="/dev/full"))
        await place.move(transfer)
        assert isinstance(transfer.result, NoSpace)
        assert transfer.result.url == "the work directory"

    async def test_a_cancelled_upload_leaves_nothing(self, place: Place) -> None:
        with anyio.fail_after(20):
            transfer = place.upload("file", local := LocalBytes(size_bytes=LARGE_BYTES))
            async with under_way(place, transfer) as scope:
                scope.cancel()
        assert place.names() == []
        assert local.calls == ["open", "discard"]

    async def test_a_cancelled_upload_leaves_what_was_there(self, place: Place) -> None:
        if not place.storage.abilities & (Ability.RENAME | Ability.MULTIPART):
            pytest.skip("this storage has no way to write beside a name")
        await place.put("file", b"before")
        with anyio.fail_after(20):
            async with under_way(place, place.upload("file", LocalBytes(size_bytes=LARGE_BYTES))) as scope:
                scope.cancel()
        assert place.names() == ["file"]
        assert await place.get("file") == b"before"

    async def test_the_name_never_holds_half_a_file(self, place: Place) -> None:
        """While the upload is under way the name is not there, or is the whole file."""
        if not place.storage.abilities & (Ability.RENAME | Ability.MULTIPART):
            pytest.skip("this storage has no way to write beside a name")
        async with under_way(place, place.upload("file", LocalBytes(size_bytes=LARGE_BYTES))) as scope:
            with pytest.raises(NotFound):
                await place.storage.stat(place.url("file"))
            scope.cancel()

    async def test_a_cancelled_download_stops_soon_and_is_discarded(self, place: Place) -> None:
        await place.move(place.upload("file", LocalBytes(os.urandom(1024 * 1024), size_bytes=96 * 1024**2)))
        transfer = place.download("file", local := LocalBytes())
        async with under_way(place, transfer) as scope:
            scope.cancel()
        assert transfer.done_bytes < 96 * 1024**2
        assert local.calls == ["open", "discard"]

    async def test_what_is_given_up_ends_soon_and_nothing_else_does(self, place: Place) -> None:
        transfer = place.upload("file", LocalBytes(size_bytes=LARGE_BYTES))
        other = place.upload("other", LocalBytes(b"content"))
        ended: list[Transfer] = []
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(place.storage.move, [transfer, other], ended.extend)
                while transfer.done_bytes == 0:
                    await anyio.sleep(0.002)
                transfer.give_up()
        assert isinstance(transfer.result, StorageError)
        assert transfer.result.retryable
        assert isinstance(other.result, FileInfo)
        assert sorted(map(id, ended)) == sorted(map(id, (transfer, other)))
        assert place.names() == ["other"]

    async def test_a_file_that_changes_while_it_is_sent_is_not_stored(self, place: Place) -> None:
        transfer = place.upload("file", local := LocalBytes(size_bytes=LARGE_BYTES))
        with anyio.fail_after(20):
            async with under_way(place, transfer):
                local.resize(3)
        assert isinstance(transfer.result, StorageError)
        assert transfer.result.retryable
        assert place.names() == []

    async def test_the_last_of_many_writers_wins_with_a_whole_file(self, place: Place) -> None:
        async def write(number: int) -> None:
            await place.put("file", bytes([number]) * 2_000_000)

        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(write, number)
        data = await place.get("file")
        assert len(data) == 2_000_000
        assert len(set(data)) == 1
        assert place.names() == ["file"]

    @pytest.mark.parametrize("size", [0, 1, 3 * 1024 * 1024 + 7, 12 * 1024 * 1024])
    async def test_what_is_held_has_its_name_when_it_is_published(self, place: Place, size: int) -> None:
        held, data = await holding(place, "d/file", size)
        with pytest.raises(NotFound):
            await place.storage.stat(place.url("d/file"))
        assert held.info == FileInfo(size, Checksum.parse(digest("adler32", data)))
        publishing = place.upload("d/file", local := LocalBytes())
        publishing.step, publishing.held = Step.PUBLISH, held
        await place.move(publishing)
        assert publishing.result == held.info
        assert held.token is None
        assert "open" not in local.calls
        assert await place.get("d/file") == data
        assert place.names() == ["d/file"]

    async def test_what_is_abandoned_is_gone_and_what_was_there_stays(self, place: Place) -> None:
        await holds_or_skip(place).put("file", b"before")
        held, _ = await holding(place, "file", 100_000)
        assert await place.get("file") == b"before"
        for _ in range(2):  # the second time there is nothing: no harm is done
            leaving = place.upload("file", LocalBytes())
            leaving.step, leaving.held = Step.ABANDON, held
            await place.move(leaving)
            assert held.token is None
        assert place.names() == ["file"]
        assert await place.get("file") == b"before"

    async def test_what_is_published_takes_the_place_of_what_was_there(self, place: Place) -> None:
        await holds_or_skip(place).put("file", b"before")
        held, data = await holding(place, "file", 100_000)
        publishing = place.upload("file", LocalBytes())
        publishing.step, publishing.held = Step.PUBLISH, held
        await place.move(publishing)
        assert await place.get("file") == data
        assert place.names() == ["file"]

    async def test_a_cancelled_upload_that_was_to_be_held_leaves_nothing(self, place: Place) -> None:
        holds_or_skip(place)
        transfer = place.upload("file", LocalBytes(size_bytes=LARGE_BYTES))
        transfer.step, transfer.held = Step.HOLD, Held()
        with anyio.fail_after(20):
            async with under_way(place, transfer) as scope:
                scope.cancel()
        assert transfer.held.token is None
        assert place.names() == []

    async def test_what_somebody_held_who_is_gone_is_removed(self, place: Place) -> None:
        if not isinstance(place.storage, Clears):
            pytest.skip("this storage leaves nothing")
        await place.put("d/file", b"before")
        held, _ = await holding(place, "d/file", 100_000, ".0123456789abcdef.part")
        for _ in range(2):  # the second time there is nothing: no harm is done
            await place.storage.clear(place.url("d/file"), [".0123456789abcdef.part", ".1123456789abcdef.part"])
        publishing = place.upload("d/file", LocalBytes())
        publishing.step, publishing.held = Step.PUBLISH, held
        await place.move(publishing)
        assert isinstance(publishing.result, StorageError)
        assert place.names() == ["d/file"]
        assert await place.get("d/file") == b"before"

    async def test_what_is_not_held_cannot_be_published(self, place: Place) -> None:
        holds_or_skip(place)
        publishing = place.upload("file", LocalBytes())
        publishing.step, publishing.held = Step.PUBLISH, Held()
        await place.move(publishing)
        assert isinstance(publishing.result, NotFound)
        assert place.names() == []

    @pytest.mark.parametrize(("first", "last"), [(0, 9), (5, 5), (100_000, None), (1, 299_999), (299_999, None)])
    async def test_a_part_goes_where_it_belongs(self, place: Place, first: int, last: int | None) -> None:
        if not place.storage.abilities & Ability.RANGES:
            pytest.skip("this storage moves whole files")
        data = os.urandom(300_000)
        await place.put("file", data)
        part = place.download("file", local := LocalBytes(size_bytes=300_000))
        part.size_bytes, part.first_byte, part.last_byte = len(data), first, last
        await place.move(part)
        end = len(data) if last is None else last + 1
        assert local.content == b"\0" * first + data[first:end] + b"\0" * (len(data) - end)
        assert part.done_bytes == end - first
        assert isinstance(part.result, FileInfo)
        assert (part.result.size_bytes, str(part.result.checksum)) == (end - first, digest("adler32", data[first:end]))

    async def test_a_part_of_another_version_is_refused(self, place: Place) -> None:
        if not place.storage.abilities & Ability.RANGES:
            pytest.skip("this storage moves whole files")
        await place.put("file", b"before, and long")
        whole = place.download("file", LocalBytes())
        await place.move(whole)
        if whole.version is None:
            pytest.skip("this storage has no names for versions")
        await place.put("file", b"after, not so long")
        part = place.download("file", LocalBytes())
        part.first_byte, part.version = 3, whole.version
        await place.move(part)
        assert isinstance(part.result, StorageError)
        assert part.result.retryable

    @pytest.mark.parametrize("size", [0, 7, 3 * 1024 * 1024 + 7])
    async def test_what_is_copied_is_there_twice(self, place: Place, size: int) -> None:
        data = os.urandom(size)
        await copies_or_skip(place).put("file", data)
        transfer = place.copy("file", "d/e/copy", local := LocalBytes())
        await place.move(transfer)
        assert isinstance(transfer.result, FileInfo)
        assert transfer.result.size_bytes == transfer.done_bytes == size
        if transfer.result.checksum is not None:
            assert str(transfer.result.checksum) == digest(transfer.result.checksum.algorithm, data)
        assert local.calls == ["discard"]
        assert place.names() == ["d/e/copy", "file"]
        assert await place.get("d/e/copy") == data

    async def test_a_copy_takes_the_place_of_what_was_there_and_of_nothing_else(self, place: Place) -> None:
        await copies_or_skip(place).put("file", b"content")
        names = [name for name in NAMES if len(name) < 90]
        await place.move(*(place.upload(name, LocalBytes(b"before")) for name in names))
        copies = [place.copy("file", name, LocalBytes()) for name in names]
        back = [place.copy(name, f"back{number}", LocalBytes()) for number, name in enumerate(names)]
        await place.move(*copies)
        await place.move(*back)
        for transfer in (*copies, *back):
            assert isinstance(transfer.result, FileInfo), transfer.url
        for number in range(len(back)):
            assert await place.get(f"back{number}") == b"content"
        assert place.names() == sorted(["file", *names, *(f"back{number}" for number in range(len(names)))])

    async def test_what_is_not_there_is_not_copied(self, place: Place) -> None:
        await copies_or_skip(place).put("other", b"before")
        for name in ("other", "new"):
            transfer = place.copy("nowhere", name, LocalBytes())
            await place.move(transfer)
            assert isinstance(transfer.result, NotFound)
        assert place.names() == ["other"]
        assert await place.get("other") == b"before"

    @pytest.mark.parametrize("algorithm", ["adler32", "md5", "sha256"])
    async def test_a_copy_has_the_checksum_that_is_wanted_or_is_none(self, place: Place, algorithm: str) -> None:
        """Whoever cannot tell it says so, and the bytes go another way; whoever can does not copy what is other."""
        data = os.urandom(100_000)
        await copies_or_skip(place).put("file", data)
        await place.put("wrong", b"before")
        right, wrong = (place.copy("file", name, LocalBytes(), algorithm) for name in ("right", "wrong"))
        right.checksum = Checksum.parse(digest(algorithm, data))
        wrong.checksum = Checksum.parse(digest(algorithm, b"other"))
        await place.move(right, wrong)
        assert isinstance(wrong.result, CannotCopy | ChecksumMismatch)
        if isinstance(wrong.result, CannotCopy):
            assert isinstance(right.result, CannotCopy)
            assert not right.result.retryable
        else:
            assert right.result == FileInfo(len(data), right.checksum)
            assert await place.get("right") == data
        assert await place.get("wrong") == b"before"
        assert place.names() == (
            ["file", "wrong"] if isinstance(right.result, CannotCopy) else ["file", "right", "wrong"]
        )

    async def test_a_copy_of_another_size_than_is_known_is_none(self, place: Place) -> None:
        await copies_or_skip(place).put("file", b"content")
        transfer = place.copy("file", "copy", LocalBytes())
        transfer.size_bytes = 8
        await place.move(transfer)
        assert isinstance(transfer.result, ChecksumMismatch)
        assert place.names() == ["file"]


def copies_or_skip(place: Place) -> Place:
    """For tests of what only some storages can."""
    if not place.storage.abilities & Ability.COPY:
        pytest.skip("this storage does not copy")
    return place


def holds_or_skip(place: Place) -> Place:
    """For tests of what only some storages can."""
    if not place.storage.abilities & Ability.HOLD:
        pytest.skip("this storage can hold nothing back")
    return place


async def holding(place: Place, name: str, size: int, part: str = "") -> tuple[Held, bytes]:
    """Something that has been sent and has no name yet."""
    data = os.urandom(size)
    transfer = holds_or_skip(place).upload(name, local := LocalBytes(data))
    transfer.step, transfer.held, transfer.part = Step.HOLD, Held(), part
    await place.move(transfer)
    assert transfer.result == transfer.held.info
    assert transfer.held.token is not None
    assert local.calls == ["open", "discard"]
    return transfer.held, data


def local_place(storage: Storage, directory: Path, base: str) -> Place:
    """A place whose files can be looked at below a directory of this machine."""

    def names() -> list[str]:
        return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())

    return Place(storage, base, names)
