"""What storages over HTTP have in common: the threads that carry their requests, the course of a download, questions."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypedDict, TypeVar, Unpack

import anyio
import pycurl
from pydantic import Field

from loadmaster.errors import CannotCopy, ChecksumMismatch, StorageError, StorageUnavailable
from loadmaster.storage.base import Ability, Direction, FileInfo, StorageOptions, Transfer
from loadmaster.storage.carrier import RECEIVE_BYTES, Pace, Request, Script, Together
from loadmaster.storage.checksums import Running
from loadmaster.storage.credentials import authorities
from loadmaster.storage.crew import Crew, is_large
from loadmaster.storage.curl import GivenUp
from loadmaster.storage.local import WORK_DIRECTORY, translate
from loadmaster.storage.replies import Reply, checksums_told, http_error, visible
from loadmaster.storage.words import Words

V = TypeVar("V")

REDIRECTS: Final = 5

WRITE_BYTES: Final = 256 * 1024
"""libcurl hands over 16 KiB at a time; so much is written at once. It stays in a core's cache."""

HELD_BYTES: Final = 128 * 1024
"""Up to this size a file is in memory until all of it has come, or gone: one request, one read or write, no callbacks."""

SMALL_BYTES: Final = 1024 * 1024
"""Up to this size a download does not ask for what only a resumed one needs, and an upload does not ask for leave."""


class CommonWords(Words):
    """What a site may say of every storage over HTTP."""

    ca_file: Path | None = None
    ca_directory: Path | None = None
    connect_seconds: float = Field(default=30, gt=0, le=3600)
    stall_seconds: int = Field(default=60, ge=1, le=86400)
    """Given up when it has been slower than `stall_bytes_per_second` for so long."""
    stall_bytes_per_second: int = Field(default=100, ge=1)


class Target:
    """A local file that the body of an answer goes to."""

    __slots__ = ("_descriptor", "_held", "_limit", "_offset", "_passed", "_pieces", "_transfer")

    def __init__(self, transfer: Transfer, descriptor: int) -> None:
        self._transfer, self._descriptor = transfer, descriptor
        self._pieces: list[bytes] = []
        self._held = 0
        self._passed: Running = transfer.begin()
        self._offset = transfer.first_byte
        end = transfer.size_bytes if transfer.last_byte is None else transfer.last_byte + 1
        self._limit = end

    def accept(self, status: int) -> bool:
        """200, or 206 when a part was asked for."""
        return status == (206 if is_part(self._transfer) else 200)

    def write(self, data: bytes) -> None:
        """Checksum and write. Raises `ChecksumMismatch` for more than there should be: a disk is not to be filled by it."""
        size = len(data)
        if self._limit is not None and self._offset + self._held + size > self._limit:
            raise ChecksumMismatch(visible(self._transfer.url), f"sends more than the {self._limit} bytes expected")
        self._passed.update(data)
        self._pieces.append(data)
        self._held += size
        self._transfer.done_bytes += size
        if self._held >= WRITE_BYTES:
            self.flush()

    def take(self, data: memoryview) -> None:
        """Checksum and write, now. Raises as `write`, and writes nothing of what is too much."""
        self.flush()
        size = len(data)
        if self._limit is not None and self._offset + size > self._limit:
            raise ChecksumMismatch(visible(self._transfer.url), f"sends more than the {self._limit} bytes expected")
        rest = data
        while rest:
            written = os.pwrite(self._descriptor, rest, self._offset)
            self._offset += written
            rest = rest[written:]
        self._passed.update(data)
        self._transfer.done_bytes += size

    def flush(self) -> None:
        """Write what is held."""
        if self._held:
            written = os.pwritev(self._descriptor, self._pieces, self._offset)
            if written < self._held:
                rest = memoryview(b"".join(self._pieces))
                while written < self._held:
                    written += os.pwrite(self._descriptor, rest[written:], self._offset + written)
            self._offset += self._held
            self._held = 0
            self._pieces.clear()


class Origin:
    """A local file that the body of a request comes from. What is sent again is not counted again."""

    __slots__ = ("_counted", "_descriptor", "_first", "_offset", "_passed", "_transfer", "size_bytes")

    def __init__(
        self, transfer: Transfer, descriptor: int, first: int, size_bytes: int, passed: Running | None = None
    ) -> None:
        """`first`, `size_bytes`: the part of the file to be sent. `passed`: the part's own checksum, if it has one."""
        self._transfer, self._descriptor = transfer, descriptor
        self._passed = passed or transfer.begin()
        self._first, self._offset, self._counted, self.size_bytes = first, first, first, size_bytes

    def read(self, count: int) -> bytes:
        """The next bytes. Raises `StorageUnavailable` when the file has become shorter."""
        left = self._first + self.size_bytes - self._offset
        data = os.pread(self._descriptor, min(count, left), self._offset)
        if not data and left:
            raise StorageUnavailable(WORK_DIRECTORY, "the output became shorter while it was sent")
        self._offset += len(data)
        new = self._offset - self._counted
        if new > 0:
            self._passed.update(data if new == len(data) else memoryview(data)[-new:])
            self._transfer.done_bytes += new
            self._counted = self._offset
        return data

    def seek(self, offset: int) -> None:
        """From there again."""
        self._offset = self._first + offset


def origin(transfer: Transfer, descriptor: int, size: int) -> Origin | bytes:
    """The body of an upload: in memory, if that is little. Raises `StorageUnavailable` when it became shorter."""
    if size > HELD_BYTES:
        return Origin(transfer, descriptor, 0, size)
    passed, data = transfer.begin(), os.pread(descriptor, size, 0)
    if len(data) != size:
        raise StorageUnavailable(WORK_DIRECTORY, "the output became shorter while it was sent")
    passed.update(data)
    transfer.done_bytes = size
    return data


def rewind(source: Origin | bytes) -> None:
    """From the beginning, whatever has been sent of it."""
    if isinstance(source, Origin):
        source.seek(0)


def plain_body(source: Origin | bytes, size: int) -> tuple[str, ...]:
    """Headers of an upload. libcurl calls what is in memory a form; and asks for leave before it sends."""
    if isinstance(source, bytes):
        return NO_FORM
    return ("Expect:",) if size <= SMALL_BYTES else ()


NO_FORM: Final = ("Content-Type:",)


class Question:
    """Something asked about a URL: a script that comes to a value, or to an error."""

    __slots__ = ("_steps", "error", "given_up", "url", "value")

    def __init__(self, url: str, steps: Generator[Request | Together, Reply, object]) -> None:
        self.url, self._steps = url, steps
        self.given_up = False
        self.error: StorageError | None = None
        self.value: Any = None

    def script(self) -> Script:
        """Run it."""
        try:
            self.value = yield from self._steps
        except StorageError as exc:
            self.error = exc


class Rest(TypedDict, total=False):
    """What else a request may have: see `Request`."""

    held: Transfer
    sink: Target
    large: bool
    source: Origin | bytes
    wants_headers: bool
    seconds: float
    quiet_seconds: float
    about: str


class CurlStorage:
    """What storages over HTTP have in common: the threads, the course of a download, questions."""

    abilities = Ability.SIDE_BY_SIDE

    def __init__(self, options: StorageOptions, words: CommonWords, settings: Mapping[int, object]) -> None:
        self._scheme = options.scheme
        pace = Pace(words.stall_bytes_per_second, words.stall_seconds)
        self._crew = Crew(options.scheme, options.streams, settings, pace)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._scheme}://>"

    async def close(self) -> None:
        """End the threads. Transfers still under way are dropped."""
        await self._crew.close()

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """As many at a time as there are streams, each direction for itself."""
        lots = [(way, lot) for way in Direction if (lot := [each for each in transfers if each.direction is way])]
        if len(lots) == 1:
            await self._crew.run(*lots[0], self._course, ended)
        else:
            async with anyio.create_task_group() as both:
                for way, lot in lots:
                    both.start_soon(self._crew.run, way, lot, self._course, ended)

    async def stat(self, url: str) -> FileInfo:
        """As the server says."""
        return await self._ask(url, self._stat(url))

    async def remove(self, url: str) -> None:
        """Have the server remove it."""
        await self._ask(url, self._remove(url))

    async def _ask(self, url: str, steps: Generator[Request | Together, Reply, V]) -> V:
        question = Question(url, steps)
        await self._crew.ask(question, Question.script)
        if question.error is not None:
            raise question.error
        value: V = question.value
        return value

    # -- what follows runs in the threads ------------------------------------------------------------------------------

    def _course(self, transfer: Transfer) -> Script:
        """One transfer from its first request to its result."""
        if transfer.direction is Direction.COPY:
            return self._copying(transfer)
        size = transfer.size_bytes
        if (
            size is not None
            and size <= HELD_BYTES
            and transfer.direction is Direction.DOWNLOAD
            and not is_part(transfer)
        ):
            return self._small(transfer, size)
        return self._any(transfer)

    def _small(self, transfer: Transfer, size: int) -> Script:
        """A file of which little is expected: nothing is opened before all of it is here."""
        kept = False
        try:
            if transfer.given_up:
                raise GivenUp(visible(transfer.url), "given up")
            passed = transfer.begin()
            request = self._request("GET", transfer.url, held=transfer)
            reply = yield request
            if 400 <= reply.status < 404 and self._renew(request):
                reply = yield request
            if reply.status != 200:
                raise self._refusal(transfer.url, reply)
            body = reply.body
            if len(body) != size:
                raise of_other_size(transfer.url, len(body), size)
            passed.update(body)
            transfer.result = self._keep(transfer, body, FileInfo(size, passed.result()))
            kept = True
        except (OSError, StorageError) as exc:
            transfer.result = ours(exc)
        finally:
            if not kept:
                transfer.local.discard()

    def _keep(self, transfer: Transfer, body: bytes, info: FileInfo) -> FileInfo:
        descriptor = transfer.local.open()
        try:
            written = os.pwrite(descriptor, body, 0)
            while written < len(body):
                written += os.pwrite(descriptor, memoryview(body)[written:], written)
            transfer.local.keep(descriptor, info)
        finally:
            with suppress(OSError):
                os.close(descriptor)
        return info

    def _copying(self, transfer: Transfer) -> Script:
        """No file of this machine has a part in it."""
        try:
            if transfer.given_up:
                raise GivenUp(visible(transfer.url), "given up")
            transfer.begun = True
            self._look_whether_to_copy(transfer)
            there = yield from self._told(transfer.source, transfer)
            transfer.is_source(there)
            transfer.result = yield from self._copy(transfer, there)
        except StorageError as exc:
            transfer.result = exc
        finally:
            transfer.local.discard()

    def _look_whether_to_copy(self, transfer: Transfer) -> None:
        """Raise `CannotCopy` if that is known before anything is asked."""

    def _copy(self, transfer: Transfer, there: FileInfo) -> Generator[Request | Together, Reply, FileInfo]:
        """Have the server copy what it said this of; what it says of the copy. Tidies up when it fails."""
        raise CannotCopy(visible(transfer.url), "this storage does not copy")
        yield  # as the others

    def _any(self, transfer: Transfer) -> Script:
        """Any other: through a descriptor, as the bytes come or go."""
        descriptor = None
        kept = False
        try:
            if transfer.given_up:
                raise GivenUp(visible(transfer.url), "given up")
            if transfer.step.sends:
                descriptor = transfer.local.open()
            if descriptor is None:
                yield from self._end(transfer, transfer.take_held())
                info = transfer.let_go()
            elif transfer.direction is Direction.UPLOAD:
                yield from self._upload(transfer, descriptor)
                info = transfer.info()
            else:
                yield from self._download(transfer, descriptor)
                info = transfer.info()
                transfer.local.keep(descriptor, info)
                kept = True
            transfer.result = info
        except (OSError, StorageError) as exc:
            transfer.result = ours(exc)
        finally:
            if not kept:
                transfer.local.discard()
            if descriptor is not None:
                with suppress(OSError):
                    os.close(descriptor)

    def _download(self, transfer: Transfer, descriptor: int) -> Script:
        """Get it, or the part that is wanted, and see that it is whole."""
        part = is_part(transfer)
        careful = part or transfer.size_bytes is None or transfer.size_bytes > SMALL_BYTES
        extra: tuple[str, ...] = ()
        if part:
            extra = (f"Range: bytes={transfer.first_byte}-{'' if transfer.last_byte is None else transfer.last_byte}",)
            if transfer.version is not None:
                extra += (f"If-Match: {transfer.version}",)
        target = Target(transfer, descriptor)
        reply = yield from self._send(
            "GET", transfer.url, extra=extra, sink=target, wants_headers=careful, large=is_large(transfer)
        )
        target.flush()
        if not target.accept(reply.status):
            if part and reply.status == 200:
                raise StorageUnavailable(visible(transfer.url), "the server gives no parts of files")
            raise self._refusal(transfer.url, reply)
        if careful:
            yield from self._look_whole(transfer, reply)
        elif transfer.done_bytes != transfer.size_bytes:
            raise of_other_size(transfer.url, transfer.done_bytes, transfer.size_bytes or 0)

    def _look_whole(self, transfer: Transfer, reply: Reply) -> Script:
        """Raise unless the answer is what was asked for, and all of it."""
        url, headers = visible(transfer.url), reply.headers
        etag = headers.get("etag", "")
        if transfer.version is not None and etag and etag != transfer.version:
            raise StorageUnavailable(url, "the file has changed meanwhile")
        if etag and not etag.startswith("W/"):
            transfer.version = etag
        size = transfer.size_bytes
        if is_part(transfer):
            given, _, whole = headers.get("content-range", "").removeprefix("bytes ").partition("/")
            if given.partition("-")[0] != str(transfer.first_byte):
                raise StorageUnavailable(url, f"gave another part than was asked for ({given[:40]!r})")
            if whole.isdecimal():
                size = int(whole) if size is None else size
        elif size is None and reply.length < 0 and "chunked" not in headers.get("transfer-encoding", ""):
            # A body that ends with the connection ends anywhere.
            size = (yield from self._stat(transfer.url)).size_bytes
        elif size is None:
            size = reply.length if reply.length >= 0 else transfer.done_bytes
        end = size if transfer.last_byte is None else transfer.last_byte + 1
        if end is not None and transfer.done_bytes != end - transfer.first_byte:
            raise StorageUnavailable(url, f"sent {transfer.done_bytes} of {end - transfer.first_byte} bytes")
        told = checksums_told(headers).get(transfer.algorithm) if not is_part(transfer) else None
        if told is not None and transfer.passed is not None and transfer.passed.result() != told:
            raise ChecksumMismatch(url, f"what came is not what the server has ({told})")

    def _upload(self, transfer: Transfer, descriptor: int) -> Script:
        """Send it, and see that the server has it under its name, or holds it. Tidies up when it fails."""
        raise NotImplementedError

    def _end(self, transfer: Transfer, token: Any) -> Script:
        """Publish or abandon what is held."""
        raise NotImplementedError

    def _stat(self, url: str) -> Generator[Request | Together, Reply, FileInfo]:
        """What is there."""
        raise NotImplementedError

    def _told(self, url: str, transfer: Transfer) -> Generator[Request | Together, Reply, FileInfo]:
        """What is there, with the checksum that the transfer is about if the server knows several."""
        raise NotImplementedError

    def _remove(self, url: str) -> Script:
        """Remove it."""
        reply = yield from self._send("DELETE", url)
        if reply.status not in {200, 202, 204}:
            raise self._refusal(url, reply)

    def _send(
        self, method: str, url: str, *, query: str = "", extra: Sequence[str] = (), **rest: Unpack[Rest]
    ) -> Generator[Request | Together, Reply, Reply]:
        """Have a request carried with our credentials; once more if they were refused and there are newer ones."""
        request = self._request(method, url, query, extra, **rest)
        reply = yield request
        if 400 <= reply.status < 404 and self._renew(request):
            if isinstance(request.source, Origin):
                request.source.seek(0)
            reply = yield request
        return reply

    def _request(
        self, method: str, url: str, query: str = "", extra: Sequence[str] = (), **rest: Unpack[Rest]
    ) -> Request:
        """A request with our credentials."""
        raise NotImplementedError

    def _renew(self, request: Request) -> bool:
        """Its credentials were refused, perhaps: whether there are newer ones, and the request has them."""
        raise NotImplementedError

    def _refusal(self, url: str, reply: Reply, what: str = "") -> StorageError:
        return http_error(url, reply, what=what)


def is_part(transfer: Transfer) -> bool:
    """Whether less than the whole file is wanted."""
    return transfer.first_byte > 0 or transfer.last_byte is not None


def common_settings(words: CommonWords, proxy: Path | None) -> dict[int, object]:
    """What every easy handle is set to."""
    file, directory = authorities(os.environ)
    file, directory = words.ca_file or file, words.ca_directory or directory
    settings: dict[int, object] = {
        pycurl.NOSIGNAL: True,
        pycurl.USERAGENT: "loadmaster",
        pycurl.HTTP_VERSION: pycurl.CURL_HTTP_VERSION_1_1,
        pycurl.PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
        pycurl.REDIR_PROTOCOLS: pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS,
        pycurl.FOLLOWLOCATION: True,
        pycurl.MAXREDIRS: REDIRECTS,
        pycurl.CONNECTTIMEOUT_MS: int(words.connect_seconds * 1000),
        pycurl.TCP_KEEPALIVE: True,
        pycurl.BUFFERSIZE: RECEIVE_BYTES,
        pycurl.SSLVERSION: pycurl.SSLVERSION_TLSv1_2,
    }
    if file is not None:
        settings[pycurl.CAINFO] = str(file)
    if directory is not None:
        settings[pycurl.CAPATH] = str(directory)
    if proxy is not None:
        settings |= {pycurl.SSLCERT: str(proxy), pycurl.SSLKEY: str(proxy)}
    return settings


def ours(exc: OSError | StorageError) -> StorageError:
    """An error of the operating system's is this machine's fault."""
    return exc if isinstance(exc, StorageError) else translate(exc, WORK_DIRECTORY)


def of_other_size(url: str, size: int, expected: int) -> StorageError:
    """Less than is expected may be more the next time."""
    kind = ChecksumMismatch if size > expected else StorageUnavailable
    return kind(visible(url), f"sent {size} of the {expected} bytes expected")
