"""Moving files: many at once, each verified as it passes, tried again, or at the next place when one fails."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol, Self

import anyio
from anyio import to_thread

from loadmaster.errors import AlreadyExists, InvalidSite, NotFound, StagingFailed, StorageError, StorageUnavailable
from loadmaster.names import local_file, local_path
from loadmaster.result import StoredFile
from loadmaster.site import Site
from loadmaster.staging.brief import FEW_FILES, are_few, move_briefly
from loadmaster.staging.errand import Errand, Outcome, told
from loadmaster.staging.files import Elsewhere, Incoming, Outgoing, OutgoingPath
from loadmaster.staging.lanes import Lanes
from loadmaster.staging.partnames import PartNames
from loadmaster.staging.parts import PartOfPath
from loadmaster.staging.party import Party
from loadmaster.staging.plan import Delivery, Fetch
from loadmaster.staging.progress import Meter, Overall, report
from loadmaster.staging.retry import Patience, delay
from loadmaster.staging.stalls import Stalls
from loadmaster.storage.base import (
    Ability,
    Catalog,
    CatalogEntry,
    Clears,
    Direction,
    FileInfo,
    LocalFile,
    Replica,
    Storage,
    Transfer,
)
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.kinds import Storages
from loadmaster.storage.local import WORK_DIRECTORY, LocalStorage, checksum, translated
from loadmaster.tasks import for_each, single_error
from loadmaster.threads import briefly
from loadmaster.workdir import Workdir

if TYPE_CHECKING:
    from loadmaster.staging.cache import Cache

NOT_MADE: Final = "the payload did not make it"


CLEAR_SECONDS: Final = 30.0
"""How long a storage may take to remove what is left of an upload, before it is left to be done later."""


class Listener(Protocol):
    """Whoever wants to know what a staging does."""

    @property
    def wants_progress(self) -> bool:
        """Whether `progress` and `overall` are worth calling."""
        ...

    async def staged(self, file: StoredFile) -> None:
        """A file has arrived, whole and verified."""

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        """A file is safe, but not where it was wanted."""

    async def unregistered(self, file: StoredFile, reason: str) -> None:
        """A file is there, or safe elsewhere, as is told next; but the catalog could not be told, and may be later."""

    async def missing(self, name: str, reason: str) -> None:
        """A file to be taken out is not there, or may not leave."""

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        """A file is on its way."""

    def overall(self, direction: Direction, overall: Overall) -> None:
        """How far all of them are."""


class Early(Protocol):
    """Outputs that were sent before they were to be delivered."""

    def close(self) -> None:
        """Begin nothing more."""
        ...

    def is_on_its_way(self, name: str) -> bool:
        """Whether it is worth waiting for."""
        ...

    async def landed(self) -> None:
        """Wait for what is on its way."""
        ...

    async def published(self, errands: Sequence[Errand]) -> list[Errand]:
        """The same, but what is there already is only to be published; such an errand has the other one as its `key`."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file that a program wants moved: from or to a `file://` URL of this machine, or between two URLs for which
    `Transfers.can_copy`."""

    source: str
    target: str
    size_bytes: int | None = None
    checksum: Checksum | None = None
    key: object = None
    """Whatever the program knows it by."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What came of it: what passed, or the last thing that went wrong."""

    wanted: Wanted
    info: FileInfo | None
    error: StorageError | None
    attempts: int


class _Each:
    """Errands as they are asked for. Not a generator: one that is left before its end would want to be closed."""

    def __init__(
        self, wanted: Iterable[Wanted] | AsyncIterable[Wanted], errand: Callable[[Wanted], Awaitable[Errand]]
    ) -> None:
        self._later = aiter(wanted) if isinstance(wanted, AsyncIterable) else None
        self._now = iter(()) if isinstance(wanted, AsyncIterable) else iter(wanted)
        self._errand = errand

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Errand:
        if self._later is not None:
            return await self._errand(await anext(self._later))
        for wanted in self._now:
            return await self._errand(wanted)
        raise StopAsyncIteration


class Transfers:
    """The storages and the catalog of a site, ready to move files. Made by `open_transfers`; may serve many jobs."""

    def __init__(
        self, site: Site, storages: Storages, catalog: Catalog | None = None, cache: Cache | None = None
    ) -> None:
        self.site = site
        self.catalog = catalog
        self.cache = cache
        self._storages = storages
        self._lanes = Lanes(site.most_streams, site.element_streams, {"file": site.streams_of("file")})
        self._patience = Patience(site.retries + 1, site.retry_seconds)
        self.stalls = Stalls(site.stall_seconds)

    def __repr__(self) -> str:
        return f"<Transfers {self.site.name or 'local'}: {self._storages!r}>"

    async def storage(self, url: str) -> Storage:
        """The storage a URL is for, opened if need be. Raises `StorageError` when there is none.

        `InvalidSite` when it does not understand what the site says of it. Files that are on their way there fail for it
        one by one, as for any other error: who shares the transfers has files of other kinds too.
        """
        return await self._storages.for_url(url)

    async def _storage(self, url: str) -> Storage:
        try:
            return await self.storage(url)
        except InvalidSite as exc:
            raise StorageError(url, str(exc)) from exc

    async def lookup(self, lfns: Sequence[str]) -> Mapping[str, CatalogEntry]:
        """What the catalog knows of these; nothing when there is no catalog. Raises `StagingFailed`."""
        if self.catalog is None:
            return {}
        try:
            return await self.catalog.lookup(lfns)
        except StorageError as exc:
            raise StagingFailed("cannot look up inputs", [str(exc)]) from exc

    # -- for programs -------------------------------------------------------------------------------------------------

    async def move(
        self,
        wanted: Iterable[Wanted] | AsyncIterable[Wanted],
        ended: Callable[[Moved], Awaitable[None]],
        *,
        overall: Callable[[Overall], None] | None = None,
        files: int | None = None,
        sync: bool = False,
        keeps: bool = False,
        enough: anyio.Event | None = None,
        deadline_seconds: float | None = None,
    ) -> None:
        """Move files as they come out of `wanted`, and await `ended` once for each: any number of them, in little memory.

        `overall` is called now and then with how far all are; `files`: how many there will be, if that is known before.
        `sync`: what comes in is on the disk when it is said to have ended, not only on its way there. `keeps`: what has
        come in of a large file whose checksum is wanted stays beside its place when it is not finished, and the next call
        goes on from there. `enough`: once it is set, nothing more is begun; `ended` hears nothing of the rest. Cancellation
        leaves nothing half there.
        """

        async def arrived(errand: Errand, outcome: Outcome) -> None:
            key = errand.key
            assert isinstance(key, Wanted)  # noqa: S101 - we put it there
            if isinstance(outcome, StorageError):
                await ended(Moved(key, None, outcome, errand.transfers))
            else:
                await ended(Moved(key, outcome, None, errand.transfers))

        async def errand(each: Wanted) -> Errand:
            return await self._take_up(_errand(each, sync, keeps))

        errands: Iterable[Errand] | AsyncIterable[Errand]
        if isinstance(wanted, AsyncIterable) or keeps:
            errands = _Each(wanted, errand)
        else:
            errands = (_errand(each, sync, keeps) for each in wanted)
        await self._run(
            errands, arrived, overall=overall, files=files, enough=enough, deadline_seconds=deadline_seconds
        )

    async def _take_up(self, errand: Errand) -> Errand:
        """The errand, to be continued from what an earlier call has kept of it, where that can be."""
        end = errand.end
        if isinstance(end, PartOfPath) and end.keeps and errand.checksum is not None and end.is_worth_it:
            try:
                storage = await self._storage(errand.replica.url)
            except StorageError:
                return errand
            if Ability.RANGES in storage.abilities:
                found = await to_thread.run_sync(end.found, errand.checksum.algorithm)
                if found is not None:
                    count, passed = found
                    errand.rest = Transfer(errand.direction, "", end, done_bytes=count, passed=passed)
        return errand

    async def can_copy(self, source: str, target: str) -> bool:
        """Whether there is a storage that may copy the one to the other by itself. If it then finds that it cannot, the
        error is `CannotCopy`."""
        try:
            storage = await self._storage(target)
            return Ability.COPY in storage.abilities and storage is await self._storage(source)
        except StorageError:
            return False

    def element_of(self, url: str) -> str | None:
        """The site's name for where a URL is: of several, the one whose place is the longest that it begins with."""
        at = [
            (len(base), name)
            for name, base in self.site.storage_elements.items()
            if url.startswith(f"{base.rstrip('/')}/")
        ]
        return max(at)[1] if at else None

    # -- for jobs -----------------------------------------------------------------------------------------------------

    async def fetch(self, fetches: Sequence[Fetch], workdir: Workdir, listener: Listener) -> None:
        """Bring files into a work directory, many at once.

        All are tried; then `StagingFailed` names those that could not be had. A name in the work directory never holds
        half a file, also after cancellation.
        """
        if not fetches:
            return
        problems: list[str] = []

        def incoming(fetch: Fetch) -> Errand:
            end = Incoming(workdir, fetch.name, size_bytes=fetch.size_bytes, checksum=fetch.checksum)
            return _inbound(fetch, end)

        async def arrived(errand: Errand, outcome: Outcome) -> None:
            if isinstance(outcome, FileInfo):
                await listener.staged(_stored(errand, outcome))
            else:
                problems.append(f"{errand.name}: {told(errand, outcome)}")

        if self.cache is None and len(fetches) <= FEW_FILES:
            if left := await self._move_few(list(map(incoming, fetches)), arrived, listener):
                await self._run(iter(left), arrived, listener, len(left))
        elif self.cache is None:
            await self._run(map(incoming, fetches), arrived, listener, len(fetches))
        else:
            await self._fetch_shared(self.cache, fetches, workdir, arrived, listener)
        if problems:
            raise StagingFailed("cannot bring in", problems)

    async def deliver(
        self,
        deliveries: Sequence[Delivery],
        workdir: Workdir,
        listener: Listener,
        early: Early | None = None,
        parts: PartNames | None = None,
    ) -> None:
        """Take files out of a work directory, many at once, and register those that have a logical name.

        The biggest are begun first. One that is not there is told to the listener and is no failure (as in DIRAC). All
        are tried; then `StagingFailed` names those that no storage took, or that may not leave. What `early` has at the
        storage already is only published. `parts`: what they are called there until they are whole.
        """
        if not deliveries:
            return
        problems: list[str] = []
        sizes = [delivery.size_bytes for delivery in deliveries]
        if None in sizes and len(sizes) > 1:
            sizes = await briefly(lambda: [workdir.seen_size(each.file or each.name) for each in deliveries])
        errands = [
            Errand(
                delivery.name, Direction.UPLOAD, delivery.targets, Outgoing(workdir, delivery.file or delivery.name),
                delivery.failover, size_bytes=size, lfn=delivery.lfn, parts=parts,
            )
            for delivery, size in zip(deliveries, sizes, strict=True)
        ]  # fmt: skip

        async def failed(errand: Errand, reason: str) -> None:
            refused = getattr(errand.end, "refused", None)
            if isinstance(refused, FileNotFoundError):
                await listener.missing(errand.name, NOT_MADE)
                return
            if refused is not None:
                reason = str(refused.strerror)
                await listener.missing(errand.name, reason)
            problems.append(f"{errand.name}: {reason}")

        async def arrived(errand: Errand, outcome: Outcome) -> None:
            if isinstance(outcome, StorageError):
                if isinstance(errand.key, Errand):  # it was only to be published
                    again.append(errand.key)
                else:
                    await failed(errand, told(errand, outcome))
                return
            file = _stored(errand, outcome)
            try:
                await self.register(file)
            except StorageError as exc:
                if not exc.retryable:
                    problems.append(f"{errand.name}: {exc}")
                    return
                await listener.unregistered(file, str(exc))  # before it is said to be there, which is not said again
            if errand.place < len(errand.places):
                await listener.staged(file)
            else:
                await listener.failed_over(file, errand.places[0].url)

        async def move(some: Sequence[Errand]) -> None:
            if self.catalog is None or len(some) == 1:
                some = await self._move_few(some, arrived, listener)
            if not some:
                return
            await self._run(
                iter(some), arrived, listener, len(some), tellers=self.site.most_streams if self.catalog else 1
            )

        again: list[Errand] = []
        new = await self._without_those_there(errands, failed, listener)
        if early is None:
            await move(new)
        else:
            await _publish(new, early, move)
            if again:
                await move(again)
        if problems:
            raise StagingFailed("cannot deliver", problems)

    async def _fetch_shared(
        self,
        cache: Cache,
        fetches: Sequence[Fetch],
        workdir: Workdir,
        arrived: Callable[[Errand, Outcome], Awaitable[None]],
        listener: Listener,
    ) -> None:
        """By way of the node's cache: each file is moved once, for all jobs that want it."""
        from loadmaster.staging.sharing import Sharing  # loaded when used

        sharing = Sharing(cache, workdir, _inbound, arrived, self.site.staging_seconds)

        async def settled(errand: Errand, outcome: Outcome) -> None:
            if (settled := await sharing.settled(errand, outcome)) is not None:
                await arrived(errand, settled)

        try:
            async with aclosing(sharing.errands(fetches)) as errands:
                await self._run(errands, settled, listener, tellers=self.site.most_streams)
        finally:
            await sharing.close()
        if sharing.again:
            await self._run(sharing.again, arrived, listener, len(sharing.again))

    # -- beside the payload -------------------------------------------------------------------------------------------

    async def can_hold(self, url: str) -> bool:
        """Whether an upload to there can be begun and published later."""
        try:
            return Ability.HOLD in (await self.storage(url)).abilities
        except StorageError:
            return False

    async def hold(
        self,
        errands: AsyncIterable[Errand],
        arrived: Callable[[Errand, Outcome], Awaitable[None]],
        listener: Listener,
        enough: anyio.Event,
    ) -> None:
        """Send outputs as they come, for as long as the payload runs: no deadline of a step is kept. Once `enough` is set,
        nothing more is begun, and this returns when what was on its way has arrived."""
        await self._run(errands, arrived, _Quiet(listener), enough=enough)

    async def abandon(self, errands: Sequence[Errand]) -> None:
        """Have storages remove what they hold. What could not be removed still has its token."""

        async def gone(errand: Errand, outcome: Outcome) -> None:
            pass

        await self._run(iter(errands), gone)

    async def clear(self, places: Iterable[str], parts: PartNames) -> dict[str, StorageError]:
        """Remove what uploads to these URLs have left that were broken off; where that was not possible, and why.

        In bounded time.
        """
        left: dict[str, StorageError] = {}

        async def one(url: str) -> None:
            left[url] = StorageUnavailable(url, f"no answer for {CLEAR_SECONDS:.0f} s")
            with anyio.move_on_after(CLEAR_SECONDS):
                try:
                    await self.clear_one(url, parts.all(url))
                    del left[url]
                except StorageError as exc:
                    left[url] = exc

        await for_each(list(dict.fromkeys(places)), one, self.site.most_streams)
        return left

    async def clear_one(self, url: str, parts: Sequence[str]) -> None:
        """As `clear`, for one URL and by these names. Raises `StorageError`."""
        storage = await self._storage(url)
        if isinstance(storage, Clears):
            with suppress(NotFound):  # not even a place where it could be
                await storage.clear(url, parts)

    # -- the same for both --------------------------------------------------------------------------------------------

    async def _move_few(
        self, errands: Sequence[Errand], arrived: Callable[[Errand, Outcome], Awaitable[None]], listener: Listener
    ) -> Sequence[Errand]:
        """Move what is a matter of a moment without a party; the errands that are left for one."""
        if not are_few(errands) or any(self._lanes.limit(errand.road.element) is not None for errand in errands):
            return errands
        try:
            storage = await self._storage(errands[0].replica.url)
        except StorageError:
            return errands
        if type(storage) is not LocalStorage:  # another may move them in a way of its own
            return errands
        left: list[Errand] = []
        size = 0
        for errand, info in zip(errands, await move_briefly(errands, storage), strict=True):
            if info is None:
                left.append(errand)
            else:
                await arrived(errand, info)
                size += info.size_bytes
        if not left and listener.wants_progress:
            count = len(errands)
            listener.overall(errands[0].direction, Overall(count, count, size, 0, size, 0.0, None, count))
        return left

    async def _run(
        self,
        errands: Iterable[Errand] | AsyncIterable[Errand],
        arrived: Callable[[Errand, Outcome], Awaitable[None]],
        listener: Listener | None = None,
        files: int | None = None,
        *,
        tellers: int = 1,
        overall: Callable[[Overall], None] | None = None,
        enough: anyio.Event | None = None,
        deadline_seconds: float | None = None,
    ) -> None:
        """Have a party of its own move these, and tell how far it is to whoever wants to know."""
        party = Party(
            errands,
            arrived,
            lanes=self._lanes,
            storage=self._storage,
            patience=self._patience,
            stalls=self.stalls,
            tellers=tellers,
            enough=enough,
            few=listener is not None,
        )
        one: Callable[..., None] | None = None
        if listener is not None and enough is None:
            deadline_seconds = self.site.staging_seconds
        if listener is not None and listener.wants_progress:
            heard, one = listener, listener.progress

            def overall(seen: Overall) -> None:
                heard.overall(party.direction, seen)

        if overall is None:
            await party.run(deadline_seconds)
            return
        meter = Meter(party, files)
        with single_error():
            async with anyio.create_task_group() as group:
                group.start_soon(report, party, meter, one, overall)
                await party.run(deadline_seconds)
                group.cancel_scope.cancel()
        overall(meter.look(anyio.current_time()))

    async def register(self, file: StoredFile) -> None:
        """Have a file that has a logical name in the catalog, if there is one. Raises `StorageError`."""
        if file.lfn is not None and self.catalog is not None:
            replica = Replica(file.url, file.storage_element)
            info = FileInfo(file.size_bytes, Checksum.parse(file.checksum) if file.checksum else None)
            entry, failures = CatalogEntry(file.lfn, info, (replica,)), 0
            while True:  # the file is there: it is not to be lost for a catalog that is busy
                try:
                    await self.catalog.register(entry)
                except StorageError as exc:
                    failures += 1
                    if not exc.retryable or failures > self.site.retries:
                        raise
                    await anyio.sleep(max(delay(self._patience, failures, random.random), exc.retry_after or 0.0))
                else:
                    return

    async def _without_those_there(
        self, errands: list[Errand], failed: Callable[[Errand, str], Awaitable[None]], listener: Listener
    ) -> list[Errand]:
        """Tell of what an earlier attempt has brought where it is wanted, and leave it out; refuse what is other content."""
        lfns = [errand.lfn for errand in errands if errand.lfn is not None]
        if not lfns or self.catalog is None:
            return errands
        try:
            known = await self.catalog.lookup(lfns)
        except StorageError as exc:
            for errand in errands:
                if errand.lfn is not None:
                    await failed(errand, str(exc))
            return [errand for errand in errands if errand.lfn is None]
        settled: set[int] = set()

        async def one(errand: Errand) -> None:
            try:
                file = await self._already_there(errand, known[errand.lfn or ""])
            except StorageError as exc:
                await failed(errand, str(exc))
            else:
                if file is None:
                    return
                await listener.staged(file)
            settled.add(id(errand))

        await for_each([errand for errand in errands if errand.lfn in known], one, self.site.most_streams)
        return [errand for errand in errands if id(errand) not in settled]

    async def _already_there(self, errand: Errand, entry: CatalogEntry) -> StoredFile | None:
        """The file, if it is where it is wanted. Other content is never written over: raises `AlreadyExists`."""
        algorithm = entry.info.checksum.algorithm if entry.info.checksum is not None else "adler32"
        info = await to_thread.run_sync(_read_through, errand.end, algorithm)
        if info != entry.info:
            raise AlreadyExists(
                f"LFN:{errand.lfn}",
                f"is in the catalog with other content ({entry.info.size_bytes} bytes, {entry.info.checksum}; "
                f"this one has {info.size_bytes}, {info.checksum})",
            )
        for place, target in enumerate(errand.places):
            if target in entry.replicas and await self._has(target, info.size_bytes):
                errand.place = place
                return _stored(errand, info)
        return None

    async def _has(self, place: Replica, size_bytes: int) -> bool:
        """Whether a replica is really there: a catalog may know of files that storage has lost."""
        try:
            return (await (await self._storage(place.url)).stat(place.url)).size_bytes == size_bytes
        except StorageError:
            return False


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
    if site.sandbox_format == "tar.zst":
        await to_thread.run_sync(_check_zstd)
    with single_error():
        async with anyio.create_task_group() as group:
            kinds = Storages(group, storages or {}, site.storage, site.streams_of, site.file)
            cache = await to_thread.run_sync(_open_cache, site)
            try:
                transfers = Transfers(site, kinds, catalog, cache)
                group.start_soon(transfers.stalls.watch)
                yield transfers
            finally:
                if cache is not None:
                    cache.close()
                await kinds.close()
                group.cancel_scope.cancel()


class _Quiet:
    """A listener to a party that may have nothing to do for hours."""

    def __init__(self, listener: Listener) -> None:
        self.wants_progress = listener.wants_progress
        self.staged, self.failed_over, self.missing = listener.staged, listener.failed_over, listener.missing
        self.unregistered, self.progress = listener.unregistered, listener.progress
        self._listener = listener
        self._last: tuple[int, int] | None = None

    def overall(self, direction: Direction, overall: Overall) -> None:
        """Tell what has changed."""
        seen = overall.done_files, overall.done_bytes
        if seen != self._last and overall.files:
            self._last = seen
            self._listener.overall(direction, overall)


async def _publish(
    errands: Sequence[Errand], early: Early, move: Callable[[Sequence[Errand]], Awaitable[None]]
) -> None:
    """Move all, what is on its way when it has arrived and everything else meanwhile."""
    early.close()
    coming: list[Errand] = []
    others: list[Errand] = []
    for errand in errands:
        (coming if early.is_on_its_way(errand.name) else others).append(errand)

    async def now() -> None:
        await move(await early.published(others))

    async def later() -> None:
        await early.landed()
        await move(await early.published(coming))

    await for_each([now, later] if coming else [now], lambda step: step(), 2)


def _open_cache(site: Site) -> Cache | None:
    """The node's cache, if the site has one. Raises `InvalidSite`."""
    if site.cache is None:
        return None
    if not site.cache.startswith("file://"):
        raise InvalidSite(f"cache: {site.cache}: only a local directory can be one")
    from loadmaster.staging.cache import Cache  # loaded when used

    return Cache(local_path(site.cache), site.cache_bytes, link=site.cache_link)


def _check_zstd() -> None:
    """Raises `InvalidSite` now, and not when there are outputs to be packed."""
    from loadmaster.staging.archives import Refused, zstd_library  # with all its compressors, loaded when used

    try:
        zstd_library()
    except Refused as exc:
        raise InvalidSite(f"sandbox_format: {exc}") from exc


def _inbound(fetch: Fetch, end: Incoming) -> Errand:
    return Errand(
        fetch.name, Direction.DOWNLOAD, fetch.sources, end,
        size_bytes=fetch.size_bytes, checksum=fetch.checksum, lfn=fetch.lfn,
    )  # fmt: skip


def _errand(wanted: Wanted, sync: bool, keeps: bool) -> Errand:
    """A download if the target is a file of this machine, an upload of one if the source is, else a copy."""
    end: PartOfPath | OutgoingPath | Elsewhere
    within = ""
    if wanted.target.startswith("file://"):
        direction, place = Direction.DOWNLOAD, wanted.source
        end = PartOfPath(
            local_file(wanted.target), size_bytes=wanted.size_bytes, checksum=wanted.checksum, sync=sync, keeps=keeps
        )
    elif wanted.source.startswith("file://"):
        direction, place = Direction.UPLOAD, wanted.target
        end = OutgoingPath(local_file(wanted.source))
    else:
        direction, place, within = Direction.COPY, wanted.target, wanted.source
        end = Elsewhere()
    return Errand(
        wanted.target, direction, (Replica(place),), end, source=within,
        size_bytes=wanted.size_bytes, checksum=wanted.checksum, key=wanted,
    )  # fmt: skip


def _read_through(end: LocalFile, algorithm: str) -> FileInfo:
    with translated(WORK_DIRECTORY):
        descriptor = end.open()
        try:
            return checksum(descriptor, algorithm)
        finally:
            os.close(descriptor)


def _stored(errand: Errand, info: FileInfo) -> StoredFile:
    place = errand.replica
    return StoredFile(
        errand.name, place.url, info.size_bytes, str(info.checksum or ""), errand.lfn, place.storage_element
    )
