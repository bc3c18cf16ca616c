"""`root://` and `roots://`: XRootD by its own client library.

    [storage.root]
    token_file = "/run/user/1000/bt_u1000"    # else as the library looks for one
    proxy = "/tmp/x509up_u1000"
    stall_seconds = 60

An upload is written to a name beside, its size compared, and renamed. The library calls back in threads of its own; what it
brings is settled in the loop of `aside`, one wake for all that has come. A path goes to the server without its percent
signs, so that `join_url` finds what other tools have stored; a `?` cannot be part of one.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

import anyio
from pydantic import Field

from loadmaster.errors import (
    AccessDenied,
    ChecksumMismatch,
    NoSpace,
    NotFound,
    StorageError,
    StorageUnavailable,
)
from loadmaster.storage.aside import CLEANUP_SECONDS, Aside, read_at, write_at
from loadmaster.storage.base import Ability, FileInfo, StorageOptions, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import WORK_DIRECTORY, translated
from loadmaster.storage.replies import visible
from loadmaster.storage.words import Words

try:
    from XRootD import client as library
    from XRootD.client.flags import AccessMode, OpenFlags, QueryCode
except ImportError as exc:  # pragma: no cover - said once, to the person who wants it
    raise ImportError("root storages need XRootD's client: pip install 'loadmaster[xrootd]'") from exc

client: Final[Any] = library  # it says that it has types, and has none

BLOCK_BYTES: Final = 1024**2
AHEAD: Final = 4
"""Blocks of one file that are asked for, or sent, before the first of them has been answered."""

_MODE: Final = AccessMode.UR | AccessMode.UW | AccessMode.GR | AccessMode.OR


class XrootdWords(Words):
    """What a site may say of `root`, `roots` and `xroot`."""

    token_file: Path | None = None
    """Only shown to a server over TLS: the library sees to that."""
    proxy: Path | None = None
    stall_seconds: float = Field(default=60, gt=0, le=3600)
    """Given up when the server has not answered for so long."""
    checksums: bool = True
    """Whether `stat` asks for a checksum. A server that has not kept it reads the file for that."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A file as the library wants it named."""

    told: str
    """For the words of errors."""
    host: str
    """With the scheme and a slash."""
    path: str
    words: str
    """What follows the path, `?` included; it may be a secret."""

    @property
    def url(self) -> str:
        return f"{self.host}{self.path}{self.words}"

    def beside(self, part: str = "") -> _Place:
        """A name in the same directory, by default one that nobody else has."""
        folder = self.path.rpartition("/")[0]
        return _Place(self.told, self.host, f"{folder}/{part or f'.{secrets.token_hex(8)}.part'}", self.words)


class Xrootd:
    """Files by URL, one at a time. Its methods are awaited in a loop of asyncio's."""

    def __init__(self, scheme: str, words: XrootdWords) -> None:
        self._scheme, self._words = scheme, words
        self._answers = _Answers()
        self._servers: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<Xrootd {self._scheme}>"

    async def stat(self, url: str) -> FileInfo:
        """The size; a checksum where the server has one, adler32 if it may choose."""
        place = self._place(url)
        found = await self._ask(place, self._server(place).stat, place.path + place.words)
        if found.flags & _IS_DIRECTORY:
            raise StorageError(place.told, "is a directory")
        return FileInfo(found.size, await self._checksum(place) if self._words.checksums else None)

    async def remove(self, url: str) -> None:
        """Remove the file."""
        place = self._place(url)
        await self._ask(place, self._server(place).rm, place.path + place.words)

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """Remove those of these names beside it."""
        place = self._place(url)
        for part in map(place.beside, parts):
            with suppress(NotFound):
                await self._ask(place, self._server(place).rm, part.path + part.words)

    async def download(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        """The file, or a part of it that is still of the same version; blocks are asked for ahead of their turn."""
        place, passed, file = self._place(url), transfer.begin(), client.File()
        await self._ask(place, file.open, place.url, OpenFlags.READ)
        try:
            found = await self._ask(place, file.stat)
            self._check_answer(place, transfer, found)
            start, end = transfer.first_byte, found.size
            if transfer.last_byte is not None:
                end = min(end, transfer.last_byte + 1)
            asked = start
            coming: deque[tuple[int, int, asyncio.Future[Any]]] = deque()
            while asked < end or coming:
                while asked < end and len(coming) < AHEAD:
                    count = min(BLOCK_BYTES, end - asked)
                    more = asked + count == found.size  # one byte that should not be there
                    coming.append((asked, count, self._begin(place, file.read, asked, count + more)))
                    asked += count
                offset, count, answer = coming.popleft()
                data = await self._answer(place, answer) or b""
                if len(data) != count:
                    what = "grew while it was read" if len(data) > count else f"ended after {offset + len(data)} bytes"
                    raise StorageUnavailable(place.told, f"{what}; {found.size} were announced")
                passed.update(data)
                write_at(target, memoryview(data), offset)
                transfer.done_bytes = offset + count - start
        finally:
            self._begin(place, file.close)  # nobody waits for it
        return transfer.info()

    async def upload(self, source: int, url: str, transfer: Transfer) -> FileInfo:
        """Beside the name, compared, renamed."""
        place, passed, file = self._place(url), transfer.begin(), client.File()
        with translated(WORK_DIRECTORY):
            size = os.fstat(source).st_size
        part = place.beside(transfer.part)
        try:
            await self._ask(place, file.open, part.url, OpenFlags.NEW | OpenFlags.MAKEPATH, _MODE)
            going: deque[tuple[int, asyncio.Future[Any]]] = deque()
            sent = 0
            while sent < size or going:
                while sent < size and len(going) < AHEAD:
                    data = read_at(source, min(BLOCK_BYTES, size - sent), sent)
                    passed.update(data)
                    going.append((len(data), self._begin(place, file.write, data, sent)))
                    sent += len(data)
                count, answer = going.popleft()
                await self._answer(place, answer)
                transfer.done_bytes += count
            with translated(WORK_DIRECTORY):
                if os.fstat(source).st_size != size:
                    raise StorageUnavailable("the output", "changed while it was copied")
            stored = await self._ask(place, file.stat, True)
            if stored.size != size:
                raise StorageUnavailable(place.told, f"{stored.size} of {size} bytes were stored")
            await self._ask(place, file.close)
            await self._ask(place, self._server(place).mv, part.path + part.words, place.path + place.words)
        except BaseException:
            await self._abandon(part, file)
            raise
        return transfer.info()

    async def _abandon(self, part: _Place, file: Any) -> None:
        """Remove what was sent; in bounded time, for the server may be gone."""
        with anyio.move_on_after(CLEANUP_SECONDS, shield=True):
            if file.is_open():
                with suppress(StorageError):
                    await self._ask(part, file.close)
            with suppress(StorageError):
                await self._ask(part, self._server(part).rm, part.path + part.words)

    def _check_answer(self, place: _Place, transfer: Transfer, found: Any) -> None:
        """Whether it is what was asked for. More than is expected is not let onto the disk."""
        version = f"{found.id}-{found.size}-{found.mtime}"
        if transfer.version is not None and version != transfer.version:
            raise StorageUnavailable(place.told, "has changed meanwhile")
        transfer.version = version
        if transfer.size_bytes is not None and found.size > transfer.size_bytes:
            raise ChecksumMismatch(place.told, f"has {found.size} bytes, not the {transfer.size_bytes} expected")
        if transfer.first_byte > found.size:
            raise StorageUnavailable(place.told, f"has {found.size} bytes, none from {transfer.first_byte} on")

    async def _checksum(self, place: _Place) -> Checksum | None:
        words = f"{place.words}&cks.type=adler32" if place.words else "?cks.type=adler32"
        try:
            found = await self._ask(place, self._server(place).query, QueryCode.CHECKSUM, place.path + words)
            name, _, digits = found.rstrip(b"\0\n ").decode("ascii").partition(" ")
            return Checksum.parse(f"{name}:{digits}")
        except (StorageError, ValueError):  # it has none, or none that we know
            return None

    def _server(self, place: _Place) -> Any:
        if (server := self._servers.get(place.host)) is None:
            server = self._servers[place.host] = client.FileSystem(place.host)
        return server

    def _place(self, url: str) -> _Place:
        told = visible(url)
        try:
            parts = urlsplit(url, allow_fragments=False)
            path = unquote(parts.path, errors="strict")
        except ValueError:
            raise StorageError(told, "no URL of a file: not UTF-8, or no proper host") from None
        path = "/" + path.lstrip("/")
        if not parts.netloc or path == "/" or not path.isprintable() or "?" in path:
            raise StorageError(told, "no URL of a file: no host or no path, or a ? or a control character in it")
        if not {".", ".."}.isdisjoint(path.split("/")):
            raise StorageError(told, "no URL of a file: it has . or .. as a part")
        words = [parts.query] if parts.query else []
        if self._words.token_file is not None:
            words.append(f"xrd.ztn={quote(str(self._words.token_file))}")
        if self._words.proxy is not None:
            words.append(f"xrd.gsiusrpxy={quote(str(self._words.proxy))}")
        scheme = "roots" if parts.scheme in {"roots", "xroots"} else "root"
        return _Place(told, f"{scheme}://{parts.netloc}/", path, "?" + "&".join(words) if words else "")

    # -- asking ------------------------------------------------------------------------------------------------------

    async def _ask(self, place: _Place, call: Callable[..., Any], *words: object) -> Any:
        return await self._answer(place, self._begin(place, call, *words))

    def _begin(self, place: _Place, call: Callable[..., Any], *words: object) -> asyncio.Future[Any]:
        """Have the library begin; its answer comes as (status, value)."""
        future = self._answers.expect(call, words)
        # The library's own limit is a whole number and only looked at every 15 s: it is there to tidy up after ours.
        seconds = int(self._words.stall_seconds) + 1
        status = call(*words, timeout=seconds, callback=self._answers.callback(future))
        if not status.ok:
            self._answers.settle(future, status, None)
        return future

    async def _answer(self, place: _Place, future: asyncio.Future[Any]) -> Any:
        try:
            with anyio.fail_after(self._words.stall_seconds):
                status, value = await future
        except TimeoutError:
            raise StorageUnavailable(place.told, f"no answer for {self._words.stall_seconds:g} s") from None
        if not status.ok:
            raise _error(place.told, status)
        return value


class _Answers:
    """What the library's threads bring, settled in the loop that waits for it.

    What was asked for is kept until the answer is there, also if nobody waits any more: the library writes into it.
    """

    def __init__(self) -> None:
        self._come: deque[tuple[asyncio.Future[Any], Any, Any]] = deque()
        self._awake = False
        self._expected: dict[asyncio.Future[Any], object] = {}

    def expect(self, *kept: object) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._expected[future] = kept
        return future

    def callback(self, future: asyncio.Future[Any]) -> Callable[[Any, Any, Any], None]:
        loop = future.get_loop()

        def come(status: Any, value: Any, hosts: Any) -> None:
            self._come.append((future, status, value))
            if not self._awake:
                self._awake = True
                with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    loop.call_soon_threadsafe(self._take)

        return come

    def settle(self, future: asyncio.Future[Any], status: Any, value: Any) -> None:
        self._expected.pop(future, None)
        if not future.done():
            future.set_result((status, value))

    def _take(self) -> None:
        self._awake = False
        while self._come:
            self.settle(*self._come.popleft())


# -- errors ----------------------------------------------------------------------------------------------------------

_IS_DIRECTORY: Final = 2

_FROM_SERVER: Final = 400

_SERVER: Final[dict[int, tuple[type[StorageError], str]]] = {
    3000: (StorageError, "an argument the server does not take"),
    3001: (StorageError, "an argument is missing"),
    3002: (StorageError, "the name is too long"),
    3003: (StorageUnavailable, "the file is locked"),
    3005: (StorageUnavailable, "an error of the server's file system"),
    3006: (StorageError, "a request the server does not take"),
    3007: (StorageUnavailable, "an error while the server read or wrote"),
    3008: (StorageUnavailable, "the server is out of memory"),
    3009: (NoSpace, "the storage is full"),
    3010: (AccessDenied, "the server does not allow it"),
    3011: (NotFound, "there is no such file"),
    3013: (StorageError, "the server cannot do that"),
    3015: (StorageError, "is not a file"),
    3016: (StorageError, "is a directory"),
    3018: (StorageError, "is there already"),
    3019: (ChecksumMismatch, "the server's checksum is another"),
    3021: (NoSpace, "the quota is full"),
    3024: (StorageUnavailable, "the server is busy"),
    3025: (AccessDenied, "the storage is read-only"),
    3028: (AccessDenied, "the server wants TLS"),
    3030: (AccessDenied, "the server wants other credentials"),
}
"""By the numbers of the XRootD protocol."""

_OURS: Final[dict[int, tuple[type[StorageError], str]]] = {
    9: (StorageError, "the library does not take an argument"),
    13: (StorageError, "the library cannot do that"),
    16: (NotFound, "no server has the file any more"),
    101: (StorageUnavailable, "the host's name cannot be resolved"),
    103: (StorageUnavailable, "no answer in time"),
    104: (StorageUnavailable, "the connection broke"),
    107: (StorageUnavailable, "the connection broke"),
    108: (StorageUnavailable, "cannot connect"),
    110: (StorageError, "TLS could not be agreed on"),
    202: (StorageUnavailable, "what answers is no XRootD server"),
    203: (AccessDenied, "the server wants other credentials"),
    204: (AccessDenied, "the server wants other credentials"),
    206: (StorageUnavailable, "no answer in time"),
    304: (NotFound, "there is no such file"),
    306: (StorageError, "redirected too often"),
}
"""By the numbers of the library."""


def _error(told: str, status: Any) -> StorageError:
    """What a status means. Its own words may have the rest of a URL in them, and are not passed on."""
    if status.code == _FROM_SERVER:
        kind, words = _SERVER.get(status.errno, (StorageUnavailable, "the server failed"))
        return kind(told, f"{words} (error {status.errno})")
    kind, words = _OURS.get(status.code, (StorageUnavailable, "failed"))
    return kind(told, f"{words} (XRootD's code {status.code})")


ABILITIES: Final = Ability.RANGES | Ability.RENAME | Ability.CHECKSUMS


@asynccontextmanager
async def open_storage(options: StorageOptions) -> AsyncIterator[Aside]:
    """What `root://` stands for. Raises `InvalidSite` that names each word that is not understood."""
    words = XrootdWords.of(options)
    abilities = ABILITIES if words.checksums else ABILITIES & ~Ability.CHECKSUMS
    storage = Aside(Xrootd(options.scheme or "root", words), streams=options.streams, abilities=abilities)
    try:
        yield storage
    finally:
        await storage.close()
