"""The files that one step of one job wants moved: handed to storages in batches, tried again, watched, told of.

    source -> queues by road -> (a lane is granted) -> batch -> storage -> arrived -> told
                  ^                                                |
                  +---------- waiting until it is due <------------+  what failed and may succeed later

There is a task for each batch, not for each file, and what is queued is bounded: a hundred thousand files take no more
memory than five thousand. What makes but one small batch of a job has no task at all: it is moved by the job's.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Final

import anyio
from anyio import lowlevel, to_thread
from anyio.abc import TaskGroup

from loadmaster.errors import ChecksumMismatch, StorageError, StorageUnavailable
from loadmaster.staging.errand import BATCH_BYTES, BATCH_FILES, Errand, Moving, Outcome, took_other
from loadmaster.staging.lanes import Lanes, Road
from loadmaster.staging.retry import Course, Patience, Step
from loadmaster.staging.split import move_in_parts, parts_of
from loadmaster.staging.stalls import Stalls
from loadmaster.storage.base import Ability, Direction, FileInfo, Storage, Transfer
from loadmaster.tasks import single_error

LOOK_AHEAD: Final = 4096
"""Files that are queued at once: enough to find the biggest, and to fill all lanes."""

TURN_FILES: Final = 128
"""So many are queued, or told of, without another task's turn: some milliseconds."""

UNTOLD: Final = 2048
"""Files that have arrived and are still to be told of; while there are more, nothing is begun."""

SLOW_BYTES_PER_SECOND: Final = 1000.0
"""A transfer that is slower than this is as good as stalled. One that has not begun waits inside its storage for others,
and for as long as that storage has some under way it may: then it is to begin."""

GIVE_UP_SECONDS: Final = 10.0
"""How long a storage may take to give up a transfer, before its whole batch is cancelled."""

FEW_FILES: Final = 16
FEW_BYTES: Final = 1024**2
"""So many files, that are no larger together, are one batch and told of when all have arrived; as is a single one."""

LEAST_FILES: Final = 64
"""So many small ones go together even where there are lanes for each: what a batch costs is then shared by some."""

RESUME_BYTES: Final = 1024**2
"""Less than this is not worth being continued."""

STALLED: Final = "moved next to nothing for a while, and was given up"

CLEANING_SECONDS: Final = 10.0


class Party:
    """One call's files. `arrived` is awaited for each, with what came of it, some at a time."""

    def __init__(
        self,
        source: Iterable[Errand] | AsyncIterable[Errand],
        arrived: Callable[[Errand, Outcome], Awaitable[None]],
        *,
        lanes: Lanes,
        storage: Callable[[str], Awaitable[Storage]],
        patience: Patience,
        stalls: Stalls,
        tellers: int = 1,
        enough: anyio.Event | None = None,
        few: bool = False,
    ) -> None:
        """`enough`: once it is set, nothing more is begun; what has not been begun is not told of. `few`: whether a few
        files may be moved by the task that calls `run`: one that only scopes cancel, for asyncio's own way knows no shield.
        """
        self._few = few
        self._enough = enough
        self._later = source if isinstance(source, AsyncIterable) else None
        self._source = iter(source) if isinstance(source, Iterable) else None
        self._room = anyio.Event()
        self._arrived = arrived
        self._lanes = lanes
        self._storage = storage
        self._patience = patience
        self._stalls = stalls
        self._tellers = tellers
        self._telling = 0
        self._number = count()
        self.direction = Direction.DOWNLOAD
        """Of what was begun last."""
        self._queues: dict[Road, list[tuple[tuple[int, int], int, Errand]]] = {}
        self._queued = 0
        self._due: list[tuple[float, int, Errand]] = []
        self._ended: deque[tuple[Errand, Outcome]] = deque()
        self._batches: dict[int, anyio.CancelScope] = {}
        self._changed = anyio.Event()
        self._group: TaskGroup | None = None
        self._crowding = {"file"}
        """Schemes of storages that move small files in one thread, whatever lanes they have."""
        self._in_one_go = False
        self._granted: tuple[int, Road, list[Errand]] | None = None
        self._deadline_seconds: float | None = None
        self._late = False
        self._stopped = False
        self._interrupted: list[Errand] = []
        self.moving: dict[Moving, int] = {}
        """The transfers that storages have in hand, and the number of their batch."""
        self.files = self.unsized_files = self.size_bytes = 0
        """What has come out of the source so far: how many, how many of them of unknown size, the size of the others."""
        self.done_files = self.done_bytes = self.transfers = 0

    def __repr__(self) -> str:
        return f"<Party {self._queued} queued, {len(self.moving)} moving, {len(self._due)} waiting, {self.done_files} done>"

    async def run(self, deadline_seconds: float | None = None) -> None:
        """Move everything. What is not done at the deadline fails then. Cancellation leaves nothing half there."""
        self._deadline_seconds = deadline_seconds
        deadline = anyio.current_time() + deadline_seconds if deadline_seconds is not None else float("inf")
        self._lanes.join(self)
        self._stalls.join(self)
        try:
            if not (self._few and await self._move_few(deadline)):
                await self._move_all(deadline)
        finally:
            self._group = None
            self._lanes.leave(self)
            self._stalls.leave(self)
            await self._clean()

    async def _move_few(self, deadline: float) -> bool:
        """What makes one batch, and has its lane at once, needs no tasks. Whether that was all there is to be done."""
        await self._refill()
        if not self.has_all or self._enough is not None or not await self._are_few():
            return False
        self._in_one_go = True
        self._lanes.assign()
        self._in_one_go = False
        if self._granted is None:
            return False
        number, road, batch = self._granted
        self._batches[number].deadline = deadline
        await self._move(number, road, batch)
        while self._ended and (self._tellers == 1 or len(self._ended) == 1):
            await self._tell_one(*self._ended.popleft())
        return self._is_over()

    async def _are_few(self) -> bool:
        if self._queued == 1:
            return True
        if self._queued > FEW_FILES or len(self._queues) != 1:
            return False
        (queue,) = self._queues.values()
        if sum(errand.weight for _, _, errand in queue) > FEW_BYTES:
            return False
        url = queue[0][2].replica.url
        try:  # one that moves them one after another has a lane for each
            return url.startswith("file://") or Ability.SIDE_BY_SIDE in (await self._storage(url)).abilities
        except StorageError:
            return False

    async def _move_all(self, deadline: float) -> None:
        with single_error():
            async with anyio.create_task_group() as group:
                self._group = group
                if self._later is not None:
                    group.start_soon(self._feed, self._later)
                if self._enough is not None:
                    group.start_soon(self._heed, self._enough)
                await self._until_over(deadline)
                group.cancel_scope.cancel()

    async def _until_over(self, deadline: float) -> None:
        while True:
            if not self._late and anyio.current_time() >= deadline:
                self._expire()
            await self._refill()
            self._lanes.assign()
            self._tell()
            if self._is_over():
                return
            due = self._due[0][0] if self._due else float("inf")
            with anyio.move_on_at(min(due, float("inf") if self._late else deadline)):
                await self._changed.wait()
            self._changed = anyio.Event()

    def _is_over(self) -> bool:
        nothing_to_come = self._source is None and self._later is None and not self._queued and not self._due
        return nothing_to_come and not self._batches and not self._ended and not self._telling

    @property
    def has_all(self) -> bool:
        """Whether the source has nothing more: the counts are final."""
        return self._source is None and self._later is None

    # -- what is to be moved ------------------------------------------------------------------------------------------

    async def _refill(self) -> None:
        """Queue what is due, and some more of the source. Now and then others have their turn."""
        now = anyio.current_time()
        while self._due and self._due[0][0] <= now:
            self._queue(heappop(self._due)[2])
        if self._queued <= LOOK_AHEAD // 2 and len(self._ended) <= UNTOLD:
            self._room.set()
        if self._source is None or self._queued > LOOK_AHEAD // 2:
            return
        for begun, errand in enumerate(self._source, 1):
            self._begin(errand)
            if self._queued >= LOOK_AHEAD or len(self._ended) > UNTOLD:
                return
            if begun % TURN_FILES == 0:
                await lowlevel.checkpoint()
                if self._stopped:
                    return
        self._source = None

    async def _feed(self, source: AsyncIterable[Errand]) -> None:
        """Queue what comes, no more of it than there is room for."""
        begun = 0
        async for errand in source:
            if self._stopped:
                break
            self._begin(errand)
            self._changed.set()
            begun += 1
            if begun % TURN_FILES == 0:
                await lowlevel.checkpoint()
            if self._queued >= LOOK_AHEAD or len(self._ended) > UNTOLD:
                self._room = anyio.Event()
                await self._room.wait()
        self._later = None
        self._changed.set()

    def _begin(self, errand: Errand) -> None:
        self.files += 1
        self.direction = errand.direction
        if errand.size_bytes is None:
            self.unsized_files += 1
        else:
            self.size_bytes += errand.size_bytes
        self._queue(errand)

    def _queue(self, errand: Errand) -> None:
        if self._stopped:
            self._interrupted.append(errand)
            return
        if self._late:
            self._ended.append((errand, self._too_late(errand)))
            return
        heappush(self._queues.setdefault(errand.road, []), (errand.urgency, next(self._number), errand))
        self._queued += 1

    def wanted(self) -> Iterable[Road]:
        """The roads of what is queued, the most urgent first."""
        if (self._group is None and not self._in_one_go) or len(self._ended) > UNTOLD:
            return ()
        if len(self._queues) == 1:
            return list(self._queues)
        return sorted(self._queues, key=lambda road: self._queues[road][0][:2])

    def take(self, road: Road) -> None:
        """Have a batch moved by this road: some small files, or a large one."""
        queue = self._queues[road]
        alone = self._lanes.limit(road.element) is not None
        share = 1 if alone else min(BATCH_FILES, -(-len(queue) // self._lanes.width(road)))
        least = 1 if alone else len(queue) if self._in_one_go else LEAST_FILES if road.scheme in self._crowding else 1
        batch: list[Errand] = []
        size = 0
        while queue:
            heavier = size + queue[0][2].weight
            fits = (len(batch) < share and heavier <= BATCH_BYTES) or (len(batch) < least and heavier <= FEW_BYTES)
            if batch and not fits:
                break
            errand = heappop(queue)[2]
            size += errand.weight
            batch.append(errand)
        if not queue:
            del self._queues[road]
        self._queued -= len(batch)
        number = next(self._number)
        self._batches[number] = anyio.CancelScope()
        if self._in_one_go:
            self._granted, self._in_one_go = (number, road, batch), False
            return
        assert self._group is not None  # noqa: S101 - lanes are only granted while we take turns
        self._group.start_soon(self._move, number, road, batch)
        if self._queued <= LOOK_AHEAD // 2:
            self._changed.set()

    # -- moving -------------------------------------------------------------------------------------------------------

    async def _move(self, number: int, road: Road, batch: Sequence[Errand]) -> None:
        """Have a storage move a batch. What it says nothing of, it did not move."""
        transfers: list[Moving] = []
        scope = self._batches[number]
        try:
            with scope:
                try:
                    storage = await self._storage(batch[0].replica.url)
                except StorageError as exc:
                    for errand in batch:
                        self._failed(errand, exc)
                    return
                if Ability.SIDE_BY_SIDE in storage.abilities:
                    self._crowding.add(road.scheme)
                for errand in batch:
                    if errand.parts is not None:
                        await errand.parts.make_room(errand.replica.url)
                ranges, now = Ability.RANGES in storage.abilities, time.monotonic()
                transfers = [self._transfer(errand, ranges, number, now) for errand in batch]
                count = self._parts(transfers, storage)
                if count > 1:
                    transfers[0].parts = parts = list[Transfer]()
                    await move_in_parts(storage, transfers[0], parts, count)
                    self._on_end(transfers)
                else:
                    await storage.move(transfers, self._on_end)
            if not transfers:
                self._queue_all(batch)
            for transfer in [transfer for transfer in transfers if transfer in self.moving]:
                if scope.cancelled_caught and not transfer.given_up:  # its neighbour would not end, or it is too late
                    self._drop(transfer)
                    self._queue(_errand(transfer))
                else:
                    reason = STALLED if transfer.given_up else "the storage said nothing of what came of it"
                    transfer.result = StorageUnavailable(transfer.url, reason)
                    self._on_end([transfer])
        finally:
            for transfer in transfers:
                if transfer in self.moving:  # we are cancelled
                    self._drop(transfer)
                    self._interrupted.append(_errand(transfer))
            del self._batches[number]
            self._lanes.release(road)
            self._changed.set()

    def _parts(self, transfers: Sequence[Moving], storage: Storage) -> int:
        """In how many parts a file comes that is alone: while others wait for a lane, streams are not lacking work."""
        if len(transfers) != 1 or self._queued:
            return 1
        limit = self._lanes.limit(_errand(transfers[0]).road.element)
        return parts_of(transfers[0], storage, self._lanes.streams if limit is None else 1)

    def _queue_all(self, errands: Iterable[Errand]) -> None:
        for errand in errands:
            self._queue(errand)

    def _transfer(self, errand: Errand, ranges: bool, number: int, now: float) -> Moving:
        """A transfer for an errand: from its beginning, or, where there are `ranges`, from where the last one got stuck."""
        url, end = errand.replica.url, errand.end
        algorithm = errand.checksum.algorithm if errand.checksum is not None else "adler32"
        end.url = url
        end.resumable = ranges and errand.direction is Direction.DOWNLOAD
        end.continues = 0
        errand.transfers += 1
        self.transfers += 1
        transfer = errand.moving = Moving(
            errand.direction, url, end, algorithm, errand.size_bytes,
            step=errand.step, held=errand.held, errand=errand, mark_time=now,
        )  # fmt: skip
        if errand.parts is not None and errand.step.sends:
            transfer.part = errand.parts.next(url)
        if errand.source:
            transfer.source, transfer.checksum = errand.source, errand.checksum
        if errand.rest is not None:
            rest, errand.rest = errand.rest, None
            transfer.passed = rest.passed
            transfer.first_byte = errand.end.continues = rest.first_byte + rest.done_bytes
            transfer.version = rest.version if rest.url == url else None
        self.moving[transfer] = number
        return transfer

    def _on_end(self, transfers: Sequence[Transfer]) -> None:
        """Called by storages, in the event loop's thread."""
        for transfer in transfers:
            if not isinstance(transfer, Moving) or transfer not in self.moving:
                continue
            self._drop(transfer)
            errand, info = _errand(transfer), transfer.result
            result = info
            if isinstance(info, FileInfo):
                if transfer.first_byte:
                    info = FileInfo(transfer.first_byte + info.size_bytes, info.checksum)
                wrong = took_other(errand, info)
                if wrong is None:
                    self._ended.append((errand, info))
                    continue
                result = wrong
            assert not isinstance(result, FileInfo)  # noqa: S101 - it is an error by now
            self._failed(errand, result or StorageUnavailable(transfer.url, "the storage did not say why"), transfer)
        if transfers:
            self._lanes.hear_of(_scheme(transfers[0]), time.monotonic())
        self._changed.set()

    def _drop(self, transfer: Moving) -> None:
        _errand(transfer).moving = None
        if self.moving.pop(transfer, None) is not None and isinstance(transfer.result, FileInfo):
            self.done_bytes += transfer.first_byte + transfer.done_bytes

    def _failed(self, errand: Errand, error: StorageError, transfer: Moving | None = None) -> None:
        """Try again, elsewhere or later, or end it."""
        if transfer is not None and transfer.given_up:
            error = StorageUnavailable(errand.replica.url, STALLED)
        if errand.course is None:
            errand.course = Course(len(errand.places), len(errand.failover))
            errand.errors = {}
        if errand.errors is not None:
            errand.errors[errand.place] = error
        ours = getattr(errand.end, "refused", None) is not None or errand.forgone
        step: Step | None = None
        if not ours and not self._late:
            step = errand.course.failed(
                errand.place,
                self._patience,
                random.random,
                retryable=error.retryable or (transfer is not None and transfer.first_byte > 0),  # as a whole it may do
                retry_after=error.retry_after,
            )
        if step is None:
            self._ended.append((errand, error))
            return
        if transfer is not None and errand.end.resumable and _is_worth_continuing(transfer, error):
            same = errand.checksum is not None or step.place == errand.place
            errand.rest = transfer if same else None
        errand.place = step.place
        if step.wait_seconds > 0:
            heappush(self._due, (anyio.current_time() + step.wait_seconds, next(self._number), errand))
        else:
            self._queue(errand)
        self._changed.set()

    # -- telling ------------------------------------------------------------------------------------------------------

    def _tell(self) -> None:
        while self._group is not None and self._telling < min(self._tellers, len(self._ended)):
            self._telling += 1
            self._group.start_soon(self._teller)

    async def _teller(self) -> None:
        try:
            told = 0
            while self._ended:
                await self._tell_one(*self._ended.popleft())
                told += 1
                if told % TURN_FILES == 0:
                    await lowlevel.checkpoint()
        finally:
            self._telling -= 1
            self._changed.set()

    async def _tell_one(self, errand: Errand, outcome: Outcome) -> None:
        if isinstance(outcome, StorageError) and errand.end.resumable:
            await to_thread.run_sync(errand.end.forget)
        self.done_files += 1
        await self._arrived(errand, outcome)

    # -- watching -----------------------------------------------------------------------------------------------------

    def look(self, now: float) -> None:
        """Give up what moves next to nothing."""
        for transfer in self.moving:
            if transfer.is_begun:
                self._lanes.hear_of(_scheme(transfer), now)
        for transfer, number in list(self.moving.items()):
            self._look_at(transfer, number, now)

    def _look_at(self, transfer: Moving, number: int, now: float) -> None:
        passed, seconds = transfer.so_far_bytes - transfer.mark_bytes, now - transfer.mark_time
        if transfer.given_up:
            if seconds > GIVE_UP_SECONDS and number in self._batches:
                self._batches[number].cancel()
        elif not transfer.is_begun and self._lanes.last_heard_of(_scheme(transfer)) > transfer.mark_time:
            transfer.mark_time = now  # waits inside the storage, which is at others
        elif seconds >= self._stalls.seconds + transfer.quiet_seconds:
            transfer.mark_bytes, transfer.mark_time = transfer.so_far_bytes, now
            if passed < SLOW_BYTES_PER_SECOND * seconds:
                transfer.give_up()

    # -- the end ------------------------------------------------------------------------------------------------------

    def _expire(self) -> None:
        """The deadline: what is on its way is stopped, and fails; what waits fails as well."""
        self._late = True
        for scope in self._batches.values():
            scope.cancel()
        waiting = list(self._waiting())
        self._queues.clear()
        self._due.clear()
        self._queued = 0
        self._queue_all(waiting)

    async def _heed(self, enough: anyio.Event) -> None:
        """Forget what waits once there has been enough."""
        await enough.wait()
        self._interrupted += self._waiting()
        self._queues.clear()
        self._due.clear()
        self._queued = 0
        self._stopped = True
        self._source = None
        self._room.set()
        self._changed.set()

    def _too_late(self, errand: Errand) -> StorageError:
        last = (errand.errors or {}).get(errand.place)
        reason = f"not done within {self._deadline_seconds:g} s"
        return StorageUnavailable(errand.replica.url, reason + (f" (before that: {last})" if last is not None else ""))

    def _waiting(self) -> Iterator[Errand]:
        yield from (errand for queue in self._queues.values() for _, _, errand in queue)
        yield from (errand for _, _, errand in self._due)

    async def _clean(self) -> None:
        """Remove what is kept of files that nobody will continue."""
        kept = [errand for errand in (*self._waiting(), *self._interrupted) if errand.end.resumable]
        if kept:
            with anyio.move_on_after(CLEANING_SECONDS, shield=True):
                await to_thread.run_sync(_forget_all, kept)


def _forget_all(errands: Sequence[Errand]) -> None:
    for errand in errands:
        errand.end.forget()


def _errand(transfer: Moving) -> Errand:
    assert transfer.errand is not None  # noqa: S101 - we make them
    return transfer.errand


def _scheme(transfer: Transfer) -> str:
    return transfer.url.partition("://")[0]


def _is_worth_continuing(transfer: Transfer, error: StorageError) -> bool:
    return error.retryable and not isinstance(error, ChecksumMismatch) and transfer.done_bytes >= RESUME_BYTES
