"""What a server's answer, or the want of one, means to us. Decisions: nothing is asked here."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from loadmaster.errors import AccessDenied, NoSpace, NotFound, StorageError, StorageUnavailable
from loadmaster.storage.checksums import DIGITS, Checksum

LONGEST_WAIT_SECONDS: Final = 3600.0
"""Of what a server may ask us to wait; whoever says more is not believed."""


@dataclass(eq=False, slots=True)
class Reply:
    """A server's answer."""

    status: int
    length: int = -1
    """Of the body, as announced; -1 when it was not, or when headers were not asked for."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """By name in lower case; empty unless they were asked for."""
    body: bytes = b""
    """The beginning of it, if it is not a file."""
    retry_after: float | None = None


_STATUS: Final[dict[int, tuple[type[StorageError], str]]] = {
    401: (AccessDenied, "the server wants other credentials"),
    403: (AccessDenied, "the server does not allow it"),
    404: (NotFound, "there is no such file"),
    410: (NotFound, "the file is gone"),
    408: (StorageUnavailable, "the server waited too long for us"),
    412: (StorageUnavailable, "the file has changed meanwhile"),
    413: (NoSpace, "the server does not take files of this size"),
    423: (StorageUnavailable, "the file is locked"),
    425: (StorageUnavailable, "too early"),
    429: (StorageUnavailable, "the server is asked too often"),
    503: (StorageUnavailable, "the server is busy"),
    507: (NoSpace, "the storage is full"),
}

_S3_CODES: Final[dict[str, type[StorageError]]] = {
    "ExpiredToken": AccessDenied,
    "TokenRefreshRequired": AccessDenied,
    "NoSuchBucket": NotFound,
    "NoSuchKey": NotFound,
    "QuotaExceeded": NoSpace,
    "RequestTimeout": StorageUnavailable,
    "RequestTimeTooSkewed": StorageUnavailable,
    "SlowDown": StorageUnavailable,
    "BadDigest": StorageUnavailable,
    "InternalError": StorageUnavailable,
}
"""Where S3's word says more than the status."""

_RENEWABLE: Final = {"ExpiredToken", "TokenRefreshRequired"}


def http_error(url: str, reply: Reply, *, what: str = "") -> StorageError:
    """What an answer means that is not the one we wanted. `what`: of several requests, the one it answers."""
    code = s3_code(reply.body)
    kind, words = _STATUS.get(reply.status, (StorageUnavailable if reply.status >= 500 else StorageError, "refused"))
    kind = _S3_CODES.get(code, kind)
    doing = f"{what}: " if what else ""
    told = f" ({code})" if code else ""
    wait = None if reply.retry_after is None else min(max(reply.retry_after, 0.0), LONGEST_WAIT_SECONDS)
    error = kind(visible(url), f"{doing}{words}: HTTP {reply.status}{told}", retry_after=wait)
    if kind is StorageError and reply.status < 400:
        error = StorageUnavailable(visible(url), f"{doing}an answer of no use: HTTP {reply.status}")
    if code in _RENEWABLE:
        error.retryable = True
    return error


def s3_code(body: bytes) -> str:
    """S3's own word for what went wrong, if the body has one."""
    found = re.search(rb"<Code>([A-Za-z]{1,64})</Code>", body[:4096])
    return found[1].decode() if found else ""


_TLS: Final = {
    51: "the server's certificate is not its own",
    58: "our own certificate cannot be used",
    59: "no cipher in common",
    60: "the server's certificate is not trusted",
    64: "TLS is required",
    66: "TLS cannot be set up",
    77: "the certificates of the authorities cannot be read",
    82: "the revocation list cannot be read",
    83: "the server's certificate has another issuer",
    90: "the server's key is not the one that was pinned",
    91: "the server's certificate has no valid status",
    98: "the server wants a certificate of ours",
}
_HOPELESS: Final = {
    3: "no proper URL",
    4: "not built into libcurl",
    43: "refused by libcurl",
    47: "redirected too often",
}
_PASSING: Final = {
    1: "an answer that is not HTTP, or that leads to something else",
    5: "the proxy's name cannot be resolved",
    6: "the host's name cannot be resolved",
    7: "cannot connect",
    8: "an answer that cannot be read",
    16: "an error of HTTP/2",
    18: "the answer ended early",
    28: "no progress for too long, or out of time",
    35: "TLS could not be agreed on",
    52: "an empty answer",
    55: "the connection broke while sending",
    56: "the connection broke while receiving",
    65: "the connection broke and what was sent could not be sent again",
    80: "TLS was not ended properly",
    92: "an error of HTTP/2",
}


def curl_error(url: str, code: int, text: str) -> StorageError:
    """What it means that there was no whole answer, by libcurl's number. Its text goes along where it says more."""
    shown = visible(url)
    if code in _HOPELESS:
        return StorageError(shown, _HOPELESS[code])
    detail = "" if "://" in text else text.replace("\n", " ").strip()[:200]
    if code in _PASSING:
        return StorageUnavailable(shown, f"{_PASSING[code]} ({detail or code})")
    if code in _TLS:
        return StorageError(shown, f"{_TLS[code]} ({detail or code})")
    return StorageUnavailable(shown, f"libcurl's error {code}{f' ({detail})' if detail else ''}")


def visible(url: str) -> str:
    """The URL without what may be a secret: names and passwords before the host, and everything after the path."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition("://")[0] + "://…"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


# -- checksums in headers --------------------------------------------------------------------------------------------

WANT_DIGEST: Final = ("Want-Digest: adler32, md5, sha-256", "Want-Repr-Digest: sha-256=1, md5=1, adler32=1")
"""RFC 3230 as grid storages have it, and RFC 9530 after it."""

_NAMES: Final = {"adler32": "adler32", "md5": "md5", "sha-256": "sha256", "sha256": "sha256", "crc32c": "crc32c"}
_PREFERRED: Final = ("adler32", "md5", "sha256", "crc32c")


def checksums_told(headers: Mapping[str, str]) -> dict[str, Checksum]:
    """Those a server tells in its headers, by algorithm; what cannot be read is not told."""
    found: dict[str, Checksum] = {}
    for header in ("repr-digest", "digest"):
        for entry in headers.get(header, "").split(","):
            name, separator, value = entry.strip().partition("=")
            algorithm = _NAMES.get(name.strip().lower())
            if separator and algorithm and (digits := _digits(algorithm, value.strip().strip(":"))):
                found[algorithm] = Checksum(algorithm, digits)
    if "composite" not in headers.get("x-amz-checksum-type", "").lower():
        for algorithm in ("crc32c", "sha256"):
            if digits := _digits(algorithm, headers.get(f"x-amz-checksum-{algorithm}", "")):
                found[algorithm] = Checksum(algorithm, digits)
    return found


def preferred(found: Mapping[str, Checksum]) -> Checksum | None:
    """One of them: DIRAC's first."""
    return next((found[name] for name in _PREFERRED if name in found), None)


def told_for(algorithm: str, found: Mapping[str, Checksum]) -> Checksum | None:
    """The one by an algorithm, if there is one; else as `preferred`."""
    return found[algorithm] if algorithm in found else preferred(found)


def etag_md5(headers: Mapping[str, str]) -> Checksum | None:
    """S3's ETag, where it is the content's md5: not of an upload in parts, not encrypted with a key of its own."""
    etag = headers.get("etag", "").strip('"').lower()
    encryption = headers.get("x-amz-server-side-encryption", "AES256")
    customer_key = "x-amz-server-side-encryption-customer-algorithm" in headers
    if encryption == "AES256" and not customer_key and re.fullmatch(r"[0-9a-f]{32}", etag):
        return Checksum("md5", etag)
    return None


def _digits(algorithm: str, value: str) -> str | None:
    """Hexadecimal as we write it, from hexadecimal or base64."""
    length = DIGITS[algorithm]
    if re.fullmatch(rf"[0-9a-fA-F]{{{length}}}", value):
        return value.lower()
    try:
        digits = base64.b64decode(value, validate=True).hex()
    except (binascii.Error, ValueError):
        return None
    return digits if len(digits) == length else None
