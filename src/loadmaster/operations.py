"""A node's pending operations: done beside its jobs, a few at a time, as they become due; whoever dies begins anew.

    due ─▶ noted as tried ─▶ at its target? ─no─▶ copied, verified ─▶ registered ─▶ removed where it was ─▶ done

Each step may be repeated: what has been done of it is found as it is. Nothing here decides what a job's result is; the
event that an operation is done does, in the journal.
"""

from __future__ import annotations

import logging
import os
import random
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread

from loadmaster import pending
from loadmaster.errors import (
    AccessDenied,
    AlreadyExists,
    CannotCopy,
    ChecksumMismatch,
    JournalFault,
    NoSpace,
    NotFound,
    StagingFailed,
    StorageError,
)
from loadmaster.events import Event, FailoverRequested, RemovalRequested
from loadmaster.journal import NodeJournal
from loadmaster.names import file_url
from loadmaster.pending import Backoff, Operation
from loadmaster.result import StoredFile
from loadmaster.staging.engine import Moved, Transfers, Wanted
from loadmaster.storage.base import FileInfo, Replica, Unregisters
from loadmaster.storage.checksums import Checksum

log = logging.getLogger(__name__)

AT_ONCE: Final = 2
"""Files of jobs that have ended wait for those of jobs that have not: so few of them move at once."""

SPOOL: Final = "moving"
"""The directory in the journal's for files that pass through us: on a disk that is synced, and ours alone."""

BELL: Final = "bell"
"""A FIFO in the journal's directory: a byte in it says that somebody else has changed what is pending."""

JOURNAL_SECONDS: Final = 60.0
"""A journal that could not be read is asked again so much later; meanwhile its jobs will have noticed."""


def ring(directory: Path) -> bool:
    """Tell the agent that has the journal in a directory that what is pending was changed; False: there is none. Blocks."""
    try:
        bell = os.open(directory / BELL, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # nobody listens, or there never was one
        return False
    try:
        with suppress(BlockingIOError):  # full of bytes that nobody has read yet: one of them will do
            os.write(bell, b"!")
    finally:
        os.close(bell)
    return True


class Operations:
    """The operations of one journal, which `work` does. For use in one event loop.

    `tell` hears the event of each one that is done, once it is on disk.
    """

    def __init__(
        self, journal: NodeJournal, transfers: Transfers, tell: Callable[[Event], None], backoff: Backoff | None = None
    ) -> None:
        self._journal = journal
        self._transfers = transfers
        self._tell = tell
        self._backoff = backoff or Backoff()
        self._busy: set[int] = set()
        self._news = anyio.Event()
        self.waiting = self.stuck = self.done = 0
        """How many there are, how many of them nobody will try before an administrator says so; how many were done."""

    def __repr__(self) -> str:
        return f"<Operations [{self.waiting} pending, {self.stuck} stuck, {self.done} done]>"

    async def all(self) -> list[Operation]:
        """All there are now, in the order in which they came."""
        return await self._journal.change(pending.every)

    def look(self) -> None:
        """There may be new ones."""
        self._news.set()

    async def work(self) -> None:
        """Do what becomes due, until cancelled. What goes wrong with one is noted, and keeps no other waiting."""
        await to_thread.run_sync(_empty_spool, self._journal.directory)
        async with listening(self._journal.directory, self.look), anyio.create_task_group() as trying:
            while True:
                self._news = anyio.Event()
                try:
                    seconds = await self._begin_some(trying.start_soon)
                except JournalFault as exc:
                    log.error("pending operations wait: %s", exc)  # noqa: TRY400 - a sentence, no traceback
                    seconds = JOURNAL_SECONDS
                with anyio.move_on_after(seconds):
                    await self._news.wait()

    async def try_all(self, operations: Sequence[Operation]) -> list[Operation]:
        """Try these once, whether they are due or not, one after another; what is left of them."""
        await to_thread.run_sync(_empty_spool, self._journal.directory)
        numbers = [operation.number for operation in operations]
        await self._journal.change(partial(pending.retry, numbers=numbers))
        for operation in operations:
            await self._try(operation)
        return [left for left in await self.all() if left.number in numbers]

    async def _begin_some(self, start_soon: Callable[..., object]) -> float | None:
        """Begin what is due, as far as there is room; for how long there is nothing more to be done. None: for ever."""
        now, room = datetime.now(UTC), AT_ONCE - len(self._busy)

        def work(database: sqlite3.Connection) -> tuple[list[Operation], datetime | None, tuple[int, int]]:
            return (*pending.due(database, now, self._backoff, self._busy, room), pending.count(database))

        operations, following, (self.waiting, self.stuck) = await self._journal.change(work)
        for operation in operations:
            self._busy.add(operation.number)
            start_soon(self._try_and_go, operation)
        if len(self._busy) >= AT_ONCE:
            return None  # until one of them has ended
        return pending.sleep_seconds(following, self._backoff, now)

    async def _try_and_go(self, operation: Operation) -> None:
        try:
            await self._try(operation)
        except JournalFault as exc:
            log.error("job %s: %s: %s", operation.job_id, operation.what, exc)  # noqa: TRY400 - as above
            await anyio.sleep(JOURNAL_SECONDS)  # what could not be written down is not tried in a circle
        finally:
            self._busy.discard(operation.number)
            self.look()

    async def _try(self, operation: Operation) -> None:
        number, tries = operation.number, operation.tries + 1
        next_due = self._after(pending.wait_seconds(self._backoff, tries, random.random))
        if not await self._journal.change(lambda database: pending.begin(database, number, next_due)):
            return
        log.info("job %s: %s (try %d)", operation.job_id, operation.what, tries)
        try:
            await self._do(operation)
        except (StorageError, StagingFailed) as exc:
            again: datetime | None = None
            if may_succeed_later(exc):
                asked = exc.retry_after if isinstance(exc, StorageError) else None
                again = self._after(pending.wait_seconds(self._backoff, tries, random.random, asked))
            error = str(exc)
            await self._journal.change(lambda database: pending.failed(database, number, error, again))
            when = "nobody tries it again" if again is None else f"again at {again:%Y-%m-%d %H:%M:%S} UTC"
            log.warning("job %s: cannot %s: %s; %s", operation.job_id, operation.what, exc, when)
            return
        with anyio.CancelScope(shield=True):  # bounded: a line on a disk. It has been done, so it is said
            event = await self._journal.change(lambda database: pending.done(database, operation, datetime.now(UTC)))
        if event is not None:
            self.done += 1
            self._tell(event)

    def _after(self, seconds: float) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=seconds)

    # -- one operation -----------------------------------------------------------------------------------------------

    async def _do(self, operation: Operation) -> None:
        request = operation.request
        if isinstance(request, FailoverRequested):
            await self._move(request.file, request.wanted, operation.number)
        elif isinstance(request, RemovalRequested):
            await self._transfers.clear_one(request.url, request.parts)
        else:
            await self._transfers.register(request.file)

    async def _move(self, file: StoredFile, wanted: str, number: int) -> None:
        """Have a file where it was wanted, known there, and gone from where it is."""
        found = await self._found(file, wanted)
        if found is None or found.checksum is None or found.checksum != _checksum(file):
            try:
                await (await self._transfers.storage(file.url)).stat(
                    file.url
                )  # names what is gone as nothing else would
            except NotFound:
                if found is None:
                    raise
                # An earlier try has removed it, which it does last: what is of its size there was verified then.
            else:
                await self._copy(file, wanted, number)  # also over what may be the file, of which nobody tells enough
        await self._transfers.register(
            StoredFile(file.name, wanted, file.size_bytes, file.checksum, file.lfn, self._transfers.element_of(wanted))
        )
        catalog = self._transfers.catalog
        if file.lfn is not None and catalog is not None:
            if not isinstance(catalog, Unregisters):
                return  # it would go on telling people to fetch the file from where it was: it stays there, too
            await catalog.unregister(file.lfn, Replica(file.url, file.storage_element))
        with suppress(NotFound):
            await (await self._transfers.storage(file.url)).remove(file.url)

    async def _found(self, file: StoredFile, url: str) -> FileInfo | None:
        """What an earlier try may have brought; None: nothing. Raises `AlreadyExists` when something else is there."""
        try:
            found = await (await self._transfers.storage(url)).stat(url)
        except NotFound:
            return None
        known = _checksum(file)
        if found.size_bytes != file.size_bytes:
            raise AlreadyExists(url, f"has {found.size_bytes} bytes, the file that is to go there {file.size_bytes}")
        same_kind = found.checksum is not None and known is not None and found.checksum.algorithm == known.algorithm
        if same_kind and found.checksum != known:
            raise AlreadyExists(url, f"has {found.checksum}, the file that is to go there {known}")
        return found

    async def _copy(self, file: StoredFile, wanted: str, number: int) -> None:
        """By the server itself if it can, else through a file of this machine."""
        size, checksum = file.size_bytes, _checksum(file)
        here = any(url.startswith("file://") for url in (file.url, wanted))
        if here or await self._transfers.can_copy(file.url, wanted):
            try:
                await self._pass(Wanted(file.url, wanted, size, checksum))
            except CannotCopy:
                pass
            else:
                return
        spool = self._journal.directory / SPOOL / str(number)
        try:
            await self._pass(Wanted(file.url, file_url(spool), size, checksum))
            await self._pass(Wanted(file_url(spool), wanted, size, checksum))
        finally:
            with anyio.CancelScope(shield=True):  # bounded: an unlink on a local disk
                await to_thread.run_sync(lambda: spool.unlink(missing_ok=True))

    async def _pass(self, wanted: Wanted) -> None:
        """Raises the last thing that went wrong."""
        came: list[Moved] = []

        async def ended(moved: Moved) -> None:
            came.append(moved)

        await self._transfers.move([wanted], ended)
        for moved in came:
            if moved.error is not None:
                raise moved.error
            _check(wanted, moved)


def may_succeed_later(error: StorageError | StagingFailed) -> bool:
    """Whether it is worth trying again by itself: also what somebody may put right at the storage, a full disk, or rights
    that have run out."""
    if isinstance(error, StorageError):
        return error.retryable or isinstance(error, AccessDenied | NoSpace)
    return True


def _check(wanted: Wanted, moved: Moved) -> None:
    found = moved.info
    if found is not None and wanted.size_bytes not in {None, found.size_bytes}:
        raise ChecksumMismatch(wanted.source, f"has {found.size_bytes} bytes, expected {wanted.size_bytes}")


def _checksum(file: StoredFile) -> Checksum | None:
    return Checksum.parse(file.checksum) if file.checksum else None


def _empty_spool(directory: Path) -> None:
    """What an agent that died has left of files on their way."""
    spool = directory / SPOOL
    spool.mkdir(mode=0o700, exist_ok=True)
    for path in spool.iterdir():
        path.unlink(missing_ok=True)


@asynccontextmanager
async def listening(directory: Path, heard: Callable[[], None]) -> AsyncIterator[None]:
    """While it is open, `heard` is called when somebody rings. Where there can be no bell there is none."""
    try:
        bell = await to_thread.run_sync(_open_bell, directory / BELL)
    except OSError as exc:
        log.warning("%s: no bell there, so changes by others are seen late: %s", directory, exc.strerror)
        yield
        return

    async def listen() -> None:
        while True:
            await anyio.wait_readable(bell)
            os.read(bell, 4096)  # there is something: this does not wait
            heard()

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(listen)
            yield
            group.cancel_scope.cancel()
    finally:
        os.close(bell)


def _open_bell(path: Path) -> int:
    with suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    # For writing too: one without writers would be at its end, and readable all the time.
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
