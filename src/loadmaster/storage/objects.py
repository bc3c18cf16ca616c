"""Google's and Azure's object stores, `gs://` and `az://` (`abfs://`), and S3 where libcurl is not to be had, by obstore.

    [storage.gs]
    service_account = "/etc/site/gcs.json"    # else as Google's own tools find one
    [storage.az]
    account = "example"                       # abfs://container@account.dfs... has it in the URL
    sas_token_file = "/run/site/sas"

An upload is one request, or parts that come into being by a last one: a name never holds half an object. The parts of an
upload that was broken off are invisible; Azure forgets them after a week, the others as the bucket's life cycle says, for
obstore has no word to abandon them.
"""

from __future__ import annotations

import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

from pydantic import Field, SecretStr

from loadmaster.errors import (
    AccessDenied,
    CannotCopy,
    ChecksumMismatch,
    NotFound,
    StorageError,
    StorageUnavailable,
)
from loadmaster.storage.aside import Aside, read_at, write_at
from loadmaster.storage.base import Ability, FileInfo, StorageOptions, Transfer
from loadmaster.storage.checksums import Checksum, Running
from loadmaster.storage.credentials import discovered_keys
from loadmaster.storage.local import WORK_DIRECTORY, translated
from loadmaster.storage.replies import visible
from loadmaster.storage.words import AmazonKeys, Words

try:
    import obstore
    from obstore import exceptions, store
except ImportError as exc:  # pragma: no cover - said once, to the person who wants it
    raise ImportError("gs and az storages need obstore: pip install 'loadmaster[objects]'") from exc

if TYPE_CHECKING:
    from obstore import GetOptions

PART_BYTES: Final = 8 * 1024**2
"""S3 and its like take parts of 5 MiB to 5 GiB."""

MOST_PARTS: Final = 10_000
"""Of one object, everywhere but on Azure, which takes more."""

PARTS_AT_ONCE: Final = 4
"""Of one upload. Times the size of a part, times the streams: what uploads take of memory at most."""

COPY_BYTES: Final = 1024**3
"""What a store may be expected to copy before a request counts as stalled. Amazon's limit is 5 GB."""

BLOCK_BYTES: Final = 1024**2
"""Handed over at once by a download."""

CHECKSUM_NAME: Final = "checksum"
"""The metadata of an object that we have put there in one request: what `stat` knows of its content."""

TOKEN_SECONDS: Final = 60
"""How long a token from a file is used before the file is read again."""


class _Words(Words):
    """What a site may say of each of these."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://[^/?#@]+")
    """Of a store that is not the company's own; one that begins with http:// is talked to without TLS."""
    anonymous: bool = False
    ca_file: Path | None = None
    """Certificates to be trusted besides the system's."""
    connect_seconds: float = Field(default=30, gt=0, le=3600)
    stall_seconds: float = Field(default=60, gt=0, le=86400)
    """Given up when nothing has come for so long. One part of an upload has to be sent, and answered, in that time."""
    part_bytes: int = Field(default=PART_BYTES, ge=5 * 1024**2, le=5 * 1024**3)
    """Of an upload; smaller files are one request."""

    def bucket(self, name: str, account: str | None, common: Mapping[str, Any]) -> Any:
        """The library's store for a bucket."""
        raise NotImplementedError


class GoogleWords(_Words):
    """What a site may say of `gs`."""

    service_account: Path | None = None
    token: SecretStr | None = None
    token_file: Path | None = None

    def bucket(self, name: str, account: str | None, common: Mapping[str, Any]) -> store.GCSStore:
        config = {
            "base_url": self.endpoint,
            "service_account": str(self.service_account) if self.service_account else None,
            "bearer_token": _secret(self.token),
            "skip_signature": self.anonymous or None,
        }
        provider = _token_from(self.token_file) if self.token_file else None
        return store.GCSStore(name, config=_given(config), credential_provider=provider, **common)


class AzureWords(_Words):
    """What a site may say of `az` and `abfs`."""

    account: str | None = None
    account_key: SecretStr | None = None
    sas_token: SecretStr | None = None
    sas_token_file: Path | None = None
    token: SecretStr | None = None
    token_file: Path | None = None

    def bucket(self, name: str, account: str | None, common: Mapping[str, Any]) -> store.AzureStore:
        config = {
            "account_name": account or self.account,
            "account_key": _secret(self.account_key),
            "sas_key": _secret(self.sas_token),
            "token": _secret(self.token),
            "endpoint": self.endpoint,
            "skip_signature": self.anonymous or None,
        }
        provider = None
        if self.sas_token_file:
            provider = _token_from(self.sas_token_file, "sas_token")
        elif self.token_file:
            provider = _token_from(self.token_file)
        return store.AzureStore(name, config=_given(config), credential_provider=provider, **common)


class AmazonWords(AmazonKeys, _Words):
    """What a site may say of `s3`: the words of `storage.s3`, so that one table serves both."""

    stall_bytes_per_second: int = Field(default=100, ge=1)
    """Read and not used: here only silence counts as a stall."""

    def bucket(self, name: str, account: str | None, common: Mapping[str, Any]) -> store.S3Store:
        endpoint = self.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        in_path = endpoint is not None if self.path_style is None else self.path_style
        config = {
            "endpoint": endpoint,
            "region": self.region
            or os.environ.get("AWS_REGION")
            or os.environ.get("AWS_DEFAULT_REGION")
            or "us-east-1",
            "virtual_hosted_style_request": not in_path,
        }
        if self.anonymous:
            return store.S3Store(name, config=_given({**config, "skip_signature": True}), **common)
        if self.access_key and self.secret_key:
            keys = {"access_key_id": _secret(self.access_key), "secret_access_key": _secret(self.secret_key)}
            return store.S3Store(
                name, config=_given({**config, **keys, "token": _secret(self.session_token)}), **common
            )
        ring = discovered_keys(os.environ, profile=self.profile, file=self.credentials_file)

        def provider() -> Any:
            if (found := ring.keys()) is None:
                raise ValueError("no keys were found")
            keys = {"access_key_id": found.access_key, "secret_access_key": found.secret_key, "expires_at": _soon()}
            return _given({**keys, "token": found.session_token or None})

        return store.S3Store(name, config=_given(config), credential_provider=provider, **common)


def _given(words: Mapping[str, Any]) -> Any:
    """Those that were said: for the others the library has its own."""
    return {name: value for name, value in words.items() if value is not None}


def _secret(word: SecretStr | None) -> str | None:
    return word.get_secret_value() if word is not None else None


def _soon() -> datetime:
    return datetime.now(UTC) + timedelta(seconds=TOKEN_SECONDS)


def _token_from(file: Path, name: str = "token") -> Callable[[], Any]:
    """What asks for the token again when it may have been renewed."""
    return lambda: {name: file.read_text(encoding="ascii").strip().removeprefix("?"), "expires_at": _soon()}


class Objects:
    """Objects by URL, one at a time. Its methods are awaited in a loop of asyncio's."""

    def __init__(self, scheme: str, words: _Words) -> None:
        self._scheme, self._words = scheme, words
        self._buckets: dict[tuple[str, str | None], Any] = {}

    def __repr__(self) -> str:
        return f"<Objects {self._scheme}>"

    def forget(self) -> None:
        """Let go of the buckets, and of the connections to them."""
        self._buckets.clear()

    async def stat(self, url: str) -> FileInfo:
        """The size, and the checksum if the object's metadata has one of ours."""
        bucket, key = self._place(url)
        with understood(url):
            found = await obstore.get_async(bucket, key, options={"head": True})
        return FileInfo(found.meta["size"], _checksum_in(found.attributes))

    async def remove(self, url: str) -> None:
        """Ask first: some of these stores do not mind removing what is not there."""
        bucket, key = self._place(url)
        with understood(url):
            await obstore.head_async(bucket, key)
            await obstore.delete_async(bucket, key)

    async def download(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        """The object, or a part of it that is still of the same version."""
        bucket, key = self._place(url)
        passed, first = transfer.begin(), transfer.first_byte
        if _is_small(transfer):
            return await self._download_small(url, target, transfer)
        options: GetOptions = {}
        if transfer.last_byte is not None:
            options["range"] = (first, transfer.last_byte + 1)
        elif first:
            options["range"] = {"offset": first}
        if transfer.version is not None:
            options["if_match"] = transfer.version
        with understood(url):
            found = await obstore.get_async(bucket, key, options=options or None)
            start, end = found.range
            self._check_answer(url, transfer, found.meta, start)
            transfer.version = found.meta["e_tag"]
            offset = start
            # Not `async for`: the library keeps for an instant what ends one, and with it this frame and all it holds.
            stream = aiter(found.stream(min_chunk_size=BLOCK_BYTES))
            while (data := await anext(stream, None)) is not None:
                block = memoryview(data)
                if offset + len(block) > end:
                    raise ChecksumMismatch(_shown(url), f"sends more than the {end - start} bytes announced")
                passed.update(block)
                write_at(target, block, offset)
                offset += len(block)
                transfer.done_bytes = offset - start
        if offset != end:
            raise StorageUnavailable(_shown(url), f"ended after {offset - start} of {end - start} bytes")
        return transfer.info()

    async def _download_small(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        """In one wait, which costs half as much; a byte more is asked for than there should be."""
        bucket, key = self._place(url)
        size = transfer.size_bytes or 0
        with understood(url):
            data = memoryview(await obstore.get_range_async(bucket, key, start=0, length=size + 1))
        if len(data) != size:
            has = f"more than {size}" if len(data) > size else f"{len(data)}"
            raise ChecksumMismatch(_shown(url), f"has {has} bytes, not the {size} expected")
        transfer.begin().update(data)
        write_at(target, data, 0)
        transfer.done_bytes = size
        return transfer.info()

    async def upload(self, source: int, url: str, transfer: Transfer) -> FileInfo:
        """In one request with its checksum beside it, or in parts."""
        bucket, key = self._place(url)
        passed = transfer.begin()
        with translated(WORK_DIRECTORY):
            size = os.fstat(source).st_size
        if size <= self._words.part_bytes:
            data = read_at(source, size, 0)
            _check_unchanged(source, size)
            passed.update(data)
            with understood(url):
                attributes = {CHECKSUM_NAME: str(passed.result())}
                await obstore.put_async(bucket, key, data, attributes=attributes, use_multipart=False)
            transfer.done_bytes = size
            return transfer.info()
        part = max(self._words.part_bytes, -(-size // MOST_PARTS))
        parts = _Parts(source, size, part, transfer, passed)
        try:
            with understood(url, parts):
                await obstore.put_async(bucket, key, parts.read(), chunk_size=part, max_concurrency=PARTS_AT_ONCE)
        finally:
            parts.closed = True
        return transfer.info()

    async def copy(self, transfer: Transfer) -> FileInfo:
        """Within a bucket; what we have put beside the content goes along."""
        (bucket, source), (other, target) = self._place(transfer.source), self._place(transfer.url)
        if bucket is not other:
            raise CannotCopy(_shown(transfer.url), "in another bucket than its source")
        there = await self.stat(transfer.source)
        transfer.is_source(there)
        if there.size_bytes > COPY_BYTES:
            raise CannotCopy(_shown(transfer.url), "too large to be copied by one request")
        with understood(transfer.url):
            await obstore.copy_async(bucket, source, target)
        return transfer.copied(there, await self.stat(transfer.url))

    def _check_answer(self, url: str, transfer: Transfer, meta: Mapping[str, Any], start: int) -> None:
        """Whether it is what was asked for. More than is expected is not let onto the disk."""
        if start != transfer.first_byte:
            raise StorageUnavailable(_shown(url), f"was asked from byte {transfer.first_byte}, answers from {start}")
        if transfer.version is not None and meta["e_tag"] != transfer.version:
            raise StorageUnavailable(_shown(url), "has changed meanwhile")
        if transfer.size_bytes is not None and meta["size"] > transfer.size_bytes:
            raise ChecksumMismatch(_shown(url), f"has {meta['size']} bytes, not the {transfer.size_bytes} expected")

    def _place(self, url: str) -> tuple[Any, str]:
        """The bucket and the key a URL names."""
        try:
            parts = urlsplit(url, allow_fragments=False)
            key = unquote(parts.path.removeprefix("/"), errors="strict")
        except ValueError:
            raise StorageError(_shown(url), "no URL of an object: not UTF-8, or no proper host") from None
        if parts.query or not {"", ".", ".."}.isdisjoint(key.split("/")):
            raise StorageError(_shown(url), "no URL of an object: it has a query, or an empty part, or . or .. as one")
        name, _, host = parts.netloc.partition("@")
        account = host.partition(".")[0] or None
        if (bucket := self._buckets.get((name, account))) is None:
            bucket = self._buckets[name, account] = self._open(url, name, account)
        return bucket, key

    def _open(self, url: str, name: str, account: str | None) -> Any:
        words = self._words
        client: dict[str, Any] = {
            "allow_http": bool(words.endpoint and words.endpoint.startswith("http://")),
            "connect_timeout": timedelta(seconds=words.connect_seconds),
            "read_timeout": timedelta(seconds=words.stall_seconds),
            "timeout": timedelta(days=7),  # obstore's own is 30 s for all of a transfer, however large
        }
        try:
            if words.ca_file is not None:
                client["root_certificate"] = words.ca_file.read_bytes()
            # Retrying is the engine's, which holds no lane meanwhile.
            return words.bucket(name, account, {"client_options": client, "retry_config": {"max_retries": 0}})
        except (exceptions.BaseError, OSError, ValueError, TypeError) as exc:
            raise StorageError(_shown(url), f"[storage.{self._scheme}] cannot be used: {_told(exc)}") from None


def _is_small(transfer: Transfer) -> bool:
    """A whole file of a size we know, not so large that it had better come in blocks. An empty one has no ranges."""
    whole = transfer.first_byte == 0 and transfer.last_byte is None and transfer.version is None
    return whole and transfer.size_bytes is not None and 0 < transfer.size_bytes <= BLOCK_BYTES


class _Parts:
    """A local file, read for an upload in parts. The library turns what is raised here into an error of its own."""

    def __init__(self, source: int, size: int, part: int, transfer: Transfer, passed: Running) -> None:
        self._source, self._size, self._part = source, size, part
        self._transfer, self._passed = transfer, passed
        self.closed = False
        """The descriptor may be another file's by now."""
        self.error: StorageError | None = None

    async def read(self) -> AsyncGenerator[bytes]:
        for offset in range(0, self._size, self._part):
            if self.closed:
                return
            try:
                data = read_at(self._source, min(self._part, self._size - offset), offset)
                if offset + len(data) == self._size:
                    _check_unchanged(self._source, self._size)
            except StorageError as exc:
                self.error = exc
                raise
            self._passed.update(data)
            self._transfer.done_bytes = offset + len(data)
            yield data


def _check_unchanged(source: int, size: int) -> None:
    with translated(WORK_DIRECTORY):
        if os.fstat(source).st_size != size:
            raise StorageUnavailable("the output", "changed while it was copied")


def _checksum_in(attributes: Mapping[Any, str]) -> Checksum | None:
    try:
        return Checksum.parse(attributes[CHECKSUM_NAME])
    except (KeyError, ValueError):  # none, or somebody else's
        return None


def _shown(url: str) -> str:
    """The URL without what may be a secret; what stands before the host of abfs:// is a container."""
    plain = visible(url)
    scheme, _, rest = url.partition("://")
    container, at, _ = rest.partition("/")[0].partition("@")
    return (
        plain.replace("://", f"://{container}@", 1)
        if at and scheme.startswith("abfs") and ":" not in container
        else plain
    )


# -- errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def understood(url: str, parts: _Parts | None = None) -> Iterator[None]:
    """Turn the library's errors into ours. Its words, and the error itself, may hold signed URLs: neither is passed on."""
    try:
        yield
    except StorageError:
        raise
    except Exception as exc:  # noqa: BLE001 - what is not the library's is raised again
        exc.__traceback__ = None  # likewise
        if parts is not None and parts.error is not None:
            raise parts.error from None
        raise _error(_shown(url), exc) from None


def _error(name: str, exc: Exception) -> StorageError:
    match exc:
        case FileNotFoundError():
            return NotFound(name, "there is no such object, or no such bucket")
        case exceptions.PermissionDeniedError() | exceptions.UnauthenticatedError():
            return AccessDenied(name, _told(exc))
        case exceptions.PreconditionError():
            return StorageUnavailable(name, "has changed meanwhile")
        case exceptions.BaseError() if not isinstance(exc, _HOPELESS):
            return StorageUnavailable(name, _told(exc))
        case exceptions.BaseError() | ValueError() | TypeError():
            return StorageError(name, _told(exc))
        case OSError() | RuntimeError():
            return StorageUnavailable(name, _told(exc))
    raise exc


_HOPELESS: Final = (
    exceptions.InvalidPathError,
    exceptions.NotSupportedError,
    exceptions.UnknownConfigurationKeyError,
)


def _told(exc: Exception) -> str:
    """A few words for people: the status if there is one, else what the library says last, without URLs."""
    first = str(exc).partition("\n")[0]
    if status := re.search(r"status code: (\d{3} [A-Za-z' -]{2,40})", first):
        what = "no token could be had: " if "token request" in first else ""
        return f"{what}HTTP {status[1].strip()}"
    last = first.rpartition(" - ")[2].rpartition("error: ")[2]
    return re.sub(r"\S*(://|[?&=])\S*", "…", last)[:160].strip() or type(exc).__name__


# -- factories -------------------------------------------------------------------------------------------------------


class _Factory:
    """What a scheme stands for."""

    def __init__(self, words: type[_Words], abilities: Ability) -> None:
        self._words, self._abilities = words, abilities

    def __call__(self, options: StorageOptions) -> AbstractAsyncContextManager[Aside]:
        """Raises `InvalidSite` that names each word that is not understood."""
        return self._open(options)

    @asynccontextmanager
    async def _open(self, options: StorageOptions) -> AsyncIterator[Aside]:
        objects = Objects(options.scheme, self._words.of(options))
        storage = Aside(objects, streams=options.streams, abilities=self._abilities)
        try:
            yield storage
        finally:
            await storage.close()
            objects.forget()


ABILITIES: Final = Ability.RANGES | Ability.MULTIPART

open_google: Final = _Factory(GoogleWords, ABILITIES)
open_azure: Final = _Factory(AzureWords, ABILITIES)
open_amazon: Final = _Factory(AmazonWords, ABILITIES | Ability.COPY)
