"""The threads of a storage over HTTP: which of them has which file, and how many files move at once."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import anyio
import pytest

from loadmaster.conformance import LocalBytes
from loadmaster.storage.base import Direction, FileInfo, StorageOptions, Transfer
from loadmaster.storage.carrier import USUAL_PACE, Request, Script
from loadmaster.storage.crew import LARGE_BYTES, Crew
from loadmaster.storage.http import open_http
from servers import Fault, HostileServer, Server, nginx

LARGE = LARGE_BYTES + 5


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home") as server:
        (server.root / "large").write_bytes(os.urandom(1024) * (LARGE_BYTES // 1024) + b"end..")
        (server.root / "small").write_bytes(b"small")
        yield server


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


def download(url: str, size_bytes: int | None) -> Transfer:
    return Transfer(Direction.DOWNLOAD, url, LocalBytes(), size_bytes=size_bytes)


def upload(url: str, content: bytes) -> Transfer:
    return Transfer(Direction.UPLOAD, url, LocalBytes(content), size_bytes=len(content))


def threads() -> int:
    return sum(thread.name == "loadmaster http" for thread in threading.enumerate())


async def test_large_files_have_threads_of_their_own_which_end_with_the_storage(web: Server) -> None:
    cores = len(os.sched_getaffinity(0))
    async with open_http(StorageOptions(scheme="http")) as storage:
        await storage.move([download(f"{web.url}/small", 5) for _ in range(20)], lambda _: None)
        assert threads() == 1
        several = [download(f"{web.url}/large", LARGE) for _ in range(6)] + [download(f"{web.url}/small", 5)]
        ended: list[Transfer] = []
        await storage.move(several, ended.extend)
        assert threads() == 1 + min(4, cores)
    assert threads() == 0
    assert sorted(map(id, ended)) == sorted(map(id, several))
    assert [transfer.result for transfer in several[:-1]] == [several[0].result] * 6
    assert isinstance(several[0].result, FileInfo)
    assert several[0].result.size_bytes == LARGE


async def test_what_large_files_bring_back_is_what_was_sent(web: Server) -> None:
    content = os.urandom(4096) * (LARGE_BYTES // 4096) + b"and more"
    async with open_http(StorageOptions(scheme="dav")) as storage:
        sent = [upload(f"{web.url.replace('http', 'dav')}/up/{number}", content) for number in range(3)]
        await storage.move(sent, lambda _: None)
        back = [download(f"{web.url.replace('http', 'dav')}/up/{number}", len(content)) for number in range(3)]
        await storage.move(back, lambda _: None)
    assert {transfer.result for transfer in (*sent, *back)} == {sent[0].result}
    assert isinstance(sent[0].result, FileInfo)
    for transfer in back:
        assert isinstance(transfer.local, LocalBytes)
        assert transfer.local.content == content


async def test_streams_are_counted_over_all_threads(hostile: HostileServer) -> None:
    """Large and small ones at once: no more than there are streams, and one for the small while the large have all."""
    hostile.files["/f"] = b"content"
    crew = Crew("http", 3, {}, USUAL_PACE)
    lock = threading.Lock()
    now: dict[bool, int] = {True: 0, False: 0}
    seen: list[tuple[int, int]] = []

    def script(transfer: Transfer) -> Script:
        large = (transfer.size_bytes or 0) >= LARGE_BYTES
        with lock:
            now[large] += 1
            seen.append((now[True], now[False]))
        yield Request("GET", transfer.url)
        yield Request("GET", transfer.url)
        with lock:
            now[large] -= 1
        transfer.result = FileInfo(7)

    ended: list[Transfer] = []
    large = [download(f"{hostile.url}/f", LARGE) for _ in range(12)]
    small = [download(f"{hostile.url}/f", 7) for _ in range(60)]
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(crew.run, Direction.DOWNLOAD, [*large, *small[:30]], script, ended.extend)
            group.start_soon(crew.run, Direction.DOWNLOAD, small[30:], script, ended.extend)
        after = len(seen)
        await crew.run(Direction.DOWNLOAD, [download(f"{hostile.url}/f", 7) for _ in range(30)], script, ended.extend)
    finally:
        await crew.close()
    assert len(ended) == 102
    assert max(large for large, _ in seen) <= 3
    assert max(sum(both) for both in seen) <= 6  # those that were under way when the large ones came go on
    assert max(small for _, small in seen[after:]) == 3  # all are theirs again


async def test_a_large_transfer_that_is_given_up_ends_in_whichever_thread_it_is(hostile: HostileServer) -> None:
    hostile.files["/f"] = bytes(1000)
    hostile.orders = lambda asked: Fault("stall")
    transfer = download(f"{hostile.url}/f", LARGE)
    async with open_http(StorageOptions(scheme="http")) as storage, anyio.create_task_group() as group:
        group.start_soon(storage.move, [transfer], lambda _: None)
        while not hostile.asked:
            await anyio.sleep(0.01)
        transfer.give_up()
    assert "given up" in str(transfer.result)
