"""Doubles we stand behind, for tests of coordinators and of programs that embed us.

    storage = Faults(MemoryStorage({"memory://se/events": b"..."}))
    storage.fail("upload", at=3)                                     # the third upload, and only that one
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        result = await run_job(job, transfers=transfers, handle=JobHandle(MemoryJournal()))

Without orders they do what the real ones do, and pass the same tests.
"""

from __future__ import annotations

import errno
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import anyio
from anyio import lowlevel, to_thread

from loadmaster.errors import NotFound, StorageError, StorageUnavailable
from loadmaster.events import Event
from loadmaster.storage.base import FileInfo, Progress, Storage

Operation: TypeAlias = Literal["stat", "download", "upload", "remove"]
"""What a storage can be asked for."""

COPY_BYTES: Final = 1024 * 1024


class MemoryStorage:
    """Files by URL, in a dictionary that is yours to fill and to look into: `files`."""

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files: dict[str, bytes] = dict(files or {})

    def __repr__(self) -> str:
        return f"<MemoryStorage {len(self.files)} files>"

    async def stat(self, url: str) -> FileInfo:
        """The size and checksum of the file."""
        await lowlevel.checkpoint()
        return _info(self._file(url))

    async def download(self, url: str, target: int, progress: Progress) -> FileInfo:
        """Write the file to the descriptor, from its beginning."""
        await lowlevel.checkpoint()
        content = self._file(url)
        await to_thread.run_sync(_write, target, content)
        progress.done_bytes = len(content)
        return _info(content)

    async def upload(self, source: int, url: str, progress: Progress) -> FileInfo:
        """Keep what the descriptor holds. The URL names the new file once all of it has been read."""
        await lowlevel.checkpoint()
        content = await to_thread.run_sync(_read, source)
        progress.done_bytes = len(content)
        self.files[url] = content
        return _info(content)

    async def remove(self, url: str) -> None:
        """Forget the file."""
        await lowlevel.checkpoint()
        self._file(url)
        del self.files[url]

    def _file(self, url: str) -> bytes:
        if url not in self.files:
            raise NotFound(url, "there is no such file")
        return self.files[url]


@dataclass(frozen=True, slots=True)
class _Order:
    """How to misbehave, at which call of an operation (every one if None)."""

    operation: Operation
    at: int | None
    error: Callable[[str], StorageError] | None = None
    size_error_bytes: int = 0
    wrong_bytes: bool = False
    hangs: anyio.Event | None = None


class Faults:
    """A storage that misbehaves on order, and otherwise does what the one it wraps does.

    `at` counts the calls of that operation, from 1; without it every call is meant. Of several orders for one call the
    first one given counts.
    """

    def __init__(self, storage: Storage) -> None:
        self.calls: list[tuple[Operation, str]] = []
        """What was asked for, in order: the operation and the URL."""
        self._storage = storage
        self._orders: list[_Order] = []

    def __repr__(self) -> str:
        return f"<Faults of {self._storage!r}: {len(self._orders)} orders, {len(self.calls)} calls>"

    def fail(
        self, operation: Operation, *, at: int | None = None, error: Callable[[str], StorageError] | None = None
    ) -> None:
        """Raise an error instead of doing anything: `error(url)`, or `StorageUnavailable`."""
        self._orders.append(_Order(operation, at, error=error or _unavailable))

    def lie_about_size(self, operation: Operation, *, at: int | None = None, by_bytes: int = 1) -> None:
        """Do it, but report a size that is off by so many bytes. Not for `remove`, which reports none."""
        self._orders.append(_Order(operation, at, size_error_bytes=by_bytes))

    def corrupt(self, operation: Literal["download", "upload"], *, at: int | None = None) -> None:
        """Move other bytes than those that are there, as many, and report the checksum of what was moved."""
        self._orders.append(_Order(operation, at, wrong_bytes=True))

    def hang(self, operation: Operation, *, at: int | None = None) -> anyio.Event:
        """Never answer; only cancellation ends the call. The event is set when a call has begun to hang."""
        hangs = anyio.Event()
        self._orders.append(_Order(operation, at, hangs=hangs))
        return hangs

    async def stat(self, url: str) -> FileInfo:
        """As the storage does, unless there is an order."""
        order = await self._obey("stat", url)
        return _lie(await self._storage.stat(url), order)

    async def download(self, url: str, target: int, progress: Progress) -> FileInfo:
        """As the storage does, unless there is an order."""
        order = await self._obey("download", url)
        if order is None or not order.wrong_bytes:
            return _lie(await self._storage.download(url, target, progress), order)
        passing = os.memfd_create("loadmaster-wrong")
        try:
            await self._storage.download(url, passing, progress)
            content = _wrong(await to_thread.run_sync(_read, passing))
            await to_thread.run_sync(_write, target, content)
        finally:
            os.close(passing)
        return _info(content)

    async def upload(self, source: int, url: str, progress: Progress) -> FileInfo:
        """As the storage does, unless there is an order."""
        order = await self._obey("upload", url)
        if order is None or not order.wrong_bytes:
            return _lie(await self._storage.upload(source, url, progress), order)
        passing = os.memfd_create("loadmaster-wrong")
        try:
            await to_thread.run_sync(_write, passing, _wrong(await to_thread.run_sync(_read, source)))
            return await self._storage.upload(passing, url, progress)
        finally:
            os.close(passing)

    async def remove(self, url: str) -> None:
        """As the storage does, unless there is an order."""
        await self._obey("remove", url)
        await self._storage.remove(url)

    async def _obey(self, operation: Operation, url: str) -> _Order | None:
        """Count the call, fail or hang if that is the order, and return it."""
        self.calls.append((operation, url))
        number = sum(1 for called, _ in self.calls if called == operation)
        orders = (order for order in self._orders if order.operation == operation and order.at in {None, number})
        order = next(orders, None)
        if order is not None and order.error is not None:
            await lowlevel.checkpoint()
            raise order.error(url)
        if order is not None and order.hangs is not None:
            order.hangs.set()
            await anyio.sleep_forever()
        return order


class MemoryJournal:
    """Keeps events in a list, `events`, which is what a disk would have after a crash."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._appends = 0
        self._failures: dict[int, Exception] = {}

    def __repr__(self) -> str:
        return f"<MemoryJournal {len(self.events)} events>"

    def fail_at(self, number: int, error: Exception | None = None) -> None:
        """Raise an error at the append of that number, counted from 1, and only there; a full disk if none is given."""
        self._failures[number] = error or OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    async def append(self, event: Event) -> None:
        """Keep the event, or fail as ordered."""
        await lowlevel.checkpoint()
        self._appends += 1
        if error := self._failures.get(self._appends):
            raise error
        self.events.append(event)


def _unavailable(url: str) -> StorageError:
    return StorageUnavailable(url, "out of order, as ordered")


def _info(content: bytes) -> FileInfo:
    return FileInfo(len(content), f"{zlib.adler32(content):08x}")


def _lie(info: FileInfo, order: _Order | None) -> FileInfo:
    return replace(info, size_bytes=info.size_bytes + order.size_error_bytes) if order is not None else info


def _wrong(content: bytes) -> bytes:
    """As many bytes, the last one another."""
    return content[:-1] + bytes([content[-1] ^ 0xFF]) if content else content


def _read(descriptor: int) -> bytes:
    """The whole file of a descriptor, wherever it stands."""
    blocks = bytearray()
    while block := os.pread(descriptor, COPY_BYTES, len(blocks)):
        blocks += block
    return bytes(blocks)


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
