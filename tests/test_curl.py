"""Storages over HTTP: what every storage promises, and what they do with servers that do not keep theirs."""

from __future__ import annotations

import base64
import hashlib
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from xml.etree import ElementTree

import anyio
import pytest

from loadmaster import StorageError
from loadmaster.conformance import NAMES, LocalBytes, Place, StorageConformance, holding, local_place
from loadmaster.errors import (
    AccessDenied,
    CannotCopy,
    ChecksumMismatch,
    InvalidSite,
    NoSpace,
    NotFound,
    StorageUnavailable,
)
from loadmaster.storage.base import Direction, FileInfo, Step, StorageOptions, Transfer
from loadmaster.storage.checksums import running
from loadmaster.storage.http import open_http
from loadmaster.storage.s3 import open_s3
from servers import Asked, Fault, HostileServer, Server, http_date, make_certificates, moto, nginx

KEYS = {"access_key": "AK", "secret_key": "SK"}


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home") as server:
        yield server


@pytest.fixture(scope="session")
def plain_dav(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home", makes_directories=False) as server:
        yield server


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as url:
        yield url


@pytest.fixture
def hostile() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture(autouse=True)
def no_credentials_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "BEARER_", "X509_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def served(server: Server, scheme: str) -> tuple[str, Path]:
    name = os.urandom(8).hex()
    (server.root / name).mkdir()
    return f"{server.url.replace('http', scheme, 1)}/{name}", server.root / name


class TestHttp(StorageConformance):
    @pytest.fixture
    async def place(self, web: Server) -> AsyncIterator[Place]:
        url, directory = served(web, "http")
        async with open_http(StorageOptions(scheme="http")) as storage:
            yield local_place(storage, directory, url)


class TestDav(StorageConformance):
    @pytest.fixture(params=["makes directories", "does not"])
    async def place(self, web: Server, plain_dav: Server, request: pytest.FixtureRequest) -> AsyncIterator[Place]:
        url, directory = served(web if request.param == "makes directories" else plain_dav, "dav")
        async with open_http(StorageOptions(scheme="dav")) as storage:
            yield local_place(storage, directory, url)


class TestS3(StorageConformance):
    @pytest.fixture
    async def place(self, s3: str) -> AsyncIterator[Place]:
        prefix = os.urandom(8).hex()
        words = {"endpoint": s3, "part_bytes": 5 * 1024**2, **KEYS}
        async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
            yield Place(storage, f"s3://bucket/{prefix}", lambda: objects(s3, f"{prefix}/"))

    async def test_the_last_of_many_writers_wins_with_a_whole_file(self, place: Place) -> None:
        """moto answers 500 when two write one object at the same instant, so each tries again, as the engine does."""

        async def write(number: int) -> None:
            for _ in range(20):
                with suppress(StorageUnavailable):
                    await place.put("file", bytes([number]) * 2_000_000)
                    return
            pytest.fail(f"writer {number} never got through")

        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(write, number)
        data = await place.get("file")
        assert len(data) == 2_000_000
        assert len(set(data)) == 1


def objects(endpoint: str, prefix: str) -> list[str]:
    with urlopen(f"{endpoint}/bucket?list-type=2&max-keys=1000&prefix={prefix}", timeout=30) as answer:
        tree = ElementTree.fromstring(answer.read())
    keys = [key.text or "" for key in tree.iter() if key.tag.endswith("}Key")]
    return sorted(key.removeprefix(prefix) for key in keys)


# -- servers that do not keep what they promise ----------------------------------------------------------------------

QUICK = {"stall_seconds": 1, "stall_bytes_per_second": 10_000, "connect_seconds": 5}


async def fetched(url: str, words: dict[str, Any] | None = None, **about: Any) -> tuple[Transfer, LocalBytes]:
    """A download by a storage of its own."""
    local = LocalBytes()
    transfer = Transfer(Direction.DOWNLOAD, url, local, **about)
    async with open_http(StorageOptions(scheme=url.partition(":")[0], words=words or {})) as storage:
        await storage.move([transfer], lambda _: None)
    return transfer, local


async def sent(url: str, content: bytes, words: dict[str, Any] | None = None, **about: Any) -> Transfer:
    transfer = Transfer(Direction.UPLOAD, url, LocalBytes(content), **about)
    async with open_http(StorageOptions(scheme=url.partition(":")[0], words=words or {})) as storage:
        await storage.move([transfer], lambda _: None)
    return transfer


def was_discarded(local: LocalBytes) -> bool:
    """A small file is opened once all of it has come, a larger one before it is asked for."""
    return local.calls in (["discard"], ["open", "discard"])


def failure(transfer: Transfer) -> StorageError:
    assert isinstance(transfer.result, StorageError), transfer.result
    return transfer.result


@pytest.mark.parametrize(
    ("status", "kind", "retryable"),
    [
        (400, StorageError, False), (401, AccessDenied, False), (403, AccessDenied, False), (404, NotFound, False),
        (408, StorageUnavailable, True), (410, NotFound, False), (413, NoSpace, False), (416, StorageError, False),
        (429, StorageUnavailable, True), (500, StorageUnavailable, True), (502, StorageUnavailable, True),
        (503, StorageUnavailable, True), (504, StorageUnavailable, True), (507, NoSpace, False),
        (204, StorageUnavailable, True), (304, StorageUnavailable, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [None, 7])
async def test_a_status_says_what_went_wrong(
    hostile: HostileServer, status: int, kind: type[StorageError], retryable: bool, size: int | None
) -> None:
    hostile.files["/f"] = b"content"
    body = b"" if status in {204, 304} else b"sorry " * 20_000
    hostile.orders = lambda asked: Fault(str(status), body=body)
    transfer, local = await fetched(f"{hostile.url}/f", size_bytes=size)
    assert type(failure(transfer)) is kind
    assert failure(transfer).retryable is retryable
    assert f"HTTP {status}" in str(transfer.result)
    assert failure(transfer).url == f"{hostile.url}/f"
    assert was_discarded(local)


@pytest.mark.parametrize(
    ("said", "least", "most"),
    [("7", 7, 7), ("0", 0, 0), ("999999999", 3600, 3600), ("-5", 0, 0), ("soon", 0, 0), (None, 0, 0), ("date", 50, 61)],
)
async def test_a_server_may_say_when_to_come_again(
    hostile: HostileServer, said: str | None, least: float, most: float
) -> None:
    value = http_date(60) if said == "date" else said
    hostile.orders = lambda asked: Fault("503", (f"Retry-After: {value}",) if value else ())
    transfer, _ = await fetched(f"{hostile.url}/f")
    assert least <= (failure(transfer).retry_after or 0) <= most


@pytest.mark.parametrize("size", [None, 100_000])
@pytest.mark.parametrize(
    "kind",
    ["reset", "empty", "truncated", "stall", "drip", "long length", "nonsense", "half a head", "endless headers"],
)
async def test_what_does_not_arrive_whole_is_no_file_and_may_be_tried_again(
    hostile: HostileServer, kind: str, size: int | None
) -> None:
    hostile.files["/f"] = os.urandom(100_000)
    hostile.orders = lambda asked: Fault(kind)
    with anyio.fail_after(15):
        transfer, local = await fetched(f"{hostile.url}/f", QUICK, size_bytes=size)
    assert failure(transfer).retryable
    assert was_discarded(local)


@pytest.mark.parametrize("direction", [Direction.DOWNLOAD, Direction.UPLOAD])
async def test_what_stalls_on_a_connection_that_was_used_before_is_given_up_too(
    hostile: HostileServer, direction: Direction
) -> None:
    """libcurl's own watch has no timer there: two of sixty files hung until the deadline of the whole."""
    hostile.files = {f"/{n}": b"content" for n in range(60)}
    hostile.orders = lambda asked: Fault("stall") if asked.path in {"/20", "/41"} else None
    files = [Transfer(direction, f"{hostile.url}/{n}", LocalBytes(b"content"), size_bytes=7) for n in range(60)]
    async with open_http(StorageOptions(scheme="http", streams=4, words={"stall_seconds": 1})) as storage:
        with anyio.fail_after(15):
            await storage.move(files, lambda _: None)
    assert [n for n, file in enumerate(files) if not isinstance(file.result, FileInfo)] == [20, 41]
    assert all(failure(files[n]).retryable and "next to nothing" in str(files[n].result) for n in (20, 41))


async def test_what_is_slow_but_not_too_slow_is_not_given_up(hostile: HostileServer) -> None:
    hostile.files["/f"] = b"content"
    hostile.orders = lambda asked: Fault("drip")  # two bytes a second
    with anyio.fail_after(15):
        transfer, local = await fetched(f"{hostile.url}/f", {"stall_seconds": 1, "stall_bytes_per_second": 1})
    assert isinstance(transfer.result, FileInfo)
    assert local.content == b"content"


@pytest.mark.parametrize("kind", ["short length", "endless"])
async def test_a_file_of_another_size_than_is_known_is_refused(hostile: HostileServer, kind: str) -> None:
    hostile.files["/f"] = os.urandom(100_000)
    hostile.orders = lambda asked: Fault(kind)
    with anyio.fail_after(15):
        transfer, local = await fetched(f"{hostile.url}/f", QUICK, size_bytes=100_000)
    assert failure(transfer).retryable
    assert transfer.done_bytes <= 100_000
    assert was_discarded(local)


@pytest.mark.parametrize("cut", [100_000, 60_000])
async def test_a_body_that_ends_with_the_connection_is_compared_with_what_the_server_says_of_it(
    hostile: HostileServer, cut: int
) -> None:
    hostile.files["/f"] = os.urandom(100_000)
    hostile.orders = lambda asked: Fault("no length", body=str(cut).encode()) if asked.method == "GET" else None
    transfer, _ = await fetched(f"{hostile.url}/f")
    assert isinstance(transfer.result, FileInfo if cut == 100_000 else StorageUnavailable)


async def test_wrong_bytes_have_another_checksum_and_keep_is_told(hostile: HostileServer) -> None:
    hostile.files["/f"] = b"content"
    hostile.orders = lambda asked: Fault("wrong bytes")
    transfer, local = await fetched(f"{hostile.url}/f", algorithm="md5")
    assert isinstance(transfer.result, FileInfo)
    assert str(transfer.result.checksum) != f"md5:{hashlib.md5(b'content').hexdigest()}"
    assert local.kept == transfer.result


async def test_a_digest_that_comes_with_the_file_is_compared(hostile: HostileServer) -> None:
    hostile.orders = lambda asked: Fault("200", ("Digest: md5=" + "0" * 32,), b"content")
    transfer, local = await fetched(f"{hostile.url}/f", algorithm="md5")
    assert isinstance(transfer.result, ChecksumMismatch)
    assert was_discarded(local)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("Digest: adler32=0a1b2c3d", "adler32:0a1b2c3d"),
        ("Digest: MD5=" + base64.b64encode(hashlib.md5(b"x").digest()).decode(), f"md5:{hashlib.md5(b'x').hexdigest()}"),
        ("Repr-Digest: sha-256=:" + base64.b64encode(hashlib.sha256(b"x").digest()).decode() + ":",
         f"sha256:{hashlib.sha256(b'x').hexdigest()}"),
        ("Digest: adler32=what,md5=,=,x", None),
        ("ETag: \"0123456789abcdef0123456789abcdef\"", None),
    ],
)  # fmt: skip
async def test_a_checksum_is_told_without_reading_where_the_server_knows_it(
    hostile: HostileServer, header: str, told: str | None
) -> None:
    hostile.orders = lambda asked: Fault("200", (header,), b"x" * 7)
    async with open_http(StorageOptions(scheme="http")) as storage:
        found = await storage.stat(f"{hostile.url}/f")
    assert found.size_bytes == 7
    assert (None if found.checksum is None else str(found.checksum)) == told
    assert "adler32" in hostile.asked[0].headers["want-digest"]


async def test_an_upload_is_compared_with_what_the_server_has(hostile: HostileServer) -> None:
    def loses_half(asked: Any) -> None:
        hostile.files = {path: content[:3] for path, content in hostile.files.items()}

    hostile.orders = loses_half
    transfer = await sent(f"{hostile.url}/f", b"content")
    assert isinstance(transfer.result, StorageUnavailable)
    assert "3 of the 7 bytes" in str(transfer.result)
    assert isinstance((await sent(f"{hostile.url}/f", b"content", {"publish": "put"})).result, FileInfo)


async def test_small_uploads_are_compared_now_and_then_and_each_while_the_server_is_not_proven(
    hostile: HostileServer,
) -> None:
    """A success is to be believed of a server that has been seen to have what it said it had."""
    files = [Transfer(Direction.UPLOAD, f"{hostile.url}/{n}", LocalBytes(b"content")) for n in range(130)]
    async with open_http(StorageOptions(scheme="http", streams=1)) as storage:
        await storage.move(files, lambda _: None)
        assert all(isinstance(file.result, FileInfo) for file in files)
        assert [asked.path for asked in hostile.asked if asked.method == "HEAD"] == ["/0", "/64", "/128"]
        hostile.asked.clear()
        hostile.orders = lambda asked: Fault("202") if asked.method == "PUT" else None
        later = Transfer(Direction.UPLOAD, f"{hostile.url}/later", LocalBytes(b"content"))
        await storage.move([later], lambda _: None)
        assert isinstance(later.result, NotFound), "what is only promised is looked for"
        assert [asked.method for asked in hostile.asked] == ["PUT", "HEAD"]


async def test_a_proven_server_is_looked_at_for_its_samples_only_however_many_go_at_once(
    hostile: HostileServer,
) -> None:
    """All that were under way with a sample were looked at as well, and those with them: one file in five."""
    files = [Transfer(Direction.UPLOAD, f"{hostile.url}/{n}", LocalBytes(b"content")) for n in range(640)]
    async with open_http(StorageOptions(scheme="http", streams=16)) as storage:
        await storage.move(files, lambda _: None)
    assert all(isinstance(file.result, FileInfo) for file in files)
    assert 10 <= [asked.method for asked in hostile.asked].count("HEAD") <= 10 + 16


async def test_a_server_that_has_lost_a_sample_is_not_believed_until_it_has_one(hostile: HostileServer) -> None:
    async with open_http(StorageOptions(scheme="http", streams=1)) as storage:

        async def moved(names: Sequence[object]) -> list[str]:
            hostile.asked.clear()
            files = [Transfer(Direction.UPLOAD, f"{hostile.url}/{n}", LocalBytes(b"content")) for n in names]
            await storage.move(files, lambda _: None)
            return [asked.path for asked in hostile.asked if asked.method == "HEAD"]

        assert await moved(range(64)) == ["/0"]
        hostile.orders = lambda asked: Fault("202") if asked.method == "PUT" else None
        assert await moved(["lost", "lost-too"]) == ["/lost", "/lost-too"]
        hostile.orders = None
        assert await moved(["kept", "believed"]) == ["/kept"]


@pytest.mark.parametrize("status", ["301", "302", "303", "307", "308"])
@pytest.mark.parametrize("size", [9, 300_000])
async def test_an_upload_that_is_sent_elsewhere_takes_its_bytes_along_or_fails(
    hostile: HostileServer, status: str, size: int
) -> None:
    with HostileServer() as pool:
        hostile.orders = lambda asked: Fault(status, (f"Location: {pool.url}/there",))
        transfer = await sent(f"{hostile.url}/f", b"\0" * size, {"publish": "put"})
        if isinstance(transfer.result, FileInfo):
            assert pool.files == {"/there": b"\0" * size}
        else:
            assert pool.files == {}


async def test_a_server_that_renames_nothing_is_sent_to_directly(hostile: HostileServer) -> None:
    hostile.knows_move = False
    async with open_http(StorageOptions(scheme="dav", streams=1)) as storage:
        url = hostile.url.replace("http", "dav")
        up = [Transfer(Direction.UPLOAD, f"{url}/{n}", LocalBytes(b"content")) for n in range(2)]
        await storage.move(up, lambda _: None)
    assert all(isinstance(each.result, FileInfo) and each.result.size_bytes == 7 for each in up)
    assert hostile.files == {"/0": b"content", "/1": b"content"}
    assert [asked.method for asked in hostile.asked] == ["PUT", "MOVE", "DELETE", "PUT", "HEAD", "PUT"]


async def test_a_server_that_copies_nothing_is_asked_once(hostile: HostileServer) -> None:
    hostile.files["/f"] = b"content"
    url = hostile.url.replace("http", "dav")
    copies = [Transfer(Direction.COPY, f"{url}/{n}", LocalBytes(), source=f"{url}/f") for n in range(5)]
    async with open_http(StorageOptions(scheme="dav", streams=1)) as storage:
        await storage.move(copies, lambda _: None)
    assert all(isinstance(each.result, CannotCopy) and not each.result.retryable for each in copies)
    assert [asked.method for asked in hostile.asked] == ["HEAD", "COPY", "DELETE"]
    assert hostile.files == {"/f": b"content"}


async def test_nothing_is_copied_between_two_servers(hostile: HostileServer) -> None:
    url = hostile.url.replace("http", "dav")
    copy = Transfer(Direction.COPY, f"{url}/new", LocalBytes(), source="dav://127.0.0.1:1/f")
    async with open_http(StorageOptions(scheme="dav")) as storage:
        await storage.move([copy], lambda _: None)
    assert isinstance(copy.result, CannotCopy)
    assert hostile.asked == []


async def test_a_copy_has_the_time_its_size_takes_and_no_more(hostile: HostileServer) -> None:
    """A server says nothing until it has copied, and 3 MB may take 3 s; one that hangs after that is given up."""
    hostile.files |= {"/large": bytes(3_000_000), "/small": b"content"}
    hostile.orders = lambda asked: Fault("stall") if asked.method == "COPY" else None
    url = hostile.url.replace("http", "dav")
    copies = [Transfer(Direction.COPY, f"{url}/n{n}", LocalBytes(), source=f"{url}/{n}") for n in ("small", "large")]
    begun, ends = anyio.current_time(), list[float]()
    async with open_http(StorageOptions(scheme="dav", words={"stall_seconds": 1})) as storage:
        with anyio.fail_after(30):
            await storage.move(copies, lambda some: ends.extend(anyio.current_time() - begun for _ in some))
    assert all(failure(each).retryable for each in copies)
    assert ends[0] >= 1
    assert ends[1] >= 4
    assert sorted(hostile.files) == ["/large", "/small"]


@pytest.mark.parametrize("status", ["403", "409", "502", "507"])
async def test_an_upload_that_cannot_be_renamed_is_removed(hostile: HostileServer, status: str) -> None:
    hostile.orders = lambda asked: Fault(status) if asked.method == "MOVE" else None
    hostile.files["/f"] = b"before"
    transfer = await sent(hostile.url.replace("http", "dav") + "/f", b"content")
    assert isinstance(transfer.result, StorageError)
    assert hostile.files == {"/f": b"before"}


@pytest.mark.parametrize("kind", ["reset", "empty", "stall", "500", "507"])
async def test_an_upload_that_breaks_off_is_an_error_and_leaves_nothing(hostile: HostileServer, kind: str) -> None:
    hostile.orders = lambda asked: Fault(kind) if asked.method == "PUT" else None
    with anyio.fail_after(15):
        transfer = await sent(hostile.url.replace("http", "dav") + "/f", b"content", QUICK)
    assert failure(transfer).retryable is (kind != "507")
    assert hostile.files == {}


async def test_a_connection_that_was_closed_meanwhile_is_no_error(hostile: HostileServer) -> None:
    """The server ends a connection that is kept for the next file: libcurl sends again, and nothing is counted twice."""
    async with open_http(StorageOptions(scheme="http", streams=1, words={"publish": "put"})) as storage:
        hostile.orders = lambda asked: Fault("reset") if len(hostile.asked) == 2 else None
        up = [Transfer(Direction.UPLOAD, f"{hostile.url}/{n}", LocalBytes(b"content %d" % n)) for n in range(3)]
        await storage.move(up, lambda _: None)
    assert [type(each.result) for each in up] == [FileInfo] * 3
    assert hostile.files == {f"/{n}": b"content %d" % n for n in range(3)}
    assert [each.done_bytes for each in up] == [9, 9, 9]


async def test_a_redirect_is_followed_and_the_token_stays_behind(hostile: HostileServer) -> None:
    with HostileServer() as pool:
        pool.files["/there"] = b"content"
        hostile.orders = lambda asked: Fault("302", (f"Location: {pool.url}/there",))
        words = {"token": "secret", "credentials_without_tls": True}
        transfer, local = await fetched(f"{hostile.url}/f", words)
        assert local.content == b"content"
        assert isinstance(transfer.result, FileInfo)
        assert hostile.asked[0].headers["authorization"] == "Bearer secret"
        assert "authorization" not in pool.asked[0].headers


@pytest.mark.parametrize("to", ["file:///etc/passwd", "ftp://127.0.0.1/x", "itself", "dict://127.0.0.1/x"])
async def test_a_redirect_to_nowhere_good_is_not_followed(hostile: HostileServer, to: str) -> None:
    hostile.orders = lambda asked: Fault("302", (f"Location: {hostile.url + '/f' if to == 'itself' else to}",))
    transfer, local = await fetched(f"{hostile.url}/f")
    assert isinstance(transfer.result, StorageError)
    assert local.content == b""
    assert len(hostile.asked) == (6 if to == "itself" else 1)


async def test_an_upload_follows_to_where_the_bytes_shall_go(hostile: HostileServer) -> None:
    with HostileServer() as pool:
        hostile.orders = lambda asked: Fault("307", (f"Location: {pool.url}{asked.target}",))
        transfer = await sent(f"{hostile.url}/f", b"x" * 3_000_000, {"publish": "put"})
        assert isinstance(transfer.result, FileInfo)
        assert pool.files == {"/f": b"x" * 3_000_000}
        assert transfer.done_bytes == 3_000_000


# -- credentials -----------------------------------------------------------------------------------------------------


def wants_token(token: str) -> Any:
    return lambda asked: None if asked.headers.get("authorization") == f"Bearer {token}" else Fault("401")


async def test_a_token_that_was_renewed_is_used_at_once(hostile: HostileServer, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    hostile.files["/f"] = b"content"
    async with open_http(
        StorageOptions(scheme="http", words={"token_file": str(file), "credentials_without_tls": True})
    ) as storage:
        hostile.orders = wants_token("old")
        assert (await storage.stat(f"{hostile.url}/f")).size_bytes == 7
        hostile.orders = wants_token("new")
        with pytest.raises(AccessDenied) as refused:
            await storage.stat(f"{hostile.url}/f")
        assert refused.value.retryable, "whoever renews the file may be late"
        file.write_text("new!\n")
        file.write_text("new\n")
        up = Transfer(Direction.UPLOAD, f"{hostile.url}/g", LocalBytes(b"some more"))
        await storage.move([up], lambda _: None)
    assert isinstance(up.result, FileInfo)
    assert hostile.files["/g"] == b"some more"


async def test_a_token_is_shown_to_nobody_without_tls(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEARER_TOKEN", "secret")
    await fetched(f"{hostile.url}/f")
    assert "authorization" not in hostile.asked[0].headers


async def test_secrets_are_in_no_words_of_ours(hostile: HostileServer) -> None:
    hostile.orders = lambda asked: Fault("403")
    url = f"{hostile.url.replace('://', '://user:secret@')}/f?X-Amz-Signature=secret"
    words = {"token": "secret", "credentials_without_tls": True}
    transfer, _ = await fetched(url, words)
    assert "secret" not in str(transfer.result)
    assert "secret" not in repr(transfer.result)
    transfer, _ = await fetched("http://user:secret@127.0.0.1:1/f?secret", words)
    assert "secret" not in str(transfer.result)
    assert failure(transfer).retryable


@pytest.mark.parametrize("words", [{"tokn": "x"}, {"stall_seconds": "long"}, {"publish": "perhaps"}])
async def test_words_that_are_not_understood_are_named(words: dict[str, Any]) -> None:
    with pytest.raises(InvalidSite, match=rf"\[storage.davs\] {next(iter(words))}"):
        async with open_http(StorageOptions(scheme="davs", words=words)):
            raise AssertionError


# -- TLS -------------------------------------------------------------------------------------------------------------


async def test_tls_shows_token_and_proxy_to_a_server_that_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    papers = make_certificates(tmp_path)
    monkeypatch.setenv("X509_USER_PROXY", str(papers.user))
    monkeypatch.setenv("BEARER_TOKEN", "secret")
    with HostileServer(tls=papers.for_server()) as server:
        server.files["/f"] = b"content"
        url = server.url.replace("https", "davs")
        transfer, local = await fetched(f"{url}/f", {"ca_file": str(papers.authority)})
        assert local.content == b"content"
        assert isinstance(transfer.result, FileInfo)
        assert server.peers == ["user"]
        assert server.asked[0].headers["authorization"] == "Bearer secret"


async def test_a_server_that_is_not_trusted_is_told_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    papers = make_certificates(tmp_path)
    monkeypatch.setenv("BEARER_TOKEN", "secret")
    with HostileServer(tls=papers.for_server()) as server:
        transfer, _ = await fetched(f"{server.url}/f")
        assert not failure(transfer).retryable
        assert "not trusted" in str(transfer.result)
        assert server.asked == []


async def test_a_proxy_that_cannot_be_read_is_said_and_not_tried_again(tmp_path: Path) -> None:
    papers = make_certificates(tmp_path)
    with HostileServer(tls=papers.for_server()) as server:
        words = {"ca_file": str(papers.authority), "proxy": str(tmp_path / "nowhere")}
        transfer, _ = await fetched(f"{server.url}/f", words)
        assert "our own certificate" in str(transfer.result)
        assert not failure(transfer).retryable


# -- the thread ------------------------------------------------------------------------------------------------------


async def test_the_thread_is_there_when_it_is_needed_and_gone_at_the_end(hostile: HostileServer) -> None:
    def ours() -> int:
        return sum(thread.name.startswith("loadmaster") for thread in threading.enumerate())

    async with open_http(StorageOptions(scheme="http")) as storage:
        assert ours() == 0
        with pytest.raises(NotFound):
            await storage.stat(f"{hostile.url}/f")
        assert ours() == 1
    assert ours() == 0
    with pytest.raises(anyio.ClosedResourceError):
        await storage.stat(f"{hostile.url}/f")
    assert ours() == 0


async def test_the_end_comes_also_while_transfers_hang(hostile: HostileServer) -> None:
    """Cancelled calls of a server that says nothing; the tidying up has its limit too."""
    hostile.orders = lambda asked: Fault("stall") if asked.method in {"PUT", "GET"} else None
    begun = time.monotonic()
    locals_ = [LocalBytes(b"content") for _ in range(4)]
    url = hostile.url.replace("http", "dav")
    async with open_http(StorageOptions(scheme="dav")) as storage:
        ways = [Direction.UPLOAD, Direction.DOWNLOAD] * 2
        transfers = [
            Transfer(way, f"{url}/{n}", local) for n, (way, local) in enumerate(zip(ways, locals_, strict=True))
        ]
        with anyio.move_on_after(0.3):
            await storage.move(transfers, lambda _: None)
    assert time.monotonic() - begun < 5
    assert [local.calls for local in locals_] == [["open", "discard"]] * 4


async def test_more_files_than_streams_wait_and_are_counted(hostile: HostileServer) -> None:
    hostile.files = {f"/{n}": b"%d" % n for n in range(500)}
    transfers = [
        Transfer(Direction.DOWNLOAD, f"{hostile.url}/{n}", LocalBytes(), size_bytes=len(str(n))) for n in range(500)
    ]
    told: list[int] = []
    async with open_http(StorageOptions(scheme="http", streams=4)) as storage:
        await storage.move(transfers, lambda some: told.append(len(some)))
    assert all(isinstance(each.result, FileInfo) for each in transfers)
    assert sum(told) == 500
    assert len(told) < 250, "told in batches"


async def test_a_lane_that_comes_free_is_taken_at_once(hostile: HostileServer) -> None:
    """An answer that came while libcurl did what was due ended the only script, and nobody began the next one."""
    up = [Transfer(Direction.UPLOAD, f"{hostile.url}/{n}", LocalBytes(b"content")) for n in range(1500)]
    async with open_http(StorageOptions(scheme="http", streams=1)) as storage:
        with anyio.fail_after(30):
            await storage.move(up, lambda _: None)
    assert len(hostile.files) == 1500


async def test_a_child_of_fork_has_a_thread_of_its_own(hostile: HostileServer) -> None:
    """The parent's is not in it: a storage that was opened before must not wait for one that is not there."""
    script = f"""
import os, sys, anyio
from loadmaster.storage.base import StorageOptions
from loadmaster.storage.http import HttpStorage
async def again(storage):
    with anyio.fail_after(5):
        assert (await storage.stat("{hostile.url}/f")).size_bytes == 7
        await storage.close()
async def both():
    storage = HttpStorage(StorageOptions(scheme="http"))
    assert (await storage.stat("{hostile.url}/f")).size_bytes == 7
    return storage
storage = anyio.run(both)
pid = os.fork()
anyio.run(again, storage)
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    hostile.files["/f"] = b"content"
    done = await anyio.run_process([sys.executable, "-c", script], check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")


# -- S3 --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "a//b", "$,!*()"])
async def test_a_request_for_any_key_is_signed_as_amazon_wants_it(hostile: HostileServer, name: str) -> None:
    """botocore's signature of what arrived is the one that came with it."""
    auth = pytest.importorskip("botocore.auth")
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    words = {"endpoint": hostile.url, "session_token": "to/ken=", "region": "eu-x-1", **KEYS}
    async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
        place = Place(storage, "s3://bucket/d", list)
        url = place.url(name) if "//" not in name else f"s3://bucket/d/{name}"
        await storage.move([Transfer(Direction.UPLOAD, url, LocalBytes(b"content"))], lambda _: None)
        await storage.stat(url)
        with suppress(StorageError):  # this server knows of no uploads in parts
            await storage.clear(url, [])
    assert hostile.files == {f"/bucket/d/{name}": b"content"}
    assert hostile.asked[-1].target.startswith("/bucket/?prefix=d%2F")
    for asked in hostile.asked:
        signed = asked.headers["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
        assert {"host", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token"} <= set(signed)
        request = AWSRequest(
            method=asked.method, url=hostile.url + asked.target, headers={name: asked.headers[name] for name in signed}
        )
        request.context["timestamp"] = asked.headers["x-amz-date"]
        signer = auth.S3SigV4Auth(Credentials("AK", "SK"), "s3", "eu-x-1")
        wanted = signer.signature(signer.string_to_sign(request, signer.canonical_request(request)), request)
        assert asked.headers["authorization"].endswith(f"Signature={wanted}")


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/", "s3:///key", "s3://a@b/key", "s3://bucket/a/../b"])
async def test_what_names_no_object_is_an_error_of_its_own(hostile: HostileServer, url: str) -> None:
    async with open_s3(StorageOptions(scheme="s3", words={"endpoint": hostile.url, **KEYS})) as storage:
        with pytest.raises(StorageError) as refused:
            await storage.stat(url)
    assert not refused.value.retryable
    assert hostile.asked == []


@pytest.mark.parametrize(("status", "pattern"), [("403", None), ("500", "listing uploads in parts")])
async def test_uploads_that_were_broken_off_are_left_to_the_bucket_where_they_may_not_be_listed(
    hostile: HostileServer, status: str, pattern: str | None
) -> None:
    hostile.orders = lambda asked: Fault(status, body=s3_error("AccessDenied"))
    async with open_s3(StorageOptions(scheme="s3", words={"endpoint": hostile.url, **KEYS})) as storage:
        with nullcontext() if pattern is None else pytest.raises(StorageUnavailable, match=pattern):
            await storage.clear("s3://bucket/d/f", [])
    assert [asked.method for asked in hostile.asked] == ["GET"]


async def test_uploads_to_other_keys_are_nobodys_leftovers(s3: str) -> None:
    base = f"s3://bucket/{os.urandom(8).hex()}"
    async with open_s3(StorageOptions(scheme="s3", words={"endpoint": s3, **KEYS})) as storage:
        place = Place(storage, base, lambda: objects(s3, f"{base.rpartition('/')[2]}/"))
        mine = [await holding(place, "f", 10) for _ in range(3)]
        others = [await holding(place, name, 10) for name in ("f2", "f/2", "d/f")]
        await storage.clear(f"{base}/f", [])
        for name, (held, _) in zip(["f"] * 3 + ["f2", "f/2", "d/f"], mine + others, strict=True):
            transfer = place.upload(name, LocalBytes())
            transfer.step, transfer.held = Step.PUBLISH, held
            await place.move(transfer)
        assert place.names() == ["d/f", "f/2", "f2"]


def s3_error(code: str) -> bytes:
    return f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>".encode()


async def test_a_large_object_is_copied_in_parts(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadmaster.storage.s3.COPY_BYTES", 5 * 1024**2)
    base, data = f"s3://bucket/{os.urandom(8).hex()}", os.urandom(12 * 1024**2)
    words = {"endpoint": s3, **KEYS}
    async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
        place = Place(storage, base, lambda: objects(s3, f"{base.removeprefix('s3://bucket/')}/"))
        await place.put("large", data)
        copy = place.copy("large", "a copy", LocalBytes())
        await place.move(copy)
        assert copy.result == FileInfo(len(data), None)
        assert copy.done_bytes == len(data)
        assert await place.get("a copy") == data
        assert place.names() == ["a copy", "large"]


async def test_a_copy_in_parts_that_fails_is_abandoned(
    s3: str, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadmaster.storage.s3.COPY_BYTES", 5)
    hostile.files["/bucket/large"] = b"twelve bytes"

    def orders(asked: Asked) -> Fault | None:
        if asked.method == "POST":
            return Fault("200", body=b"<UploadId>a</UploadId>")
        if asked.method != "PUT":
            return None
        wrong = "partNumber=2" in asked.target
        return Fault(
            "200", body=s3_error("InternalError") if wrong else b"<CopyPartResult><ETag>1</ETag></CopyPartResult>"
        )

    hostile.orders = orders
    async with open_s3(StorageOptions(scheme="s3", words={"endpoint": hostile.url, **KEYS})) as storage:
        copy = Transfer(Direction.COPY, "s3://bucket/new", LocalBytes(), source="s3://bucket/large")
        await storage.move([copy], lambda _: None)
    assert failure(copy).retryable
    assert "InternalError" in str(copy.result)
    assert [asked.target for asked in hostile.asked if asked.method == "DELETE"] == ["/bucket/new?uploadId=a"]
    assert {asked.headers["x-amz-copy-source"] for asked in hostile.asked if asked.method == "PUT"} == {"/bucket/large"}


async def test_an_upload_in_parts_is_abandoned_when_a_part_cannot_be_sent(s3: str, hostile: HostileServer) -> None:
    answers = {"POST": b"<UploadId>a&amp;b</UploadId>"}
    hostile.orders = lambda asked: Fault(
        {"POST": "200", "PUT": "503", "DELETE": "204"}[asked.method],
        body=answers.get(asked.method, s3_error("SlowDown")),
    )
    words = {"endpoint": hostile.url, "part_bytes": 5 * 1024**2, **KEYS}
    transfer = Transfer(Direction.UPLOAD, "s3://bucket/f", LocalBytes(size_bytes=11 * 1024**2), algorithm="md5")
    async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
        await storage.move([transfer], lambda _: None)
    assert isinstance(transfer.result, StorageUnavailable)
    assert "SlowDown" in str(transfer.result)
    assert [asked.method for asked in hostile.asked] == ["POST", "PUT", "PUT", "PUT", "DELETE"]
    assert hostile.asked[-1].target == "/bucket/f?uploadId=a%26b"


@pytest.mark.parametrize("algorithm", ["adler32", "md5"])
async def test_parts_are_sent_beside_each_other_where_their_checksums_can_be_combined(
    hostile: HostileServer, algorithm: str
) -> None:
    """Each part waits until as many have been asked for as can be under way."""
    content = os.urandom(1024) * (23 * 1024)
    parts: dict[int, bytes] = {}
    failed: list[str] = []

    def orders(asked: Any) -> Fault:
        if asked.method == "PUT":
            number = int(asked.target.partition("partNumber=")[2].partition("&")[0])
            if number == 2 and not failed:
                failed.append(asked.target)
                return Fault("500")
            parts[number] = asked.body
            return Fault("200", (f'ETag: "{number}"',))
        if asked.method == "HEAD":
            return Fault("200", body=b"".join(part for _, part in sorted(parts.items())))
        return Fault("200", body=b"<UploadId>u</UploadId>")

    hostile.orders = orders
    words = {"endpoint": hostile.url, "part_bytes": 5 * 1024**2, **KEYS}
    transfer = Transfer(Direction.UPLOAD, "s3://bucket/f", LocalBytes(content), algorithm=algorithm)
    async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
        await storage.move([transfer], lambda _: None)
    passed = running(algorithm)
    passed.update(content)
    assert transfer.result == FileInfo(len(content), passed.result())
    assert b"".join(part for _, part in sorted(parts.items())) == content
    sent = [asked.target for asked in hostile.asked if asked.method == "PUT"]
    assert len(sent) == 6
    assert [f'"{number}"'.encode() in hostile.asked[-2].body for number in range(1, 6)] == [True] * 5


async def test_an_error_that_comes_with_200_is_one(hostile: HostileServer) -> None:
    """S3 begins to answer the last word of an upload before it knows how it ends."""

    def orders(asked: Any) -> Fault:
        if asked.method == "POST":
            return Fault(
                "200", body=s3_error("InternalError") if "uploadId" in asked.target else b"<UploadId>u</UploadId>"
            )
        return Fault("200", ('ETag: "x"',)) if asked.method == "PUT" else Fault("204")

    hostile.orders = orders
    words = {"endpoint": hostile.url, "part_bytes": 5 * 1024**2, **KEYS}
    transfer = Transfer(Direction.UPLOAD, "s3://bucket/f", LocalBytes(size_bytes=6 * 1024**2))
    async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
        await storage.move([transfer], lambda _: None)
    assert isinstance(transfer.result, StorageUnavailable)
    assert hostile.asked[-1].method == "DELETE"


async def test_keys_that_were_renewed_are_used_at_once(hostile: HostileServer, tmp_path: Path) -> None:
    file = tmp_path / "credentials"

    def write(name: str) -> None:
        file.write_text(
            f"[grid]\naws_access_key_id = {name}\naws_secret_access_key = SECRET\naws_session_token = t-{name}\n"
        )

    write("OLD")
    expired = Fault("403", body=s3_error("ExpiredToken"))
    hostile.files["/bucket/f"] = b"content"
    words = {"endpoint": hostile.url, "credentials_file": str(file), "profile": "grid"}
    async with open_s3(StorageOptions(scheme="s3", words=words)) as storage:
        assert (await storage.stat("s3://bucket/f")).size_bytes == 7
        hostile.orders = lambda asked: None if asked.headers["x-amz-security-token"] == "t-RENEWED" else expired
        transfer = Transfer(Direction.DOWNLOAD, "s3://bucket/f", LocalBytes())
        await storage.move([transfer], lambda _: None)
        assert isinstance(failure(transfer), AccessDenied)
        assert failure(transfer).retryable
        assert "SECRET" not in str(transfer.result)
        write("RENEWED")
        transfer = Transfer(Direction.DOWNLOAD, "s3://bucket/f", LocalBytes())
        await storage.move([transfer], lambda _: None)
        assert isinstance(transfer.result, FileInfo)


async def test_a_bucket_elsewhere_is_named_and_not_followed(hostile: HostileServer) -> None:
    hostile.orders = lambda asked: Fault("301", ("x-amz-bucket-region: eu-west-3", f"Location: {hostile.url}/x"))
    async with open_s3(StorageOptions(scheme="s3", words={"endpoint": hostile.url, **KEYS})) as storage:
        with pytest.raises(StorageError, match="it is in eu-west-3") as refused:
            await storage.stat("s3://bucket/f")
    assert not refused.value.retryable
    assert len(hostile.asked) == 1


@pytest.mark.parametrize("words", [{"access_key": "x"}, {"endpoint": "ftp://x"}, {"part_bytes": 5}, {"region_": "x"}])
async def test_words_of_s3_that_are_not_understood_are_named(words: dict[str, Any]) -> None:
    with pytest.raises(InvalidSite, match=r"\[storage.s3\]") as refused:
        async with open_s3(StorageOptions(scheme="s3", words=words)):
            raise AssertionError
    assert next(iter(words)) in str(refused.value)
