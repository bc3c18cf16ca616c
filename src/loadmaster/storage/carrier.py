"""A request, and the handle of libcurl's that carries it: what goes out, what comes back, and whether it still moves."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeAlias, TypeVar

from loadmaster.errors import ChecksumMismatch, StorageError
from loadmaster.storage.direct import WORTH_BYTES, Direct
from loadmaster.storage.replies import Reply, curl_error, visible

try:
    import pycurl
except ImportError as exc:  # pragma: no cover - said once, to the person who wants it
    raise ImportError("http, dav and s3 storages need pycurl: pip install 'loadmaster[http]'") from exc

W = TypeVar("W")

BODY_BYTES: Final = 64 * 1024
"""Of an answer that is not a file; what comes after is not looked at."""


RECEIVE_BYTES: Final = 1024**2
"""Asked of the system at once. Large files took a fifth less CPU than with 256 KiB; a thread has one such buffer."""

FIRST_BYTES: Final = 64 * 1024
"""The same for a body that is going to be read directly: libcurl reads ten times so much before it lets go."""

SEND_BYTES: Final = 1024**2
"""Of a large file, read at once; libcurl's own 64 KiB are sixteen times as many calls of ours."""


class Sink(Protocol):
    """Where the body of a good answer goes. May raise OSError, about this machine, or `StorageError`."""

    def accept(self, status: int) -> bool:
        """Whether an answer of this status is what the sink is for; else its body is kept in the reply."""
        ...

    def write(self, data: bytes) -> None:
        """The next bytes."""
        ...

    def take(self, data: memoryview) -> None:
        """The next bytes; the memory is used again afterwards."""
        ...


class Held(Protocol):
    """A file so small that it is in memory until it is whole."""

    size_bytes: int | None
    done_bytes: int


class Source(Protocol):
    """Where the body of a request comes from. May raise OSError, about this machine, or `StorageError`."""

    size_bytes: int

    def read(self, count: int) -> bytes:
        """The next bytes, at most so many."""
        ...

    def seek(self, offset: int) -> None:
        """Go on from there: a redirect, or a connection that the server had closed meanwhile."""
        ...


@dataclass(frozen=True, slots=True)
class Signing:
    """What libcurl signs requests with, as AWS wants it (SigV4)."""

    access_key: str
    secret_key: str = field(repr=False)
    region: str = "us-east-1"


@dataclass(frozen=True, slots=True)
class Pace:
    """What is slower than so many bytes a second, for so many seconds, has stalled."""

    bytes_per_second: float = 100.0
    seconds: float = 60.0


USUAL_PACE: Final = Pace()


@dataclass(eq=False, slots=True)
class Request:
    """One request. The reply is sent into the script that yields it; where none came, a `StorageError` is thrown."""

    method: str
    url: str
    headers: Sequence[str] = ()
    """`Name: value`. The same object again costs nothing."""
    held: Held | None = None
    """What the body of a good answer is; it comes in the reply. One that is longer is broken off."""
    sink: Sink | None = None
    large: bool = False
    """Whether much is expected for the sink: it may be read past libcurl, if the reply shall have its headers."""
    source: Source | bytes | None = None
    wants_headers: bool = False
    """Whether the reply shall have its headers."""
    signing: Signing | None = None
    seconds: float = 0.0
    """For the whole of it; 0 for as long as it is not stalled."""
    quiet_seconds: float = 0.0
    """How much longer than others it may move nothing, for the server has much to do before it answers."""
    about: str = ""
    """The URL as the caller has it, for the words of errors."""
    shown: object = None
    """The credentials that go along, for whoever has to look for newer ones."""


_NONE: Final = Request("", "")
NO_REPLY: Final = Reply(0)


@dataclass(eq=False, slots=True)
class Together:
    """Scripts to be run beside each other, so many at once; then the script that yields this goes on.

    Where one of them raises a `StorageError` the others are given up where they stand, and the error is thrown.
    """

    scripts: Iterable[Script]
    at_once: int


Script: TypeAlias = Generator[Request | Together, Reply, None]


Kind: TypeAlias = tuple[str, bool, bool, bool]
"""Of a request: its method, whether headers are wanted, whether its body is in memory, whether that of the answer is not."""


class Carrier(Generic[W]):
    """An easy handle of libcurl's and the request it carries. It serves one kind, so that little has to be set anew."""

    __slots__ = (
        "_accepted",
        "_body",
        "_header_lines",
        "_headers",
        "_held_bytes",
        "_paced",
        "_passed_bytes",
        "_signing",
        "curl",
        "direct",
        "failure",
        "key",
        "request",
        "work",
    )

    def __init__(self, key: Kind, settings: Mapping[int, object]) -> None:
        self.key = key
        self.curl = curl = pycurl.Curl()
        self.work: W | None = None
        self.request = _NONE
        self.failure: OSError | StorageError | None = None
        self.direct: Direct | None = None
        self._accepted: bool | None = None
        self._body: list[bytes] = []
        self._held_bytes = 0
        self._headers: Sequence[str] = ()
        self._header_lines: list[bytes] = []
        self._signing: Signing | None = None
        self._passed_bytes = 0
        self._paced = 0.0
        for option, value in settings.items():
            curl.setopt(option, value)
        method, wants_headers, has_bytes, has_sink = key
        curl.setopt(pycurl.WRITEFUNCTION, self._write if has_sink else self._keep)
        if wants_headers:
            curl.setopt(pycurl.HEADERFUNCTION, self._header_lines.append)
        if has_bytes:
            curl.setopt(pycurl.POST, True)
            curl.setopt(pycurl.POSTREDIR, pycurl.REDIR_POST_ALL)
            if method != "POST":
                curl.setopt(pycurl.CUSTOMREQUEST, method)
        elif method == "HEAD":
            curl.setopt(pycurl.NOBODY, True)
        elif method == "PUT":
            curl.setopt(pycurl.UPLOAD, True)
            curl.setopt(pycurl.UPLOAD_BUFFERSIZE, SEND_BYTES)
            curl.setopt(pycurl.READFUNCTION, self._read)
            curl.setopt(pycurl.SEEKFUNCTION, self._seek)
        elif method != "GET":
            curl.setopt(pycurl.CUSTOMREQUEST, method)
            curl.setopt(pycurl.FOLLOWLOCATION, False)

    def load(self, request: Request) -> None:
        """Make ready for a request."""
        curl = self.curl
        self.request, self._paced = request, 0.0
        curl.setopt(pycurl.URL, request.url)
        if request.headers is not self._headers:
            curl.setopt(pycurl.HTTPHEADER, request.headers)
            self._headers = request.headers
        source = request.source
        if source is not None:
            if isinstance(source, bytes):
                curl.setopt(pycurl.POSTFIELDS, source)
            else:
                curl.setopt(pycurl.INFILESIZE_LARGE, source.size_bytes)
        if request.signing is not self._signing:
            self._sign(request.signing)
        if request.seconds:
            curl.setopt(pycurl.TIMEOUT_MS, int(request.seconds * 1000))
        if request.large and request.url.startswith("http:"):
            curl.setopt(pycurl.BUFFERSIZE, FIRST_BYTES)

    def unload(self) -> None:
        """Forget the request: what it held is let go."""
        if self.request.seconds:
            self.curl.setopt(pycurl.TIMEOUT_MS, 0)
        if self.request.large:
            self.curl.setopt(pycurl.BUFFERSIZE, RECEIVE_BYTES)
        self.request, self.work, self.failure, self._accepted = _NONE, None, None, None
        self._body.clear()
        self._held_bytes = 0
        self._header_lines.clear()

    @property
    def accepted(self) -> bool:
        """Whether the body goes to the sink, and has begun to."""
        return self._accepted is True

    def go_direct(self) -> Direct | None:
        """Have libcurl leave the rest of the body to us, where that is worth it and nothing lies between. To be asked
        while libcurl does nothing: it has handed over all it has received."""
        curl, sink = self.curl, self.request.sink
        left = int(curl.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T) - curl.getinfo(pycurl.SIZE_DOWNLOAD_T))
        if left < WORTH_BYTES or sink is None or self.failure is not None:
            return None
        if curl.getinfo(pycurl.SCHEME).lower() != "http" or curl.getinfo(pycurl.USED_PROXY):
            return None
        if not {"transfer-encoding", "content-encoding"}.isdisjoint(_headers(self._header_lines)):
            return None
        socket = curl.getinfo(pycurl.ACTIVESOCKET)
        if socket < 0:
            return None
        curl.pause(pycurl.PAUSE_RECV)
        self.direct = Direct(socket, left, sink, self.request.about or self.request.url)
        return self.direct

    def stalls(self, now: float, seconds: float, pace: Pace) -> bool:
        """Whether it has been too slow for too long. Asked now and then; `seconds`: since it was asked last."""
        asks = self.curl.getinfo
        passed = int(asks(pycurl.SIZE_DOWNLOAD_T) + asks(pycurl.SIZE_UPLOAD_T) + asks(pycurl.HEADER_SIZE))
        if self.direct is not None:
            passed += self.direct.passed_bytes
        begins = not self._paced or not asks(pycurl.PRETRANSFER_TIME)  # to connect has a limit of its own
        if begins or passed - self._passed_bytes >= pace.bytes_per_second * seconds:
            self._paced = now
        self._passed_bytes = passed
        return now - self._paced >= pace.seconds + self.request.quiet_seconds

    def outcome(self, code: int, text: str) -> Reply | StorageError:
        """What came of the request. Raises OSError, about this machine."""
        request, curl = self.request, self.curl
        status = curl.getinfo(pycurl.RESPONSE_CODE)
        if self.failure is not None and status < 400:
            if isinstance(self.failure, StorageError):
                return self.failure
            raise self.failure
        if code and self.failure is None:
            return curl_error(request.about or request.url, code, text)
        sink = request.sink
        if sink is not None and self._accepted is None and self._body and sink.accept(status):
            try:
                sink.write(self._body.pop())
            except StorageError as exc:
                return exc
        body = self._body
        reply = Reply(status)
        if body:
            reply.body = body[0] if len(body) == 1 else b"".join(body)
        if self._header_lines:
            reply.headers = _headers(self._header_lines)
            reply.length = int(curl.getinfo(pycurl.CONTENT_LENGTH_DOWNLOAD_T))
        if status >= 400:
            reply.retry_after = curl.getinfo(pycurl.RETRY_AFTER) or None
        return reply

    def _sign(self, signing: Signing | None) -> None:
        if signing is None:
            self.curl.unsetopt(pycurl.AWS_SIGV4)
            self.curl.unsetopt(pycurl.USERNAME)
            self.curl.unsetopt(pycurl.PASSWORD)
        else:
            self.curl.setopt(pycurl.AWS_SIGV4, f"aws:amz:{signing.region}:s3")
            self.curl.setopt(pycurl.USERNAME, signing.access_key)
            self.curl.setopt(pycurl.PASSWORD, signing.secret_key)
        self._signing = signing

    # Those below are called by libcurl, which cannot pass on what they raise.

    def _keep(self, data: bytes) -> int | None:
        """Without a sink. What is too much of a good answer makes it a bad one."""
        held = self.request.held
        self._held_bytes = count = self._held_bytes + len(data)
        if held is not None:
            size = held.size_bytes or 0
            if count > size and count > BODY_BYTES:
                expected = f"sends more than the {size} bytes expected"
                self.failure = ChecksumMismatch(visible(self.request.about), expected)
                return -1
            held.done_bytes = min(count, size)
        elif count > BODY_BYTES + len(data):
            return None
        self._body.append(data)
        return None

    def _write(self, data: bytes) -> int | None:
        """The status is in the headers, if we have them. Else the first piece waits: of a small file it is all there is."""
        request = self.request
        sink = request.sink
        assert sink is not None  # noqa: S101 - else it is kept
        try:
            if self._accepted is None:
                if request.wants_headers:
                    self._accepted = sink.accept(_status(self._header_lines))
                elif not self._body:
                    self._body.append(data)
                    return None
                else:
                    sink.write(self._body[0])
                    self._accepted = True
            if self._accepted:
                sink.write(data)
                return None
        except (OSError, StorageError) as exc:
            self.failure = exc
            return -1
        if sum(map(len, self._body)) < BODY_BYTES:
            self._body.append(data)
        return None

    def _read(self, count: int) -> bytes | int:
        try:
            return self.request.source.read(count)  # type: ignore[union-attr]
        except (OSError, StorageError) as exc:
            self.failure = exc
            return int(pycurl.READFUNC_ABORT)

    def _seek(self, offset: int, origin: int) -> int:
        if origin != os.SEEK_SET:
            return int(pycurl.SEEKFUNC_CANTSEEK)
        self.request.source.seek(offset)  # type: ignore[union-attr]
        return int(pycurl.SEEKFUNC_OK)


def _status(lines: Sequence[bytes]) -> int:
    """Of the last answer; libcurl has seen that there is a number."""
    for line in reversed(lines):
        if line.startswith(b"HTTP/"):
            return int(line.split(maxsplit=2)[1])
    return 0


def _headers(lines: Sequence[bytes]) -> dict[str, str]:
    """Of the last answer: the ones before it were redirects. Names in lower case; of several the last counts."""
    found: dict[str, str] = {}
    for line in lines:
        if line.startswith(b"HTTP/"):
            found.clear()
        name, separator, value = line.decode("latin-1").partition(":")
        if separator:
            found[name.strip().lower()] = value.strip()
    return found
