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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import anyio
from anyio import from_thread, lowlevel, to_thread

from loadmaster.errors import NotFound, StorageError, StorageUnavailable
from loadmaster.events import Event
from loadmaster.storage.base import Ability, Clears, Direction, FileInfo, LocalFile, Step, Storage, Transfer
from loadmaster.storage.checksums import running
from loadmaster.storage.local import WORK_DIRECTORY, translated

Operation: TypeAlias = Literal["stat", "download", "upload", "copy", "publish", "abandon", "remove"]
"""What a storage can be asked for; `publish` and `abandon` are about uploads that it was to hold."""

COPY_BYTES: Final = 1024 * 1024


class MemoryStorage:
    """Files by URL, in a dictionary that is yours to fill and to look into: `files`."""

    abilities = Ability.RANGES | Ability.CHECKSUMS | Ability.RENAME | Ability.HOLD | Ability.COPY

    def __init__(self, files: Mapping[str, bytes] | None = None) -> None:
        self.files: dict[str, bytes] = dict(files or {})

    def __repr__(self) -> str:
        return f"<MemoryStorage {len(self.files)} files>"

    async def stat(self, url: str) -> FileInfo:
        """The size and checksum of the file."""
        await lowlevel.checkpoint()
        return _info(self._file(url))

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """All of them in one thread. A URL names a new file once all of it has been read."""
        await lowlevel.checkpoint()
        done: list[Transfer] = []
        try:
            await to_thread.run_sync(self._move, transfers, done)
        finally:
            ended(done)

    def _move(self, transfers: Sequence[Transfer], done: list[Transfer]) -> None:
        for transfer in transfers:
            from_thread.check_cancelled()
            if not transfer.step.sends or transfer.direction is Direction.COPY:
                self._end(transfer)
                done.append(transfer)
                continue
            passed = transfer.begin()
            content = b""
            try:
                download = transfer.direction is Direction.DOWNLOAD
                if download:
                    content = self._part(transfer)
                with translated(WORK_DIRECTORY):
                    descriptor = transfer.local.open()
                    try:
                        if download:
                            for start in range(0, len(content), COPY_BYTES):
                                block = content[start : start + COPY_BYTES]
                                _write(descriptor, block, transfer.first_byte + start)
                                passed.update(block)
                                transfer.done_bytes += len(block)
                                _check(transfer)
                            transfer.local.keep(descriptor, transfer.info())
                        else:
                            content = _taken(descriptor, transfer)
                            passed.update(content)
                    finally:
                        os.close(descriptor)
            except StorageError as exc:
                transfer.result = exc
                transfer.local.discard()
            except BaseException:
                transfer.local.discard()
                raise
            else:
                if transfer.step is Step.HOLD:
                    part = f"{transfer.url.rpartition('/')[0]}/{transfer.part or f'.{os.urandom(8).hex()}.part'}"
                    self.files[part] = content
                    transfer.hold(part)
                elif not download:
                    self.files[transfer.url] = content
                if not download:
                    transfer.local.discard()
                transfer.result = transfer.info()
            done.append(transfer)

    def _end(self, transfer: Transfer) -> None:
        """Give what is held its name, or forget it; or copy it within."""
        try:
            if transfer.direction is Direction.COPY:
                content = self._file(transfer.source)
                info = _info(content, transfer.algorithm)
                transfer.is_source(info)
                transfer.result = transfer.copied(info, info)
                self.files[transfer.url] = content
                return
            held = self.files.pop(transfer.take_held(), None)
            if transfer.step is Step.PUBLISH:
                if held is None:
                    raise NotFound(transfer.url, "what was held is gone")
                self.files[transfer.url] = held
            transfer.result = transfer.let_go()
        except StorageError as exc:
            transfer.result = exc
        finally:
            transfer.local.discard()

    def _part(self, transfer: Transfer) -> bytes:
        last = None if transfer.last_byte is None else transfer.last_byte + 1
        return self._file(transfer.url)[transfer.first_byte : last]

    async def remove(self, url: str) -> None:
        """Forget the file."""
        await lowlevel.checkpoint()
        self._file(url)
        del self.files[url]

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """Forget what was held under these names."""
        await lowlevel.checkpoint()
        for part in parts:
            self.files.pop(f"{url.rpartition('/')[0]}/{part}", None)

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
        self.abilities = storage.abilities
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
        order = await _obey(self._order("stat", url), url)
        return _lie(await self._storage.stat(url), order)

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """As the storage does, unless there is an order; all that have none go to it in one call."""
        plain: list[Transfer] = []
        async with anyio.create_task_group() as group:
            for transfer in transfers:
                operation = _operation(transfer)
                order = self._order(operation, transfer.url)
                if order is None:
                    plain.append(transfer)
                else:
                    group.start_soon(self._misbehave, transfer, order, ended)
            if plain:
                await self._storage.move(plain, ended)

    async def _misbehave(self, transfer: Transfer, order: _Order, ended: Callable[[Sequence[Transfer]], None]) -> None:
        """Fail or hang, or have it moved with something between it and its local file."""
        with anyio.CancelScope() as scope:
            transfer.when_given_up = scope.cancel
            transfer.begin()
            try:
                await _obey(order, transfer.url)
                bent = _Bent(transfer.local, order)
                transfer.local = bent
                try:
                    await self._storage.move([transfer], lambda _: None)
                finally:
                    transfer.local = bent.local
                if isinstance(transfer.result, FileInfo):
                    transfer.result = bent.info or _lie(transfer.result, order)
            except StorageError as exc:
                transfer.result = exc
                transfer.local.discard()
        if transfer.result is None:
            transfer.result = StorageUnavailable(transfer.url, "given up")
        ended([transfer])

    async def remove(self, url: str) -> None:
        """As the storage does, unless there is an order."""
        await _obey(self._order("remove", url), url)
        await self._storage.remove(url)

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """As the other does; no order is for this."""
        if isinstance(self._storage, Clears):
            await self._storage.clear(url, parts)

    def _order(self, operation: Operation, url: str) -> _Order | None:
        """Count the call, and see whether there is an order for it."""
        self.calls.append((operation, url))
        number = sum(1 for called, _ in self.calls if called == operation)
        orders = (order for order in self._orders if order.operation == operation and order.at in {None, number})
        return next(orders, None)


def _operation(transfer: Transfer) -> Operation:
    if transfer.direction is not Direction.UPLOAD:
        return "download" if transfer.direction is Direction.DOWNLOAD else "copy"
    return {Step.PUBLISH: "publish", Step.ABANDON: "abandon"}.get(transfer.step, "upload")  # type: ignore[return-value]


async def _obey(order: _Order | None, url: str) -> _Order | None:
    """Fail or hang if that is the order; else return it."""
    if order is not None and order.error is not None:
        await lowlevel.checkpoint()
        raise order.error(url)
    if order is not None and order.hangs is not None:
        order.hangs.set()
        await anyio.sleep_forever()
    return order


class _Bent:
    """A local file between which and the storage something goes wrong."""

    def __init__(self, local: LocalFile, order: _Order) -> None:
        self.local, self._order = local, order
        self.info: FileInfo | None = None
        """What arrived in truth, where that is other than what the storage sent."""

    def open(self) -> int:
        if not self._order.wrong_bytes:
            return self.local.open()
        passing = os.memfd_create("loadmaster-wrong")
        if self._order.operation == "upload":
            try:
                source = self.local.open()
            except BaseException:
                os.close(passing)
                raise
            try:
                _write(passing, _wrong(_read(source)))
            finally:
                os.close(source)
        return passing

    def keep(self, descriptor: int, info: FileInfo) -> None:
        if not self._order.wrong_bytes:
            self.local.keep(descriptor, _lie(info, self._order))
            return
        content = _wrong(_read(descriptor))
        target = self.local.open()
        try:
            _write(target, content)
            self.info = _info(content)
            self.local.keep(target, self.info)
        finally:
            os.close(target)

    def discard(self) -> None:
        self.local.discard()


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


def _info(content: bytes, algorithm: str = "adler32") -> FileInfo:
    passed = running(algorithm)
    passed.update(content)
    return FileInfo(len(content), passed.result())


def _lie(info: FileInfo, order: _Order | None) -> FileInfo:
    return replace(info, size_bytes=info.size_bytes + order.size_error_bytes) if order is not None else info


def _wrong(content: bytes) -> bytes:
    """As many bytes, the last one another."""
    return content[:-1] + bytes([content[-1] ^ 0xFF]) if content else content


def _check(transfer: Transfer) -> None:
    from_thread.check_cancelled()
    if transfer.given_up:
        raise StorageUnavailable(transfer.url, "given up")


def _taken(descriptor: int, transfer: Transfer) -> bytes:
    """The whole file of a descriptor, provided that it stays as it is meanwhile."""
    size, blocks = os.fstat(descriptor).st_size, bytearray()
    while block := os.pread(descriptor, COPY_BYTES, len(blocks)):
        blocks += block
        transfer.done_bytes = len(blocks)
        _check(transfer)
    if len(blocks) != size or os.fstat(descriptor).st_size != size:
        raise StorageUnavailable(transfer.url, "changed while it was copied")
    return bytes(blocks)


def _read(descriptor: int) -> bytes:
    """The whole file of a descriptor, wherever it stands."""
    blocks = bytearray()
    while block := os.pread(descriptor, COPY_BYTES, len(blocks)):
        blocks += block
    return bytes(blocks)


def _write(descriptor: int, content: bytes, offset: int = 0) -> None:
    rest = memoryview(content)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[count:], offset + count
