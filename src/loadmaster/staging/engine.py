"""Moving files: many at once, each verified as it passes, the next replica or storage element when one fails."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import anyio
from anyio import to_thread

from loadmaster.errors import (
    AlreadyExists,
    ChecksumMismatch,
    InvalidSite,
    StagingFailed,
    StorageError,
    StorageUnavailable,
)
from loadmaster.names import local_path
from loadmaster.result import StoredFile
from loadmaster.site import Site
from loadmaster.staging.files import Incoming, Outgoing
from loadmaster.staging.plan import Delivery, Fetch
from loadmaster.storage.base import Catalog, CatalogEntry, Direction, FileInfo, Replica, Storage, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import WORK_DIRECTORY, LocalStorage, checksum, translated
from loadmaster.tasks import for_each, single_error
from loadmaster.workdir import Workdir

T = TypeVar("T")

PROGRESS_SECONDS: Final = 0.5
"""Between two looks at the bytes of running transfers; a person cannot use more."""


NOT_MADE: Final = "the payload did not make it"


class Listener(Protocol):
    """Whoever wants to know what a staging does."""

    @property
    def wants_progress(self) -> bool:
        """Whether `progress` is worth calling."""
        ...

    async def staged(self, file: StoredFile) -> None:
        """A file has arrived, whole and verified."""

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        """A file is safe, but not where it was wanted."""

    async def missing(self, name: str, reason: str) -> None:
        """A file to be taken out is not there, or may not leave."""

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        """A file is on its way."""


@dataclass(eq=False, slots=True)
class _Moving:
    """One transfer under way."""

    name: str
    url: str
    size_bytes: int | None
    transfer: Transfer


class Transfers:
    """The storages and the catalog of a site, ready to move files. Made by `open_transfers`; may serve many jobs."""

    def __init__(self, site: Site, storages: Mapping[str, Storage], catalog: Catalog | None) -> None:
        self.site = site
        self.catalog = catalog
        self._storages = storages
        self._incoming, self._outgoing = anyio.Semaphore(site.streams), anyio.Semaphore(site.streams)

    def __repr__(self) -> str:
        return f"<Transfers {self.site.name or 'local'}: {', '.join(sorted(self._storages))}>"

    async def lookup(self, lfns: Sequence[str]) -> Mapping[str, CatalogEntry]:
        """What the catalog knows of these; nothing when there is no catalog. Raises `StagingFailed`."""
        if self.catalog is None:
            return {}
        try:
            return await self.catalog.lookup(lfns)
        except StorageError as exc:
            raise StagingFailed("cannot look up inputs", [str(exc)]) from exc

    async def fetch(self, fetches: Sequence[Fetch], workdir: Workdir, listener: Listener) -> None:
        """Bring files into a work directory, many at once.

        All are tried; then `StagingFailed` names those that could not be had. A name in the work directory never holds
        half a file, also after cancellation.
        """
        problems: list[str] = []
        moving: set[_Moving] = set()

        async def one(fetch: Fetch) -> None:
            try:
                async with self._incoming:
                    file = await self._fetch(fetch, workdir, moving)
                await listener.staged(file)
            except StorageError as exc:
                problems.append(f"{fetch.name}: {_told(exc)}")

        await self._all(fetches, one, moving, listener)
        if problems:
            raise StagingFailed("cannot bring in", problems)

    async def deliver(self, deliveries: Sequence[Delivery], workdir: Workdir, listener: Listener) -> None:
        """Take files out of a work directory, many at once, and register those that have a logical name.

        One that is not there is told to the listener and is no failure (as in DIRAC). All are tried; then
        `StagingFailed` names those that no storage took, or that may not leave.
        """
        problems: list[str] = []
        moving: set[_Moving] = set()

        async def one(delivery: Delivery) -> None:
            source = Outgoing(workdir, delivery.name)
            try:
                async with self._outgoing:
                    await self._deliver(delivery, source, workdir, moving, listener)
            except StorageError as exc:
                if source.refused is None:
                    problems.append(f"{delivery.name}: {_told(exc)}")
                elif isinstance(source.refused, FileNotFoundError):
                    await listener.missing(delivery.name, NOT_MADE)
                else:
                    reason = str(source.refused.strerror)
                    await listener.missing(delivery.name, reason)
                    problems.append(f"{delivery.name}: {reason}")

        await self._all(deliveries, one, moving, listener)
        if problems:
            raise StagingFailed("cannot deliver", problems)

    async def _fetch(self, fetch: Fetch, workdir: Workdir, moving: set[_Moving]) -> StoredFile:
        """The first replica that gives the right bytes. Raises what the last one raised."""

        algorithm = fetch.checksum.algorithm if fetch.checksum is not None else "adler32"
        local = Incoming(workdir, fetch.name, size_bytes=fetch.size_bytes, checksum=fetch.checksum)

        async def attempt(source: Replica) -> StoredFile:
            local.url = source.url
            transfer = Transfer(Direction.DOWNLOAD, source.url, local, algorithm, fetch.size_bytes)
            return _stored(fetch.name, source, await self._move(fetch.name, transfer, moving), fetch.lfn)

        return await _first(fetch.sources, attempt)

    async def _move(self, name: str, transfer: Transfer, moving: set[_Moving]) -> FileInfo:
        """Have one file moved. Raises `StorageError`."""
        under_way = _Moving(name, transfer.url, transfer.size_bytes, transfer)
        moving.add(under_way)
        try:
            await self._storage(transfer.url).move([transfer], lambda _: None)
        finally:
            moving.discard(under_way)
        if isinstance(transfer.result, FileInfo):
            return transfer.result
        raise transfer.result or StorageUnavailable(transfer.url, "the storage said nothing of what came of it")

    async def _deliver(
        self, delivery: Delivery, source: Outgoing, workdir: Workdir, moving: set[_Moving], listener: Listener
    ) -> None:
        """The first storage that takes it; else the first failover one. Raises what the last wanted one raised."""

        async def attempt(target: Replica) -> StoredFile:
            info = await self._move(delivery.name, Transfer(Direction.UPLOAD, target.url, source), moving)
            if info.size_bytes != source.size_bytes:
                raise ChecksumMismatch(target.url, f"took {info.size_bytes} bytes of {source.size_bytes}")
            return _stored(delivery.name, target, info, delivery.lfn)

        if file := await self._already_there(delivery, source):
            await listener.staged(file)
            return
        try:
            file = await _first(delivery.targets, attempt)
        except StorageError as exc:
            if not delivery.failover:
                raise
            try:
                file = await _first(delivery.failover, attempt)
            except StorageError:
                raise exc from None  # what went wrong where it was wanted tells more
            await self._register(file)
            await listener.failed_over(file, delivery.targets[0].url)
        else:
            await self._register(file)
            await listener.staged(file)

    async def _register(self, file: StoredFile) -> None:
        if file.lfn is not None and self.catalog is not None:
            replica = Replica(file.url, file.storage_element)
            info = FileInfo(file.size_bytes, Checksum.parse(file.checksum) if file.checksum else None)
            await self.catalog.register(CatalogEntry(file.lfn, info, (replica,)))

    async def _already_there(self, delivery: Delivery, source: Outgoing) -> StoredFile | None:
        """The file, if an earlier attempt has brought it where it is wanted. Other content is never written over."""
        if delivery.lfn is None or self.catalog is None:
            return None
        entry = (await self.catalog.lookup([delivery.lfn])).get(delivery.lfn)
        if entry is None:
            return None
        algorithm = entry.info.checksum.algorithm if entry.info.checksum is not None else "adler32"
        info = await to_thread.run_sync(_read_through, source, algorithm)
        if info != entry.info:
            raise AlreadyExists(
                f"LFN:{delivery.lfn}",
                f"is in the catalog with other content ({entry.info.size_bytes} bytes, {entry.info.checksum}; "
                f"this one has {info.size_bytes}, {info.checksum})",
            )
        for target in delivery.targets:
            if target in entry.replicas and await self._has(target, info.size_bytes):
                return _stored(delivery.name, target, info, delivery.lfn)
        return None

    async def _has(self, place: Replica, size_bytes: int) -> bool:
        """Whether a replica is really there: a catalog may know of files that storage has lost."""
        try:
            return (await self._storage(place.url).stat(place.url)).size_bytes == size_bytes
        except StorageError:
            return False

    async def _all(
        self, items: Sequence[T], work: Callable[[T], Awaitable[None]], moving: set[_Moving], listener: Listener
    ) -> None:
        """Work on all items, some at a time, and tell about progress meanwhile."""
        if not listener.wants_progress:
            await for_each(items, work, self.site.streams)
            return
        with single_error():
            async with anyio.create_task_group() as watching:
                watching.start_soon(_report, moving, listener)
                await for_each(items, work, self.site.streams)
                watching.cancel_scope.cancel()

    def _storage(self, url: str) -> Storage:
        scheme = url.partition("://")[0]
        if scheme not in self._storages:
            raise StorageError(url, f"no storage for {scheme}://; there is {'://, '.join(sorted(self._storages))}://")
        return self._storages[scheme]


@asynccontextmanager
async def open_transfers(
    site: Site, *, storages: Mapping[str, Storage] | None = None, catalog: Catalog | None = None
) -> AsyncIterator[Transfers]:
    """The storages and the catalog of a site, for as long as they are needed.

    `storages` adds kinds of storage, or replaces ours, by URL scheme; `catalog` replaces the one of the configuration.
    """
    if catalog is None and site.catalog is not None:
        if not site.catalog.startswith("file://"):
            raise InvalidSite(f"catalog: {site.catalog}: only a local file can be one")
        from loadmaster.storage.catalog import SqliteCatalog  # with sqlite3, loaded when used

        catalog = SqliteCatalog(local_path(site.catalog))
    yield Transfers(site, {"file": LocalStorage(2 * site.streams), **(storages or {})}, catalog)


async def _first(places: Sequence[Replica], attempt: Callable[[Replica], Awaitable[StoredFile]]) -> StoredFile:
    """The first attempt that succeeds. Raises what the last one raised, with what the others had to say as notes."""
    earlier: list[str] = []
    for place in places:
        try:
            return await attempt(place)
        except StorageError as exc:
            if len(earlier) == len(places) - 1:
                for said in earlier:
                    exc.add_note(said)
                raise
            earlier.append(str(exc))
    raise AssertionError("a plan has at least one place for each file")


def _told(exc: StorageError) -> str:
    """An error, after those of the places that were tried before."""
    return "; ".join([*getattr(exc, "__notes__", ()), str(exc)])


def _read_through(source: Outgoing, algorithm: str) -> FileInfo:
    with translated(WORK_DIRECTORY):
        descriptor = source.open()
        try:
            return checksum(descriptor, algorithm)
        finally:
            os.close(descriptor)


async def _report(moving: set[_Moving], listener: Listener) -> None:
    """Tell how far the transfers are, now and then: bytes have no edge to wait for."""
    while True:
        await anyio.sleep(PROGRESS_SECONDS)
        for transfer in moving:
            listener.progress(transfer.name, transfer.url, transfer.transfer.done_bytes, transfer.size_bytes)


def _stored(name: str, place: Replica, info: FileInfo, lfn: str | None) -> StoredFile:
    return StoredFile(name, place.url, info.size_bytes, str(info.checksum or ""), lfn, place.storage_element)
