"""Many jobs on one node, in one event loop, so that its cores are never idle while there is work.

    submit -> waiting -> [disk reserved: staging in -> ready -> [slot leased: computing] -> delivering] -> ended

A waiting job is a description and a handle, nothing else. So many are begun as are needed for the next ones to be ready
when a slot is (`loadmaster.ahead` has the rule); whoever only delivers its outputs is in nobody's way.

With a journal a job is recorded before it waits, and a node that is started again goes on with what its predecessor had
before it begins anything else (`loadmaster.recovery`).
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from datetime import UTC, datetime
from heapq import heappop, heappush
from math import inf
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

import anyio
from anyio import to_thread

from loadmaster.ahead import SLOW_SECONDS, Ahead, Preparing, disk_bytes, has_room, input_bytes, next_slow, places
from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.errors import (
    InvalidJob,
    JobError,
    JobWasKilled,
    NodeClosed,
    NodeFull,
    PayloadHeld,
    PayloadNotStarted,
    RescheduleJob,
    StagingFailed,
    WorkdirFault,
)
from loadmaster.events import ComputingEnded, Event, FileStagedIn, FileStagedOut, JobAccepted, JobFinished
from loadmaster.handle import JOURNAL_SECONDS, JobHandle
from loadmaster.hooks import reference_of
from loadmaster.ledger import Ledger, Slot
from loadmaster.lifecycle import Stage
from loadmaster.machine import detect
from loadmaster.occupancy import Meter, NodeStatistics, Occupation, idle_reasons
from loadmaster.payload.supervise import HEARTBEAT_SECONDS
from loadmaster.result import Failure, JobResult, Phase, Status
from loadmaster.runner import run_job
from loadmaster.site import Site
from loadmaster.sources import JobSource
from loadmaster.staging.engine import Transfers, open_transfers
from loadmaster.streams import EventStream, EventStreams
from loadmaster.tasks import for_each, single_error
from loadmaster.workdir import default_root

if TYPE_CHECKING:
    from loadmaster.journal import NodeJournal  # these three with sqlite3, loaded when used
    from loadmaster.logbook import History
    from loadmaster.operations import Operations
    from loadmaster.pending import Backoff, Operation
    from loadmaster.recovery import Succession

log = logging.getLogger(__name__)

BACKLOG: Final = 100_000
"""So many jobs may wait: 3 kB each, beside its description (`benchmarks/node.py`)."""

ASKING: Final = 8
"""So many questions to a source at once: one that takes 50 ms to answer has 64 slots filled in half a second."""

GIVE_BACK_SECONDS: Final = 10.0
"""How long a drained node waits for the answers of a source, to give back what they bring."""

RECORDED_AT_ONCE: Final = 200
"""So many new jobs go to the journal together; whoever comes meanwhile waits for some 20 ms."""

FORGETTING_SECONDS: Final = 3600.0

WAITING: Final = "waiting"
FOR_DISK: Final = "waiting for disk"
STAGING_IN: Final = "staging in"
READY: Final = "ready"
COMPUTING: Final = "computing"
DELIVERING: Final = "delivering"


@dataclass(eq=False, slots=True)
class _Entry:
    """A job of the node's, until it has ended."""

    job: JobDescription
    handle: JobHandle
    coordinator: type[Coordinator]
    number: int
    phase: str = WAITING
    scope: anyio.CancelScope | None = None
    """Around all of it, once it has been begun."""
    preparing: Preparing | None = None
    given_back: bool = False
    recalled: bool = False
    """It had ended before it was submitted."""
    over: bool = False
    journal: Succession | None = None
    recorded: anyio.Event | None = None
    """Set once the journal has it."""
    disk: ExitStack | None = None
    """What it has held all the time, if an earlier agent began it."""
    slot: Slot | None = None
    held_slot: ExitStack | None = None


class Node:
    """Runs jobs, as many at once as the node has slots for.

        async with Node(ce, site=site) as node:
            handle = node.submit(job)
            result = await handle.wait()

    Leaving the block waits for all jobs; an exception or a cancellation stops them, as it does `run_job`. `ledger` has
    what there is, else what the machine says. `ahead`: how many jobs may be begun before there is a slot for them, as
    many as there are cores if not given; `ahead_bytes`: with inputs of how many bytes; one that is not ready after
    `slow_seconds` gives its place to another. `backlog`: how many may wait.

    `journal`: a directory on a local disk, or what `open_journal` made of one. Jobs that were open in it are gone on with
    on entry, `resumed` has their handles; one that is submitted again is not run again: its handle has what the journal
    has. `lost`: what becomes of a job whose payload, or work directory, is gone with an agent: it is run again here as the
    next attempt (`handle` has that one's handle), or only ends as Rescheduled, for whoever gave it to do so.

    What jobs of the journal have left to be done (files that are safe elsewhere, catalogs that were down) is done beside
    the jobs, and tried again for as long as it may succeed: `backoff` says when. Nobody waits for it, also not the end of
    the block: the next node goes on.
    """

    def __init__(
        self,
        ce: ComputingElement | None = None,
        *,
        site: Site | None = None,
        transfers: Transfers | None = None,
        ledger: Ledger | None = None,
        root: Path | None = None,
        journal: Path | NodeJournal | None = None,
        lost: Literal["rerun", "reschedule"] = "rerun",
        backoff: Backoff | None = None,
        coordinator: type[Coordinator] = JobExecutionCoordinator,
        backlog: int = BACKLOG,
        ahead: int | None = None,
        ahead_bytes: int | None = None,
        slow_seconds: float = SLOW_SECONDS,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> None:
        if site is not None and transfers is not None:
            raise TypeError("a node takes a site or transfers, which have one, not both")
        self.ce = ce or ComputingElement()
        self._site = site or Site()
        self._transfers = transfers
        self._given_ledger = ledger
        self._root = root
        self._given_journal = journal
        self._journal: NodeJournal | None = None
        self._operations: Operations | None = None
        self._backoff = backoff
        self._lost = lost
        self.resumed: tuple[JobHandle, ...] = ()
        """Of the jobs that were open in the journal."""
        self._coordinator = coordinator
        self._backlog = backlog
        self._ahead_jobs, self._ahead_bytes, self._slow_seconds = ahead, ahead_bytes, slow_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._entries: dict[str, _Entry] = {}  # by job id
        self._waiting: dict[int, _Entry] = {}
        self._order: list[tuple[int, int]] = []  # a heap of priorities and numbers; those that left are skipped
        self._submitted = 0
        self._unstarted: deque[tuple[_Entry, JobError]] = deque()
        self._unrecorded: deque[_Entry] = deque()
        self._later: dict[str, deque[_Entry]] = {}  # by job id: another attempt is to end first
        self._preparing: dict[Preparing, _Entry] = {}
        self._phases = Counter[str]()
        self._streams = EventStreams()
        self._news = anyio.Event()
        self._change: anyio.Event | None = None
        """Made by the first who waits for it."""
        self._draining = anyio.Event()
        self._open = False
        self._ended = Counter[str]()
        self._given_back = self._interrupted = self._bytes_in = self._bytes_out = 0
        self._cpu_seconds = 0.0

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {phase}" for phase, count in self._phases.items() if count)
        return f"<Node [{counts or 'idle'}]>"

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._root = root = await to_thread.run_sync(_made, self._root)
            if self._given_ledger is None:
                self._given_ledger = await to_thread.run_sync(lambda: detect(root).ledger())
            self.ledger = self._given_ledger
            jobs = max(2, self.ledger.cores) if self._ahead_jobs is None else self._ahead_jobs
            self._terms = Ahead(jobs, self._ahead_bytes, self._slow_seconds)
            if isinstance(self._given_journal, Path):
                from loadmaster.journal import open_journal  # with sqlite3, loaded when used

                self._journal = await stack.enter_async_context(open_journal(self._given_journal))
            else:
                self._journal = self._given_journal
            if self._transfers is None:
                self._transfers = await stack.enter_async_context(open_transfers(self._site))
            stack.callback(self._let_all_go)
            stack.enter_context(single_error())
            self._group = await stack.enter_async_context(anyio.create_task_group())
            self._meter = Meter(anyio.current_time())
            self._open = True
            if self._journal is not None:
                from loadmaster.operations import Operations  # with sqlite3, loaded when used

                await self._resume(self._journal, root)
                self._group.start_soon(self._keep_journal, self._journal)
                self._operations = Operations(self._journal, self._transfers, self._streams.tell, self._backoff)
                self._group.start_soon(self._operations.work)
            self._look()
            self._group.start_soon(self._keep_house)
            self._group.start_soon(self._beat)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if error is not None:
            self._open = False
            return await self._stack.__aexit__(kind, error, traceback)
        async with self._stack:
            await self.wait_idle()
            self._open = False
            self._group.cancel_scope.cancel()
        return None

    # -- for whoever has jobs ----------------------------------------------------------------------------------------

    def submit(
        self, job: JobDescription, *, coordinator: type[Coordinator] | None = None, attempt: int = 1
    ) -> JobHandle:
        """The handle of a job that runs when its turn comes: by its priority, then by when it came. Does not wait.

        One that can never run here has failed, with the reason, when you await it. Raises `NodeFull` when too many wait,
        `NodeClosed` when the node takes no more. Where there is a journal, the job is in there
        soon, before its turn comes: with its first event, `JobAccepted`. One that is in there is not run again.
        """
        return self._take(job, coordinator or self._coordinator, attempt).handle

    @property
    def journal(self) -> NodeJournal | None:
        """The journal that its jobs are recorded in, if there is one."""
        return self._journal

    def handle(self, job_id: str) -> JobHandle | None:
        """The handle of a job that the node has now, of its last attempt if the one before was lost; else None."""
        entry = self._entries.get(job_id)
        return None if entry is None else entry.handle

    def events(self, *, transient: bool = False) -> EventStream:
        """What happens to all jobs, from now on; `transient`: with heartbeats and progress. Ends with the node."""
        return self._streams.open(transient=transient)

    def close_events(self) -> None:
        """Those who read `events` have what there is, then the end."""
        self._streams.close()

    async def occupations(self) -> AsyncIterator[Occupation]:
        """What the cores do, and why those that do nothing do not: now, and whenever it changes; ends with the node.

        A slow reader misses what has passed meanwhile. `statistics` has it all added up.
        """
        told: tuple[int, Mapping[str, int]] | None = None
        while True:
            self._look()
            if told != (told := (self._meter.busy, self._meter.idle)):
                yield Occupation(datetime.now(UTC), self.ledger.cores, told[0], MappingProxyType(dict(told[1])))
            elif self._open:
                await self._changed()
            else:
                return

    async def wait_idle(self) -> None:
        """Wait until there is no job."""
        while self._entries or self._unstarted:
            await self._changed()

    def begin_drain(self) -> None:
        """Take no more from now on, and give back what does not compute yet. `drain` does that and waits."""
        self._draining.set()
        for entry in list(self._entries.values()):
            if entry.phase in {WAITING, FOR_DISK, STAGING_IN, READY} and entry.handle.kill_reason is None:
                entry.given_back = self._stop(entry, RescheduleJob(GIVEN_BACK))

    async def drain(self, *, deadline_seconds: float = inf, reason: str = "drained") -> None:
        """End in order: take no more, give back what does not compute yet, and wait until the others have ended.

        Jobs that are given back end as Rescheduled. Payloads that still run at the deadline are killed, for that reason,
        and deliver their sandboxes; how long that takes is bounded by their own deadlines only. May be called again.
        """
        self.begin_drain()
        with anyio.move_on_after(deadline_seconds):
            await self.wait_idle()
            return
        self.kill_all(reason)
        await self.wait_idle()

    def kill_all(self, reason: str, *, hurry: bool = False) -> None:
        """Kill every job that is not being given back already, for that reason. `hurry`: without the grace."""
        for entry in list(self._entries.values()):
            if not entry.given_back:
                entry.handle.kill(reason)
            if hurry:
                entry.handle.hurry()

    async def serve(
        self,
        source: JobSource,
        *,
        coordinator: type[Coordinator] | None = None,
        ended: Callable[[JobDescription, JobResult], Awaitable[None]] | None = None,
    ) -> None:
        """Take jobs from a source until it has no more or the node is drained; returns when all of them have ended.

        It is asked for as many as staging can run ahead with, several times at once. `ended` is awaited with the result
        of each job that is not given back. What the source raises ends this, and no job. Where there is a journal, the
        source hears that a job was accepted once it is in there; one that is there already is not run again, but `ended` is
        awaited again; one that had been rescheduled begins its next attempt.
        """
        asked, more = 0, True

        async def ask() -> None:
            nonlocal more, asked
            try:
                job = await source.next(max(1, self._room(0)))
                if job is None:
                    more = False
                else:
                    entry = None
                    with anyio.move_on_after(
                        JOURNAL_SECONDS, shield=True
                    ):  # it is ours by now: it is run or given back
                        entry = await taken(job)
                    followers.start_soon(see_through, job, entry)
            finally:
                asked -= 1
            self._wake()

        async def taken(
            job: JobDescription,
        ) -> _Entry | None:  # at once, so that they are in the order in which they came
            try:
                return self._take(job, coordinator or self._coordinator, await self._attempt(job))
            except (NodeClosed, NodeFull):
                return None

        async def see_through(job: JobDescription, entry: _Entry | None) -> None:
            if entry is None:
                await source.give_back(job)
                return
            if entry.recorded is not None:
                await entry.recorded.wait()
            await source.accepted(job)
            result = await entry.handle.wait()
            while (
                following := self._entries.get(job.job_id)
            ) is not None and following.handle.attempt > result.attempt:
                entry = following
                result = await entry.handle.wait()
            if entry.given_back:
                await source.give_back(job)
            elif ended is not None:
                await ended(job, result)

        async def stop_asking() -> None:
            await self._draining.wait()
            asking.cancel_scope.deadline = anyio.current_time() + GIVE_BACK_SECONDS
            self._wake()

        with single_error():
            async with anyio.create_task_group() as followers, anyio.create_task_group() as asking:
                asking.start_soon(stop_asking)
                while asked or (more and not self._draining.is_set()):
                    while more and not self._draining.is_set() and asked < ASKING and self._room(asked) > 0:
                        asked += 1
                        asking.start_soon(ask)
                    await self._changed()
                asking.cancel_scope.cancel()

    async def pending(self) -> list[Operation]:
        """What jobs have left to be done; nothing where there is no journal."""
        return [] if self._operations is None else await self._operations.all()

    def statistics(self) -> NodeStatistics:
        """What the node does and has done."""
        self._look()
        meter = self._meter
        return NodeStatistics(
            seconds=meter.looked - meter.began,
            jobs=MappingProxyType(
                {phase: self._phases[phase] for phase in (WAITING, FOR_DISK, STAGING_IN, READY, COMPUTING, DELIVERING)}
            ),
            ended=MappingProxyType({status.value: self._ended[status] for status in Status}),
            given_back=self._given_back,
            interrupted=self._interrupted,
            cores=self.ledger.cores,
            busy_cores=meter.busy,
            busy_core_seconds=meter.busy_core_seconds,
            cpu_seconds=self._cpu_seconds,
            idle=MappingProxyType(dict(meter.idle)),
            idle_core_seconds=MappingProxyType(dict(meter.idle_core_seconds)),
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            pending=0 if self._operations is None else self._operations.waiting,
            stuck=0 if self._operations is None else self._operations.stuck,
            operations_done=0 if self._operations is None else self._operations.done,
        )

    # -- who may begin -----------------------------------------------------------------------------------------------

    def _take(self, job: JobDescription, coordinator: type[Coordinator], attempt: int) -> _Entry:
        if not self._open or self._draining.is_set():
            raise NodeClosed("the node takes no more jobs")
        if self._journal is not None and job.job_id in self._entries:
            return self._entries[job.job_id]
        if len(self._waiting) + len(self._unrecorded) >= self._backlog:
            raise NodeFull(f"{len(self._waiting)} jobs wait already")
        succession = self._succession()
        handle = JobHandle(succession)
        entry = self._enter_book(job, handle, coordinator, attempt, succession)
        if job.job_id in self._entries:
            self._unstarted.append((entry, InvalidJob(f"there is a job {job.job_id} on this node already")))
        else:
            self._entries[job.job_id] = entry
            if succession is not None:
                entry.recorded = anyio.Event()
                self._unrecorded.append(entry)
            else:
                self._put_in_line(entry)
        self._news.set()
        return entry

    def _enter_book(
        self,
        job: JobDescription,
        handle: JobHandle,
        coordinator: type[Coordinator],
        attempt: int,
        journal: Succession | None,
    ) -> _Entry:
        """A job that is the node's from now on."""
        entry = _Entry(job, handle, coordinator, self._submitted, journal=journal)
        self._submitted += 1
        if journal is not None:
            journal.life = handle.life

        def at_kill() -> None:
            if not handle.life.has_reached(Stage.STAGING_IN):  # else there may be a payload to be ended
                self._stop(entry, JobWasKilled(handle.kill_reason or ""))

        handle.reserve(job.job_id, attempt, audience=self, at_kill=at_kill, tasks=self._group)
        self._phases[WAITING] += 1
        return entry

    def _put_in_line(self, entry: _Entry) -> None:
        """Have it wait for its turn, if it can have one."""
        if (reason := entry.handle.kill_reason) is not None:
            self._unstarted.append((entry, JobWasKilled(reason)))
        elif self._draining.is_set():
            entry.given_back = True
            self._unstarted.append((entry, RescheduleJob(GIVEN_BACK)))
        elif (never := self._never_fits(entry.job)) is not None:
            self._unstarted.append((entry, never))
        else:
            self._waiting[entry.number] = entry
            heappush(self._order, (-entry.job.priority, entry.number))
        self._news.set()

    def _never_fits(self, job: JobDescription) -> JobError | None:
        try:
            self.ledger.check(job)
        except PayloadNotStarted as exc:
            return exc
        if self.ledger.disk_bytes is not None and disk_bytes(job) > self.ledger.disk_bytes:
            return StagingFailed(
                f"the job needs {disk_bytes(job)} bytes of disk, the node has {self.ledger.disk_bytes}"
            )
        return None

    def _room(self, asked: int) -> int:
        """How many jobs a source may be asked for now, beyond those."""
        ahead = places(self._terms, self._preparing, anyio.current_time())
        return min(ahead, self._backlog) - len(self._waiting) - len(self._unrecorded) - asked

    async def _keep_house(self) -> None:
        """Begin who may begin, end who never will, and tell who waits for a change. The only task that does: once for
        all that has happened in a turn of the event loop."""
        while True:
            with anyio.CancelScope() as until_slow:
                while not until_slow.cancel_called:
                    self._news = anyio.Event()
                    if self._unrecorded:
                        await self._record_them()
                    while self._unstarted:
                        await self._end_early(*self._unstarted.popleft())
                    now = anyio.current_time()
                    while (entry := self._next(now)) is not None:
                        self._begin(entry, now)
                    self._look()
                    self._wake()
                    # Then a place becomes free: a source may be asked.
                    until_slow.deadline = next_slow(self._terms, self._preparing, now)
                    await self._news.wait()
                    until_slow.deadline = inf

    async def _beat(self) -> None:
        """Heartbeats of all jobs, for whoever wants them."""
        while True:
            await anyio.sleep(self._heartbeat_seconds)
            for entry in list(self._entries.values()):
                entry.handle.beat()

    def _next(self, now: float) -> _Entry | None:
        while self._order and self._order[0][1] not in self._waiting:
            heappop(self._order)
        if not self._order or places(self._terms, self._preparing, now) < 1:
            return None
        entry = self._waiting[self._order[0][1]]
        if not has_room(self._terms, self._preparing, input_bytes(entry.job)):
            return None
        del self._waiting[heappop(self._order)[1]]
        return entry

    def _begin(self, entry: _Entry, now: float) -> None:
        if not entry.handle.life.has_reached(Stage.EXITED):
            entry.preparing = Preparing(now, input_bytes(entry.job))
            self._preparing[entry.preparing] = entry
        entry.scope = anyio.CancelScope()
        waits = self.ledger.disk_bytes is not None and entry.disk is None
        self._enter(entry, FOR_DISK if waits else _phase(entry.handle.stage))
        self._group.start_soon(self._carry, entry)

    def _stop(self, entry: _Entry, why: JobError) -> bool:
        """End a job before it computes. False if it has ended already, or will in a moment."""
        if self._waiting.pop(entry.number, None) is not None:
            self._unstarted.append((entry, why))
            self._news.set()
        elif entry.scope is not None:
            entry.scope.cancel()
        else:
            return False
        return True

    # -- one job -----------------------------------------------------------------------------------------------------

    async def _carry(self, entry: _Entry) -> None:
        """From its disk to its end."""
        job, handle = entry.job, entry.handle
        why: JobError = RescheduleJob(GIVEN_BACK)
        try:
            with entry.scope or anyio.CancelScope():
                async with AsyncExitStack() as stack:
                    if entry.disk is None:
                        disk = self.ledger.reserve_disk(disk_bytes(job), priority=job.priority)
                        await stack.enter_async_context(disk)
                    else:
                        stack.enter_context(entry.disk)
                        stack.callback(self._give_up_slot, entry)
                    self._enter(entry, _phase(handle.stage))
                    await run_job(
                        job, ce=self.ce, coordinator=entry.coordinator, transfers=self._transfers,
                        slots=_Slots(self, entry), handle=handle, attempt=handle.attempt, root=self._root,
                        heartbeat_seconds=self._heartbeat_seconds,
                    )  # fmt: skip
        except (WorkdirFault, PayloadHeld) as exc:
            # Its payload may run: it is the next start's to look again.
            if isinstance(exc, PayloadHeld) or handle.stage in {Stage.GRANTED, Stage.RUNNING}:
                log.error("job %s: is left open in the journal: %s", job.job_id, exc)  # noqa: TRY400 - a sentence
                self._forget(entry)
                return
            why = RescheduleJob(f"this node has no work directory for it: {exc}")
        except BaseException:
            self._forget(entry)
            raise
        if handle.kill_reason is not None:
            why = JobWasKilled(handle.kill_reason)
        await self._end_early(entry, why)

    async def _end_early(self, entry: _Entry, why: JobError) -> None:
        """The end of a job: its own, or if it has none, for that reason."""
        record = entry.handle.record
        try:
            if entry.handle.stage is Stage.NEW:
                await self._record_beginning(entry)
            await entry.handle.keep_order()
            if entry.handle.stage is not Stage.FINISHED:
                failure = Failure.of(why, Phase.STAGE_IN)
                if entry.handle.stage not in {Stage.COMPUTED, Stage.STAGING_OUT}:
                    await record(ComputingEnded, failure)
                await record(JobFinished, entry.handle.ends_as(failure), failure)
        finally:
            self._forget(entry)

    def _forget(self, entry: _Entry) -> None:
        """Whatever has become of it, it is no longer the node's."""
        if entry.over:
            return
        entry.over = True
        self._no_longer_prepares(entry)
        self._phases[entry.phase] -= 1
        if self._entries.get(entry.job.job_id) is entry:
            del self._entries[entry.job.job_id]
            self._begin_next_attempt(entry)
        if (result := entry.handle.result) is None:
            self._interrupted += 1
        elif not entry.recalled:
            self._ended[result.status] += 1
            entry.given_back = entry.given_back and result.status is Status.RESCHEDULED
            self._given_back += entry.given_back
            self._cpu_seconds += result.outcome.cpu_seconds if result.outcome is not None else 0.0
        entry.handle.let_go()
        self._news.set()

    def _enter(self, entry: _Entry, phase: str) -> None:
        self._phases[entry.phase] -= 1
        self._phases[phase] += 1
        entry.phase = phase

    def _no_longer_prepares(self, entry: _Entry) -> None:
        if entry.preparing is not None:
            self._preparing.pop(entry.preparing, None)
        self._news.set()

    @asynccontextmanager
    async def _lease(self, entry: _Entry) -> AsyncIterator[Slot]:
        """A slot, when it is ready for one."""
        if entry.preparing is not None:
            entry.preparing.ready = True
        self._enter(entry, READY)
        self._news.set()
        try:
            async with self._ledgers(entry) as slot:
                self._enter(entry, COMPUTING)
                self._no_longer_prepares(entry)
                yield slot
        finally:
            self._enter(entry, DELIVERING)
            self._no_longer_prepares(entry)

    @contextmanager
    def _hold(self, entry: _Entry) -> Iterator[None]:
        """The slot that an adopted payload has had all the time."""
        self._enter(entry, COMPUTING)
        self._no_longer_prepares(entry)
        try:
            yield
        finally:
            self._give_up_slot(entry)
            self._enter(entry, DELIVERING)
            self._news.set()

    def _ledgers(self, entry: _Entry) -> AbstractAsyncContextManager[Slot]:
        return self.ledger.lease(entry.job) if entry.held_slot is None else self._held(entry.held_slot, entry)

    @asynccontextmanager
    async def _held(self, held: ExitStack, entry: _Entry) -> AsyncIterator[Slot]:
        """One that an earlier agent had, but no payload in it."""
        assert entry.slot is not None  # noqa: S101 - the two come together
        with held:
            yield entry.slot
            entry.held_slot = None

    def _give_up_slot(self, entry: _Entry) -> None:
        held, entry.held_slot = entry.held_slot, None
        if held is not None:
            held.close()

    # -- the journal -------------------------------------------------------------------------------------------------

    async def _resume(self, journal: NodeJournal, root: Path) -> None:
        """Go on with what is open. What runs has its slot again before anybody else is granted one."""
        from loadmaster.recovery import Resumed, resumed, tidy

        def understood(histories: list[History]) -> list[tuple[Resumed, Succession]]:
            found = []
            for history in histories:
                succession = self._succession()
                assert succession is not None  # noqa: S101 - there is a journal
                if (each := resumed(history, succession, self._coordinator)) is not None:
                    found.append((each, succession))
            return found

        histories = await journal.open_jobs()
        await tidy(journal, root, histories)
        now = anyio.current_time()
        for each, succession in await to_thread.run_sync(understood, histories):
            handle = each.handle
            entry = self._enter_book(each.job, handle, each.coordinator, handle.attempt, succession)
            if each.job.job_id in self._entries:
                self._later.setdefault(each.job.job_id, deque()).append(entry)
                continue
            self._entries[each.job.job_id] = entry
            self._go_on_with(entry, now)
        self.resumed = tuple(entry.handle for entry in self._entries.values())

    def _go_on_with(self, entry: _Entry, now: float) -> None:
        from loadmaster.recovery import slot_of

        if not entry.handle.life.has_reached(Stage.STAGING_IN):
            self._put_in_line(entry)
            return
        entry.disk = ExitStack()
        entry.disk.enter_context(self.ledger.hold_disk(disk_bytes(entry.job)))
        if entry.handle.stage in {Stage.GRANTED, Stage.RUNNING}:
            entry.slot = slot = slot_of(entry.handle, entry.job)
            if slot is not None:
                entry.held_slot = ExitStack()
                entry.held_slot.enter_context(self.ledger.hold(entry.job, slot))
        self._begin(entry, now)

    def _succession(self) -> Succession | None:
        """The journal, as one job has it."""
        if self._journal is None:
            return None
        from loadmaster.recovery import Succession

        return Succession(self._journal, lambda: self._lost == "rerun" and self._open and not self._draining.is_set())

    async def _attempt(self, job: JobDescription) -> int:
        """Which attempt at a job a source means."""
        if self._journal is None or job.job_id in self._entries:
            return 1
        attempt, status = (await self._journal.last([job.job_id])).get(job.job_id, (1, ""))
        return attempt + 1 if status == Status.RESCHEDULED else attempt

    async def _record_them(self) -> None:
        """Have the journal take those that came, all of them at once; then they wait like the others."""
        assert self._journal is not None  # noqa: S101 - nobody else puts them there
        new = [self._unrecorded.popleft() for _ in range(min(len(self._unrecorded), RECORDED_AT_ONCE))]
        last = await self._journal.last([entry.job.job_id for entry in new])

        async def one(entry: _Entry) -> None:
            attempt, _ = last.get(entry.job.job_id, (0, ""))
            if attempt >= entry.handle.attempt:
                await self._recall(entry)
            else:
                await self._record_beginning(entry)
                self._put_in_line(entry)
            if entry.recorded is not None:
                entry.recorded.set()

        await for_each(new, one, RECORDED_AT_ONCE)
        if self._unrecorded:
            self._news.set()

    async def _recall(self, entry: _Entry) -> None:
        """A job that the journal knows: it has ended, and is not run again."""
        assert self._journal is not None  # noqa: S101 - as above
        history = await self._journal.history(entry.job.job_id)
        entry.handle.recall(history.events if history is not None else ())
        entry.recalled = True
        self._forget(entry)

    async def _record_beginning(self, entry: _Entry) -> None:
        site = self._site if self._transfers is None else self._transfers.site
        await entry.handle.record(
            JobAccepted, entry.job.words(), reference_of(entry.coordinator),
            outputs=site.output_directory or "", site=site.file,
        )  # fmt: skip

    def _begin_next_attempt(self, entry: _Entry) -> None:
        """The next one to go on with, if an attempt was lost."""
        job_id = entry.job.job_id
        if entry.journal is not None and (accepted := entry.journal.follows) is not None:
            succession = self._succession()
            handle = JobHandle.resumed(succession, [accepted])
            following = self._enter_book(entry.job, handle, entry.coordinator, accepted.attempt, succession)
            self._later.setdefault(job_id, deque()).appendleft(following)
        if (waiting := self._later.get(job_id)) and self._open:
            self._entries[job_id] = following = waiting.popleft()
            self._go_on_with(following, anyio.current_time())
            if not waiting:
                del self._later[job_id]

    async def _keep_journal(self, journal: NodeJournal) -> None:
        """Forget what ended long ago, now and then: nothing says when."""
        while True:
            await journal.forget()
            await anyio.sleep(FORGETTING_SECONDS)

    # -- what others know --------------------------------------------------------------------------------------------

    @property
    def wants_offers(self) -> bool:
        """Whether anybody reads heartbeats and progress."""
        return self._streams.wants_transient

    def hear(self, event: Event) -> None:
        """Something has happened to one of the jobs."""
        match event:
            case FileStagedIn(file=file):
                self._bytes_in += file.size_bytes
            case FileStagedOut(file=file):
                self._bytes_out += file.size_bytes
            case ComputingEnded(job_id=job_id):
                entry = self._entries.get(job_id)
                if (
                    entry is not None and entry.preparing is not None and entry.phase != DELIVERING
                ):  # it has not computed
                    self._enter(entry, DELIVERING)
                    self._no_longer_prepares(entry)
            case JobFinished() if self._operations is not None and (entry := self._entries.get(event.job_id)):
                if entry.handle.life.has_pending:
                    self._operations.look()
        self._streams.tell(event)

    def _wake(self) -> None:
        if self._change is not None:
            self._change.set()
            self._change = None

    async def _changed(self) -> None:
        """Return when something has changed since this was called."""
        self._change = self._change or anyio.Event()
        await self._change.wait()

    def _look(self) -> None:
        """What the cores do from now on."""
        for_disk = for_inputs = 0
        for each, entry in self._preparing.items():
            if not each.ready:
                cores = entry.job.number_of_processors
                for_disk += cores if entry.phase == FOR_DISK else 0
                for_inputs += cores if entry.phase == STAGING_IN else 0
        idle = idle_reasons(self.ledger, for_disk=for_disk, for_inputs=for_inputs, waiting=bool(self._waiting))
        self._meter.look(anyio.current_time(), self.ledger.cores - self.ledger.free_cores, idle)

    def _let_all_go(self) -> None:
        self._open = False
        for entry in list(self._entries.values()):
            self._forget(entry)
        for entry, _ in self._unstarted:
            self._forget(entry)
        for waiting in self._later.values():
            for entry in waiting:
                self._forget(entry)
        self._waiting.clear()
        self._unstarted.clear()
        self._unrecorded.clear()
        self._streams.close()
        self._wake()


def _phase(stage: Stage) -> str:
    """Of a job that is gone on with. One that has a slot may have a payload: it is not to be given back."""
    if stage in {Stage.GRANTED, Stage.RUNNING}:
        return COMPUTING
    return STAGING_IN if stage < Stage.GRANTED else DELIVERING


GIVEN_BACK: Final = "given back: the node was drained before it computed"


@dataclass(frozen=True, slots=True)
class _Slots:
    """The node's slots, for one of its jobs."""

    node: Node
    entry: _Entry

    def lease(self, job: JobDescription) -> AbstractAsyncContextManager[Slot]:
        """As the ledger's; the node knows of it."""
        return self.node._lease(self.entry)

    def hold(self, job: JobDescription, slot: Slot) -> AbstractContextManager[None]:
        """As the ledger's."""
        return self.node._hold(self.entry)


def _made(root: Path | None) -> Path:
    """The directory for work directories, which is there from now on."""
    if root is None:
        return default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise WorkdirFault(f"{root}: {exc.strerror}") from exc
    return root
