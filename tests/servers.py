"""Servers on 127.0.0.1 for tests and campaigns: nginx with WebDAV, moto's S3, and one that is hostile on purpose."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import Request as UrlRequest
from urllib.request import urlopen

import _servers
import pytest


@dataclass(frozen=True)
class Server:
    """Where it listens, and the directory that it serves."""

    url: str
    root: Path


@contextmanager
def nginx(home: Path, *, makes_directories: bool = True) -> Iterator[Server]:
    """An nginx that takes PUT, DELETE, MKCOL, COPY and MOVE. `makes_directories`: those a PUT needs."""
    with or_skip(), _servers.nginx(home, home / "root", makes_directories=makes_directories) as url:
        yield Server(url, home / "root")


@contextmanager
def moto(home: Path) -> Iterator[str]:
    """The URL of moto's S3, with a bucket named `bucket`. It looks at no signature."""
    with or_skip(), _servers.moto(home) as url:
        urlopen(UrlRequest(f"{url}/bucket", method="PUT"), timeout=30).close()
        yield url


@contextmanager
def or_skip() -> Iterator[None]:
    """What needs a program that is not here is not tried."""
    try:
        yield
    except _servers.Absent as exc:
        pytest.skip(str(exc))


# -- the hostile one -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """A request as the server saw it."""

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)

    @property
    def path(self) -> str:
        return unquote(urlsplit(self.target).path)


@dataclass(frozen=True)
class Fault:
    """Something done wrong on purpose: `kind` is one of `FAULTS`, or a status; what else it says depends on that."""

    kind: str
    headers: tuple[str, ...] = ()
    body: bytes = b""


FAULTS = (
    "reset", "truncated", "wrong bytes", "stall", "drip", "long length", "short length", "no length", "empty",
    "nonsense", "endless", "endless headers", "half a head",
)  # fmt: skip
TRANSIENT = ("500", "502", "503", "429", "401", *FAULTS[:7], "empty")
"""For campaigns: what may pass when it is tried again."""

Orders = Callable[[Asked], Fault | None]


class HostileServer:
    """Files in memory, by HTTP with ranges, PUT, DELETE and MOVE. `orders` says of each request what is done wrong.

    with HostileServer() as server:
        server.files["/a"] = b"content"
        server.orders = lambda asked: Fault("503", ("Retry-After: 1",)) if asked.method == "GET" else None
    """

    def __init__(self, orders: Orders | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.orders = orders
        self.asked: list[Asked] = []
        self.attempts: Counter[tuple[str, str]] = Counter()
        self.faults: Counter[str] = Counter()
        self.knows_move = True
        self.peers: list[str] = []
        """Over TLS: the common names of the certificates that were shown."""
        self._tls = tls
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="hostile server")
        self.port = 0

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    def __enter__(self) -> HostileServer:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(self, *exc: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    def _serve(self) -> None:
        async def main() -> None:
            server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1024, limit=2**20, ssl=self._tls)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._stop.wait()
            server.close()
            talks = asyncio.all_tasks() - {asyncio.current_task()}
            for talk in talks:
                talk.cancel()
            await asyncio.gather(*talks, return_exceptions=True)

        self._loop.run_until_complete(main())

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._tls is not None and (shown := writer.get_extra_info("peercert")):
            self.peers.append(dict(pair for part in shown["subject"] for pair in part)["commonName"])
        try:
            while (asked := await self._read(reader, writer)) is not None:
                self.asked.append(asked)
                self.attempts[asked.method, asked.path] += 1
                fault = self.orders(asked) if self.orders is not None else None
                if fault is not None:
                    self.faults[fault.kind] += 1
                if not await self._answer(asked, fault, writer):
                    return
        except (ConnectionError, asyncio.IncompleteReadError):
            return
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Asked | None:
        head = await reader.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        return Asked(method, target, headers, body)

    async def _answer(self, asked: Asked, fault: Fault | None, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays."""
        kind = fault.kind if fault is not None else ""
        if fault is not None and kind.isdecimal():
            writer.write(_head(int(kind), len(fault.body), *fault.headers))
            if asked.method != "HEAD":
                writer.write(fault.body)
            return True
        if kind == "reset":
            _reset_when_closed(writer)
            writer.transport.abort()
            return False
        if kind == "empty":
            return False
        if kind == "stall":
            await self._stop.wait()
            return False
        if kind == "nonsense":
            writer.write(b"\x16\x03\x01 what?\r\n\r\n")
            return False
        if kind == "half a head":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Le")
            return False
        if kind == "endless headers":
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"X-More: " + b"x" * 1000 + b"\r\n")
                await writer.drain()
        status, headers, body = self._do(asked)
        if asked.method == "HEAD":
            writer.write(_head(status, len(body), *headers))
            return True
        length: int | None = len(body)
        if kind == "wrong bytes":
            body = bytes(byte ^ 1 for byte in body[:1]) + body[1:]
        elif kind == "long length":
            length = len(body) + 10
        elif kind == "short length":
            length = len(body) // 2
        elif kind in {"no length", "endless"}:
            length = None
        elif kind in {"truncated", "stall halfway", "reset halfway"}:
            body = body[: len(body) // 2]
        elif kind == "chunked":
            headers, length = (*headers, "Transfer-Encoding: chunked"), None
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        writer.write(_head(status, length, *headers))
        if kind == "drip":
            for position in range(len(body)):
                writer.write(body[position : position + 1])
                await writer.drain()
                await asyncio.sleep(0.5)
        while kind == "endless":
            writer.write(b"x" * 65536)
            await writer.drain()
        if kind == "no length" and fault is not None and fault.body:
            body = body[: int(fault.body)]
        writer.write(body)
        await writer.drain()
        if kind == "stall halfway":
            await self._stop.wait()
        if kind == "reset halfway":
            _reset_when_closed(writer)
        return kind in {"", "wrong bytes"}

    def _do(self, asked: Asked) -> tuple[int, tuple[str, ...], bytes]:
        path, files = asked.path, self.files
        if asked.method in {"GET", "HEAD"}:
            if path not in files:
                return 404, (), b"no such file"
            body, etag = files[path], f'"{hash(files[path]) & 0xFFFFFFFF:08x}"'
            if asked.headers.get("if-match", etag) != etag:
                return 412, (), b""
            if asked.headers.get("range", "").startswith("bytes="):
                first, _, last = asked.headers["range"].removeprefix("bytes=").partition("-")
                end = min(int(last) + 1, len(body)) if last else len(body)
                return (
                    206,
                    (f"Content-Range: bytes {first}-{end - 1}/{len(body)}", f"ETag: {etag}"),
                    body[int(first) : end],
                )
            return 200, (f"ETag: {etag}",), body
        if asked.method == "PUT":
            files[path] = asked.body
            return 201, (), b""
        if asked.method == "DELETE":
            return (204, (), b"") if files.pop(path, None) is not None else (404, (), b"")
        if asked.method == "MOVE" and self.knows_move:
            if path not in files:
                return 404, (), b""
            files[unquote(urlsplit(asked.headers["destination"]).path)] = files.pop(path)
            return 201, (), b""
        return 405, (), b""


def _reset_when_closed(writer: asyncio.StreamWriter) -> None:
    connection = writer.transport.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def _head(status: int, length: int | None, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def some_of_the_time(share: float, seed: int, kinds: Sequence[str] = TRANSIENT) -> Orders:
    """For campaigns: that share of requests gets a fault, by chance that can be repeated."""
    chance = random.Random(seed)

    def orders(asked: Asked) -> Fault | None:
        if chance.random() >= share:
            return None
        kind = chance.choice(kinds)
        return Fault(kind, ("Retry-After: 0",) if kind in {"429", "503"} else ())

    return orders


def http_date(seconds_from_now: float) -> str:
    return formatdate(time.time() + seconds_from_now, usegmt=True)


@dataclass(frozen=True)
class Certificates:
    """Of an authority of our own: its certificate, and files with certificate and key for a server and for a user."""

    authority: Path
    server: Path
    user: Path

    def for_server(self) -> ssl.SSLContext:
        """TLS that asks users for theirs."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.server)
        context.load_verify_locations(self.authority)
        context.verify_mode = ssl.CERT_OPTIONAL
        return context


def make_certificates(home: Path) -> Certificates:
    """For 127.0.0.1, and for somebody called `user`."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.now(UTC)
    keys = {who: ec.generate_private_key(ec.SECP256R1()) for who in ("authority", "server", "user")}
    names = {who: x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, who)]) for who in keys}
    for who, key in keys.items():
        builder = (
            x509.CertificateBuilder(names["authority"], names[who], key.public_key(), x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=who == "authority", path_length=None), critical=True)
        )
        if who == "server":
            address = x509.IPAddress(ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        pem = builder.sign(keys["authority"], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        if who != "authority":
            pem += key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        (home / f"{who}.pem").write_bytes(pem)
    return Certificates(*(home / f"{who}.pem" for who in keys))
