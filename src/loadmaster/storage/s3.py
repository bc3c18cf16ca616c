"""Objects in S3 and its like: `s3://bucket/key`. The requests are carried by `curl`, which also signs them (SigV4).

    [storage.s3]
    endpoint = "https://s3.example.org"       # else Amazon's, by region
    region = "us-east-1"
    profile = "grid"                          # of ~/.aws/credentials; else AWS_ACCESS_KEY_ID and its like

A key is the URL's path with its percent signs resolved, as in all our URLs. An object comes into being by the last request
of its upload, so nothing is renamed; what was sent before that is abandoned when the upload fails.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import AsyncIterator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Unpack, cast
from urllib.parse import quote, unquote_to_bytes, urlsplit

import pycurl
from anyio import to_thread
from pydantic import Field, field_validator, model_validator

from loadmaster.errors import AccessDenied, CannotCopy, ChecksumMismatch, StorageError, StorageUnavailable
from loadmaster.storage.base import COPY_BYTES_PER_SECOND, Ability, FileInfo, Step, StorageOptions, Transfer
from loadmaster.storage.carrier import Request, Script, Signing, Together
from loadmaster.storage.checksums import COMBINABLE, Running, combined, continuing, running
from loadmaster.storage.credentials import KeyRing, Keys, discovered_keys
from loadmaster.storage.curl import CLEANUP_SECONDS, GivenUp
from loadmaster.storage.local import WORK_DIRECTORY
from loadmaster.storage.replies import Reply, checksums_told, etag_md5, http_error, s3_code, told_for, visible
from loadmaster.storage.web import CommonWords, CurlStorage, Origin, Rest, common_settings, origin, plain_body
from loadmaster.storage.words import AmazonKeys

log = logging.getLogger(__name__)

PARTS: Final = 10_000
"""S3's limit; larger files have larger parts."""

PART_TRIALS: Final = 3
"""Of each part, at once, before the whole upload is given back to whoever tries again later."""


COPY_BYTES: Final = 1024**3
"""A larger object is copied by the server in parts of this size, beside each other; it takes 5 GB by one request."""

PARTS_AT_ONCE: Final = 4
"""Of one file: one connection is seldom as fast as the way is wide."""


@dataclass(eq=False, slots=True)
class Piece:
    """A part of an upload."""

    number: int
    first_byte: int
    size_bytes: int
    passed: Running | None
    """Its own checksum; None if all of them share one, and go one after another."""
    tag: str = ""


class S3Words(AmazonKeys, CommonWords):
    """What a site may say of s3."""

    endpoint: str | None = None
    part_bytes: int = Field(default=16 * 1024**2, ge=5 * 1024**2, le=5 * 1024**3)

    @field_validator("endpoint")
    @classmethod
    def _is_endpoint(cls, value: str | None) -> str | None:
        if value is not None and (urlsplit(value).scheme not in {"http", "https"} or not urlsplit(value).hostname):
            raise ValueError("must be an http:// or https:// URL")
        return value

    @model_validator(mode="after")
    def _both_keys(self) -> S3Words:
        if (self.access_key is None) != (self.secret_key is None):
            raise ValueError("access_key and secret_key go together")
        return self


@dataclass(frozen=True, slots=True)
class _Parts:
    """All parts of an upload that is not an object yet."""

    upload: str
    """As it is named in requests."""
    tags: tuple[str, ...]
    size_bytes: int

    def listing(self) -> bytes:
        """What the server is told to make an object of."""
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{_escaped(tag)}</ETag></Part>"
            for number, tag in enumerate(self.tags, 1)
        )
        return f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()


class S3Storage(CurlStorage):
    """Objects by bucket and key."""

    abilities = (
        Ability.SIDE_BY_SIDE | Ability.RANGES | Ability.CHECKSUMS | Ability.MULTIPART | Ability.HOLD | Ability.COPY
    )

    def __init__(self, options: StorageOptions, environ: Mapping[str, str] = os.environ) -> None:
        words = S3Words.of(options)
        settings = common_settings(words, None) | {pycurl.FOLLOWLOCATION: False}  # a signature is for one host
        super().__init__(options, words, settings)
        named = environ.get("AWS_ENDPOINT_URL_S3") or environ.get("AWS_ENDPOINT_URL")
        self._endpoint = (words.endpoint or named or "").rstrip("/")
        self._region = words.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        self._path_style = words.path_style if words.path_style is not None else bool(self._endpoint)
        self._part_bytes = words.part_bytes
        self._ring: KeyRing | None = None
        if words.access_key is not None and words.secret_key is not None:
            token = words.session_token.get_secret_value() if words.session_token else ""
            keys = Keys(words.access_key.get_secret_value(), words.secret_key.get_secret_value(), token)
            self._ring = KeyRing(keys)
        elif not words.anonymous:
            self._ring = discovered_keys(environ, profile=words.profile, file=words.credentials_file)
        self._signing: tuple[Keys, Signing, tuple[str, ...]] | None = None

    def _upload(self, transfer: Transfer, descriptor: int) -> Script:
        size = os.fstat(descriptor).st_size
        passed = transfer.begin()
        if size > self._part_bytes or transfer.step is Step.HOLD:
            yield from self._upload_parts(transfer, descriptor, size)
            return
        source = origin(transfer, descriptor, size)  # what is in memory is signed, and so is looked at by the server
        by_md5 = transfer.algorithm == "md5"
        reply = yield from self._send(
            "PUT", transfer.url, extra=plain_body(source, size), source=source, wants_headers=by_md5
        )
        if reply.status not in {200, 201, 204}:
            raise self._refusal(transfer.url, reply)
        told = etag_md5(reply.headers)
        if told is not None and by_md5 and passed.result() != told:
            raise ChecksumMismatch(visible(transfer.url), f"the server has {told}, not what was sent")

    def _upload_parts(self, transfer: Transfer, descriptor: int, size: int) -> Script:
        """Some beside each other, if the checksum of all can be had from theirs. Then the word that makes an object."""
        url = transfer.url
        upload = yield from self._begin_parts(url)
        try:
            length = max(self._part_bytes, -(-size // PARTS))
            beside = transfer.algorithm in COMBINABLE
            pieces = [
                Piece(number, first, min(length, size - first), running(transfer.algorithm) if beside else None)
                for number, first in enumerate(range(0, size, length) or (0,), 1)
            ]
            yield Together(
                (self._part(transfer, descriptor, upload, piece) for piece in pieces), PARTS_AT_ONCE if beside else 1
            )
            if beside:
                transfer.passed = _of_all(transfer.algorithm, pieces)
            parts = _Parts(upload, tuple(piece.tag for piece in pieces), size)
            if transfer.step is Step.HOLD:
                transfer.hold(parts)
                return
            yield from self._complete(url, parts)
        except StorageError:
            yield from self._abandon(url, upload)
            raise

    def _begin_parts(self, url: str) -> Generator[Request | Together, Reply, str]:
        """An upload, as it is named in requests."""
        reply = yield from self._send("POST", url, query="uploads=", source=b"")
        found = re.search(rb"<UploadId>([^<]+)</UploadId>", reply.body)
        if reply.status != 200 or found is None:
            raise self._refusal(url, reply, "beginning an upload in parts")
        return "uploadId=" + quote(_unescaped(found[1]), safe="-._~")

    def _abandon(self, url: str, upload: str) -> Script:
        with suppress(StorageError):
            yield from self._send("DELETE", url, query=upload, seconds=CLEANUP_SECONDS)

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """Have the server forget all uploads in parts to this key that have not become an object."""
        await self._ask(url, self._clear(url))

    def _clear(self, url: str) -> Script:
        key = unquote_to_bytes(url.removeprefix(f"{self._scheme}://").partition("/")[2]).decode(errors="replace")
        while True:
            reply = yield from self._send("GET", url, query=f"{_LISTING}{quote(key, safe='-._~')}&uploads=")
            if reply.status == 403:  # a right of its own, which many have not: then the bucket's life cycle ends them
                log.info("%s: whether uploads were broken off there is not told", visible(url))
                return
            if reply.status != 200:
                raise self._refusal(url, reply, "listing uploads in parts")
            uploads = [_UPLOAD_ID.search(each) for each in _UPLOAD.findall(reply.body) if _key_in(each) == key]
            for found in uploads:
                if found is not None:
                    query = "uploadId=" + quote(_unescaped(found[1]), safe="-._~")
                    gone = yield from self._send("DELETE", url, query=query)
                    if gone.status not in {200, 202, 204, 404}:
                        raise self._refusal(url, gone, "abandoning an upload in parts")
            if not uploads or b"<IsTruncated>true</IsTruncated>" not in reply.body:
                return  # those of this very key come first in a list

    def _copy(self, transfer: Transfer, there: FileInfo) -> Generator[Request | Together, Reply, FileInfo]:
        """By one request, or by one for each part of a large object."""
        url, size = transfer.url, there.size_bytes
        if size > COPY_BYTES:
            yield from self._copy_parts(transfer, size)
        else:
            yield from self._have_copied(transfer, "", (), size)
        try:
            transfer.version = None
            return transfer.copied(there, (yield from self._told(url, transfer)))
        except (CannotCopy, ChecksumMismatch):
            with suppress(StorageError):
                yield from super()._remove(url)
            raise

    def _copy_parts(self, transfer: Transfer, size: int) -> Script:
        url, tags = transfer.url, dict[int, str]()
        upload = yield from self._begin_parts(url)

        def part(number: int, first: int) -> Script:
            last = min(first + length, size) - 1
            extra = (f"x-amz-copy-source-range: bytes={first}-{last}",)
            query = f"partNumber={number}&{upload}"
            tags[number] = yield from self._have_copied(transfer, query, extra, last + 1 - first)

        length = max(COPY_BYTES, -(-size // PARTS))
        try:
            yield Together((part(*each) for each in enumerate(range(0, size, length), 1)), PARTS_AT_ONCE)
            yield from self._complete(url, _Parts(upload, tuple(tags[number] for number in sorted(tags)), size))
        except StorageError:
            yield from self._abandon(url, upload)
            raise

    def _have_copied(
        self, transfer: Transfer, query: str, extra: tuple[str, ...], size: int
    ) -> Generator[Request | Together, Reply, str]:
        """What the server calls the copy. It may begin to answer before it knows what comes of it."""
        extra += (f"x-amz-copy-source: {self._path(transfer.source)}",)
        if transfer.version:
            extra += (f"x-amz-copy-source-if-match: {transfer.version}",)
        reply = yield from self._send(
            "PUT", transfer.url, query=query, extra=extra, source=b"", quiet_seconds=size / COPY_BYTES_PER_SECOND
        )
        if reply.status != 200 or s3_code(reply.body):
            raise self._refusal(transfer.url, reply, "copying")
        found = re.search(rb"<ETag>([^<]+)</ETag>", reply.body)
        if found is None:
            raise StorageUnavailable(visible(transfer.url), "the server does not say what it has copied")
        transfer.done_bytes += size
        return _unescaped(found[1])

    def _complete(self, url: str, parts: _Parts) -> Script:
        """Make an object of the parts."""
        xml = ("Content-Type: application/xml",)
        reply = yield from self._send("POST", url, query=parts.upload, extra=xml, source=parts.listing())
        if reply.status != 200 or s3_code(reply.body):  # it begins to answer before it knows
            raise self._refusal(url, reply, "making an object of the parts")
        found_size = (yield from self._stat(url)).size_bytes
        if found_size != parts.size_bytes:
            raise StorageUnavailable(visible(url), f"the server has {found_size} of the {parts.size_bytes} bytes sent")

    def _end(self, transfer: Transfer, token: _Parts) -> Script:
        if transfer.step is Step.PUBLISH:
            yield from self._complete(transfer.url, token)
            return
        reply = yield from self._send("DELETE", transfer.url, query=token.upload)
        if reply.status not in {200, 202, 204, 404}:
            raise self._refusal(transfer.url, reply, "abandoning the parts")

    def _part(self, transfer: Transfer, descriptor: int, upload: str, piece: Piece) -> Script:
        """Send one part; it is told what the server calls it."""
        url, query = transfer.url, f"partNumber={piece.number}&{upload}"
        source = Origin(transfer, descriptor, piece.first_byte, piece.size_bytes, piece.passed)
        trial = 1
        while True:
            source.seek(0)
            try:
                reply = yield from self._send("PUT", url, query=query, source=source, wants_headers=True)
                if reply.status != 200:
                    raise self._refusal(url, reply, "sending a part")
                if "etag" not in reply.headers:
                    raise StorageUnavailable(visible(url), "the server does not name the part it was sent")
            except StorageError as exc:
                ours = exc.url == WORK_DIRECTORY or isinstance(exc, GivenUp)
                if trial == PART_TRIALS or ours or not exc.retryable or exc.retry_after:
                    raise
                trial += 1
            else:
                piece.tag = reply.headers["etag"]
                return

    def _stat(self, url: str) -> Generator[Request | Together, Reply, FileInfo]:
        return (yield from self._told(url))

    def _told(self, url: str, transfer: Transfer | None = None) -> Generator[Request | Together, Reply, FileInfo]:
        reply = yield from self._send("HEAD", url, extra=_CHECKSUMS, wants_headers=True)
        if reply.status != 200:
            raise self._refusal(url, reply)
        if reply.length < 0:
            raise StorageUnavailable(visible(url), "the server does not say how large it is")
        found = checksums_told(reply.headers)
        if (md5 := etag_md5(reply.headers)) is not None:
            found.setdefault("md5", md5)
        if transfer is not None and transfer.version is None:
            transfer.version = reply.headers.get("etag")
        return FileInfo(reply.length, told_for(transfer.algorithm if transfer is not None else "", found))

    def _remove(self, url: str) -> Script:
        """S3 removes what is not there without a word, so it is asked first."""
        yield from self._stat(url)
        yield from super()._remove(url)

    def _request(
        self, method: str, url: str, query: str = "", extra: Sequence[str] = (), **rest: Unpack[Rest]
    ) -> Request:
        address = self._address(url)
        if query.startswith(_LISTING):  # this one asks the bucket
            address = address.removesuffix(_key(url, url.removeprefix(f"{self._scheme}://").partition("/")[2]))
        if query:
            address += f"?{query}"
        keys, signing, headers = self._signed_by(look=False)
        if extra:
            headers = (*headers, *extra) if headers else tuple(extra)
        rest.setdefault("about", url)
        return Request(method, address, headers, signing=signing, shown=(keys, extra), **rest)

    def _renew(self, request: Request) -> bool:
        if self._ring is None or not self._ring.renewable:
            return False
        keys, extra = cast(tuple[Keys | None, Sequence[str]], request.shown)
        newer, request.signing, headers = self._signed_by(look=True)
        request.headers, request.shown = (*headers, *extra), (newer, extra)
        return newer is not keys

    def _signed_by(self, *, look: bool) -> tuple[Keys | None, Signing | None, tuple[str, ...]]:
        keys = self._ring.keys(look=look) if self._ring is not None else None
        if keys is None:
            return None, None, ()
        known = self._signing  # which another thread may replace at any time
        if known is None or known[0] is not keys:
            headers = (f"x-amz-security-token: {keys.session_token}",) if keys.session_token else ()
            self._signing = known = (keys, Signing(keys.access_key, keys.secret_key, self._region), headers)
        return known

    def _address(self, url: str) -> str:
        bucket, _, path = url.removeprefix(f"{self._scheme}://").partition("/")
        if not bucket or not path:
            raise StorageError(visible(url), "names no object: s3://bucket/key")
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
            raise StorageError(visible(url), f"{bucket!r} is no name of a bucket")
        key = _key(url, path)
        if self._path_style or "." in bucket:
            return f"{self._endpoint or f'https://s3.{self._region}.amazonaws.com'}/{bucket}/{key}"
        if self._endpoint:
            scheme, _, host = self._endpoint.partition("://")
            return f"{scheme}://{bucket}.{host}/{key}"
        return f"https://{bucket}.s3.{self._region}.amazonaws.com/{key}"

    def _path(self, url: str) -> str:
        """Bucket and key, as a source is named."""
        self._address(url)  # or say what is wrong with it
        bucket, _, path = url.removeprefix(f"{self._scheme}://").partition("/")
        return f"/{bucket}/{_key(url, path)}"

    def _refusal(self, url: str, reply: Reply, what: str = "") -> StorageError:
        if 300 <= reply.status < 400:
            region = reply.headers.get("x-amz-bucket-region", "")
            where = f" (it is in {region})" if re.fullmatch(r"[a-z0-9-]{1,40}", region) else ""
            return StorageError(visible(url), f"the bucket is elsewhere{where}: HTTP {reply.status}")
        error = http_error(url, reply, what=what)
        if isinstance(error, AccessDenied) and (self._ring is None or not self._ring.renewable):
            error.retryable = False
        return error


def _key(url: str, path: str) -> str:
    key = quote(unquote_to_bytes(path), safe="/-._~")
    if any(part in {".", ".."} for part in key.split("/")):
        raise StorageError(visible(url), "a key with '.' or '..' as a part cannot be asked for")
    return key


def _of_all(algorithm: str, pieces: Sequence[Piece]) -> Running:
    whole = running(algorithm).result()
    for piece in pieces:
        if piece.passed is not None:
            whole = combined(whole, piece.passed.result(), piece.size_bytes)
    return continuing(whole)


_LISTING: Final = "prefix="
_UPLOAD: Final = re.compile(rb"<Upload>.*?</Upload>", re.DOTALL)
_UPLOAD_ID: Final = re.compile(rb"<UploadId>([^<]+)</UploadId>")


def _key_in(upload: bytes) -> str | None:
    found = re.search(rb"<Key>([^<]*)</Key>", upload)
    return None if found is None else _unescaped(found[1])


_CHECKSUMS: Final = ("x-amz-checksum-mode: ENABLED",)


def _unescaped(text: bytes) -> str:
    return text.decode().replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


@asynccontextmanager
async def open_s3(options: StorageOptions) -> AsyncIterator[S3Storage]:
    """The storage behind s3. Raises `InvalidSite` for words it does not understand."""
    storage = await to_thread.run_sync(S3Storage, options)  # it looks for credentials
    try:
        yield storage
    finally:
        await storage.close()
