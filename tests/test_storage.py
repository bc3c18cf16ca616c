"""What every storage promises, and what the local one adds.

A later storage joins by its line in `PLACES`: a context manager that makes one below a directory of the test.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

from conftest import until
from loadmaster import StorageError
from loadmaster.errors import AccessDenied, NoSpace, NotFound, StorageUnavailable
from loadmaster.names import file_url, join_url
from loadmaster.storage.base import Progress, Storage
from loadmaster.storage.local import LocalStorage, checksum

LARGE_BYTES = 8 * 1024**3
"""Of a sparse file: far more than a storage can take before it is cancelled, and nothing on the source's disk."""


@dataclass(frozen=True)
class Place:
    """A storage, and a look behind it."""

    storage: Storage
    base: str
    names: Callable[[], list[str]]
    """Everything that is there, partial files included."""

    def url(self, name: str) -> str:
        return join_url(self.base, name)


@contextmanager
def local(directory: Path) -> Iterator[Place]:
    directory.mkdir()
    yield Place(
        LocalStorage(),
        file_url(directory),
        lambda: sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()),
    )


PLACES: dict[str, Callable[[Path], AbstractContextManager[Place]]] = {"local": local}


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with PLACES[request.param](tmp_path / "storage") as place:
        yield place


@pytest.fixture
def source(tmp_path: Path) -> Iterator[int]:
    """An empty file to upload from."""
    descriptor = os.open(tmp_path / "source", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def target(tmp_path: Path) -> Iterator[int]:
    """An empty file to download to."""
    descriptor = os.open(tmp_path / "target", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield descriptor
    os.close(descriptor)


def fill(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, content, 0)


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def adler32(data: bytes) -> str:
    return f"{zlib.adler32(data):08x}"


@asynccontextmanager
async def under_way(work: Callable[[Progress], object]) -> AsyncIterator[anyio.CancelScope]:
    """A transfer that has begun; cancel what is given."""
    progress = Progress()
    async with anyio.create_task_group() as group:
        group.start_soon(work, progress)  # type: ignore[arg-type]
        await until(lambda: progress.done_bytes > 0)
        yield group.cancel_scope


# -- every storage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4096, 1024 * 1024, 3 * 1024 * 1024 + 7])
async def test_what_went_in_comes_out(place: Place, source: int, target: int, size: int) -> None:
    data = os.urandom(size)
    fill(source, data)
    sent, received = Progress(), Progress()
    up = await place.storage.upload(source, place.url("file"), sent)
    down = await place.storage.download(place.url("file"), target, received)
    assert content(target) == data
    assert up == down
    assert (up.size_bytes, up.adler32) == (size, adler32(data))
    assert sent.done_bytes == received.done_bytes == size


async def test_what_is_there_has_its_size_and_the_right_checksum_or_none(place: Place, source: int) -> None:
    fill(source, b"content")
    await place.storage.upload(source, place.url("d/e/file"), Progress())
    found = await place.storage.stat(place.url("d/e/file"))
    assert found.size_bytes == 7
    assert found.adler32 in {None, adler32(b"content")}
    assert place.names() == ["d/e/file"]


async def test_an_upload_starts_at_the_beginning_and_leaves_the_descriptor_where_it_was(
    place: Place, source: int, target: int
) -> None:
    fill(source, b"content")
    os.lseek(source, 3, os.SEEK_SET)
    for name in ("first", "second"):
        await place.storage.upload(source, place.url(name), Progress())
    assert os.lseek(source, 0, os.SEEK_CUR) == 3
    await place.storage.download(place.url("second"), target, Progress())
    assert content(target) == b"content"


async def test_an_upload_replaces_what_was_there(place: Place, source: int, target: int) -> None:
    for data in (b"a longer content", b"new"):
        fill(source, data)
        await place.storage.upload(source, place.url("file"), Progress())
    await place.storage.download(place.url("file"), target, Progress())
    assert content(target) == b"new"
    assert place.names() == ["file"]


async def test_what_is_not_there_is_not_found(place: Place, target: int) -> None:
    for url in (place.url("nowhere"), place.url("no/where")):
        with pytest.raises(NotFound, match=r"nowhere|no/where") as stat:
            await place.storage.stat(url)
        with pytest.raises(NotFound):
            await place.storage.download(url, target, Progress())
        with pytest.raises(NotFound):
            await place.storage.remove(url)
        assert stat.value.url == url
        assert not stat.value.retryable
    assert content(target) == b""


async def test_what_is_removed_is_not_there(place: Place, source: int) -> None:
    await place.storage.upload(source, place.url("file"), Progress())
    await place.storage.remove(place.url("file"))
    assert place.names() == []
    with pytest.raises(NotFound):
        await place.storage.stat(place.url("file"))


@pytest.mark.parametrize(
    "name",
    [
        "n" * 255,
        "ü" * 127,
        "a b",
        "100%",
        "a%20b",
        "what?",
        "#1",
        "a+b&c=d;e",
        "'\"",
        "日本",
        "~",
        "-rf",
        "a:b@c",
        "[x]",
    ],
)
async def test_names_are_kept_as_they_are(place: Place, source: int, target: int, name: str) -> None:
    fill(source, b"content")
    await place.storage.upload(source, place.url(name), Progress())
    assert place.names() == [name]
    await place.storage.download(place.url(name), target, Progress())
    assert content(target) == b"content"


async def test_a_name_that_is_too_long_is_a_storage_error(place: Place, source: int) -> None:
    with pytest.raises(StorageError):
        await place.storage.upload(source, f"{place.base}/{'n' * 256}/file", Progress())
    assert place.names() == []


async def test_a_cancelled_upload_leaves_nothing(place: Place, source: int) -> None:
    os.ftruncate(source, LARGE_BYTES)
    with anyio.fail_after(20):
        async with under_way(lambda p: place.storage.upload(source, place.url("file"), p)) as scope:
            scope.cancel()
    assert place.names() == []


async def test_a_cancelled_upload_leaves_what_was_there(place: Place, source: int, target: int) -> None:
    fill(source, b"before")
    await place.storage.upload(source, place.url("file"), Progress())
    os.ftruncate(source, LARGE_BYTES)
    with anyio.fail_after(20):
        async with under_way(lambda p: place.storage.upload(source, place.url("file"), p)) as scope:
            scope.cancel()
    assert place.names() == ["file"]
    await place.storage.download(place.url("file"), target, Progress())
    assert content(target) == b"before"


async def test_the_name_never_holds_half_a_file(place: Place, source: int) -> None:
    """While the upload is under way the name is not there, or is the whole file."""
    os.ftruncate(source, LARGE_BYTES)
    async with under_way(lambda p: place.storage.upload(source, place.url("file"), p)) as scope:
        with pytest.raises(NotFound):
            await place.storage.stat(place.url("file"))
        scope.cancel()


async def test_a_cancelled_download_stops_soon(place: Place, source: int, tmp_path: Path) -> None:
    fill(source, os.urandom(1024 * 1024))
    os.ftruncate(source, 96 * 1024**2)
    await place.storage.upload(source, place.url("file"), Progress())
    null = os.open(os.devnull, os.O_WRONLY)
    progress = Progress()
    async with anyio.create_task_group() as group:
        group.start_soon(place.storage.download, place.url("file"), null, progress)
        await until(lambda: progress.done_bytes > 0)
        group.cancel_scope.cancel()
    os.close(null)
    assert 0 < progress.done_bytes < 96 * 1024**2


async def test_a_file_that_changes_while_it_is_sent_is_not_stored(place: Place, source: int) -> None:
    os.ftruncate(source, LARGE_BYTES)
    with pytest.raises(StorageUnavailable, match="changed while it was copied") as caught:
        await upload_and(place, source, lambda: os.ftruncate(source, 3))
    assert caught.value.retryable
    assert place.names() == []


async def upload_and(place: Place, source: int, then: Callable[[], None]) -> None:
    progress, errors = Progress(), list[StorageError]()

    async def upload() -> None:
        try:
            await place.storage.upload(source, place.url("file"), progress)
        except StorageError as exc:
            errors.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(upload)
        await until(lambda: progress.done_bytes > 0)
        then()
    if errors:
        raise errors[0]


async def test_many_transfers_at_once_do_not_mix(place: Place, tmp_path: Path) -> None:
    results: dict[str, bytes] = {}

    async def there_and_back(number: int) -> None:
        data = f"{number} ".encode() * 100_000
        with (tmp_path / f"in{number}").open("wb+") as inward, (tmp_path / f"out{number}").open("wb+") as outward:
            fill(inward.fileno(), data)
            await place.storage.upload(inward.fileno(), place.url(f"f{number}"), Progress())
            await place.storage.download(place.url(f"f{number}"), outward.fileno(), Progress())
            results[f"f{number}"] = content(outward.fileno())
            assert results[f"f{number}"] == data

    async with anyio.create_task_group() as group:
        for number in range(20):
            group.start_soon(there_and_back, number)
    assert place.names() == sorted(results)
    assert len(results) == 20


async def test_the_last_of_many_writers_wins_with_a_whole_file(place: Place, tmp_path: Path, target: int) -> None:
    async def write(number: int) -> None:
        with (tmp_path / f"in{number}").open("wb+") as file:
            fill(file.fileno(), bytes([number]) * 2_000_000)
            await place.storage.upload(file.fileno(), place.url("file"), Progress())

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(write, number)
    await place.storage.download(place.url("file"), target, Progress())
    data = content(target)
    assert len(data) == 2_000_000
    assert len(set(data)) == 1
    assert place.names() == ["file"]


# -- the local one -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "link to a fifo"])
async def test_what_is_no_file_is_refused_without_hanging(tmp_path: Path, target: int, kind: str) -> None:
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
        await LocalStorage().download(file_url(path), target, Progress())
    assert not caught.value.retryable
    with pytest.raises(StorageError, match=r"is a directory|is not a regular file"):
        await LocalStorage().stat(file_url(path))


async def test_a_name_that_is_no_text_is_a_name(tmp_path: Path, source: int, target: int) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9 \xff")
    fill(source, b"content")
    await LocalStorage().upload(source, file_url(path), Progress())
    assert os.listdir(os.fsencode(tmp_path)).count(b"caf\xe9 \xff") == 1
    await LocalStorage().download(file_url(path), target, Progress())
    assert content(target) == b"content"


@pytest.mark.parametrize("url", ["file://elsewhere/x", "root://host//x", "file:relative", "file:///a%00b"])
async def test_a_url_that_is_no_path_here_is_a_storage_error(url: str) -> None:
    with pytest.raises(StorageError):
        await LocalStorage().stat(url)


async def test_an_upload_onto_a_directory_fails_and_leaves_nothing_beside_it(tmp_path: Path, source: int) -> None:
    (tmp_path / "se" / "file").mkdir(parents=True)
    with pytest.raises(StorageError):
        await LocalStorage().upload(source, file_url(tmp_path / "se" / "file"), Progress())
    assert [path.name for path in (tmp_path / "se").iterdir()] == ["file"]


async def test_a_full_storage_element_is_named_and_has_no_part_left(small_disk: Path, source: int) -> None:
    os.ftruncate(source, 4 * 1024 * 1024)
    url = file_url(small_disk / "file")
    with pytest.raises(NoSpace) as caught:
        await LocalStorage().upload(source, url, Progress())
    assert caught.value.url == url
    assert list(small_disk.iterdir()) == []


async def test_a_full_work_directory_is_named_not_the_storage_element(small_disk: Path, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(4 * 1024 * 1024)
    target = os.open(small_disk / "target", os.O_RDWR | os.O_CREAT)
    with pytest.raises(NoSpace) as caught:
        await LocalStorage().download(file_url(tmp_path / "large"), target, Progress())
    os.close(target)
    assert caught.value.url == "the work directory"


def test_what_an_ordinary_user_may_not_touch_is_denied(as_ordinary_user: Callable[[str], str]) -> None:
    script = """
from pathlib import Path
from loadmaster.errors import AccessDenied
from loadmaster.names import file_url
from loadmaster.storage.base import Progress
from loadmaster.storage.local import LocalStorage

Path("secret").touch(mode=0)
Path("closed").mkdir(mode=0o500)
file = os.open("file", os.O_RDWR | os.O_CREAT)
storage, here = LocalStorage(), Path.cwd()

async def refused(what, *args):
    try:
        await what(*args)
    except AccessDenied as exc:
        print("denied", exc.retryable)

async def main():
    await refused(storage.download, file_url(here / "secret"), file, Progress())
    await refused(storage.upload, file, file_url(here / "closed" / "file"), Progress())
    await refused(storage.upload, file, file_url(here / "closed" / "new" / "file"), Progress())

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
    progress, caught = Progress(), list[StorageError]()
    null = os.open(os.devnull, os.O_WRONLY)

    async def download() -> None:
        try:
            await LocalStorage().download(file_url(path), null, progress)
        except StorageError as exc:
            caught.append(exc)

    async with anyio.create_task_group() as group:
        group.start_soon(download)
        await until(lambda: progress.done_bytes > 0)
        os.truncate(path, 3)
    os.close(null)
    assert [str(exc) for exc in caught] == [f"{file_url(path)}: changed while it was copied"]


def test_a_checksum_is_of_the_whole_file_from_its_beginning(source: int) -> None:
    data = os.urandom(3_000_000)
    fill(source, data)
    os.lseek(source, 0, os.SEEK_END)
    results = []

    async def main() -> None:
        results.append(await anyio.to_thread.run_sync(checksum, source))

    anyio.run(main)
    assert (results[0].size_bytes, results[0].adler32) == (len(data), adler32(data))
