"""Events -> where the job stands -> what may come next -> its result. No clock, no files, no await.

                                              ┌── StageInEnded ──▶ staged in ──┐
    (new) ─JobAccepted─▶ accepted ─StageInStarted─▶ staging in ─PayloadPrepared─▶ prepared ─SlotGranted─▶ granted
                            │                           │                            │                      │
                            │                           │                            │             PayloadStarted
                            │                           │                            │                      ▼
                            ├───────────────────────────┴────────────────────────────┤◀─PayloadExited─── running
                            ▼                                                        ▼
                        computed ◀────────────────────ComputingEnded──────────────────  (from all but `running`)
                            ├─StageOutStarted─▶ staging out ─┐
                            └──────────JobFinished───────────┴─▶ finished

A payload that runs must exit before anything else ends; everything before `computed` may end the computing. After a
restart StageInStarted may come again, in an empty directory, and SlotGranted, where the first slot was of no use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum, auto
from typing import Any, Final

from loadmaster.errors import IllegalEvent
from loadmaster.events import (
    CompanionFailed,
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    JobAccepted,
    JobFinished,
    KillOrdered,
    LimitReached,
    OperationDone,
    OperationDropped,
    OutputMissing,
    ParameterReported,
    PayloadAdopted,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    RegistrationRequested,
    Remembered,
    RemovalRequested,
    SlotGranted,
    SoftStopOrdered,
    StageInEnded,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.result import EndedBy, Failure, JobResult, PayloadOutcome, Status, StoredFile, Verdict


class Stage(IntEnum):
    """Where a job stands; what comes later is greater."""

    __hash__ = int.__hash__  # an enumeration's own goes by the name, and takes ten times as long

    NEW = auto()
    ACCEPTED = auto()
    STAGING_IN = auto()
    STAGED_IN = auto()
    PREPARED = auto()
    GRANTED = auto()
    RUNNING = auto()
    EXITED = auto()
    COMPUTED = auto()
    STAGING_OUT = auto()
    FINISHED = auto()


COMPUTING: Final = frozenset(
    {Stage.ACCEPTED, Stage.STAGING_IN, Stage.STAGED_IN, Stage.PREPARED, Stage.GRANTED, Stage.RUNNING, Stage.EXITED}
)
"""Where a kill still ends something."""

_DELIVERING: Final = frozenset({Stage.COMPUTED, Stage.STAGING_OUT})
_PAYLOAD_SEEN: Final = frozenset({Stage.RUNNING, Stage.EXITED})

_MOVES: Final[Mapping[type[Event], tuple[frozenset[Stage], Stage]]] = {
    JobAccepted: (frozenset({Stage.NEW}), Stage.ACCEPTED),
    StageInStarted: (frozenset({Stage.ACCEPTED, Stage.STAGING_IN}), Stage.STAGING_IN),
    StageInEnded: (frozenset({Stage.STAGING_IN}), Stage.STAGED_IN),
    PayloadPrepared: (frozenset({Stage.STAGING_IN, Stage.STAGED_IN}), Stage.PREPARED),
    SlotGranted: (frozenset({Stage.PREPARED, Stage.GRANTED}), Stage.GRANTED),
    PayloadStarted: (frozenset({Stage.GRANTED}), Stage.RUNNING),
    PayloadExited: (frozenset({Stage.RUNNING}), Stage.EXITED),
    ComputingEnded: (COMPUTING - {Stage.RUNNING}, Stage.COMPUTED),
    StageOutStarted: (frozenset({Stage.COMPUTED}), Stage.STAGING_OUT),
    JobFinished: (_DELIVERING, Stage.FINISHED),
}
"""Events that move a job on: from where, to where."""

_NOTES: Final[Mapping[type[Event], frozenset[Stage]]] = {
    FileStagedIn: COMPUTING - {Stage.ACCEPTED},
    FileStagedOut: _PAYLOAD_SEEN | _DELIVERING,
    OutputMissing: _PAYLOAD_SEEN | _DELIVERING,
    FailoverRequested: _PAYLOAD_SEEN | _DELIVERING,
    RegistrationRequested: _PAYLOAD_SEEN | _DELIVERING,
    RemovalRequested: _PAYLOAD_SEEN | _DELIVERING,
    ParameterReported: COMPUTING | _DELIVERING,
    Remembered: COMPUTING | _DELIVERING,
    KillOrdered: COMPUTING,  # and while a lost attempt is delivered: see `may_be_killed`
    PayloadAdopted: frozenset({Stage.RUNNING}),
    SoftStopOrdered: frozenset({Stage.RUNNING}),
    LimitReached: frozenset({Stage.RUNNING}),
    CompanionFailed: frozenset({Stage.RUNNING}),
    OperationDone: frozenset({Stage.FINISHED}),
    OperationDropped: frozenset({Stage.FINISHED}),
}
"""Events that leave a job where it stands: where they may come."""


class Lifecycle:
    """One job's history, folded. `advance` refuses an event out of order and then changes nothing."""

    def __init__(self) -> None:
        self.stage = Stage.NEW
        self.outcome: PayloadOutcome | None = None
        self.failure: Failure | None = None
        self.accepted: JobAccepted | None = None
        self.stage_in: StageInStarted | None = None
        self.prepared: PayloadPrepared | None = None
        self.slot: SlotGranted | None = None
        self.started: PayloadStarted | None = None
        self.kill_reason: str | None = None
        self.soft_stop: int | None = None
        """The signal by which the payload was asked to wind down."""
        self.verdict: Verdict | None = None
        """The limit for which it is ended."""
        self.companion_failure: Failure | None = None
        """What failed beside it, and ends it."""
        self.memory: dict[str, Any] = {}
        self.safe: set[tuple[str, str]] = set()
        """The outputs that have arrived, or are safe elsewhere: their names, and where they were wanted."""
        self.identity: tuple[str, int] | None = None
        self._finished: JobFinished | None = None
        # By name and place, since a hook that is called again (`RetryHook`) moves the same files again.
        self._inputs: dict[str, StoredFile] = {}
        self._outputs: dict[tuple[str, str], StoredFile] = {}
        self._missing: dict[str, None] = {}
        self._pending: dict[str, None] = {}
        self._dropped = False
        self._parameters: dict[str, str] = {}

    @classmethod
    def of(cls, events: Iterable[Event]) -> Lifecycle:
        """Where a job stands after these events. Raises `IllegalEvent` when they cannot be one job's."""
        life = cls()
        for event in events:
            life.advance(event)
        return life

    def check(self, event: Event) -> None:
        """Raise `IllegalEvent` when the event cannot come now."""
        kind = type(event)
        allowed = _MOVES[kind][0] if kind in _MOVES else _NOTES.get(kind, frozenset())
        if self.stage not in allowed and not (kind is KillOrdered and self.may_be_killed):
            raise IllegalEvent(
                f"job {event.job_id}: {event.kind} cannot come while the job is {self.stage.name.lower()}"
            )
        if self.identity not in {None, (event.job_id, event.attempt)}:
            raise IllegalEvent(
                f"job {event.job_id}, attempt {event.attempt}: {event.kind} is of another job or attempt"
            )

    def advance(self, event: Event) -> None:
        """Take one event in. Raises `IllegalEvent`, with nothing changed, when it cannot come now."""
        self.check(event)
        if move := _MOVES.get(type(event)):
            self.stage = move[1]
        match event:
            case JobAccepted(job_id=job_id, attempt=attempt):
                self.identity = job_id, attempt
                self.accepted = event
            case StageInStarted():
                self.stage_in = event
                self._inputs.clear()
            case PayloadPrepared():
                self.prepared = event
            case SlotGranted():
                self.slot = event
            case PayloadStarted():
                self.started = event
            case KillOrdered(reason=reason):
                self.kill_reason = self.kill_reason or reason
                if self.failure is not None:  # it was lost, and would have come again
                    self.failure = Failure("JobWasKilled", self.kill_reason, self.failure.phase)
            case SoftStopOrdered(signal=number):
                self.soft_stop = number
            case LimitReached(verdict=verdict):
                self.verdict = self.verdict or verdict
            case CompanionFailed(failure=failure):
                self.companion_failure = self.companion_failure or failure
            case Remembered(name=name, value=value):
                self.memory[name] = value
            case FileStagedIn(file=file):
                self._inputs[file.name] = file
            case FileStagedOut(file=file):
                self._outputs[file.name, file.url] = file
                self.safe.add((file.name, file.url))
            case FailoverRequested(file=file, wanted=wanted):
                self._outputs[file.name, file.url] = file
                self.safe.add((file.name, wanted))
                self._pending[move_line(file, wanted)] = None
            case RegistrationRequested(file=file):
                self._pending[register_line(file)] = None
            case RemovalRequested(url=url):
                self._pending[removal_line(url)] = None
            case OperationDone(what=what):
                self._pending.pop(what, None)
            case OperationDropped(what=what):
                self._pending.pop(what, None)
                self._dropped = True
            case OutputMissing(name=name):
                self._missing[name] = None
            case ParameterReported(name=name, value=value):
                self._parameters[name] = value
            case PayloadExited(outcome=outcome):
                self.outcome = outcome
            case ComputingEnded(failure=failure):
                self.failure = failure
            case JobFinished(failure=failure):
                self._finished = event
                self.failure = self.failure or failure

    def has_reached(self, stage: Stage) -> bool:
        """Whether the job stands there, or beyond."""
        return self.stage >= stage

    @property
    def may_be_killed(self) -> bool:
        """Whether an order to end it still changes anything: something is computed, or would be by the next attempt,
        because this one was lost."""
        lost = self.stage in _DELIVERING and self.failure is not None and self.failure.kind == "PayloadLost"
        return lost or self.stage in COMPUTING

    @property
    def ending_by(self) -> EndedBy | None:
        """For whom the payload is to be ended, as far as that is known; None: for nobody."""
        if self.verdict is not None:
            return EndedBy.LIMIT
        if self.kill_reason is not None:
            return EndedBy.KILL
        return EndedBy.COORDINATOR if self.companion_failure is not None else None

    @property
    def boot_id(self) -> str:
        """Of the machine, when the work directory was made."""
        return "" if self.stage_in is None else self.stage_in.identity.partition(":")[0]

    def staged_in(self, name: str) -> StoredFile | None:
        """The input of that name, if it has arrived."""
        return self._inputs.get(name)

    @property
    def has_pending(self) -> bool:
        """Whether something is left to be done elsewhere."""
        return bool(self._pending)

    def ends_as(self, failure: Failure | None = None) -> Status:
        """The status the job has if it finishes now, with this failure if it had none before."""
        match self.failure or failure:
            case None:
                return Status.COMPLETED if self._pending else Status.DONE
            case Failure(kind="JobWasKilled"):
                return Status.KILLED
            case Failure(kind="RescheduleJob" | "HoldJob" | "PayloadLost"):
                return Status.RESCHEDULED
            case _:
                return Status.FAILED

    def _status(self, said: Status) -> Status:
        """A job is no longer Completed once everything it had left has been done."""
        done = said is Status.COMPLETED and not self._pending and not self._dropped
        return Status.DONE if done else said

    def result(self) -> JobResult:
        """The job's result. Raises `IllegalEvent` before JobFinished."""
        if self._finished is None:
            raise IllegalEvent(f"a job that is {self.stage.name.lower()} has no result yet")
        return JobResult(
            job_id=self._finished.job_id,
            attempt=self._finished.attempt,
            status=self._status(self._finished.status),
            failure=self.failure,
            outcome=self.outcome,
            inputs=tuple(self._inputs.values()),
            outputs=tuple(self._outputs.values()),
            missing_outputs=tuple(self._missing),
            pending=tuple(self._pending),
            parameters=dict(self._parameters),
        )


def move_line(file: StoredFile, wanted: str) -> str:
    """What is left to be done for a file that is safe elsewhere, in a line."""
    return f"move {file.url} to {wanted}"


def removal_line(url: str) -> str:
    """What is left to be done about uploads that were broken off, in a line."""
    return f"remove what is left of uploads to {url}"


def register_line(file: StoredFile) -> str:
    """What is left to be done for a file that no catalog took, in a line."""
    return f"register LFN:{file.lfn} at {file.url}"
