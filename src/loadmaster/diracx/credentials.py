"""A file of DiracX's: an access token that is good for minutes, and the refresh token that gets the next one.

    {"access_token": "...", "refresh_token": "...", "expires_on": 1700000000}

Several processes share such a file, DiracX's own client among them. A refresh token may be good for once only, and whoever
shows it again loses all; so whoever refreshes holds the lock (`flock`) of the file meanwhile, and whoever has waited for it
finds the new tokens in the same file. That is why it is written in place.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import anyio
from anyio import CapacityLimiter, to_thread

from loadmaster.diracx.errors import CredentialsRefused

log = logging.getLogger(__name__)

EARLY_SECONDS: Final = 60.0
"""A token that is good for less is not begun with: a request, and what the server does for it, take their time."""

MOST_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a server gave us. `expires_on`: in seconds since 1970."""

    access: str = field(repr=False)
    refresh: str | None = field(repr=False, default=None)
    expires_on: float = 0.0

    def good_for(self, now: float) -> float:
        """How many seconds the access token has left."""
        return self.expires_on - now


Refresh = Callable[[str], Awaitable[Tokens]]
"""Turns a refresh token into new tokens. Raises `DiracxError`."""


def check_credentials(path: Path) -> None:
    """Look whether there are credentials that are good, or may become so. Blocks.

    Raises `CredentialsRefused` that names the file and what is wrong with it.
    """
    try:
        file = _File(path)
    except OSError as exc:
        raise CredentialsRefused(f"{path}: {exc.strerror}") from exc
    try:
        tokens = file.read()
    finally:
        file.close()
    if tokens.refresh is None and not (tokens.access and tokens.good_for(time.time()) > 0):
        raise CredentialsRefused(f"{path}: the token is no longer good, and cannot be refreshed")


class Credentials:
    """The tokens of one file, for all tasks of this process."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokens: Tokens | None = None
        self._turn = anyio.Lock()
        self._threads = CapacityLimiter(1)  # one that waits for a lock for ever must not take one of the host's

    def __repr__(self) -> str:
        return f"<Credentials {self._path}>"

    async def token(self, refresh: Refresh, *, refused: str | None = None) -> str:
        """An access token that is good for a while; never `refused`, which the server did not take.

        Raises `CredentialsRefused` when there is none and none can be got, and what `refresh` raises.
        """
        async with self._turn:
            if self._tokens is not None and self._usable(self._tokens, refused):
                return self._tokens.access
            async with self._locked() as file:
                tokens = await to_thread.run_sync(file.read)
                if not self._usable(tokens, refused):
                    # What is in the file may be older than what we have, if we could not write to it.
                    kept = self._tokens.refresh if self._tokens is not None and not file.writable else None
                    if (with_it := kept or tokens.refresh) is None:
                        raise CredentialsRefused(f"{self._path}: the token is no longer good, and cannot be refreshed")
                    tokens = await refresh(with_it)
                    self._tokens = tokens
                    with anyio.CancelScope(shield=True):  # a small local file; what is not written is lost for good
                        await to_thread.run_sync(file.write, tokens)
                self._tokens = tokens
                return tokens.access

    def _usable(self, tokens: Tokens, refused: str | None) -> bool:
        return bool(tokens.access) and tokens.access != refused and tokens.good_for(time.time()) > EARLY_SECONDS

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[_File]:
        """The file, which nobody else reads or writes meanwhile."""
        claim = _Claim(self._path)
        try:
            # The kernel tells when the lock is ours. Whoever has it may hang: then the thread is left to wait alone.
            file = await to_thread.run_sync(claim.take, abandon_on_cancel=True, limiter=self._threads)
        except OSError as exc:
            raise CredentialsRefused(f"{self._path}: {exc.strerror}") from exc
        except BaseException:
            claim.abandon()
            raise
        try:
            yield file
        finally:
            file.close()


class _Claim:
    """One wait for the lock, which may be given up."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = threading.Lock()
        self._file: _File | None = None
        self._abandoned = False

    def take(self) -> _File:
        """The file, locked. Blocks."""
        file = _File(self._path)
        try:
            file.lock()
        except BaseException:
            file.close()
            raise
        with self._turn:
            self._file = file
            if self._abandoned:
                file.close()
        return file

    def abandon(self) -> None:
        """Nobody waits any more: a lock that has come, or comes later, is let go."""
        with self._turn:
            self._abandoned = True
            if self._file is not None:
                self._file.close()


class _File:
    """An open file of credentials. Methods block."""

    def __init__(self, path: Path) -> None:
        self._path = path
        flags = os.O_CLOEXEC | os.O_NOCTTY
        try:
            self._descriptor, self.writable = os.open(path, os.O_RDWR | flags), True
        except PermissionError:
            self._descriptor, self.writable = os.open(path, os.O_RDONLY | flags), False
        except OSError as exc:
            if exc.errno != 30:  # a file system that is only read
                raise
            self._descriptor, self.writable = os.open(path, os.O_RDONLY | flags), False

    def lock(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def read(self) -> Tokens:
        """Raises `CredentialsRefused`; its words have nothing of the file in them."""
        try:
            words: Any = json.loads(os.pread(self._descriptor, MOST_BYTES, 0))
            refresh = words.get("refresh_token")
            return Tokens(
                _as_header(words["access_token"]),
                str(refresh) if refresh else None,
                float(words.get("expires_on") or 0.0),
            )
        except OSError as exc:
            raise CredentialsRefused(f"{self._path}: {exc.strerror}") from exc
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise CredentialsRefused(f"{self._path}: not a file of DiracX's credentials") from None

    def write(self, tokens: Tokens) -> None:
        """Put the new tokens in place, in one write, so that a death in between leaves one or the other."""
        if not self.writable:
            log.warning("%s: cannot be written to: new tokens are kept in memory only", self._path)
            return
        words = {
            "access_token": tokens.access, "refresh_token": tokens.refresh, "expires_on": int(tokens.expires_on),
        }  # fmt: skip
        text = json.dumps(words).encode()
        try:
            longer = os.fstat(self._descriptor).st_size
            os.pwrite(self._descriptor, text.ljust(longer), 0)  # blanks after the end mean nothing to JSON
            os.ftruncate(self._descriptor, len(text))
            os.fsync(self._descriptor)
        except OSError as exc:
            log.warning("%s: new tokens are kept in memory only: %s", self._path, exc.strerror)
            self.writable = False


def _as_header(token: object) -> str:
    """A token. One with anything in it that would end a header is none."""
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError("not a token")
    return token
