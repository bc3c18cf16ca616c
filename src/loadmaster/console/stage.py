"""What `loadmaster stage` does: the files of a manifest are moved, those that are there already are left alone.

    manifest -> what is there already? -> first -> what came of each line
                                            | `--> again    what a server does not copy by itself goes to the spool
                                            v        v
                                          onward  <--+      and from there to its target

Nothing is remembered of a file but one byte, so that any number of them takes no more memory than a few thousand.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf
from typing import Final, Protocol, Self

import anyio
from anyio import to_thread

from loadmaster.console.manifest import BadManifest, Entry, Manifest
from loadmaster.console.orders import Orders
from loadmaster.console.present import Absent, InTheWay, Look, There
from loadmaster.console.spool import Spool, open_spool
from loadmaster.errors import CannotCopy, StorageError
from loadmaster.names import shown
from loadmaster.site import Site
from loadmaster.staging.engine import Moved, Transfers, Wanted, open_transfers
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import FileInfo
from loadmaster.tasks import single_error

SPOOLED: Final = 2
"""Files in the spool, for each stream: one comes in while the other goes out."""

REFUSED: Final = 256
"""Files that no server has copied and that wait for a place in the spool; while there are more, nothing is begun."""


class Outcome(StrEnum):
    """What may come of a line."""

    MOVED = "moved"
    THERE = "there"
    """Its target was there already, and right as far as one looked."""
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of one line of a manifest."""

    entry: Entry
    outcome: Outcome
    info: FileInfo | None = None
    attempts: int = 0
    """How often it was begun; a file from server to server is begun twice at the least."""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """How the files are to be moved."""

    everything: bool = False
    """Whether or not their targets are there: nobody looks."""
    verify: bool = False
    """What is there already has to prove its content."""
    resume: bool = False
    """What has come of a file is kept when it fails, and continued by the next run."""
    sync: bool = False
    """What has come in is on the disk, not only on its way there, when it gets its name."""
    deadline_seconds: float | None = None


@dataclass(slots=True)
class Tally:
    """What has come of the files so far."""

    files: int
    moved: int = 0
    there: int = 0
    failed: int = 0
    moved_bytes: int = 0
    there_bytes: int = 0
    attempts: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> int:
        """Files nothing has come of."""
        return self.files - self.moved - self.there - self.failed

    def take(self, ended: Ended) -> None:
        """Count one more."""
        size_bytes = ended.info.size_bytes if ended.info is not None else 0
        self.attempts += ended.attempts
        match ended.outcome:
            case Outcome.MOVED:
                self.moved += 1
                self.moved_bytes += size_bytes
            case Outcome.THERE:
                self.there += 1
                self.there_bytes += size_bytes
            case Outcome.FAILED:
                self.failed += 1


class Listener(Protocol):
    """Whoever wants to know what becomes of the files."""

    def say(self, line: str) -> None:
        """Something a person should know."""
        ...

    def ended(self, ended: Ended) -> None:
        """It is known what came of a line. Called once for each; waits for nothing."""
        ...

    async def follow(self, staging: Stage) -> None:
        """Look now and then how far it is, until cancelled."""
        ...


async def stage(manifest: Manifest, site: Site, terms: Terms, listener: Listener, orders: Orders) -> Tally:
    """Move the files of a manifest. The first order has no more begun, the second leaves at once.

    Raises `BadManifest` before anything is moved when there is no storage for a line.
    """
    async with open_transfers(site) as transfers:
        staging = Stage(manifest, transfers, terms, listener)
        await staging.check()
        with single_error():
            async with anyio.create_task_group() as beside:
                beside.start_soon(_obey, orders, staging, listener, beside.cancel_scope)
                beside.start_soon(listener.follow, staging)
                await staging.run()
                beside.cancel_scope.cancel()
    return staging.tally


async def _obey(orders: Orders, staging: Stage, listener: Listener, everything: anyio.CancelScope) -> None:
    name = await orders.next()
    listener.say(f"{name}: no more files are begun, those under way are finished (once more: leave at once)")
    staging.begin_no_more()
    name = await orders.next()
    listener.say(f"{name}: leaving; the files under way are dropped")
    everything.cancel()


class Stage:
    """One manifest being staged."""

    def __init__(self, manifest: Manifest, transfers: Transfers, terms: Terms, listener: Listener) -> None:
        self.tally = Tally(manifest.files)
        self.passing_bytes = 0
        """That have passed of files that are under way, when it was last looked."""
        self._manifest, self._transfers, self._terms, self._listener = manifest, transfers, terms, listener
        self._told = bytearray(manifest.last_line + 1)
        """For each line, whether it is known what came of it."""
        self._enough = anyio.Event()
        self._begun = 0.0

    def begin_no_more(self) -> None:
        """What is under way is finished, nothing else is begun."""
        self._enough.set()

    async def check(self) -> None:
        """Raise `BadManifest` that names every line for which there is no storage, or none that can be opened."""
        unusable: dict[str, str] = {}
        for scheme, url in self._manifest.schemes.items():
            try:
                await self._transfers.storage(url)
            except StorageError as exc:
                unusable[scheme] = str(exc).removeprefix(f"{url}: ")
        if unusable:
            problems = await to_thread.run_sync(self._manifest.lines_with, unusable)
            raise BadManifest(self._manifest.name, problems)

    async def run(self) -> Tally:
        """Move what is to be moved, and return when that is done or no more shall be begun.

        What is not there at the deadline fails then. Cancellation leaves no half files.
        """
        self._begun = anyio.current_time()
        try:
            with single_error():
                async with anyio.create_task_group() as beside:
                    beside.start_soon(self._stop_in_time)
                    async with open_spool() as spool:
                        await self._move(spool)
                    beside.cancel_scope.cancel()
            if self._seconds_left <= 0:
                await to_thread.run_sync(self._too_late)
        finally:
            self.tally.seconds = anyio.current_time() - self._begun
        return self.tally

    @property
    def _seconds_left(self) -> float:
        deadline = self._terms.deadline_seconds
        return inf if deadline is None else self._begun + deadline - anyio.current_time()

    async def _stop_in_time(self) -> None:
        await anyio.sleep(self._seconds_left)
        self._enough.set()

    def _too_late(self) -> None:
        """Name every file nothing has come of. Blocks; nothing else goes on by now."""
        reason = f"not begun within {self._terms.deadline_seconds:g} s"
        for entry in self._manifest.entries():
            self._ended(Ended(entry, Outcome.FAILED, reason=reason))

    def _ended(self, ended: Ended) -> None:
        """Once for each line, whoever says so first."""
        if not self._told[ended.entry.line]:
            self._told[ended.entry.line] = 1
            self.tally.take(ended)
            self._listener.ended(ended)

    async def _move(self, spool: Spool) -> None:
        """Everything is one call of the engine; what goes from server to server goes on in others."""
        onward, arriving = anyio.create_memory_object_stream[Wanted](inf)  # the spool bounds it
        again, refused = anyio.create_memory_object_stream[_Leg](REFUSED)
        deadline = self._terms.deadline_seconds
        routes = _Routes(self._transfers, spool)

        async def arrived(moved: Moved) -> None:
            leg = moved.wanted.key
            assert isinstance(leg, _Leg)  # noqa: S101 - we put it there
            if leg.copies and moved.error is not None and not moved.error.retryable:
                routes.does_not_copy(leg.entry, moved.error)
                await again.send(leg.through_us(moved))
                return
            if moved.error is None and moved.wanted.target == leg.spooled:
                onward.send_nowait(leg.onward(moved))
                return
            if moved.error is None and leg.is_other(moved):
                with suppress(StorageError):
                    await (await self._transfers.storage(leg.entry.target)).remove(leg.entry.target)
            self._ended(leg.ended(moved))
            if leg.spooled is not None:
                await routes.leave(leg.spooled)

        async def first_legs_again() -> None:
            async with onward:
                await self._transfers.move(_Refused(refused, routes), arrived, deadline_seconds=deadline)

        async def second_legs() -> None:
            await self._transfers.move(arriving, arrived, deadline_seconds=deadline)

        async with arriving, refused, anyio.create_task_group() as legs:
            legs.start_soon(second_legs)
            legs.start_soon(first_legs_again)
            async with again:
                await self._transfers.move(
                    _Lines(self, routes), arrived, overall=self._look, files=self.tally.files,
                    sync=self._terms.sync, keeps=self._terms.resume, enough=self._enough, deadline_seconds=deadline,
                )  # fmt: skip

    def _look(self, overall: Overall) -> None:
        self.passing_bytes = overall.passing_bytes

    # -- what is to be moved -------------------------------------------------------------------------------------

    async def next_window(self, look: Look, entries: Iterator[Entry]) -> list[Entry] | None:
        """Of the next lines, those that are to be moved; None when there are no more, or shall be no more."""
        if self._enough.is_set():
            return None
        window = await look.at(entries)
        for entry, finding in window:
            match finding:
                case There(info):
                    self._ended(Ended(entry, Outcome.THERE, info))
                case InTheWay(what):
                    self._ended(Ended(entry, Outcome.FAILED, reason=f"there is {what} in its place"))
        return [entry for entry, finding in window if isinstance(finding, Absent)] if window else None

    def look(self) -> Look:
        """What tells what is there."""
        return Look(self._transfers, nowhere=self._terms.everything, verify=self._terms.verify)

    def entries(self) -> Iterator[Entry]:
        """All lines."""
        return self._manifest.entries()


@dataclass(frozen=True, slots=True)
class _Leg:
    """A line on its way: straight, or to the spool and from there."""

    entry: Entry
    spooled: str | None = None
    attempts: int = 0
    copies: bool = False
    """Whether the server is to copy it by itself."""

    def wanted(self) -> Wanted:
        """Straight, or the first leg."""
        entry = self.entry
        return Wanted(entry.source, self.spooled or entry.target, entry.size_bytes, entry.checksum, self)

    def through_us(self, moved: Moved) -> _Leg:
        """After the server has refused."""
        return replace(self, attempts=self.attempts + moved.attempts, copies=False)

    def onward(self, moved: Moved) -> Wanted:
        """The second leg, after the first: with the size and checksum of what has come in."""
        assert self.spooled is not None  # noqa: S101 - it was its target
        assert moved.info is not None  # noqa: S101 - it has come in
        leg = replace(self, attempts=self.attempts + moved.attempts)
        return Wanted(self.spooled, self.entry.target, moved.info.size_bytes, moved.info.checksum, leg)

    def is_other(self, moved: Moved) -> bool:
        """Whether what was sent is not what the manifest says. What comes in is verified before it gets its name."""
        size_bytes, checksum = self.entry.size_bytes, self.entry.checksum
        return moved.info is not None and (
            (size_bytes is not None and moved.info.size_bytes != size_bytes)
            or (checksum is not None and moved.info.checksum != checksum)
        )

    def ended(self, moved: Moved) -> Ended:
        """What came of it."""
        attempts = self.attempts + moved.attempts
        if moved.error is not None:
            return Ended(self.entry, Outcome.FAILED, attempts=attempts, reason=str(moved.error))
        if moved.info is not None and self.is_other(moved):
            reason = (
                f"{shown(self.entry.source)}: {moved.info.size_bytes} bytes, {moved.info.checksum}: not what is wanted"
            )
            return Ended(self.entry, Outcome.FAILED, attempts=attempts, reason=reason)
        return Ended(self.entry, Outcome.MOVED, moved.info, attempts)


class _Routes:
    """Which way a line goes."""

    def __init__(self, transfers: Transfers, spool: Spool) -> None:
        self._transfers, self._spool = transfers, spool
        self._places = anyio.Semaphore(SPOOLED * transfers.site.most_streams)
        self._copies: dict[tuple[str, str], bool] = {}
        """Whether a server copies to another, or to itself, as far as is known."""

    async def leg(self, entry: Entry) -> _Leg:
        """The first one of a line. Waits for a place in the spool if it needs one."""
        if entry.source.startswith("file://") or entry.target.startswith("file://"):
            return _Leg(entry)
        servers = _server(entry.source), _server(entry.target)
        if servers not in self._copies:
            self._copies[servers] = await self._transfers.can_copy(entry.source, entry.target)
        return _Leg(entry, copies=True) if self._copies[servers] else await self.to_spool(_Leg(entry))

    async def to_spool(self, leg: _Leg) -> _Leg:
        """The same, to a place in the spool."""
        await self._places.acquire()
        return replace(leg, spooled=await self._spool.place())

    async def leave(self, place: str) -> None:
        """A file has left its place in the spool."""
        await self._spool.remove(place)
        self._places.release()

    def does_not_copy(self, entry: Entry, error: StorageError) -> None:
        """Where that is said of a server, it is not asked again."""
        if isinstance(error, CannotCopy):
            self._copies[_server(entry.source), _server(entry.target)] = False


def _server(url: str) -> str:
    return "/".join(url.split("/", 3)[:3])


class _Refused:
    """Files that no server has copied, to be moved to the spool."""

    def __init__(self, legs: AsyncIterator[_Leg], routes: _Routes) -> None:
        self._legs, self._routes = legs, routes

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Wanted:
        return (await self._routes.to_spool(await anext(self._legs))).wanted()


class _Lines:
    """The files to be moved, as the engine takes them. Not a generator: one of those would want to be closed."""

    def __init__(self, staging: Stage, routes: _Routes) -> None:
        self._staging, self._routes = staging, routes
        self._look, self._entries = staging.look(), staging.entries()
        self._window: deque[Entry] = deque()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Wanted:
        while not self._window:
            window = await self._staging.next_window(self._look, self._entries)
            if window is None:
                raise StopAsyncIteration
            self._window.extend(window)
        return (await self._routes.leg(self._window.popleft())).wanted()
