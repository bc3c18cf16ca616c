"""What every storage promises (`loadmaster.conformance`), and what the local one adds."""

from __future__ import annotations

import os
import shutil
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote

import anyio
import pytest

from loadmaster import StorageError
from loadmaster.conformance import LARGE_BYTES, LocalBytes, Place, StorageConformance, local_place, under_way
from loadmaster.errors import AccessDenied, ChecksumMismatch, NoSpace, NotFound, StorageUnavailable
from loadmaster.names import file_url
from loadmaster.staging.files import IncomingPath
from loadmaster.storage.base import Ability, Direction, FileInfo, StorageOptions, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import WORK_DIRECTORY, LocalStorage, checksum, open_storage, translated
from loadmaster.storage.single import OneByOne
from loadmaster.testing import Faults, MemoryStorage


class TestLocal(StorageConformance):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        directory = tmp_path / "storage"
        return local_place(LocalStorage(), directory, file_url(directory))


class TestMemory(StorageConformance):
    @pytest.fixture
    def place(self) -> Place:
        storage = MemoryStorage()
        return Place(storage, "memory://se", lambda: names_in(storage))


class TestFaults(StorageConformance):
    """With no orders, and with one for every call: `lie_about_size` by nothing is none to speak of."""

    @pytest.fixture(params=["no orders", "orders"])
    def place(self, request: pytest.FixtureRequest) -> Place:
        memory = MemoryStorage()
        storage = Faults(memory)
        if request.param == "orders":
            storage.lie_about_size("upload", by_bytes=0)
            storage.lie_about_size("download", by_bytes=0)
        return Place(storage, "memory://se", lambda: names_in(memory))


class TestOneByOne(StorageConformance):
    @pytest.fixture
    def place(self) -> Place:
        single = Dictionary()
        storage = OneByOne(single, streams=4, abilities=Ability.RENAME | Ability.COPY)
        return Place(storage, "memory://se", lambda: names_in(single))


def names_in(storage: MemoryStorage | Dictionary) -> list[str]:
    return sorted(unquote(url.removeprefix("memory://se/")) for url in storage.files)


class Dictionary:
    """A storage of few words: one file at a time, in blocks, awaiting between them."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    async def stat(self, url: str) -> FileInfo:
        await anyio.sleep(0)
        return FileInfo(len(self._file(url)))

    async def download(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        passed, content = transfer.begin(), self._file(url)
        for start in range(0, len(content), 65536):
            block = content[start : start + 65536]
            with translated(WORK_DIRECTORY):
                await anyio.to_thread.run_sync(os.write, target, block)
            passed.update(block)
            transfer.done_bytes += len(block)
        return transfer.info()

    async def upload(self, source: int, url: str, transfer: Transfer) -> FileInfo:
        if len(url) > 1024:
            raise StorageError(url, "too long")
        passed, content = transfer.begin(), bytearray()
        size = await anyio.to_thread.run_sync(size_of, source)
        while block := await anyio.to_thread.run_sync(os.pread, source, 65536, len(content)):
            content += block
            passed.update(block)
            transfer.done_bytes += len(block)
        if await anyio.to_thread.run_sync(size_of, source) != size:
            raise StorageUnavailable(url, "changed while it was copied")
        self.files[url] = bytes(content)
        return transfer.info()

    async def copy(self, transfer: Transfer) -> FileInfo:
        there = await self.stat(transfer.source)
        transfer.is_source(there)
        self.files[transfer.url] = self._file(transfer.source)
        return transfer.copied(there, await self.stat(transfer.url))

    async def remove(self, url: str) -> None:
        await anyio.sleep(0)
        self._file(url)
        del self.files[url]

    def _file(self, url: str) -> bytes:
        if url not in self.files:
            raise NotFound(url, "there is no such file")
        return self.files[url]


def size_of(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


def fill(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


async def moved(storage: LocalStorage, direction: Direction, url: str, local: LocalBytes) -> FileInfo:
    """Have it moved; raises what came of it if that is an error."""
    transfer = Transfer(direction, url, local)
    await storage.move([transfer], lambda _: None)
    if isinstance(transfer.result, FileInfo):
        return transfer.result
    assert transfer.result is not None
    raise transfer.result


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """An empty file."""
    descriptor = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


# -- the local one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "link to a fifo"])
async def test_what_is_no_file_is_refused_without_hanging(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "input"
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "directory":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case _:
            os.mkfifo(tmp_path / "fifo")
            path.symlink_to("fifo")
    with anyio.fail_after(5), pytest.raises(StorageError, match=r"is a directory|is not a regular file") as caught:
        await moved(LocalStorage(), Direction.DOWNLOAD, file_url(path), LocalBytes())
    assert not caught.value.retryable
    with pytest.raises(StorageError, match=r"is a directory|is not a regular file"):
        await LocalStorage().stat(file_url(path))


async def test_a_name_that_is_no_text_is_a_name(tmp_path: Path) -> None:
    path, local = tmp_path / os.fsdecode(b"caf\xe9 \xff"), LocalBytes()
    await moved(LocalStorage(), Direction.UPLOAD, file_url(path), LocalBytes(b"content"))
    assert os.listdir(os.fsencode(tmp_path)).count(b"caf\xe9 \xff") == 1
    await moved(LocalStorage(), Direction.DOWNLOAD, file_url(path), local)
    assert local.content == b"content"


@pytest.mark.parametrize("url", ["file://elsewhere/x", "root://host//x", "file:relative", "file:///a%00b"])
async def test_a_url_that_is_no_path_here_is_a_storage_error(url: str) -> None:
    with pytest.raises(StorageError):
        await LocalStorage().stat(url)


async def test_an_upload_onto_a_directory_fails_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    (tmp_path / "se" / "file").mkdir(parents=True)
    with pytest.raises(StorageError):
        await moved(LocalStorage(), Direction.UPLOAD, file_url(tmp_path / "se" / "file"), LocalBytes())
    assert [path.name for path in (tmp_path / "se").iterdir()] == ["file"]


async def test_a_full_storage_element_is_named_and_has_no_part_left(small_disk: Path) -> None:
    url = file_url(small_disk / "file")
    with pytest.raises(NoSpace) as caught:
        await moved(LocalStorage(), Direction.UPLOAD, url, LocalBytes(size_bytes=4 * 1024 * 1024))
    assert caught.value.url == url
    assert list(small_disk.iterdir()) == []


async def test_a_script_stays_one_and_a_directory_made_for_it_is_made_once(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/bin/sh")
    script.chmod(0o755)
    target = IncomingPath(tmp_path / "new" / "script", sync=True)
    transfer = Transfer(Direction.DOWNLOAD, file_url(script), target)
    await LocalStorage().move([transfer], lambda _: None)
    assert isinstance(transfer.result, FileInfo)
    assert os.access(tmp_path / "new" / "script", os.X_OK)
    assert os.listdir(tmp_path / "new") == ["script"]


@pytest.fixture
def sharing_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk on which files may share blocks. Takes a system administrator."""
    image, disk = tmp_path / "image", tmp_path / "sharing disk"
    disk.mkdir()
    with image.open("wb") as file:
        file.truncate(256 * 1024**2)
    for command in (["mkfs.btrfs", "-q", str(image)], ["mount", "-o", "loop", str(image), str(disk)]):
        if shutil.which(command[0]) is None or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("no disk on which files share blocks can be made here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


async def test_large_files_share_their_blocks_where_the_disk_can_and_are_verified(sharing_disk: Path) -> None:
    data = os.urandom(64 * 1024**2)
    (sharing_disk / "file").write_bytes(data)
    os.sync()
    before = os.statvfs(sharing_disk)
    url, storage = file_url(sharing_disk), LocalStorage()
    for number in range(8):  # 512 MB on a disk of 256
        copy = Transfer(Direction.COPY, f"{url}/copy{number}", LocalBytes(), source=f"{url}/file")
        await storage.move([copy], lambda _: None)
        assert copy.result == FileInfo(len(data), Checksum("adler32", f"{zlib.adler32(data):08x}"))
    assert (sharing_disk / "copy7").read_bytes() == data
    incoming = IncomingPath(sharing_disk / "brought in", checksum=Checksum("adler32", "00000001"))
    down = Transfer(Direction.DOWNLOAD, f"{url}/file", incoming)
    await storage.move([down], lambda _: None)
    assert isinstance(down.result, ChecksumMismatch)
    assert not (sharing_disk / "brought in").exists()
    os.sync()
    assert (before.f_bfree - os.statvfs(sharing_disk).f_bfree) * before.f_bsize < len(data)


async def moved_alone(storage: LocalStorage, transfer: Transfer) -> Transfer:
    told: list[Transfer] = []
    await storage.move([transfer], told.extend)
    assert told == [transfer]
    return transfer


@pytest.mark.parametrize("size", [None, 5], ids=["nobody said", "said to be small"])
@pytest.mark.parametrize("way", [Direction.DOWNLOAD, Direction.UPLOAD], ids=lambda way: way.value)
async def test_a_file_is_found_to_be_large_and_is_moved(tmp_path: Path, way: Direction, size: int | None) -> None:
    """What is said of a size may be of yesterday; nothing is opened twice for it."""
    there = tmp_path / "there"
    content = os.urandom(1024**2)
    there.write_bytes(content)
    local = LocalBytes(content if way is Direction.UPLOAD else b"")
    transfer = Transfer(way, file_url(there), local, size_bytes=size)
    await moved_alone(LocalStorage(), transfer)
    assert transfer.result == FileInfo(1024**2, Checksum("adler32", f"{zlib.adler32(content):08x}"))
    assert local.calls.count("open") == 1
    assert there.read_bytes() == content


async def test_where_the_disk_is_slow_small_files_keep_nobody_else_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave the thread that others wait for, until the disk is fast again."""
    monkeypatch.setattr("loadmaster.storage.local.SLOW_SECONDS", 0.0)
    (tmp_path / "there").write_bytes(b"cargo")
    storage, there = LocalStorage(), file_url(tmp_path / "there")
    assert storage._may_be_brief(Transfer(Direction.DOWNLOAD, there, LocalBytes()))
    for _ in range(2):
        transfer = await moved_alone(storage, Transfer(Direction.DOWNLOAD, there, LocalBytes()))
        assert transfer.result == FileInfo(5, Checksum.parse("adler32:060b020d"))
        assert not storage._may_be_brief(transfer)
    upload = Transfer(Direction.UPLOAD, file_url(tmp_path / "se"), LocalBytes(b"results"))
    assert storage._may_be_brief(upload)  # each direction is judged by itself
    monkeypatch.setattr("loadmaster.storage.local.SLOW_SECONDS", 60.0)
    await moved_alone(storage, transfer)
    assert storage._may_be_brief(transfer)


async def test_options_of_the_site_that_are_none_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="synch: there is `sync`"):
        async with open_storage(StorageOptions("file", words={"synch": True})):
            pass
    async with open_storage(StorageOptions("file", words={"sync": False})) as storage:
        await moved(storage, Direction.UPLOAD, file_url(tmp_path / "a"), LocalBytes(b"content"))
    assert (tmp_path / "a").read_bytes() == b"content"


def test_what_an_ordinary_user_may_not_touch_is_denied(as_ordinary_user: Callable[[str], str]) -> None:
    script = """
from pathlib import Path
from loadmaster.errors import AccessDenied
from loadmaster.names import file_url
from loadmaster.staging.files import OutgoingPath, IncomingPath
from loadmaster.storage.base import Direction, Transfer
from loadmaster.storage.local import LocalStorage

Path("secret").touch(mode=0)
Path("closed").mkdir(mode=0o500)
Path("file").touch()
storage, here = LocalStorage(), Path.cwd()

async def refused(direction, url, local):
    transfer = Transfer(direction, url, local)
    await storage.move([transfer], lambda _: None)
    if isinstance(transfer.result, AccessDenied):
        print("denied", transfer.result.retryable)

async def main():
    await refused(Direction.DOWNLOAD, file_url(here / "secret"), IncomingPath(here / "in"))
    await refused(Direction.UPLOAD, file_url(here / "closed" / "file"), OutgoingPath(here / "file"))
    await refused(Direction.UPLOAD, file_url(here / "closed" / "new" / "file"), OutgoingPath(here / "file"))

anyio.run(main)
assert list(Path("closed").iterdir()) == []
"""
    assert as_ordinary_user(script) == "denied False\n" * 3
    assert not AccessDenied.retryable


async def test_an_input_that_shrinks_while_it_is_copied_is_not_taken_for_whole(tmp_path: Path) -> None:
    """The size at the end was compared for outputs only: half an input passed."""
    path = tmp_path / "input"
    with path.open("wb") as file:
        file.truncate(LARGE_BYTES)
    transfer = Transfer(Direction.DOWNLOAD, file_url(path), LocalBytes(device=os.devnull))
    async with under_way(local_place(LocalStorage(), tmp_path, ""), transfer):
        os.truncate(path, 3)
    assert str(transfer.result) == f"{file_url(path)}: changed while it was copied"


def test_a_checksum_is_of_the_whole_file_from_its_beginning(source: int) -> None:
    data = os.urandom(3_000_000)
    fill(source, data)
    os.lseek(source, 0, os.SEEK_END)
    results: list[FileInfo] = []

    async def main() -> None:
        results.append(await anyio.to_thread.run_sync(checksum, source))

    anyio.run(main)
    assert (results[0].size_bytes, str(results[0].checksum)) == (len(data), f"adler32:{zlib.adler32(data):08x}")
