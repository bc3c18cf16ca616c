"""The outside's hold on one job: its events so far, an order to end it, its result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Concatenate, Final, ParamSpec, Protocol, Self
from weakref import WeakSet

import anyio
from anyio.abc import TaskGroup

from loadmaster.errors import IllegalEvent, NodeClosed, RuntimeFault
from loadmaster.events import Event, KillOrdered, OutputPrinted
from loadmaster.lifecycle import COMPUTING, Lifecycle, Stage
from loadmaster.result import Failure, JobResult, Status

P = ParamSpec("P")

TRANSIENT_EVENTS_KEPT = 256
"""For a follower that is slow: of heartbeats and progress only the latest matter."""


JOURNAL_SECONDS: Final = 60.0
"""A disk that does not take a line for that long will not take the next one either."""


class Journal(Protocol):
    """Where events go before anybody is told."""

    async def append(self, event: Event) -> None:
        """Return when the event is on disk. An exception means it is not: nobody is told of it, and `run_job` raises
        `RuntimeFault`."""


class Write(Protocol):
    """Events on their way to the disk."""

    async def settled(self) -> None:
        """Return when they are on disk and were told, or it is known that they are not."""


class KeepsState(ABC):
    """A journal that also has a place for what outlives an agent of its payloads, and that writes behind."""

    directory: Path
    """Where all of it is: nothing for a payload to see."""
    has_next: bool = False
    """Whether the job's next attempt has been begun, or is being written together with the end of this one."""

    @abstractmethod
    def write_soon(self, events: Sequence[Event], told: Callable[[Exception | None], None]) -> Write:
        """Have events written after all that were given before: all of them, or none. Does not wait.

        `told` is called in the event loop once they are on disk, or with what went wrong. Raises `RuntimeFault` when
        nothing is taken any more.
        """

    @abstractmethod
    def state_directory(self, job_id: str, attempt: int) -> Path:
        """That place, for one attempt at a job; it is there only once a payload has been started."""


class Audience(Protocol):
    """Whoever hears what happens to many jobs, at once and without waiting."""

    @property
    def wants_offers(self) -> bool:
        """Whether heartbeats and progress are worth making."""
        ...

    def hear(self, event: Event) -> None:
        """An event of one of them."""
        ...


class JobHandle:
    """Make one, pass it to `run_job`, and keep it: to follow the job, to kill it. For use in the event loop's thread."""

    def __init__(self, journal: Journal | None = None) -> None:
        self._journal = journal
        self._life = Lifecycle()
        self._events: list[Event] = []
        self._followers: WeakSet[_Follower] | tuple[()] = ()
        """Seldom anybody: to make a WeakSet, and to go through it, costs more than all the rest."""
        self._writing = anyio.Lock(fast_acquire=True)
        self._stage = Stage.NEW
        self._ordered = False
        self._write: Write | None = None
        self._awaited = 0
        self._fault: Exception | None = None
        self._keeps: KeepsState | None = journal if isinstance(journal, KeepsState) else None
        self._identity: tuple[str, int] | None = None
        self._state: Path | None = None
        self._computing: anyio.CancelScope | None = None
        self._computed = False
        self._closed = False
        self._hurry: Callable[[], None] | None = None
        self._hurried = False
        self._over: anyio.Event | None = None
        self._audience: Audience | None = None
        self._reserved = False
        self._resumed = False
        self.has_past = False
        """Whether an earlier agent may have had the job."""
        self._at_kill: Callable[[], None] | None = None
        self._beat: Callable[[], None] | None = None
        self._obeying: TaskGroup | None = None
        self.tasks: TaskGroup | None = None
        """Whose task runs the job, if it is known before it does."""
        self.kill_reason: str | None = None

    @classmethod
    def resumed(cls, journal: Journal | None, events: Iterable[Event]) -> Self:
        """The handle of a job that has these events behind it: `run_job` goes on from there.

        Raises `IllegalEvent` when they cannot be one job's. One that has finished is over, and has its result.
        """
        handle = cls(journal)
        handle._events = list(events)
        handle._life = life = Lifecycle.of(handle._events)
        if life.identity is not None:
            handle._identity, handle._resumed, handle.has_past = life.identity, True, True
        handle._computed = life.stage not in COMPUTING and life.stage is not Stage.NEW
        handle._closed = life.stage is Stage.FINISHED
        handle._stage = life.stage
        handle.kill_reason, handle._ordered = life.kill_reason, life.kill_reason is not None
        return handle

    def __repr__(self) -> str:
        job = self._identity[0] if self._identity else "not started"
        return f"<JobHandle {job}: {self._stage.name.lower()}, {len(self._events)} events>"

    # -- for whoever holds it ------------------------------------------------------------------------------------

    @property
    def job_id(self) -> str | None:
        """Whose handle it is; None before it has been given to a job."""
        return None if self._identity is None else self._identity[0]

    @property
    def attempt(self) -> int:
        """Which try at the job."""
        return 1 if self._identity is None else self._identity[1]

    @property
    def stage(self) -> Stage:
        """Where the job stands, as everybody has been told."""
        return self._stage

    @property
    def life(self) -> Lifecycle:
        """What has been done, as the events so far have it, those too that are still being written. To be read only."""
        return self._life

    @property
    def history(self) -> tuple[Event, ...]:
        """Every event of the job until now."""
        return tuple(self._events)

    @property
    def first(self) -> Event | None:
        """The job's first event: by its time one can tell two jobs of one name."""
        return self._events[0] if self._events else None

    @property
    def result(self) -> JobResult | None:
        """The job's result once it has finished, None before and when it was interrupted."""
        return self._life.result() if self._stage is Stage.FINISHED else None

    async def wait(self) -> JobResult:
        """The job's result, once it is over. Raises `NodeClosed` if it was interrupted and has none."""
        if not self._closed:
            self._over = self._over or anyio.Event()
            await self._over.wait()
        if (result := self.result) is None:
            raise NodeClosed(f"job {self.job_id} was interrupted: it has no result")
        return result

    def kill(self, reason: str, attempt: int | None = None) -> bool:
        """Order the job to end, with its reason kept; returns without waiting.

        Whatever is computing ends: staging in, hooks, the payload (TERM, grace, KILL). The sandbox is still delivered,
        output data is not, and the job ends as Killed. False when it is too late: the job has finished computing and
        only delivers its outputs, or has ended; or when the order is for another `attempt`. One that has not begun never
        does, nor does the next attempt at one that was lost: the order is the job's. Where there is a journal the order is
        obeyed once it is in there: `KillOrdered`.
        """
        if self._is_too_late_to_kill or attempt not in {None, self.attempt}:
            return False
        if self.kill_reason is None:
            self.kill_reason = reason
        if self._obeying is not None and self._journal is not None:
            self._obeying.start_soon(self.keep_order)
        elif self._journal is None:
            if self._life.may_be_killed and self._life.kill_reason is None:
                self._say(KillOrdered, self.kill_reason)
            self._end_computing()
        if self._at_kill is not None:
            self._at_kill()
        return True

    @property
    def _is_too_late_to_kill(self) -> bool:
        if self._closed:
            return True
        if self._keeps is not None and self._keeps.has_next:
            return False  # whoever begins that passes it on
        computed = self._computed and not self._life.has_reached(Stage.COMPUTED)
        return computed or not (self._life.may_be_killed or self._life.stage is Stage.NEW)

    def hurry(self) -> None:
        """Whoever is being asked to end is made to, at once: what is left of a grace is not kept."""
        self._hurried = True
        if self._hurry is not None:
            self._hurry()

    def events(self) -> AsyncIterator[Event]:
        """Every event of the job from its first, then as they come; ends when the job is over. Blocks nobody."""
        return self._follower(transient=False)

    def follow(self, *, output: bool = False) -> AsyncIterator[Event]:
        """As `events`, with heartbeats and transfer progress as they are offered; a slow reader misses some of those.

        `output`: also what the payload prints, if this is called before it starts.
        """
        return self._follower(transient=True, output=output)

    def _follower(self, *, transient: bool, output: bool = False) -> _Follower:
        follower = _Follower(self, transient=transient, output=output)
        self._followers = self._followers or WeakSet()
        self._followers.add(follower)
        return follower

    # -- for whoever runs the job --------------------------------------------------------------------------------

    @property
    def followed(self) -> bool:
        """Whether anybody wants heartbeats and progress: they cost something to make."""
        return any(follower.transient for follower in self._followers) or (
            self._audience is not None and self._audience.wants_offers
        )

    @property
    def output_followed(self) -> bool:
        """Whether anybody wants what the payload prints."""
        return any(follower.output for follower in self._followers)

    @property
    def has_audience(self) -> bool:
        """Whether somebody hears of many jobs, this one among them, and has `beat` called."""
        return self._audience is not None

    def beat(self) -> None:
        """Have the job give a heartbeat, if it runs."""
        if self._beat is not None:
            self._beat()

    def begin(self, tasks: TaskGroup, beat: Callable[[], None]) -> None:
        """The job runs, until `close`: an order to end has a task in there which has it written, and then obeyed; `beat`
        gives a heartbeat."""
        self._obeying, self._beat = tasks, beat

    def ends_as(self, failure: Failure | None) -> Status:
        """The status the job has if it finishes now, with this failure if it had none before."""
        return self._life.ends_as(failure)

    def recalls(self, job_id: str, attempt: int) -> JobResult | None:
        """The result of this attempt at the job, if the handle was made from a history that has it."""
        return self.result if self._resumed and self._identity == (job_id, attempt) else None

    def open(self, job_id: str, attempt: int) -> None:
        """Begin the one job this handle is for."""
        kept_for = self._identity if self._reserved or self._resumed else None
        self._at_kill, self._resumed = None, False
        if self._identity is not None and kept_for != (job_id, attempt):
            raise RuntimeFault(f"this handle was already used for job {self._identity[0]}; make one for each job")
        self._identity = job_id, attempt

    def reserve(
        self, job_id: str, attempt: int, *, audience: Audience, at_kill: Callable[[], None], tasks: TaskGroup
    ) -> None:
        """Keep this handle for a job that will begin later, in a task of `tasks`, and open until `let_go`. `at_kill`: it
        will not begin."""
        self.open(job_id, attempt)
        self._reserved, self._audience, self._at_kill, self.tasks = True, audience, at_kill, tasks

    def recall(self, events: Iterable[Event]) -> None:
        """This job has been before: it has this history and result, and is over."""
        past = JobHandle.resumed(None, events)
        self._identity, self._life, self._events = past._identity, past._life, past._events
        self._stage = past._stage
        self._computed = True

    def let_go(self) -> None:
        """The job for which it was kept is over, and nothing more will be recorded."""
        self._reserved, self._at_kill = False, None
        self.close()

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The part of the job that a kill ends; an order that came earlier ends it at once."""
        try:
            with anyio.CancelScope() as self._computing:
                if self._ordered or (self._journal is None and self.kill_reason is not None):
                    self._computing.cancel()
                yield
        finally:
            self._computing = None
            self._computed = True

    async def keep_order(self) -> None:
        """Have an order to end in the job's history, if there is one and it is not; then obey it."""
        if self.kill_reason is None:
            return
        with suppress(IllegalEvent):  # it comes too late, or somebody else was quicker
            if self._life.kill_reason is None:
                await self.record(KillOrdered, self.kill_reason)
        await self.settle()
        if self._ordered:
            self._end_computing()

    def _end_computing(self) -> None:
        if self._computing is not None:
            self._computing.cancel()

    @property
    def state(self) -> Path | None:
        """Where that is kept of the payload which outlives an agent; None where nobody would look for it."""
        if self._state is None and self._identity is not None and self._keeps is not None:
            self._state = self._keeps.state_directory(*self._identity)
        return self._state

    @property
    def hidden(self) -> tuple[Path, ...]:
        """What the payload need not see."""
        return () if self._keeps is None else (self._keeps.directory,)

    @property
    def is_journalled(self) -> bool:
        """Whether the job goes on after the death of its agent."""
        return self._keeps is not None

    async def record(
        self, kind: Callable[Concatenate[str, int, datetime, P], Event], *args: P.args, **kw: P.kwargs
    ) -> None:
        """Add an event to the job's history: in order or refused; on disk, and told, when this returns.

        Cancellation does not interrupt it: what happened has happened.
        """
        if self._journal is None or self._keeps is not None:
            self._say(kind, *args, **kw)
            await self.settle()
            return
        with anyio.move_on_after(JOURNAL_SECONDS, shield=True) as writing:
            async with self._writing:  # the journal has the events in the order in which they were told
                event = self._new(kind, *args, **kw)
                self._life.check(event)
                await self._keep(self._journal, event)
                self._life.advance(event)
                self._tell(event, self._life.stage)
        if writing.cancelled_caught:
            raise RuntimeFault(f"the journal has not answered for {JOURNAL_SECONDS:.0f} s")

    async def note(
        self, kind: Callable[Concatenate[str, int, datetime, P], Event], *args: P.args, **kw: P.kwargs
    ) -> None:
        """As `record`, without waiting for the disk: it is there, and told, in a moment, and after all that came before.

        What does something outside, or calls somebody else's hook, awaits `settle` first: an agent that dies before has
        not done it, and its successor begins there.
        """
        if self._journal is None or self._keeps is not None:
            self._say(kind, *args, **kw)
        else:
            await self.record(kind, *args, **kw)

    async def settle(self) -> None:
        """Return when everything noted is on disk and was told. Cancellation does not interrupt it. Raises
        `RuntimeFault` when something is not: then nothing that comes after it will be either."""
        if self._write is not None:
            self._awaited += 1
            try:
                with anyio.CancelScope(shield=True):  # bounded: a journal that writes behind knows how long it may take
                    await self._write.settled()
            finally:
                self._awaited -= 1
        if self._fault is not None:
            raise self._fault

    def _say(self, kind: Callable[Concatenate[str, int, datetime, P], Event], *args: P.args, **kw: P.kwargs) -> None:
        """Add an event to the job's life, and have it written where there is a journal; then it is told."""
        if self._fault is not None:
            raise self._fault
        event = self._new(kind, *args, **kw)
        self._life.advance(event)
        stage = self._life.stage
        if self._keeps is None:
            self._tell(event, stage)
            return

        def told(fault: Exception | None) -> None:
            if self._write is write:
                self._write = None
            if fault is None:
                self._tell(event, stage)
            elif self._fault is None:
                self._fault = fault
                if not self._awaited and self._obeying is not None:  # nobody would hear of it for long
                    self._obeying.start_soon(self.settle)

        self._write = write = self._keeps.write_soon((event,), told)

    def offer(self, kind: Callable[Concatenate[str, int, datetime, P], Event], *args: P.args, **kw: P.kwargs) -> None:
        """Tell whoever follows right now; nothing is recorded."""
        event = self._new(kind, *args, **kw)
        for follower in self._followers:
            if follower.transient and (follower.output or not isinstance(event, OutputPrinted)):
                follower.offers.append(event)
                follower.wake()
        if self._audience is not None and self._audience.wants_offers:
            self._audience.hear(event)

    @contextmanager
    def hurried_by(self, end_at_once: Callable[[], None]) -> Iterator[None]:
        """While a payload is being ended: what ends it at once. Haste that was asked for before is not forgotten."""
        self._hurry = end_at_once
        try:
            if self._hurried:
                end_at_once()
            yield
        finally:
            self._hurry = None

    def close(self) -> None:
        """The job is over, finished or interrupted: followers see what is left and end."""
        self._obeying = self._beat = None
        if self._reserved:
            return
        self._closed = True
        if self._over is not None:
            self._over.set()
        for follower in self._followers:
            follower.wake()

    async def _keep(self, journal: Journal, event: Event) -> None:
        try:
            await journal.append(event)
        except RuntimeFault:
            raise
        except Exception as exc:  # a journal of anybody's: whatever it raises, the event is not on disk
            raise RuntimeFault(f"job {event.job_id}: the journal did not take {event.kind}: {exc}") from exc

    def _tell(self, event: Event, stage: Stage) -> None:
        self._stage = stage
        self._ordered = self._ordered or isinstance(event, KillOrdered)
        self._events.append(event)
        for follower in self._followers:
            follower.wake()
        if self._audience is not None:
            self._audience.hear(event)

    def _new(self, kind: Callable[Concatenate[str, int, datetime, P], Event], *args: P.args, **kw: P.kwargs) -> Event:
        if self._identity is None:
            raise RuntimeFault("this handle has not been given to a job yet")
        return kind(*self._identity, datetime.now(UTC), *args, **kw)


class _Follower:
    """A cursor over a handle's events, with a place for offers. Forgotten by the handle when its reader drops it."""

    def __init__(self, handle: JobHandle, *, transient: bool, output: bool) -> None:
        self.transient, self.output = transient, output
        self.offers: deque[Event] = deque(maxlen=TRANSIENT_EVENTS_KEPT)
        self._handle = handle
        self._seen = 0
        self._news: anyio.Event | None = None

    def wake(self) -> None:
        if self._news is not None:
            self._news.set()

    def __aiter__(self) -> _Follower:
        return self

    async def __anext__(self) -> Event:
        while True:
            if self._seen < len(self._handle._events):
                self._seen += 1
                return self._handle._events[self._seen - 1]
            if self.offers:
                return self.offers.popleft()
            if self._handle._closed:
                raise StopAsyncIteration
            self._news = anyio.Event()
            await self._news.wait()
            self._news = None
