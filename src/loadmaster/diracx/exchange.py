"""One request and its answer, with the library's habits taken care of: what it logs, raises and leaves open."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

import anyio

from loadmaster.diracx.errors import DiracxUnavailable
from loadmaster.errors import LoadmasterError

try:
    import httpx as httpx
except ImportError as exc:  # pragma: no cover - said once, to the person who wants it
    raise ImportError("DiracX needs httpx: pip install 'loadmaster[diracx]'") from exc

ANSWER_SECONDS: Final = 60.0
"""For the whole of one request and its answer."""

MOST_BYTES: Final = 4 * 1024**2
"""No answer of DiracX's is longer; one that is, is none."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back: a status, headers by name in lower case, and the whole body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


async def exchange(
    http: httpx.AsyncClient, request: httpx.Request, what: str, *, seconds: float = ANSWER_SECONDS
) -> Answer:
    """Send a request, take its answer whole. Raises `DiracxUnavailable` that begins with `what`."""
    body = bytearray()

    async def take(block: bytes) -> bool:
        body.extend(block)
        return len(body) <= MOST_BYTES

    try:
        with anyio.fail_after(seconds):
            async with streamed(http, request) as response:
                await give_blocks(response.aiter_bytes(), take)
    except TimeoutError as exc:
        raise DiracxUnavailable(f"{what}: no answer within {seconds:.0f} s") from exc
    except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, ssl.SSLError, OSError) as exc:
        raise unavailable(what, exc) from exc
    if len(body) > MOST_BYTES:
        raise DiracxUnavailable(f"{what}: an answer without end", answered=True)
    return Answer(response.status_code, {k.lower(): v for k, v in response.headers.items()}, bytes(body))


async def give_blocks(blocks: AsyncIterator[bytes], take: Callable[[bytes], Awaitable[bool]]) -> None:
    """Give blocks as they come, until `take` wants no more, or raises what is our own or the system's.

    The library's generators, one in the other, only end well at their end or by a cancellation: so they get one.
    """
    error: Exception | None = None
    with anyio.CancelScope() as scope:
        async for block in blocks:
            try:
                more = await take(block)
            except (LoadmasterError, OSError) as exc:
                error, more = exc, False
            if not more:
                scope.cancel()
    if error is not None:
        raise error


@asynccontextmanager
async def streamed(http: httpx.AsyncClient, request: httpx.Request) -> AsyncIterator[httpx.Response]:
    """An answer, to be read as it comes."""
    async with AsyncExitStack() as stack:
        response = await http.send(request, stream=True)

        async def close() -> None:
            with anyio.move_on_after(5, shield=True):
                await response.aclose()

        stack.push_async_callback(close)
        yield response


def without_query(http: httpx.AsyncClient, method: str, url: str, **words: Any) -> httpx.Request:
    """A request whose URL, which is logged, has nothing of what comes after the path: that is what signs it."""
    parts = urlsplit(url)
    target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
    extensions = {"target": target.encode("ascii"), "timeout": http.timeout.as_dict()}
    bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path or '/'}"
    return http.build_request(method, bare, extensions=extensions, **words)


def unavailable(what: str, exc: BaseException) -> DiracxUnavailable:
    """The library's error in our words. Its own may quote what we sent, so only those of the system go along."""
    detail = next((str(each.strerror) for each in _causes(exc) if isinstance(each, OSError) and each.strerror), "")
    return DiracxUnavailable(f"{what}: {type(exc).__name__}{f' ({detail})' if detail else ''}")


def _causes(exc: BaseException | None) -> Iterable[BaseException]:
    while exc is not None:
        yield exc
        exc = exc.__cause__ or exc.__context__
