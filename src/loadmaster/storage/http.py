"""Files by HTTP and WebDAV: `http://`, `https://`, `dav://`, `davs://`. The requests are carried by `curl`.

    [storage.davs]
    token_file = "/run/user/1000/bt_u1000"    # else as WLCG's token discovery finds one
    proxy = "/tmp/x509up_u1000"               # a certificate with its key; else X509_USER_PROXY or the usual place
    publish = "move"

How an upload comes to its name, `publish`: "move" writes beside it and has the server rename (dav, davs); "check" writes
to the name and asks for the size afterwards (http, https, and where nothing can be renamed); "put" trusts the server to
keep nothing of an upload that broke off.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Unpack, cast
from urllib.parse import quote, urlsplit, urlunsplit

from anyio import to_thread
from pydantic import SecretStr

from loadmaster.errors import AccessDenied, CannotCopy, ChecksumMismatch, NotFound, StorageError, StorageUnavailable
from loadmaster.storage.base import Ability, FileInfo, Step, StorageOptions, Transfer
from loadmaster.storage.carrier import Request, Script, Together
from loadmaster.storage.credentials import Token, discovered_proxy, discovered_token, own_user
from loadmaster.storage.curl import CLEANUP_SECONDS
from loadmaster.storage.replies import WANT_DIGEST, Reply, checksums_told, http_error, told_for, visible
from loadmaster.storage.web import (
    SMALL_BYTES,
    CommonWords,
    CurlStorage,
    Origin,
    Rest,
    common_settings,
    origin,
    plain_body,
    rewind,
)

SAMPLE: Final = 64
"""Of the small files that a server says it has, the first and every so many-th are looked at."""

DEPTH: Final = 32
"""Directories that are made for one file."""

_PERHAPS_NO_DIRECTORY: Final = {403, 404, 409, 500}
"""What a PUT is answered where there is none: 409 by the book, 404 and 403 by some, 500 by nginx."""


class HttpWords(CommonWords):
    """What a site may say of http, https, dav and davs."""

    token: SecretStr | None = None
    token_file: Path | None = None
    proxy: Path | None = None
    """A certificate and its key in one file."""
    credentials_without_tls: bool = False
    """Whether a token is shown to whoever listens."""
    publish: Literal["move", "check", "put"] | None = None


class HttpStorage(CurlStorage):
    """Files of a web server, or of one that speaks WebDAV."""

    def __init__(self, options: StorageOptions) -> None:
        words = HttpWords.of(options)
        user = own_user()
        if words.token is not None or words.token_file is not None:
            self._token = Token(words.token.get_secret_value() if words.token else "", words.token_file)
        else:
            self._token = discovered_token(os.environ, user)
        proxy = words.proxy or discovered_proxy(os.environ, user)
        super().__init__(options, words, common_settings(words, proxy))
        self._dav = options.scheme in {"dav", "davs"}
        self._publish = words.publish or ("move" if self._dav else "check")
        self._cannot_rename: set[str] = set()
        self._cannot_copy: set[str] = set()
        self._proven: dict[str, int] = {}
        """How many files a host has taken since it was first seen to have what it said; none after one that it has not.
        Until then each is looked at."""
        self._without_tls = words.credentials_without_tls
        self._headers: tuple[str, ...] = ()
        self.abilities = Ability.SIDE_BY_SIDE | Ability.RANGES | Ability.CHECKSUMS
        if self._publish == "move":
            self.abilities |= Ability.RENAME | Ability.HOLD | Ability.COPY

    def _upload(self, transfer: Transfer, descriptor: int) -> Script:
        size = os.fstat(descriptor).st_size
        source = origin(transfer, descriptor, size)
        host = _host(transfer.url)
        if self._publish == "move" and host not in self._cannot_rename:
            if (yield from self._upload_beside(transfer, source, size)):
                return
            self._cannot_rename.add(host)
        if transfer.step is Step.HOLD:
            raise StorageError(visible(transfer.url), "the server cannot rename: it can hold nothing back")
        status = yield from self._put(transfer, source, size)
        if self._publish != "put":
            seen = self._proven.get(host, 0)
            self._proven[host] = seen + 1 if seen else 0
            if status == 202 or size > SMALL_BYTES or seen % SAMPLE == 0:
                try:
                    yield from self._compare(transfer, transfer.url, size)
                except StorageError:
                    self._proven[host] = 0
                    raise
                self._proven[host] = self._proven[host] or 1

    def _upload_beside(
        self, transfer: Transfer, source: Origin | bytes, size: int
    ) -> Generator[Request | Together, Reply, bool]:
        """Send it to a name beside and have the server rename it. Whether the server knows how to."""
        part = beside(transfer.url, transfer.part)
        try:
            yield from self._put(transfer, source, size, part)
            if size > SMALL_BYTES or transfer.step is Step.HOLD:
                yield from self._compare(transfer, part, size)
            if transfer.step is Step.HOLD:
                transfer.hold(part)
                return True
            if (yield from self._rename(part, transfer.url)):
                return True
        except StorageError:
            yield from self._abandon(part)
            raise
        yield from self._abandon(part)
        return False

    def _rename(self, part: str, url: str) -> Generator[Request | Together, Reply, bool]:
        """Whether the server knows how to."""
        destination = f"Destination: {self._address(url)}"
        reply = yield from self._send("MOVE", part, extra=(destination, "Overwrite: T"), about=url)
        if reply.status in {201, 204}:
            return True
        if reply.status not in {405, 501}:
            raise self._refusal(url, reply, "renaming")
        return False

    def _look_whether_to_copy(self, transfer: Transfer) -> None:
        url, host = transfer.url, _host(transfer.url)
        if host != _host(transfer.source):
            raise CannotCopy(visible(url), "on another server than its source")
        if host in self._cannot_copy or host in self._cannot_rename:
            raise CannotCopy(visible(url), "the server copies nothing")

    def _copy(self, transfer: Transfer, there: FileInfo) -> Generator[Request | Together, Reply, FileInfo]:
        """To a name beside, since the server writes while it copies; then renamed."""
        url = transfer.url
        part = beside(url, transfer.part)
        try:
            yield from self._have_copied(transfer, part)
            info = transfer.copied(there, (yield from self._told(part, transfer)))
            if (yield from self._rename(part, url)):
                return info
        except StorageError:
            yield from self._abandon(part)
            raise
        yield from self._abandon(part)
        self._cannot_rename.add(_host(url))
        raise CannotCopy(visible(url), "the server renames nothing")

    def _have_copied(self, transfer: Transfer, part: str) -> Script:
        extra = (f"Destination: {self._address(part)}", "Overwrite: T")
        quiet = transfer.quiet_seconds
        reply = yield from self._send("COPY", transfer.source, extra=extra, about=transfer.url, quiet_seconds=quiet)
        if reply.status in _PERHAPS_NO_DIRECTORY and (yield from self._make_directory(transfer.url, DEPTH)):
            reply = yield from self._send("COPY", transfer.source, extra=extra, about=transfer.url, quiet_seconds=quiet)
        if reply.status in {405, 501}:
            self._cannot_copy.add(_host(transfer.url))
            raise CannotCopy(visible(transfer.url), "the server copies nothing")
        if reply.status not in {201, 204}:
            raise self._refusal(transfer.url, reply, "copying")

    def _end(self, transfer: Transfer, token: Any) -> Script:
        if transfer.step is Step.ABANDON:
            with suppress(NotFound):
                yield from self._remove(token)
        elif not (yield from self._rename(token, transfer.url)):
            self._cannot_rename.add(_host(transfer.url))
            raise StorageError(visible(transfer.url), "the server cannot rename")

    def _abandon(self, part: str) -> Script:
        with suppress(StorageError):
            yield from self._send("DELETE", part, seconds=CLEANUP_SECONDS)

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """Have the server remove those of these names beside it."""
        if self._publish == "move":
            await self._ask(url, self._clear(url, parts))

    def _clear(self, url: str, parts: Sequence[str]) -> Script:
        for part in parts:
            with suppress(NotFound):
                yield from self._remove(beside(url, part))

    def _put(
        self, transfer: Transfer, source: Origin | bytes, size: int, place: str | None = None
    ) -> Generator[Request | Together, Reply, int]:
        """Send the body; where the directory is missing, make it (WebDAV's servers do not) and send it again. The status."""
        url = transfer.url
        place = place or url
        extra = plain_body(source, size)
        rewind(source)
        reply = yield from self._send("PUT", place, extra=extra, source=source, about=url)
        if reply.status in _PERHAPS_NO_DIRECTORY and self._dav and (yield from self._make_directory(url, DEPTH)):
            rewind(source)
            reply = yield from self._send("PUT", place, extra=extra, source=source, about=url)
        if reply.status not in {200, 201, 202, 204}:
            raise self._refusal(url, reply)
        return reply.status

    def _make_directory(self, url: str, depth: int) -> Generator[Request | Together, Reply, bool]:
        """Whether the directory of the URL is there now, and those above it."""
        parts = urlsplit(url)
        path = parts.path.rstrip("/").rpartition("/")[0] + "/"
        directory = urlunsplit((*parts[:2], path, parts[3], ""))
        if path == "/" or not depth:
            return False
        reply = yield from self._send("MKCOL", directory)
        if reply.status in _PERHAPS_NO_DIRECTORY and (yield from self._make_directory(directory, depth - 1)):
            reply = yield from self._send("MKCOL", directory)
        return reply.status in {201, 405}  # 405: it is there, by somebody else

    def _compare(self, transfer: Transfer, url: str, size: int) -> Script:
        """Raise unless the server has what was sent."""
        reply = yield from self._send("HEAD", url, extra=WANT_DIGEST, wants_headers=True)
        if reply.status not in {200, 204}:
            raise self._refusal(url, reply, "after the upload")
        if reply.length >= 0 and reply.length != size:
            raise StorageUnavailable(visible(url), f"the server has {reply.length} of the {size} bytes sent")
        told = checksums_told(reply.headers).get(transfer.algorithm)
        if told is not None and transfer.passed is not None and transfer.passed.result() != told:
            raise ChecksumMismatch(visible(url), f"the server has {told}, not what was sent")

    def _stat(self, url: str) -> Generator[Request | Together, Reply, FileInfo]:
        return (yield from self._told(url))

    def _told(self, url: str, transfer: Transfer | None = None) -> Generator[Request | Together, Reply, FileInfo]:
        reply = yield from self._send("HEAD", url, extra=WANT_DIGEST, wants_headers=True)
        if reply.status not in {200, 204}:
            raise self._refusal(url, reply)
        if reply.length < 0:
            raise StorageUnavailable(visible(url), "the server does not say how large it is")
        found = checksums_told(reply.headers)
        return FileInfo(reply.length, told_for(transfer.algorithm if transfer is not None else "", found))

    def _request(
        self, method: str, url: str, query: str = "", extra: Sequence[str] = (), **rest: Unpack[Rest]
    ) -> Request:
        address = self._address(url)
        token = self._token.text() if self._without_tls or address.startswith("https://") else ""
        headers = self._with_token(token, extra) if token else extra
        rest.setdefault("about", url)
        return Request(method, address, headers, shown=(token, extra), **rest)

    def _renew(self, request: Request) -> bool:
        token, extra = cast(tuple[str, Sequence[str]], request.shown)
        newer = self._token.text(look=True) if token else token
        request.headers, request.shown = self._with_token(newer, extra), (newer, extra)
        return newer != token

    def _with_token(self, token: str, extra: Sequence[str]) -> Sequence[str]:
        """The same object for the same words: libcurl need not be told again."""
        if not token:
            return extra
        return self._headers_of(f"Authorization: Bearer {token}", tuple(extra))

    def _headers_of(self, authorization: str, extra: tuple[str, ...]) -> Sequence[str]:
        if extra:
            return (authorization, *extra)
        known = self._headers  # which another thread may replace at any time
        if known != (authorization,):
            self._headers = known = (authorization,)
        return known

    def _address(self, url: str) -> str:
        """What libcurl is given: http or https, and nothing that has no place in a URL."""
        scheme, _, rest = url.partition("://")
        if not _PLAIN(rest):
            rest = quote(rest, safe=_IN_URLS)
        return f"{'https' if scheme in {'https', 'davs'} else 'http'}://{rest}"

    def _refusal(self, url: str, reply: Reply, what: str = "") -> StorageError:
        error = http_error(url, reply, what=what)
        if isinstance(error, AccessDenied) and reply.status == 401 and self._token.renewable:
            error.retryable = True  # whoever renews the token's file may be late
        return error


_IN_URLS: Final = "%/:?#[]@!$&'()*+,;=-._~"
_PLAIN: Final = re.compile(r"[\w%/:?#[\]@!$&'()*+,;=.~-]*", re.ASCII).fullmatch


def _host(url: str) -> str:
    return url.partition("://")[2].partition("/")[0]


def beside(url: str, part: str = "") -> str:
    """A name in the same directory, by default one that nobody else uses."""
    parts = urlsplit(url)
    directory = parts.path.rpartition("/")[0]
    return urlunsplit((*parts[:2], f"{directory}/{part or f'.{os.urandom(8).hex()}.part'}", parts[3], ""))


@asynccontextmanager
async def open_http(options: StorageOptions) -> AsyncIterator[HttpStorage]:
    """The storage behind http, https, dav and davs. Raises `InvalidSite` for words it does not understand."""
    storage = await to_thread.run_sync(HttpStorage, options)  # it looks for credentials
    try:
        yield storage
    finally:
        await storage.close()
