"""Many jobs on one node, in one event loop, so that its cores are never idle while there is work.

    submit -> waiting -> [disk reserved: staging in -> ready -> [slot leased: computing] -> delivering] -> ended

A waiting job is a description and a handle, nothing else. So many are begun as are needed for the next ones to be ready
when a slot is (`loadmaster.ahead` has the rule); whoever only delivers its outputs is in nobody's way.

With a journal a job is recorded before it waits, and a node that is started again goes on with what its predecessor had
before it begins anything else (`loadmaster.recovery`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from functools import partial
from math import inf
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Final, Literal, Self

import anyio
from anyio import to_thread

from loadmaster.ahead import SLOW_SECONDS, Ahead
from loadmaster.book import FOR_DISK, GIVEN_BACK, PHASES, READY, STAGING_IN, WAITING, Book, Entry
from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.dispatch import Dispatch
from loadmaster.errors import InvalidJob, NodeClosed, NodeFull, RescheduleJob, WorkdirFault
from loadmaster.handle import JobHandle
from loadmaster.ledger import Ledger
from loadmaster.machine import detect
from loadmaster.occupancy import NodeStatistics, Occupation
from loadmaster.payload.starter import open_starter
from loadmaster.payload.supervise import HEARTBEAT_SECONDS
from loadmaster.result import JobResult, Status
from loadmaster.runner import run_job
from loadmaster.serving import Serving
from loadmaster.site import Site
from loadmaster.sources import JobSource
from loadmaster.staging.engine import Transfers, open_transfers
from loadmaster.streams import EventStream
from loadmaster.tasks import single_error
from loadmaster.workdir import default_root

if TYPE_CHECKING:
    from loadmaster.journal import NodeJournal  # these with sqlite3, loaded when used
    from loadmaster.operations import Operations
    from loadmaster.pending import Backoff, Operation
    from loadmaster.records import Records

BACKLOG: Final = 100_000
"""So many jobs may wait: 3 kB each, beside its description (`benchmarks/node.py`)."""


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
        self._ahead_jobs, self._ahead_bytes, self._slow_seconds = ahead, ahead_bytes, slow_seconds
        self._heartbeat_seconds = heartbeat_seconds
        self._book = Book(backlog)
        self._records: Records | None = None

    def __repr__(self) -> str:
        return f"<Node {self._book!r}>"

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            self._root = root = await to_thread.run_sync(_made, self._root)
            if self._given_ledger is None:
                self._given_ledger = await to_thread.run_sync(lambda: detect(root).ledger())
            self.ledger = self._given_ledger
            jobs = max(2, self.ledger.cores) if self._ahead_jobs is None else self._ahead_jobs
            terms = Ahead(jobs, self._ahead_bytes, self._slow_seconds)
            if isinstance(self._given_journal, Path):
                from loadmaster.journal import open_journal  # with sqlite3, loaded when used

                self._journal = await stack.enter_async_context(open_journal(self._given_journal))
            else:
                self._journal = self._given_journal
            if self._transfers is None:
                self._transfers = await stack.enter_async_context(open_transfers(self._site))
            starter = await stack.enter_async_context(open_starter())
            stack.callback(self._let_all_go)
            stack.enter_context(single_error())
            self._group = await stack.enter_async_context(anyio.create_task_group())
            run = partial(
                run_job, ce=self.ce, transfers=self._transfers, root=root, heartbeat_seconds=self._heartbeat_seconds,
                starter=starter,
            )  # fmt: skip
            self._book.begin(self._group, self.ledger, terms)
            self._dispatch = Dispatch(self._book, run, self._transfers.site, self._group, anyio.current_time())
            if self._journal is not None:
                await self._open_records(self._journal, self._transfers, root)
            self._dispatch.look(anyio.current_time())
            self._group.start_soon(self._dispatch.work)
            self._group.start_soon(self._beat)
            self._stack = stack.pop_all()
        return self

    async def _open_records(self, journal: NodeJournal, transfers: Transfers, root: Path) -> None:
        from loadmaster.operations import Operations  # with sqlite3, loaded when used
        from loadmaster.records import Records

        self._records = Records(journal, self._book, transfers.site, self._lost)
        self.resumed = await self._records.resume(root, self._coordinator)
        self._group.start_soon(self._records.work)
        self._group.start_soon(self._records.forget)
        self._operations = Operations(journal, transfers, self._book.streams.tell, self._backoff)
        self._book.at_pending = self._operations.look
        self._group.start_soon(self._operations.work)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        if error is not None:
            self._book.open = False
            return await self._stack.__aexit__(kind, error, traceback)
        async with self._stack:
            await self.wait_idle()
            self._book.open = False
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
        entry = self._book.entries.get(job_id)
        return None if entry is None else entry.handle

    def events(self, *, transient: bool = False) -> EventStream:
        """What happens to all jobs, from now on; `transient`: with heartbeats and progress. Ends with the node."""
        return self._book.streams.open(transient=transient)

    def close_events(self) -> None:
        """Those who read `events` have what there is, then the end."""
        self._book.streams.close()

    async def occupations(self) -> AsyncGenerator[Occupation, None]:
        """What the cores do, and why those that do nothing do not: now, and whenever it changes; ends with the node.

        A slow reader misses what has passed meanwhile. `statistics` has it all added up.
        """
        told: tuple[int, Mapping[str, int]] | None = None
        while True:
            self._dispatch.look(anyio.current_time())
            if told != (told := (self._dispatch.meter.busy, self._dispatch.meter.idle)):
                yield Occupation(datetime.now(UTC), self.ledger.cores, told[0], MappingProxyType(dict(told[1])))
            elif self._book.open:
                await self._book.change.wait()
            else:
                return

    async def wait_idle(self) -> None:
        """Wait until there is no job."""
        while not self._book.is_empty:
            await self._book.change.wait()

    def begin_drain(self) -> None:
        """Take no more from now on, and give back what does not compute yet. `drain` does that and waits."""
        self._book.draining.set()
        for entry in list(self._book.entries.values()):
            if entry.phase in {WAITING, FOR_DISK, STAGING_IN, READY} and entry.handle.kill_reason is None:
                entry.given_back = self._book.stop(entry, RescheduleJob(GIVEN_BACK))

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
        for entry in list(self._book.entries.values()):
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

        async def take(job: JobDescription) -> Entry:
            attempt = 1 if self._records is None else await self._records.attempt(job)
            return self._take(job, coordinator or self._coordinator, attempt)

        await Serving(source, self._book, take, ended).work()

    async def pending(self) -> list[Operation]:
        """What jobs have left to be done; nothing where there is no journal."""
        return [] if self._operations is None else await self._operations.all()

    def statistics(self) -> NodeStatistics:
        """What the node does and has done."""
        self._dispatch.look(anyio.current_time())
        meter, book = self._dispatch.meter, self._book
        return NodeStatistics(
            seconds=meter.looked - meter.began,
            jobs=MappingProxyType({phase: book.phases[phase] for phase in PHASES}),
            ended=MappingProxyType({status.value: book.ended[status] for status in Status}),
            given_back=book.given_back,
            interrupted=book.interrupted,
            cores=self.ledger.cores,
            busy_cores=meter.busy,
            busy_core_seconds=meter.busy_core_seconds,
            cpu_seconds=book.cpu_seconds,
            idle=MappingProxyType(dict(meter.idle)),
            idle_core_seconds=MappingProxyType(dict(meter.idle_core_seconds)),
            bytes_in=book.bytes_in,
            bytes_out=book.bytes_out,
            pending=0 if self._operations is None else self._operations.waiting,
            stuck=0 if self._operations is None else self._operations.stuck,
            operations_done=0 if self._operations is None else self._operations.done,
            recalled=book.recalled,
            begun_again=book.begun_again,
        )

    # -- details -----------------------------------------------------------------------------------------------------

    def _take(self, job: JobDescription, coordinator: type[Coordinator], attempt: int) -> Entry:
        book = self._book
        if not book.takes_jobs:
            raise NodeClosed("the node takes no more jobs")
        there = book.entries.get(job.job_id)
        if self._records is not None and there is not None:
            return there
        if book.waiting >= book.backlog:
            raise NodeFull(f"{book.waiting} jobs wait already")
        succession = None if self._records is None else self._records.succession()
        entry = book.enter(job, JobHandle(succession), coordinator, attempt, succession)
        if there is not None:
            book.refuse(entry, InvalidJob(f"there is a job {job.job_id} on this node already"))
            return entry
        book.entries[job.job_id] = entry
        if self._records is not None:
            book.record(entry)
        else:
            book.put_in_line(entry)
        return entry

    async def _beat(self) -> None:
        """Heartbeats of all jobs, for whoever wants them."""
        while True:
            await anyio.sleep(self._heartbeat_seconds)
            for entry in list(self._book.entries.values()):
                entry.handle.beat()

    def _let_all_go(self) -> None:
        self._book.close_all()
        if self._records is not None:
            self._records.close()


def _made(root: Path | None) -> Path:
    """The directory for work directories, which is there from now on."""
    if root is None:
        return default_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise WorkdirFault(f"{root}: {exc.strerror}") from exc
    return root
