"""Object stores by obstore: what every storage promises, what servers do to us, and what is never said of secrets."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import os
import socket
import threading
import traceback
import urllib.request
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from loadmaster.conformance import LocalBytes, Place, StorageConformance
from loadmaster.errors import AccessDenied, ChecksumMismatch, InvalidSite, NotFound, StorageError, StorageUnavailable
from loadmaster.storage.base import Direction, FileInfo, StorageFactory, StorageOptions, Transfer
from servers_objects import AZURE_ACCOUNT, AZURE_KEY, azurite, moto

pytest.importorskip("obstore")

import obstore

from loadmaster.storage import objects

BUCKET = "loadmaster"
CLIENT: dict[str, object] = {"client_options": {"allow_http": True}, "retry_config": {"max_retries": 0}}
S3_KEYS = {"access_key": "AKIAEXAMPLE", "secret_key": "an-s3-secret"}


@pytest.fixture(scope="module")
def s3_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with moto(tmp_path_factory.mktemp("moto")) as endpoint:
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=10).close()
        _warm(s3_words(endpoint))
        yield endpoint


@pytest.fixture(scope="module")
def azure_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with azurite(tmp_path_factory.mktemp("azurite")) as endpoint:
        _make_container(endpoint)
        _warm(s3_words(endpoint))
        yield endpoint


def _warm(words: dict[str, object]) -> None:
    """The library starts its threads, which have descriptors, once in the life of a process: before anybody counts."""
    bucket = objects.AmazonWords.model_validate(words).bucket(BUCKET, None, CLIENT)
    with suppress(FileNotFoundError, obstore.exceptions.BaseError):
        obstore.head(bucket, "nothing")


def _make_container(endpoint: str) -> None:
    date = email.utils.formatdate(usegmt=True)
    path = f"/{AZURE_ACCOUNT}/{AZURE_ACCOUNT}/{BUCKET}"
    text = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:2021-12-02\n{path}\nrestype:container"
    signature = base64.b64encode(hmac.new(base64.b64decode(AZURE_KEY), text.encode(), hashlib.sha256).digest()).decode()
    headers = {
        "x-ms-date": date,
        "x-ms-version": "2021-12-02",
        "Authorization": f"SharedKey {AZURE_ACCOUNT}:{signature}",
        "Content-Length": "0",
    }
    request = urllib.request.Request(f"{endpoint}/{BUCKET}?restype=container", method="PUT", headers=headers)
    urllib.request.urlopen(request, timeout=10).close()


def s3_words(endpoint: str) -> dict[str, object]:
    return {"endpoint": endpoint, **S3_KEYS}


def gs_words(endpoint: str) -> dict[str, object]:
    return {"endpoint": endpoint, "token": "a-google-token"}


def az_words(endpoint: str) -> dict[str, object]:
    return {"endpoint": endpoint, "account": AZURE_ACCOUNT, "account_key": AZURE_KEY}


def options(scheme: str, words: Mapping[str, object], streams: int = 8) -> StorageOptions:
    return StorageOptions(scheme=scheme, streams=streams, words=words)


def _names(words: objects._Words, prefix: str) -> Callable[[], list[str]]:
    def names() -> list[str]:
        bucket = words.bucket(BUCKET, None, CLIENT)  # let go of each time, and with it its connections
        found = [item["path"] for batch in obstore.list(bucket, prefix) for item in batch]
        return sorted(path.removeprefix(f"{prefix}/") for path in found)

    return names


class OnMoto(StorageConformance):
    """On a server that is not made for two writers of one name: it may answer 500, which an engine tries again."""

    async def test_the_last_of_many_writers_wins_with_a_whole_file(self, place: Place) -> None:
        async def write(number: int) -> None:
            while True:
                up = place.upload("file", LocalBytes(bytes([number]) * 2_000_000))
                await place.move(up)
                if isinstance(up.result, FileInfo):
                    return
                assert isinstance(up.result, StorageUnavailable)
                assert "HTTP 500" in str(up.result)

        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(write, number)
        data = await place.get("file")
        assert len(data) == 2_000_000
        assert len(set(data)) == 1
        assert place.names() == ["file"]


class TestS3(OnMoto):
    @pytest.fixture
    async def place(self, s3_endpoint: str) -> AsyncIterator[Place]:
        words, prefix = s3_words(s3_endpoint), uuid.uuid4().hex
        async with objects.open_amazon(options("s3", words)) as storage:
            yield Place(storage, f"s3://{BUCKET}/{prefix}", _names(objects.AmazonWords.model_validate(words), prefix))


class TestGoogle(OnMoto):
    """Against a server of S3's: obstore speaks to Google by the interface that both have."""

    @pytest.fixture
    async def place(self, s3_endpoint: str) -> AsyncIterator[Place]:
        words, prefix = gs_words(s3_endpoint), uuid.uuid4().hex
        names = _names(objects.AmazonWords.model_validate(s3_words(s3_endpoint)), prefix)
        async with objects.open_google(options("gs", words)) as storage:
            yield Place(storage, f"gs://{BUCKET}/{prefix}", names)


class TestAzure(StorageConformance):
    @pytest.fixture(params=["az://{}", "abfs://{}@" + AZURE_ACCOUNT + ".dfs.core.windows.net"])
    async def place(self, request: pytest.FixtureRequest, azure_endpoint: str) -> AsyncIterator[Place]:
        words, prefix = az_words(azure_endpoint), uuid.uuid4().hex
        base = f"{request.param.format(BUCKET)}/{prefix}"
        async with objects.open_azure(options("az", words)) as storage:
            yield Place(storage, base, _names(objects.AzureWords.model_validate(words), prefix))


# -- what they add to it ---------------------------------------------------------------------------------------------


async def test_what_was_sent_in_one_request_has_its_checksum_beside_it(s3_endpoint: str) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    async with objects.open_amazon(options("s3", s3_words(s3_endpoint))) as storage:
        up = Transfer(Direction.UPLOAD, url, LocalBytes(b"content"), "md5")
        await storage.move([up], lambda _: None)
        found = await storage.stat(url)
    assert found == up.result == FileInfo(7, found.checksum)
    assert str(found.checksum) == "md5:9a0364b9e99bb480dd25e1f0284c8555"


async def test_a_large_object_goes_to_s3_in_parts_and_comes_back_whole(s3_endpoint: str) -> None:
    await _there_and_back_in_parts(objects.open_amazon, "s3", s3_words(s3_endpoint))


async def test_a_large_object_goes_to_azure_in_parts_and_comes_back_whole(azure_endpoint: str) -> None:
    await _there_and_back_in_parts(objects.open_azure, "az", az_words(azure_endpoint))


async def _there_and_back_in_parts(factory: StorageFactory, scheme: str, words: dict[str, object]) -> None:
    data, url = os.urandom(3 * objects.PART_BYTES + 5), f"{scheme}://{BUCKET}/{uuid.uuid4().hex}"
    async with factory(options(scheme, words)) as storage:
        up = Transfer(Direction.UPLOAD, url, LocalBytes(data))
        await storage.move([up], lambda _: None)
        down = Transfer(Direction.DOWNLOAD, url, local := LocalBytes())
        await storage.move([down], lambda _: None)
        assert await storage.stat(url) == FileInfo(len(data))
    assert local.content == data
    assert up.result == down.result


@pytest.mark.parametrize("size", [7, 6, 8, 0, 2 * 1024**2])
async def test_what_is_known_of_the_size_is_held_against_what_comes(s3_endpoint: str, size: int) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    async with objects.open_amazon(options("s3", s3_words(s3_endpoint))) as storage:
        up = Transfer(Direction.UPLOAD, url, LocalBytes(b"content"))
        await storage.move([up], lambda _: None)
        down = Transfer(Direction.DOWNLOAD, url, local := LocalBytes(), size_bytes=size)
        await storage.move([down], lambda _: None)
    if size in {7, 2 * 1024**2}:  # of a large one that is short the local end says so, as of every file
        assert down.result == up.result
        assert local.content == b"content"
    else:
        assert isinstance(down.result, ChecksumMismatch)
        assert local.content == b""


async def test_an_object_larger_than_expected_does_not_fill_our_disk(s3_endpoint: str) -> None:
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
    async with objects.open_amazon(options("s3", s3_words(s3_endpoint))) as storage:
        await storage.move([Transfer(Direction.UPLOAD, url, LocalBytes(b"content"))], lambda _: None)
        down = Transfer(Direction.DOWNLOAD, url, local := LocalBytes(), size_bytes=3)
        await storage.move([down], lambda _: None)
    assert isinstance(down.result, ChecksumMismatch)
    assert local.content == b""


async def test_a_token_is_read_again_from_its_file(s3_endpoint: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    words = {"endpoint": s3_endpoint, "token_file": str(file)}
    async with objects.open_google(options("gs", words)) as storage:
        with pytest.raises(StorageError) as none:
            await storage.stat(f"gs://{BUCKET}/nothing")
        assert not isinstance(none.value, NotFound)
        file.write_text("a-token\n")
        with pytest.raises(NotFound):
            await storage.stat(f"gs://{BUCKET}/nothing")


@pytest.mark.parametrize(
    "url", ["s3://b/a//b", "s3://b/../c", "s3://b/", "s3://b/a?versionId=1", "s3://b/%ff", "s3://[b/a"]
)
async def test_a_url_that_names_no_object_is_refused(url: str, s3_endpoint: str) -> None:
    async with objects.open_amazon(options("s3", s3_words(s3_endpoint))) as storage:
        with pytest.raises(StorageError, match="no URL of an object") as refused:
            await storage.stat(url)
    assert not refused.value.retryable


@pytest.mark.parametrize(
    ("factory", "scheme", "words", "complaint"),
    [
        (objects.open_google, "gs", {"tokne": "x"}, r"\[storage.gs\] tokne: there is no such field"),
        (objects.open_azure, "az", {"stall_seconds": 0}, r"\[storage.az\] stall_seconds: .*greater than 0"),
        (objects.open_amazon, "s3", {"endpoint": "minio.example.org"}, r"\[storage.s3\] endpoint: "),
        (objects.open_amazon, "s3", {"secret_key": ["hush"]}, r"\[storage.s3\] secret_key: "),
    ],
)
async def test_words_that_are_not_understood_are_named(
    factory: Any, scheme: str, words: dict[str, object], complaint: str
) -> None:
    with pytest.raises(InvalidSite, match=complaint) as invalid:
        async with factory(options(scheme, words)):
            pass
    assert "hush" not in str(invalid.value)


# -- servers that do what they should not ----------------------------------------------------------------------------

Answer = Callable[[socket.socket], None]


@contextmanager
def hostile(answer: Answer) -> Iterator[str]:
    """An endpoint each of whose connections is handled by a function, once a request has come."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(connection: socket.socket) -> None:
        try:
            if connection.recv(65536):
                answer(connection)
        except OSError:
            pass
        finally:
            connection.close()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connections.append(connection)
            threads.append(threading.Thread(target=serve, args=[connection]))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        accepting.join()
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join()


def status(line: str, body: str = "") -> Answer:
    head = f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}"
    return lambda connection: connection.sendall(head.encode())


def body(announced: int, sent: bytes) -> Answer:
    head = (
        f'HTTP/1.1 200 OK\r\nContent-Length: {announced}\r\nETag: "1"\r\nConnection: close\r\n'
        "Last-Modified: Sun, 22 Nov 2026 12:00:00 GMT\r\n\r\n"
    )
    return lambda connection: connection.sendall(head.encode() + sent)


def silent(connection: socket.socket) -> None:
    """Says nothing, until the other end has gone."""
    connection.recv(65536)


def stalling(connection: socket.socket) -> None:
    body(100_000, b"x" * 10_000)(connection)
    connection.recv(65536)


ECHO = "SignatureDoesNotMatch: an-s3-secret"


@pytest.mark.parametrize(
    ("answer", "kind", "retryable", "words"),
    [
        (status("503 Slow Down", ECHO), StorageUnavailable, True, "HTTP 503"),
        (status("500 Internal Server Error", ECHO), StorageUnavailable, True, "HTTP 500"),
        (status("403 Forbidden", ECHO), AccessDenied, False, "HTTP 403"),
        (status("401 Unauthorized", ECHO), AccessDenied, False, "HTTP 401"),
        (status("404 Not Found", ECHO), NotFound, False, "no such"),
        (lambda connection: None, StorageUnavailable, True, ""),
        (body(1000, b"x" * 10), StorageUnavailable, True, ""),
        (lambda connection: connection.sendall(b"SSH-2.0-OpenSSH\r\n"), StorageUnavailable, True, ""),
        (silent, StorageUnavailable, True, ""),
        (stalling, StorageUnavailable, True, ""),
    ],
    ids=["503", "500", "403", "401", "404", "hangs up", "truncates", "is no web server", "is silent", "stalls"],
)
async def test_what_a_bad_server_does_is_told_apart(
    answer: Answer, kind: type[StorageError], retryable: bool, words: str, s3_endpoint: str
) -> None:
    with hostile(answer) as endpoint, anyio.fail_after(15):
        configured = {**s3_words(endpoint), "stall_seconds": 1, "session_token": "a-session-token"}
        async with objects.open_amazon(options("s3", configured)) as storage:
            down = Transfer(Direction.DOWNLOAD, f"s3://{BUCKET}/file", local := LocalBytes())
            await storage.move([down], lambda _: None)
    assert type(down.result) is kind
    assert down.result.retryable is retryable
    assert words in str(down.result)
    assert local.calls == ["open", "discard"]
    told = "".join(traceback.format_exception(down.result))
    assert "secret" not in told
    assert "a-session-token" not in told


async def test_a_signed_address_is_not_told(s3_endpoint: str) -> None:
    """Azure's signature is part of the address, which the library has in its errors."""
    with hostile(status("500 Internal Server Error")) as endpoint:
        words = {"endpoint": endpoint, "account": "a", "sas_token": "sv=2024-01-01&sig=hush%2Fhush"}
        async with objects.open_azure(options("az", words)) as storage:
            with pytest.raises(StorageUnavailable) as failed:
                await storage.stat("az://container/file")
    assert "hush" not in "".join(traceback.format_exception(failed.value))


@pytest.mark.parametrize("leave", ["cancelled", "given up"])
async def test_a_silent_server_does_not_hold_us(leave: str, s3_endpoint: str) -> None:
    with hostile(silent) as endpoint:
        async with objects.open_amazon(options("s3", s3_words(endpoint))) as storage:
            down = Transfer(Direction.DOWNLOAD, f"s3://{BUCKET}/file", local := LocalBytes())
            with anyio.fail_after(5):
                async with anyio.create_task_group() as group:
                    group.start_soon(storage.move, [down], lambda _: None)
                    while not down.begun:
                        await anyio.sleep(0.002)
                    down.give_up() if leave == "given up" else group.cancel_scope.cancel()
    assert local.calls == ["open", "discard"]
    assert isinstance(down.result, StorageUnavailable) == (leave == "given up")


async def test_a_storage_is_closed_under_what_it_was_asked(s3_endpoint: str) -> None:
    with hostile(silent) as endpoint, anyio.fail_after(5):
        async with objects.open_amazon(options("s3", s3_words(endpoint))) as storage:
            with anyio.move_on_after(0.2):
                await storage.stat(f"s3://{BUCKET}/file")
        await storage.close()
