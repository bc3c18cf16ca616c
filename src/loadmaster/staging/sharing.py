"""A job's inputs by way of the node's cache: what is there is given at once, what another brings in is waited for."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from enum import Enum, auto
from itertools import islice
from typing import Final, TypeAlias

import anyio
from anyio import to_thread

from loadmaster.errors import NoSpace, StorageError
from loadmaster.staging.cache import Cache, Entry, Filling, key_of
from loadmaster.staging.errand import Errand, Outcome
from loadmaster.staging.files import Incoming
from loadmaster.staging.plan import Fetch
from loadmaster.storage.base import FileInfo
from loadmaster.storage.local import WORK_DIRECTORY, translated
from loadmaster.workdir import Workdir

log = logging.getLogger(__name__)

CLAIMS: Final = 128
"""Files a job brings in for all at once; for each there is a descriptor open."""

CHUNK: Final = 32
"""Files that are looked for in one turn of a thread."""

CLOSING_SECONDS: Final = 10.0
"""For the files that were not brought in: some calls about files on a local disk."""


class _Else(Enum):
    """What else may come of looking for a file."""

    BUSY = auto()
    """Another brings it in."""
    ALONE = auto()
    """It is no file for a cache, or the cache cannot be used: the job brings it in for itself."""


_Found: TypeAlias = FileInfo | Filling | _Else


class IntoCache(Incoming):
    """A file that is being brought in for all who want it."""

    __slots__ = ("filling",)

    def __init__(self, filling: Filling, fetch: Fetch) -> None:
        super().__init__(filling, fetch.name, size_bytes=fetch.size_bytes, checksum=fetch.checksum)
        self.filling = filling

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Give it to the cache, and to the job. Raises `ChecksumMismatch`."""
        self.filling.info = FileInfo(self.continues + info.size_bytes, info.checksum)
        super().keep(descriptor, info)


class Sharing:
    """The inputs of one job. To be closed, in any case, when they have been moved."""

    def __init__(
        self,
        cache: Cache,
        workdir: Workdir,
        errand: Callable[[Fetch, Incoming], Errand],
        present: Callable[[Errand, FileInfo], Awaitable[None]],
        deadline_seconds: float | None = None,
    ) -> None:
        """`present` is awaited for what was there already, with the errand it would have been."""
        self._cache, self._workdir = cache, workdir
        self._errand, self._present = errand, present
        self._deadline = float("inf") if deadline_seconds is None else anyio.current_time() + deadline_seconds
        self._held: set[Filling] = set()
        self._fetches: dict[Filling, Fetch] = {}
        self._freed = anyio.Event()
        self.again: list[Errand] = []
        """What the disk was too full for; there may be room now, for the job's own."""

    async def errands(self, fetches: Sequence[Fetch]) -> AsyncGenerator[Errand, None]:
        """What is to be moved, in some order: first what nobody else is at. To be closed by who leaves it before its end."""
        busy: list[Fetch] = []
        rest = iter(fetches)
        while chunk := list(islice(rest, CHUNK)):
            while len(self._held) > CLAIMS - CHUNK:
                self._freed = anyio.Event()
                await self._freed.wait()
            found = await to_thread.run_sync(self._look_for, chunk)
            for fetch, what in zip(chunk, found, strict=True):
                if what is _Else.BUSY:
                    busy.append(fetch)
                elif (errand := await self._begun(fetch, what)) is not None:
                    yield errand
        for fetch in busy:
            if (errand := await self._begun(fetch, await self._wait_for(fetch))) is not None:
                yield errand

    async def settled(self, errand: Errand, outcome: Outcome) -> Outcome | None:
        """What came of an errand, after the cache has had its file; None when it has to be done again, by the job alone."""
        filling = errand.key
        if not isinstance(filling, Filling):
            return outcome
        try:
            # A small one was given to the cache and the job in the storage's thread already, if there was room for both.
            if not filling.closed or isinstance(outcome, NoSpace):
                return await self._settled(filling, outcome)
        finally:
            self._held.discard(filling)
            self._fetches.pop(filling, None)
            self._freed.set()
        return outcome

    async def _settled(self, filling: Filling, outcome: Outcome) -> Outcome | None:
        try:
            if isinstance(outcome, FileInfo):
                with translated(WORK_DIRECTORY):
                    await to_thread.run_sync(filling.finish)
            elif isinstance(outcome, NoSpace):
                fetch = self._fetches[filling]
                await to_thread.run_sync(filling.close)
                await to_thread.run_sync(self._cache.make_room, fetch.size_bytes or 1)
                self.again.append(self._errand(fetch, self._own(fetch)))
                return None
        except StorageError as exc:
            return exc
        finally:
            if not filling.closed:
                with anyio.move_on_after(CLOSING_SECONDS, shield=True):
                    await to_thread.run_sync(filling.close)
        return outcome

    async def close(self) -> None:
        """Let others bring in what was not."""
        if self._held:
            with anyio.move_on_after(CLOSING_SECONDS, shield=True):
                await to_thread.run_sync(self._close_all)

    def _close_all(self) -> None:
        while self._held:
            self._held.pop().close()

    async def _begun(self, fetch: Fetch, what: _Found) -> Errand | None:
        """The errand that is left to be done for a file, if any."""
        if isinstance(what, FileInfo):
            await self._present(self._errand(fetch, self._own(fetch)), what)
            return None
        if isinstance(what, Filling):
            self._fetches[what] = fetch
            errand = self._errand(fetch, IntoCache(what, fetch))
            errand.key = what
            return errand
        return self._errand(fetch, self._own(fetch))

    async def _wait_for(self, fetch: Fetch) -> _Found:
        key = key_of(fetch)
        assert key is not None  # noqa: S101 - somebody is bringing it in
        with anyio.move_on_at(self._deadline):
            while await self._cache.wait(key):
                (found,) = await to_thread.run_sync(self._look_for, [fetch])
                if found is not _Else.BUSY:
                    return found
        return _Else.ALONE

    def _own(self, fetch: Fetch) -> Incoming:
        return Incoming(self._workdir, fetch.name, size_bytes=fetch.size_bytes, checksum=fetch.checksum)

    # -- in a thread --------------------------------------------------------------------------------------------------

    def _look_for(self, fetches: Sequence[Fetch]) -> list[_Found]:
        return [self._look_for_one(fetch) for fetch in fetches]

    def _look_for_one(self, fetch: Fetch) -> _Found:
        """Give a file to the job if it is there; else claim it."""
        key = key_of(fetch)
        if key is None or (fetch.size_bytes or 0) > self._cache.max_bytes:
            return _Else.ALONE
        try:
            claimed = self._cache.claim(key, fetch.size_bytes)
            if isinstance(claimed, Entry):
                try:
                    fits = fetch.size_bytes in {None, claimed.info.size_bytes}
                    return claimed.info if fits and claimed.place(self._workdir, fetch.name) else _Else.ALONE
                finally:
                    claimed.close()
        except OSError as exc:  # of the cache, or of the work directory, which will say so again
            log.warning("%r: %s is fetched without it: %s", self._cache, fetch.name, exc.strerror or exc)
            return _Else.ALONE
        if claimed is None:
            return _Else.BUSY
        self._held.add(claimed)  # at once: what is cancelled here is closed by `close`
        claimed.workdir = self._workdir
        return claimed
