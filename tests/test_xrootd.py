"""XRootD by its own client library: what every storage promises, and what servers do to us."""

from __future__ import annotations

import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loadmaster.conformance import NAMES, LocalBytes, Place, StorageConformance, local_place
from loadmaster.errors import ChecksumMismatch, InvalidSite, NotFound, StorageError
from loadmaster.storage.base import Ability, Clears, Direction, FileInfo, StorageOptions, Transfer
from servers_objects import xrootd

pytest.importorskip("XRootD")

from loadmaster.storage import xrootd as storage_module
from loadmaster.storage.xrootd import open_storage


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Path]]:
    """Where it is, and its directory. The library connects, and starts its threads, before anybody counts."""
    with xrootd() as (url, root, _):
        storage_module.client.FileSystem(url).stat("/", timeout=10)
        yield url, root


def options(**words: object) -> StorageOptions:
    return StorageOptions(scheme="root", words=words)


@pytest.fixture
async def place(server: tuple[str, Path]) -> AsyncIterator[Place]:
    url, root = server
    name = uuid.uuid4().hex
    async with open_storage(options()) as storage:
        yield local_place(storage, root / name, f"{url}/{name}")


class TestXrootd(StorageConformance):
    @pytest.fixture
    async def place(self, server: tuple[str, Path]) -> AsyncIterator[Place]:
        url, root = server
        name = uuid.uuid4().hex
        async with open_storage(options()) as storage:
            yield local_place(storage, root / name, f"{url}/{name}")

    @pytest.mark.parametrize("name", [name for name in NAMES if "?" not in name])
    async def test_names_are_kept_as_they_are(self, place: Place, name: str) -> None:
        await super().test_names_are_kept_as_they_are(place, name)


async def test_a_name_xrootd_cannot_have_is_refused(place: Place) -> None:
    for name in ("what?", "a\nb", "../up", "\udcff"):
        url = f"{place.base}/{name}".replace("?", "%3F").replace("\n", "%0A").replace("\udcff", "%FF")
        with pytest.raises(StorageError, match="no URL of a file") as refused:
            await place.storage.stat(url)
        assert not refused.value.retryable


async def test_what_an_upload_that_was_broken_off_has_left_is_removed(place: Place) -> None:
    for name in ("d/file", "d/.0123.part", "d/.4567.part"):
        await place.put(name, b"content")
    assert isinstance(place.storage, Clears)
    for _ in range(2):  # the second time there is nothing: no harm is done
        await place.storage.clear(place.url("d/file"), [".0123.part", ".89ab.part"])
    assert place.names() == ["d/.4567.part", "d/file"]


async def test_stat_has_the_servers_checksum(place: Place) -> None:
    await place.put("file", b"hello")
    found = await place.storage.stat(place.url("file"))
    assert found == FileInfo(5, found.checksum)
    assert str(found.checksum) == "adler32:062c0215"


async def test_a_server_need_not_be_asked_for_checksums(server: tuple[str, Path]) -> None:
    async with open_storage(options(checksums=False)) as storage:
        assert not storage.abilities & Ability.CHECKSUMS
        url = f"{server[0]}/{uuid.uuid4().hex}"
        up = Transfer(Direction.UPLOAD, url, LocalBytes(b"hello"))
        await storage.move([up], lambda _: None)
        assert await storage.stat(url) == FileInfo(5)


async def test_a_directory_is_no_file(place: Place) -> None:
    await place.put("d/file", b"hello")
    with pytest.raises(StorageError, match="is a directory"):
        await place.storage.stat(place.url("d"))
    with pytest.raises(StorageError, match="directory"):
        await place.get("d")


async def test_a_file_larger_than_expected_does_not_fill_our_disk(place: Place) -> None:
    await place.put("file", b"content")
    down = place.download("file", local := LocalBytes())
    down.size_bytes = 3
    await place.move(down)
    assert isinstance(down.result, ChecksumMismatch)
    assert local.content == b""


async def test_what_follows_the_path_of_a_url_is_not_told(place: Place) -> None:
    with pytest.raises(NotFound) as missing:
        await place.storage.stat(place.url("nowhere") + "?authz=Bearer%20hush")
    assert "hush" not in str(missing.value)


@pytest.mark.parametrize("words", [{"tokne_file": "x"}, {"stall_seconds": -1}])
async def test_words_that_are_not_understood_are_named(words: dict[str, object]) -> None:
    with pytest.raises(InvalidSite, match=rf"\[storage.root\] {next(iter(words))}: "):
        async with open_storage(options(**words)):
            pass


# -- servers that do what they should not: in a process of their own, for the library keeps connections -----------------

SCRIPT = """
import sys, anyio, os, signal, time
sys.path.insert(0, {tests!r})
from loadmaster.conformance import LocalBytes
from loadmaster.storage.base import Direction, StorageOptions, Transfer
from loadmaster.storage.xrootd import open_storage

async def main():
    words = {{"stall_seconds": {seconds}}}
    async with open_storage(StorageOptions(scheme="root", words=words)) as storage:
        transfer = Transfer(Direction.{direction}, {url!r}, local := LocalBytes(size_bytes={size}))
        began = time.monotonic()
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                group.start_soon(storage.move, [transfer], lambda _: None)
                {during}
        print(type(transfer.result).__name__, getattr(transfer.result, "retryable", None), local.calls,
              round(time.monotonic() - began), transfer.result, sep="|")

anyio.run(main, backend={backend!r})
"""

UNTIL_BEGUN = """while transfer.done_bytes == 0:
                    await anyio.sleep(0.001)
                """


def told(
    backend: str, url: str, during: str, *, direction: str = "DOWNLOAD", size: int = 0, seconds: float = 1
) -> list[str]:
    words = {"url": url, "during": during, "direction": direction, "size": size, "seconds": seconds}
    script = SCRIPT.format(tests=str(Path(__file__).parent), backend=backend, **words)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize(
    ("direction", "how"), [("DOWNLOAD", "SIGSTOP"), ("DOWNLOAD", "SIGKILL"), ("UPLOAD", "SIGSTOP")]
)
def test_a_server_that_stops_in_the_middle_is_given_up(backend: str, direction: str, how: str) -> None:
    with xrootd() as (url, root, process):
        with (root / "large").open("wb") as large:
            large.truncate(8 * 1024**3)
        name = "large" if direction == "DOWNLOAD" else "new"
        during = UNTIL_BEGUN + f"os.kill({process.pid}, signal.{how})"
        answer = told(backend, f"{url}/{name}", during, direction=direction, size=8 * 1024**3)
        assert not (root / "new").exists()
    assert answer[:2] == ["StorageUnavailable", "True"]
    assert answer[2] == "['open', 'discard']"
    assert int(answer[3]) < 15


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("leave", ["group.cancel_scope.cancel()", "transfer.give_up()"])
def test_a_server_that_never_answers_does_not_hold_us(backend: str, leave: str) -> None:
    during = f"await anyio.sleep(0.5)\n                {leave}"
    with _silent() as url:
        answer = told(backend, f"{url}/file", during, seconds=600)
    assert answer[0] == ("NoneType" if "cancel" in leave else "StorageUnavailable")
    assert answer[2] == "['open', 'discard']"
    assert int(answer[3]) <= 2


def test_a_server_that_never_answers_is_told_of() -> None:
    with _silent() as url:
        answer = told("asyncio", f"{url}/file", "pass")
    assert answer[:2] == ["StorageUnavailable", "True"]
    assert "no answer for 1 s" in answer[4]


@contextmanager
def _silent() -> Iterator[str]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"root://127.0.0.1:{listener.getsockname()[1]}/"
