"""Large bodies that are read from the connection itself: whole, or as much as came, whatever the other side does."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import anyio
import pytest

from conftest import until
from loadmaster.conformance import LocalBytes
from loadmaster.errors import ChecksumMismatch, NoSpace, StorageError, StorageUnavailable
from loadmaster.storage.base import Direction, FileInfo, StorageOptions, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.crew import LARGE_BYTES
from loadmaster.storage.direct import Direct
from loadmaster.storage.http import open_http
from servers import Fault, HostileServer, make_certificates

CONTENT = os.urandom(8192) * (LARGE_BYTES // 8192) + b"end"
SUM = Checksum("adler32", f"{zlib.adler32(CONTENT):08x}")
WORDS = {"stall_seconds": 1, "stall_bytes_per_second": 10_000, "connect_seconds": 5}


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        server.files["/f"] = CONTENT
        yield server


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The descriptors that are read directly, as they are."""
    seen: list[int] = []
    read = Direct.read

    def noted(self: Direct) -> bool:
        seen.append(self.descriptor)
        return read(self)

    monkeypatch.setattr(Direct, "read", noted)
    return seen


def wanted(server: HostileServer, local: LocalBytes | None = None) -> Transfer:
    return Transfer(Direction.DOWNLOAD, f"{server.url}/f", local or LocalBytes(), size_bytes=len(CONTENT))


def content(transfer: Transfer) -> bytes:
    assert isinstance(transfer.local, LocalBytes)
    return transfer.local.content


async def fetched(*transfers: Transfer, words: dict[str, object] | None = None) -> None:
    scheme = transfers[0].url.partition(":")[0]
    async with open_http(StorageOptions(scheme=scheme, words={**WORDS, **(words or {})})) as storage:
        for transfer in transfers:
            await storage.move([transfer], lambda _: None)


async def test_a_large_body_is_read_directly_and_is_whole(server: HostileServer, reads: list[int]) -> None:
    transfers = [wanted(server) for _ in range(3)]  # one after another, by the same handle of libcurl's
    await fetched(*transfers)
    for transfer in transfers:
        assert transfer.result == FileInfo(len(CONTENT), SUM)
        assert content(transfer) == CONTENT
    assert len(reads) >= 3


async def test_a_part_of_a_file_is_read_directly_to_its_place(server: HostileServer, reads: list[int]) -> None:
    server.files["/f"] = os.urandom(1000) + CONTENT + os.urandom(1000)
    transfer = Transfer(
        Direction.DOWNLOAD, f"{server.url}/f", LocalBytes(), first_byte=1000, last_byte=999 + len(CONTENT)
    )
    await fetched(transfer)
    assert transfer.result == FileInfo(len(CONTENT), SUM)
    assert content(transfer)[1000:] == CONTENT
    assert reads


@pytest.mark.parametrize("kind", ["truncated", "reset halfway", "stall halfway", "long length"])
async def test_what_breaks_off_is_told_with_as_much_as_came(server: HostileServer, reads: list[int], kind: str) -> None:
    server.orders = lambda asked: Fault(kind)
    transfer = wanted(server)
    await fetched(transfer)
    assert isinstance(transfer.result, StorageUnavailable)
    assert transfer.result.retryable
    assert transfer.result.url == transfer.url
    assert transfer.done_bytes <= len(content(transfer))
    assert content(transfer)[: transfer.done_bytes] == CONTENT[: transfer.done_bytes]
    if kind != "reset halfway":  # which takes what was not read yet along
        assert transfer.done_bytes >= len(CONTENT) // 2
    assert reads


async def test_more_than_is_expected_is_not_written(server: HostileServer) -> None:
    server.files["/f"] = CONTENT + bytes(LARGE_BYTES)
    transfer = wanted(server)
    await fetched(transfer)
    assert isinstance(transfer.result, ChecksumMismatch)
    assert len(content(transfer)) <= len(CONTENT)


async def test_a_full_disk_is_said_to_be_full(server: HostileServer, reads: list[int]) -> None:
    transfer = wanted(server, LocalBytes(device="/dev/full"))
    await fetched(transfer)
    assert isinstance(transfer.result, NoSpace)


async def test_what_is_given_up_while_it_is_read_ends(server: HostileServer, reads: list[int]) -> None:
    server.orders = lambda asked: Fault("stall halfway")
    transfer = wanted(server)
    async with open_http(StorageOptions(scheme="http")) as storage, anyio.create_task_group() as group:
        group.start_soon(storage.move, [transfer], lambda _: None)
        await until(lambda: transfer.done_bytes >= len(CONTENT) // 2)
        transfer.give_up()
    assert isinstance(transfer.result, StorageError)
    assert "given up" in str(transfer.result)
    assert reads


async def test_what_is_cancelled_while_it_is_read_is_discarded(server: HostileServer, reads: list[int]) -> None:
    server.orders = lambda asked: Fault("stall halfway")
    transfer = wanted(server)
    async with open_http(StorageOptions(scheme="http")) as storage, anyio.create_task_group() as group:
        group.start_soon(storage.move, [transfer], lambda _: None)
        await until(lambda: transfer.done_bytes >= len(CONTENT) // 2)
        group.cancel_scope.cancel()
    assert reads
    assert transfer.local.calls == ["open", "discard"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("how", ["chunked", "tls"])
async def test_what_is_no_plain_body_is_left_to_libcurl(
    server: HostileServer, reads: list[int], how: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if how == "chunked":
        server.orders = lambda asked: Fault("chunked")
        transfer = wanted(server)
        await fetched(transfer)
    else:
        certificates = make_certificates(tmp_path_factory.mktemp("certificates"))
        with HostileServer(tls=certificates.for_server()) as secure:
            secure.files["/f"] = CONTENT
            transfer = wanted(secure)
            await fetched(transfer, words={"ca_file": str(certificates.authority)})
    assert transfer.result == FileInfo(len(CONTENT), SUM)
    assert content(transfer) == CONTENT
    assert not reads
