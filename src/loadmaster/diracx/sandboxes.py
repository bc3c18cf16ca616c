"""DiracX's sandboxes as a storage, so that a site's `sandbox_store` can be `diracx://sandboxes`.

    sandbox_store = "diracx://sandboxes"
    sandbox_format = "tar.zst"                 # or "tar.bz2": it takes archives, not files
    sandbox_limit_bytes = 104857600            # DiracX's own limit

    [storage.diracx]                           # what is not said here is looked for as DiracX's own client does
    url = "https://diracx.example.org"
    owner_credentials_path = "/run/job/credentials.json"

An input sandbox `SB:<element>|/S3/<bucket>/...` is then `diracx://sandboxes/S3/<bucket>/...`, and its content is compared
with the checksum in its name. An output sandbox is written to `diracx://sandboxes/<job id>/<anything>.tar.zst`: it is stored
under its checksum, and then made the output of that job. There are no others' sandboxes for a pilot: its job's owner's
credentials are needed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final
from urllib.parse import unquote

import anyio
from anyio import to_thread
from pydantic import ValidationError

from loadmaster.description import complaints
from loadmaster.diracx.client import DiracX, open_diracx
from loadmaster.diracx.errors import CredentialsRefused, DiracxError, DiracxRefused, DiracxUnavailable
from loadmaster.diracx.exchange import exchange, give_blocks, httpx, streamed, unavailable, without_query
from loadmaster.diracx.preferences import Preferences
from loadmaster.errors import (
    AccessDenied,
    ChecksumMismatch,
    InvalidSite,
    NoSpace,
    NotFound,
    StorageError,
    StorageUnavailable,
)
from loadmaster.storage.base import FileInfo, Storage, StorageOptions, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import WORK_DIRECTORY, translated
from loadmaster.storage.replies import Reply, http_error
from loadmaster.storage.single import OneByOne

SCHEME: Final = "diracx"
STORE: Final = "diracx://sandboxes"

BLOCK_BYTES: Final = 1024**2
LIMIT_BYTES: Final = 100 * 1024**2
"""DiracX takes no larger ones."""

MOVE_SECONDS: Final = 600.0
"""For one sandbox, in one go; a network so slow that 100 MiB take longer is tried again."""

_STORED: Final = re.compile(r"/S3/[^/]+(?:/[^/]+){3}/([a-z0-9]{3,10}):([0-9a-f]{64})\.[a-z0-9.]+")
_OUTPUT: Final = re.compile(r"/([0-9]{1,18})/[^/]+?\.(tar\.bz2|tar\.zst)")


@asynccontextmanager
async def open_sandboxes(options: StorageOptions) -> AsyncIterator[Storage]:
    """The factory of `diracx://`. Raises `InvalidSite` when it is not said which server, or nonsense."""
    preferences = await to_thread.run_sync(_preferences, options)
    async with open_diracx(preferences) as diracx:
        yield sandboxes(diracx, streams=options.streams)


def sandboxes(diracx: DiracX, *, streams: int = 8) -> Storage:
    """The sandboxes of a server that is open already: for `open_transfers(site, storages={"diracx": ...})`."""
    return OneByOne(_Sandboxes(diracx), streams=streams)


def _preferences(options: StorageOptions) -> Preferences:
    try:
        if "url" in options.words and "credentials_path" in options.words:
            return Preferences.model_validate(dict(options.words))
        told = Preferences.load(
            os.environ | ({"DIRACX_URL": str(options.words["url"])} if "url" in options.words else {})
        )
        return Preferences.model_validate({**told.model_dump(), **options.words})
    except ValidationError as exc:
        raise InvalidSite("; ".join(f"[storage.{options.scheme}] {line}" for line in complaints(exc))) from None


class _Sandboxes:
    """One sandbox at a time."""

    def __init__(self, diracx: DiracX) -> None:
        self._diracx = diracx

    def __repr__(self) -> str:
        return f"<Sandboxes of {self._diracx.url}>"

    async def stat(self, url: str) -> FileInfo:
        """The size and checksum of a sandbox that is stored."""
        pfn, checksum = _stored(url)
        async with self._opened(url, pfn) as response:
            length = response.headers.get("content-length", "")
            if not length.isdecimal():
                raise StorageUnavailable(url, "the store does not say how long it is")
            return FileInfo(int(length), checksum)

    async def download(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        """Write it to the descriptor; compared with the checksum it is called by."""
        pfn, checksum = _stored(url)
        passed, digest = transfer.begin(), hashlib.sha256()

        async def take(block: bytes) -> bool:
            passed.update(block)
            digest.update(block)
            await to_thread.run_sync(_write, target, block)
            transfer.done_bytes += len(block)
            if transfer.done_bytes > LIMIT_BYTES:
                raise StorageError(url, f"has more than {LIMIT_BYTES:,} bytes")
            return True

        async with self._opened(url, pfn) as response:
            await give_blocks(response.aiter_raw(BLOCK_BYTES), take)
        if checksum is not None and digest.hexdigest() != checksum.digits:
            raise ChecksumMismatch(url, f"sha256 {digest.hexdigest()} expected {checksum.digits}")
        return transfer.info()

    async def upload(self, source: int, url: str, transfer: Transfer) -> FileInfo:
        """Store it, and make it the output of the job in its URL."""
        found = _OUTPUT.fullmatch(_path(url))
        if found is None:
            raise StorageError(url, "DiracX takes archives as sandboxes: sandbox_format is tar.zst or tar.bz2")
        size_bytes, digits = await to_thread.run_sync(_looked_through, source, transfer.begin())
        if not 0 < size_bytes <= LIMIT_BYTES:
            raise NoSpace(url, f"has {size_bytes:,} bytes, and DiracX takes 1 to {LIMIT_BYTES:,}")
        with _in_our_words(url):
            place = await self._diracx.announce_sandbox(digits, size_bytes, found[2])
            if place.get("url"):
                await self._send(url, source, size_bytes, place)
            transfer.done_bytes = size_bytes
            await self._diracx.assign_output(int(found[1]), place["pfn"])
        return transfer.info()

    async def remove(self, url: str) -> None:
        """DiracX removes those that no job has, by itself."""
        raise StorageError(url, "DiracX removes sandboxes itself, once no job has them")

    # -- the store behind DiracX -----------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _opened(self, url: str, pfn: str) -> AsyncIterator[httpx.Response]:
        """The content, as it comes. What goes wrong with it in the block is told in our words, too."""
        with _in_our_words(url):
            signed = await self._diracx.sandbox_url(pfn)
            with anyio.fail_after(MOVE_SECONDS):
                request = _signed(self._diracx.http, "GET", signed, headers={"Accept-Encoding": "identity"})
                async with streamed(self._diracx.http, request) as response:
                    if response.status_code != 200:
                        raise http_error(url, Reply(response.status_code, body=await _beginning(response)))
                    yield response

    async def _send(self, url: str, source: int, size_bytes: int, place: dict[str, Any]) -> None:
        """Post the archive to where DiracX says, with the fields that allow it."""
        fields = place.get("fields")
        if not isinstance(fields, dict) or not all(isinstance(each, str) for each in (*fields, *fields.values())):
            raise StorageUnavailable(url, "DiracX does not say how it is to be sent")
        boundary = os.urandom(16).hex()
        head, tail = _form(fields, boundary)
        length = len(head) + size_bytes + len(tail)
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}", "Content-Length": str(length)}
        content = _around(head, source, size_bytes, tail)
        request = _signed(self._diracx.http, "POST", str(place["url"]), headers=headers, content=content)
        answer = await exchange(self._diracx.http, request, f"{url}: sent to its store", seconds=MOVE_SECONDS)
        if not 200 <= answer.status < 300:
            raise http_error(url, Reply(answer.status, body=answer.body[:4096]))


class _in_our_words:  # noqa: N801 - a context manager, as `suppress` is
    """What DiracX, or the store behind it, has against it, as `StorageError`."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, traceback: object) -> None:
        if isinstance(exc, TimeoutError):
            raise StorageUnavailable(self._url, f"not done within {MOVE_SECONDS:.0f} s") from exc
        if isinstance(exc, httpx.HTTPError | httpx.StreamError):
            raise StorageUnavailable(self._url, str(unavailable("the store", exc))) from exc
        if isinstance(exc, DiracxError):
            raise _storage_error(self._url, exc) from exc


def _storage_error(url: str, exc: DiracxError) -> StorageError:
    if isinstance(exc, DiracxRefused):
        kind = {403: AccessDenied, 404: NotFound}.get(exc.status, StorageError)
        return kind(url, str(exc))
    if isinstance(exc, CredentialsRefused):
        return AccessDenied(url, str(exc))
    retry_after = exc.retry_after if isinstance(exc, DiracxUnavailable) else None
    return StorageUnavailable(url, str(exc), retry_after=retry_after)


def _path(url: str) -> str:
    return unquote(url.removeprefix(STORE)) if url.startswith(f"{STORE}/") else ""


def _stored(url: str) -> tuple[str, Checksum | None]:
    """The name of a sandbox with DiracX, and what its content comes to. Raises `StorageError`."""
    path = _path(url)
    found = _STORED.fullmatch(path)
    if found is None:
        raise StorageError(url, "not the name of a sandbox: SB:<element>|/S3/<bucket>/<vo>/<group>/<user>/sha256:...")
    return path, Checksum("sha256", found[2]) if found[1] == "sha256" else None


def _signed(http: httpx.AsyncClient, method: str, url: str, **words: Any) -> httpx.Request:
    if not url.startswith(("https://", "http://")):
        raise DiracxUnavailable("DiracX gave what is not a URL for a sandbox", answered=True)
    return without_query(http, method, url, **words)


async def _beginning(response: httpx.Response) -> bytes:
    body = bytearray()

    async def take(block: bytes) -> bool:
        body.extend(block)
        return len(body) < 4096

    await give_blocks(response.aiter_raw(4096), take)
    return bytes(body)


def _form(fields: dict[str, str], boundary: str) -> tuple[bytes, bytes]:
    """What comes before the file in a form, and what after it. S3 wants the file last."""
    parts = []
    for name, value in fields.items():
        if any(character in name for character in '"\r\n') or boundary in value:
            raise DiracxUnavailable("DiracX gave a form that cannot be sent", answered=True)
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n')
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="file"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    return "".join(parts).encode(), f"\r\n--{boundary}--\r\n".encode()


async def _around(head: bytes, source: int, size_bytes: int, tail: bytes) -> AsyncIterator[bytes]:
    yield head
    at = 0
    while at < size_bytes:
        block = await to_thread.run_sync(_read, source, min(BLOCK_BYTES, size_bytes - at), at)
        yield block
        at += len(block)
    yield tail


def _read(source: int, count: int, at: int) -> bytes:
    with translated(WORK_DIRECTORY):
        block = os.pread(source, count, at)
    if not block:
        raise StorageUnavailable(WORK_DIRECTORY, "the sandbox became shorter while it was sent")
    return block


def _write(target: int, block: bytes) -> None:
    left = memoryview(block)
    with translated(WORK_DIRECTORY):
        while left:
            left = left[os.write(target, left) :]


def _looked_through(source: int, passed: Any) -> tuple[int, str]:
    """The size of a file and its sha256; the transfer's own checksum has all bytes then, too."""
    digest, at = hashlib.sha256(), 0
    with translated(WORK_DIRECTORY):
        while block := os.pread(source, BLOCK_BYTES, at):
            digest.update(block)
            passed.update(block)
            at += len(block)
    return at, digest.hexdigest()
