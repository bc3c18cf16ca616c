"""What a node knows of its jobs: who is there, where each stands, and what became of those that were. No files, no await.

    put in line -> waiting -> begun [waiting for disk -> staging in -> ready -> computing -> delivering] -> closed

What a job's handle tells comes here, and goes on to whoever reads the node's events.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import anyio
from anyio.abc import TaskGroup

from loadmaster.admission import Admission
from loadmaster.ahead import Ahead, disk_bytes
from loadmaster.bell import Bell
from loadmaster.coordinator import Coordinator
from loadmaster.description import JobDescription
from loadmaster.errors import JobError, JobWasKilled, PayloadNotStarted, RescheduleJob, StagingFailed
from loadmaster.events import ComputingEnded, Event, FileStagedIn, FileStagedOut, JobFinished
from loadmaster.handle import JobHandle
from loadmaster.ledger import Ledger, Slot
from loadmaster.lifecycle import Stage
from loadmaster.result import Status
from loadmaster.streams import EventStreams

if TYPE_CHECKING:
    from loadmaster.recovery import Succession  # with sqlite3, loaded when used

WAITING: Final = "waiting"
FOR_DISK: Final = "waiting for disk"
STAGING_IN: Final = "staging in"
READY: Final = "ready"
COMPUTING: Final = "computing"
DELIVERING: Final = "delivering"
PHASES: Final = (WAITING, FOR_DISK, STAGING_IN, READY, COMPUTING, DELIVERING)

GIVEN_BACK: Final = "given back: the node was drained before it computed"


@dataclass(eq=False, slots=True)
class Entry:
    """A job of the node's, until it has ended."""

    job: JobDescription
    handle: JobHandle
    coordinator: type[Coordinator]
    number: int
    phase: str = WAITING
    scope: anyio.CancelScope | None = None
    """Around all of it, once it has been begun."""
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

    def give_up_slot(self) -> None:
        """What it has held all the time is somebody else's."""
        held, self.held_slot = self.held_slot, None
        if held is not None:
            held.close()


class Book:
    """The jobs of a node."""

    ledger: Ledger

    def __init__(self, backlog: int) -> None:
        self.backlog = backlog
        self.entries: dict[str, Entry] = {}
        """By job id."""
        self.line = Admission[Entry](Ahead(1))
        self.unrecorded = deque[Entry]()
        """They are to be in the journal before they wait."""
        self.going_on = deque[Entry]()
        """An earlier agent had begun them."""
        self.unstarted = deque[tuple[Entry, JobError]]()
        """They never begin, for that reason."""
        self.phases = Counter[str]()
        """How many jobs are in each."""
        self.cores = Counter[str]()
        """How many they need."""
        self.ended = Counter[str]()
        self.begun_again = 0
        self.given_back = self.interrupted = self.recalled = self.bytes_in = self.bytes_out = 0
        self.cpu_seconds = 0.0
        self.open = False
        self.draining = anyio.Event()
        self.news = Bell()
        """For whoever begins jobs: there may be something to do."""
        self.new = Bell()
        """For whoever has the journal: there is somebody unrecorded."""
        self.change = Bell()
        """For everybody else: all that followed from the news has been done."""
        self.streams = EventStreams()
        self.at_end: Callable[[Entry], None] | None = None
        self.at_pending: Callable[[], None] | None = None
        self._tasks: TaskGroup | None = None
        self._numbers = 0

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {phase}" for phase, count in self.phases.items() if count)
        return f"[{counts or 'idle'}]"

    def begin(self, tasks: TaskGroup, ledger: Ledger, terms: Ahead) -> None:
        """Jobs are taken from now on, and run in those tasks."""
        self._tasks, self.ledger, self.line = tasks, ledger, Admission(terms)
        self.open = True

    @property
    def takes_jobs(self) -> bool:
        """Whether new ones are taken."""
        return self.open and not self.draining.is_set()

    @property
    def waiting(self) -> int:
        """How many wait to be begun."""
        return len(self.line) + len(self.unrecorded)

    @property
    def is_empty(self) -> bool:
        """Whether there is no job."""
        return not self.entries and not self.unstarted

    def room(self, now: float) -> int:
        """How many jobs a source may be asked for now."""
        return min(self.line.places(now), self.backlog) - self.waiting

    # -- one job's way -----------------------------------------------------------------------------------------------

    def enter(
        self,
        job: JobDescription,
        handle: JobHandle,
        coordinator: type[Coordinator],
        attempt: int,
        journal: Succession | None,
    ) -> Entry:
        """A job that is the node's from now on. It is not among `entries` yet: another of its name may be."""
        assert self._tasks is not None  # noqa: S101 - none is taken before
        entry = Entry(job, handle, coordinator, self._numbers, journal=journal)
        self._numbers += 1
        if journal is not None:
            journal.life = handle.life

        def at_kill() -> None:
            if not handle.life.has_reached(Stage.STAGING_IN):  # else there may be a payload to be ended
                self.stop(entry, JobWasKilled(handle.kill_reason or ""))

        handle.reserve(job.job_id, attempt, audience=self, at_kill=at_kill, tasks=self._tasks)
        self._count(entry, 1)
        return entry

    def put_in_line(self, entry: Entry) -> None:
        """Have it wait for its turn, if it can have one."""
        if (reason := entry.handle.kill_reason) is not None:
            self.unstarted.append((entry, JobWasKilled(reason)))
        elif self.draining.is_set():
            entry.given_back = True
            self.unstarted.append((entry, RescheduleJob(GIVEN_BACK)))
        elif (never := self._never_fits(entry.job)) is not None:
            self.unstarted.append((entry, never))
        else:
            self.line.put(entry)
        self.news.ring()

    def record(self, entry: Entry) -> None:
        """It is to be in the journal first."""
        entry.recorded = anyio.Event()
        self.unrecorded.append(entry)
        self.new.ring()

    def go_on_with(self, entry: Entry) -> None:
        """An earlier agent had begun it: it is begun again at once."""
        self.going_on.append(entry)
        self.news.ring()

    def refuse(self, entry: Entry, why: JobError) -> None:
        """It never begins."""
        self.unstarted.append((entry, why))
        self.news.ring()

    def stop(self, entry: Entry, why: JobError) -> bool:
        """End a job before it computes. False if it has ended already, or will in a moment."""
        if self.line.withdraw(entry):
            self.refuse(entry, why)
        elif entry.scope is not None:
            entry.scope.cancel()
        else:
            return False
        return True

    def move(self, entry: Entry, phase: str) -> None:
        """It is in that phase from now on; whoever computes, or did, holds no place any more."""
        self._count(entry, -1)
        entry.phase = phase
        self._count(entry, 1)
        if phase == READY:
            self.line.get_ready(entry)
        elif phase in {COMPUTING, DELIVERING}:
            self.line.leave(entry)
        self.news.ring()

    def close(self, entry: Entry) -> None:
        """Whatever has become of it, it is no longer the node's."""
        if entry.over:
            return
        entry.over = True
        self.line.leave(entry)
        self._count(entry, -1)
        own = self.entries.get(entry.job.job_id) is entry
        if own:
            del self.entries[entry.job.job_id]
        if (result := entry.handle.result) is None:
            self.interrupted += 1
        elif entry.recalled:
            self.recalled += 1
        else:
            self.ended[result.status] += 1
            entry.given_back = entry.given_back and result.status is Status.RESCHEDULED
            self.given_back += entry.given_back
            self.cpu_seconds += result.outcome.cpu_seconds if result.outcome is not None else 0.0
        if own and self.at_end is not None:
            self.at_end(entry)
        entry.handle.let_go()
        self.news.ring()

    def close_all(self) -> None:
        """The node is gone: nothing more becomes of any."""
        self.open = False
        for entry in (*self.entries.values(), *(entry for entry, _ in self.unstarted)):
            self.close(entry)
        self.line.clear()
        self.unstarted.clear()
        self.unrecorded.clear()
        self.going_on.clear()
        self.streams.close()
        self.change.ring()

    @asynccontextmanager
    async def disk_of(self, entry: Entry) -> AsyncIterator[None]:
        """Wait for the disk of a job's stay and hold it, or what it has held all the time, and its slot."""
        if entry.disk is not None:
            with entry.disk:
                try:
                    yield
                finally:
                    entry.give_up_slot()
        else:
            async with self.ledger.reserve_disk(disk_bytes(entry.job), priority=entry.job.priority):
                yield

    def _count(self, entry: Entry, one: int) -> None:
        self.phases[entry.phase] += one
        self.cores[entry.phase] += one * entry.job.number_of_processors

    def _never_fits(self, job: JobDescription) -> JobError | None:
        try:
            self.ledger.check(job)
        except PayloadNotStarted as exc:
            return exc
        there = self.ledger.disk_bytes
        if there is not None and disk_bytes(job) > there:
            return StagingFailed(f"the job needs {disk_bytes(job)} bytes of disk, the node has {there}")
        return None

    # -- what the jobs tell ------------------------------------------------------------------------------------------

    @property
    def wants_offers(self) -> bool:
        """Whether anybody reads heartbeats and progress."""
        return self.streams.wants_transient

    def hear(self, event: Event) -> None:
        """Something has happened to one of the jobs."""
        match event:
            case FileStagedIn(file=file):
                self.bytes_in += file.size_bytes
            case FileStagedOut(file=file):
                self.bytes_out += file.size_bytes
            case ComputingEnded(job_id=job_id):
                entry = self.entries.get(job_id)
                if entry is not None and entry.scope is not None and entry.phase != DELIVERING:  # no slot says so
                    self.move(entry, DELIVERING)
            case JobFinished(job_id=job_id) if self.at_pending is not None:
                entry = self.entries.get(job_id)
                if entry is not None and entry.handle.life.has_pending:
                    self.at_pending()
        self.streams.tell(event)


def phase_of(stage: Stage) -> str:
    """Of a job that is gone on with. One that has a slot may have a payload: it is not to be given back."""
    if stage in {Stage.GRANTED, Stage.RUNNING}:
        return COMPUTING
    return STAGING_IN if stage < Stage.GRANTED else DELIVERING
