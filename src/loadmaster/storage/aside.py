"""Storages by libraries that want an asyncio loop of their own: they have it, in a thread beside ours.

The thread lives from the first transfer until the storage is closed, whatever loop the program itself runs. In it a storage
is a few straight methods, each about one file (`SingleStorage`); local files are opened, kept and discarded there too, so
that a file costs no switch of threads. What has ended is told in batches, by an eventfd the program's loop waits for.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Any, Final, Generic, TypeVar, TypeVarTuple, Unpack

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from loadmaster.errors import StorageError, StorageUnavailable
from loadmaster.storage.base import Ability, Clears, Direction, FileInfo, Transfer
from loadmaster.storage.local import WORK_DIRECTORY, translated
from loadmaster.storage.single import SingleStorage, copy_by
from loadmaster.tasks import for_each

T = TypeVar("T")
A = TypeVarTuple("A")

CLEANUP_SECONDS: Final = 5.0
"""How long a storage may tidy up at its server after a transfer that was given up."""

LEAVING_SECONDS: Final = CLEANUP_SECONDS + 1
"""How long a cancelled call waits for that."""


class _Errand(Generic[T]):
    """Something to be done in the thread, and what has come of it so far."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self.work = work
        self.value: T | None = None
        self.error: Exception = anyio.ClosedResourceError()
        self.done = self.over = False
        self.cancelled = False
        self.scope: anyio.CancelScope | None = None
        self.told: deque[Transfer] = deque()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # held for an instant: nobody may write to a number that is another file's by now
        self._awake = self._closed = False

    async def run(self) -> None:
        """In the thread."""
        try:
            with anyio.CancelScope() as self.scope:
                if not self.cancelled:
                    self.value = await self.work()
                    self.done = True
        except Exception as exc:  # noqa: BLE001 - passed on to whoever waits for it
            self.error = exc
        finally:
            self.over = True
            self.wake()

    def cancel(self) -> None:
        """In the thread."""
        self.cancelled = True
        if self.scope is not None:
            self.scope.cancel()

    def tell(self, transfer: Transfer) -> None:
        """One has ended. In the thread; the loop is woken once for all it has not taken yet."""
        self.told.append(transfer)
        self.wake()

    def wake(self) -> None:
        with self._lock:
            if not self._awake and not self._closed:
                self._awake = True
                os.eventfd_write(self.descriptor, 1)

    async def news(self) -> list[Transfer]:
        """Those that have ended since it was asked last; returns also when everything has. In the program's loop."""
        await anyio.wait_readable(self.descriptor)
        with self._lock:
            self._awake = False
            with suppress(BlockingIOError):
                os.eventfd_read(self.descriptor)
        return [self.told.popleft() for _ in range(len(self.told))]

    def close(self) -> None:
        with self._lock:
            self._closed = True
            os.close(self.descriptor)


class Aside:
    """The storage that moves each of its transfers by a call of the other, in a thread with an asyncio loop.

    To be closed. Nothing is shared with the program's loop, so it runs under any.
    """

    def __init__(self, single: SingleStorage, *, streams: int, abilities: Ability) -> None:
        """`streams`: so many at once, in each direction. With `Ability.RANGES` the other is asked for parts too."""
        self.abilities = abilities | Ability.SIDE_BY_SIDE
        self.single = single
        self._streams = streams
        self._free: dict[Direction, anyio.Semaphore] = {}
        self._group: TaskGroup | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._context: Context | None = None
        self._thread: threading.Thread | None = None
        self._starting = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Aside {self.single!r}>"

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """Each is one task of the thread's loop."""

        async def one(transfer: Transfer) -> None:
            async with self._free[transfer.direction]:
                await self._move(transfer)
            errand.tell(transfer)

        if transfers:
            errand = _Errand(partial(for_each, transfers, one, self._streams))
            await self._send(errand, ended)

    async def stat(self, url: str) -> FileInfo:
        """As the other says."""
        return await self._ask(partial(self.single.stat, url))

    async def remove(self, url: str) -> None:
        """As the other does."""
        await self._ask(partial(self.single.remove, url))

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """As the other does, if there is anything for it to do."""
        if isinstance(self.single, Clears):
            await self._ask(partial(self.single.clear, url, parts))

    async def close(self) -> None:
        """Cancel what is under way and end the thread."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._soon(self._stop)
            with anyio.CancelScope(shield=True):  # what is cancelled in there tidies up in bounded time
                await to_thread.run_sync(thread.join)

    async def _ask(self, work: Callable[[], Awaitable[T]]) -> T:
        errand = _Errand(work)
        await self._send(errand, lambda _: None)
        return errand.value  # type: ignore[return-value] # an errand that raised nothing has one

    async def _send(self, errand: _Errand[T], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """Have it done; returns, or raises, as it ends. Cancelled, it waits until the other has tidied up."""
        try:
            await self._start()
            self._soon(self._run, errand)
            try:
                while not errand.over or errand.told:
                    if news := await errand.news():
                        ended(news)
            except BaseException:
                self._soon(errand.cancel)
                with anyio.move_on_after(LEAVING_SECONDS, shield=True):
                    while not errand.over:
                        await errand.news()
                raise
        finally:
            errand.close()
        if not errand.done:
            raise errand.error

    async def _start(self) -> None:
        async with self._starting:
            if self._thread is None or not self._thread.is_alive():  # as in a child of fork
                ready = threading.Event()
                live = partial(anyio.run, self._live, ready, backend="asyncio")
                self._thread = threading.Thread(target=live, name=f"loadmaster {self.single!r}", daemon=True)
                self._thread.start()
                await to_thread.run_sync(ready.wait)

    def _soon(self, call: Callable[[Unpack[A]], object], *args: *A) -> None:
        """Have something called in the thread; nothing when it has ended. From any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed
                # Not in the caller's context, which says what loop the caller runs in.
                self._loop.call_soon_threadsafe(call, *args, context=self._context)

    # -- in the thread ---------------------------------------------------------------------------------------------

    async def _live(self, ready: threading.Event) -> None:
        self._loop, self._context = asyncio.get_running_loop(), copy_context()
        self._free = {direction: anyio.Semaphore(self._streams) for direction in Direction}
        async with anyio.create_task_group() as self._group:
            ready.set()
            await anyio.sleep_forever()

    def _run(self, errand: _Errand[Any]) -> None:
        if self._group is not None:
            self._group.start_soon(errand.run)

    def _stop(self) -> None:
        if self._group is not None:
            self._group.cancel_scope.cancel()

    async def _move(self, transfer: Transfer) -> None:
        """Cancelled from the inside when the transfer is given up."""
        with anyio.CancelScope() as scope:
            transfer.when_given_up = partial(self._soon, scope.cancel)
            try:
                if transfer.given_up:
                    raise StorageUnavailable(transfer.url, "given up")
                transfer.result = await self._through_descriptor(transfer)
            except StorageError as exc:
                transfer.result = exc
        if transfer.result is None:
            transfer.result = StorageUnavailable(transfer.url, "given up")

    async def _through_descriptor(self, transfer: Transfer) -> FileInfo:
        """Open, have it moved, keep or discard. The descriptor is closed last."""
        if transfer.direction is Direction.COPY:
            try:
                return await copy_by(self.single, transfer)
            finally:
                transfer.local.discard()
        kept, descriptor = False, -1
        try:
            with translated(WORK_DIRECTORY):
                descriptor = transfer.local.open()
            transfer.begin()
            if transfer.direction is Direction.UPLOAD:
                return await self.single.upload(descriptor, transfer.url, transfer)
            info = await self.single.download(transfer.url, descriptor, transfer)
            with translated(WORK_DIRECTORY):
                transfer.local.keep(descriptor, info)
            kept = True
            return info
        finally:
            if not kept:
                transfer.local.discard()
            if descriptor >= 0:
                os.close(descriptor)


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of it to a file of ours; what goes wrong is the work directory's fault."""
    with translated(WORK_DIRECTORY):
        while data:
            count = os.pwrite(descriptor, data, offset)
            data, offset = data[count:], offset + count


def read_at(descriptor: int, count: int, offset: int) -> bytes:
    """So many bytes of a file of ours. Raises `StorageUnavailable` when they are not there any more."""
    with translated(WORK_DIRECTORY):
        data = os.pread(descriptor, count, offset)
    if len(data) != count:
        raise StorageUnavailable("the output", "changed while it was copied")
    return data
