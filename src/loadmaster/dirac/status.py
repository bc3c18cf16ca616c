"""A job's events as DIRAC's statuses, in its order and words. No clock, no files, no await.

| event             | Status: MinorStatus                                                                              |
| ----------------- | ------------------------------------------------------------------------------------------------ |
| `JobAccepted`     | Running: Job Initialization                                                                      |
| `StageInStarted`  | Downloading InputSandbox, the same with LFN(s), Input Data Resolution: what of these there is    |
| `SlotGranted`     | Application                                                                                      |
| `PayloadExited`   | Completing: Application Finished Successfully, or With Errors; with 222 Going to reschedule job  |
|                   | Failed: what limit was exceeded, or Received Kill signal                                         |
| `ComputingEnded`  | Failed: why, if that has not been said                                                           |
| `StageOutStarted` | Completing: Uploading Output Sandbox; this and the next two only if nothing has failed           |
| `FileStagedOut`   | Output Sandbox Uploaded, when it is whole; then Uploading Output Data                            |
| `JobFinished`     | what of these is still unsaid, and Output Data Uploaded; then the end, which is one of           |
|                   | Done: Execution Complete; Completed: Pending Requests; Failed: as it was, or Pending Requests;   |
|                   | Rescheduled: its cause                                                                           |

Some attempts that have failed end as Rescheduled with DIRAC (`Statuses.cause` says for which of its reasons): there the
wrapper decides that a job should run again, here the agent does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from loadmaster.description import RESCHEDULE_EXIT_CODE
from loadmaster.dirac.words import JobStatus, Major, Minor, limit_word
from loadmaster.events import (
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    JobAccepted,
    JobFinished,
    OutputMissing,
    ParameterReported,
    PayloadExited,
    SlotGranted,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.names import is_lfn
from loadmaster.result import EndedBy, Failure, PayloadOutcome, Phase, Status, StoredFile


def statuses(events: Iterable[Event]) -> Iterator[tuple[datetime, JobStatus]]:
    """What is said of a job, with the time of the event that says it; several of one time are in their order."""
    fold = Statuses()
    for event in events:
        for said in fold.advance(event):
            yield event.time, said


class Statuses:
    """The statuses of one attempt, one event after the other: to be kept beside a handle, and made again from a journal."""

    def __init__(self) -> None:
        self.current = JobStatus()
        """All that has been said."""
        self.cause = ""
        """Why DIRAC would reschedule the job, once computing has ended, or staging out has failed; else empty."""
        self._job: Mapping[str, Any] = {}
        self._sandbox = _Sandbox(())
        self._inputs: set[str] = set()
        self._failure: Failure | None = None
        self._pending = False
        self._to_grid = False
        self._ended = False

    def advance(self, event: Event) -> tuple[JobStatus, ...]:
        """What is to be said of an event, often nothing. Events that this module does not know say nothing."""
        said = []
        for status in self._said(event):
            self.current = status.over(self.current)
            said.append(status)
        return tuple(said)

    def _said(self, event: Event) -> Iterator[JobStatus]:
        match event:
            case JobAccepted(description=description):
                self._job = description
                self._sandbox = _Sandbox(file["pattern"] for file in description.get("output_sandbox", ()))
                yield JobStatus(Major.RUNNING, Minor.JOB_INITIALIZATION)
            case StageInStarted():
                yield from self._staging_in()
            case FileStagedIn(file=file):
                self._inputs.add(file.name)
            case SlotGranted():
                yield JobStatus(minor=Minor.APPLICATION)
            case PayloadExited(outcome=outcome):
                yield from _payload_exited(outcome)
            case ComputingEnded(failure=failure):
                self._failure = failure
                if failure is not None:
                    yield from self._computing_failed(failure)
            case StageOutStarted():
                if self._failure is None and self._has_outputs:
                    yield JobStatus(Major.COMPLETING, Minor.UPLOADING_OUTPUT_SANDBOX)
            case FailoverRequested(file=file):
                self._pending = True
                yield from self._staged_out(file)
            case FileStagedOut(file=file):
                yield from self._staged_out(file)
            case OutputMissing(name=name):
                self._sandbox.missing(name)
            case ParameterReported(name="OutputSandboxLFN"):
                yield from self._sandbox_to_grid()
            case JobFinished(status=status, failure=failure):
                yield from self._finished(status, failure)

    def _staging_in(self) -> Iterator[JobStatus]:
        if sandbox := self._job.get("input_sandbox"):
            yield JobStatus(minor=Minor.DOWNLOADING_INPUT_SANDBOX)
            if any(is_lfn(file["source"]) for file in sandbox):
                yield JobStatus(minor=Minor.DOWNLOADING_INPUT_SANDBOX_LFN)
        if self._job.get("input_data"):
            yield JobStatus(minor=Minor.INPUT_DATA_RESOLUTION)

    def _computing_failed(self, failure: Failure) -> Iterator[JobStatus]:
        self.cause = self._cause_of(failure)
        if self.current.status == Major.FAILED:
            return  # by a limit or a kill, which has been said
        if self.cause == Minor.DOWNLOADING_INPUT_SANDBOX:
            yield JobStatus(minor=self._missing_sandbox())
        elif not self.cause and failure.kind != "PayloadFailed":
            yield JobStatus(Major.FAILED, _word(failure))

    def _cause_of(self, failure: Failure) -> str:
        """DIRAC's reason to reschedule a job whose computing failed; none for the failures it leaves at that."""
        if failure.kind in {"RescheduleJob", "HoldJob"}:
            return Minor.JOB_WRAPPER_EXECUTION
        if failure.phase is not Phase.STAGE_IN:
            return ""
        if failure.kind == "StagingFailed":
            lacking = self._lacking("input_sandbox") or not self._job.get("input_data")
            return Minor.DOWNLOADING_INPUT_SANDBOX if lacking else Minor.INPUT_DATA_RESOLUTION
        if failure.kind == "HookFailed":
            return Minor.JOB_WRAPPER_INITIALIZATION
        return ""

    def _lacking(self, inputs: str) -> list[Mapping[str, Any]]:
        return [file for file in self._job.get(inputs, ()) if file["name"] not in self._inputs and _is_for_now(file)]

    def _missing_sandbox(self) -> str:
        lfns_only = all(is_lfn(file["source"]) for file in self._lacking("input_sandbox"))
        return Minor.FAILED_DOWNLOADING_INPUT_SANDBOX_LFN if lfns_only else Minor.FAILED_DOWNLOADING_INPUT_SANDBOX

    # -- the outputs -----------------------------------------------------------------------------------------------

    @property
    def _has_outputs(self) -> bool:
        return bool(self._job.get("output_sandbox") or self._job.get("output_data"))

    def _staged_out(self, file: StoredFile) -> Iterator[JobStatus]:
        self._sandbox.arrived(file)
        uploading = self.current.minor == Minor.UPLOADING_OUTPUT_SANDBOX
        if uploading and self._sandbox.is_whole and self._job.get("output_data"):
            yield from self._sandbox_uploaded()

    def _sandbox_uploaded(self) -> Iterator[JobStatus]:
        """That the sandbox is out, if anything of it is, and that the data follow, if any are asked for."""
        if self._sandbox.has_arrived:
            yield JobStatus(Major.COMPLETING, Minor.OUTPUT_SANDBOX_UPLOADED)
        if self._job.get("output_data"):
            yield JobStatus(minor=Minor.UPLOADING_OUTPUT_DATA)

    def _sandbox_to_grid(self) -> Iterator[JobStatus]:
        """The sandbox has gone where output data go, which is said of a failed job, too."""
        self._to_grid = True
        if self._failure is None and self.current.minor == Minor.UPLOADING_OUTPUT_SANDBOX:
            yield JobStatus(minor=Minor.UPLOADING_OUTPUT_DATA)
        elif self._failure is not None and self.current.status == Major.COMPLETING and not self.cause:
            yield JobStatus(minor=Minor.UPLOADING_OUTPUT_DATA)
            yield JobStatus(Major.COMPLETING, Minor.OUTPUT_DATA_UPLOADED)

    def _finished(self, status: Status, failure: Failure | None) -> Iterator[JobStatus]:
        if self._ended:
            return
        self._ended = True
        if self._failure is not None:
            yield from self._end_of_failed()
        elif failure is not None:
            yield from self._stage_out_failed(failure)
        else:
            if self.current.minor == Minor.UPLOADING_OUTPUT_SANDBOX:
                yield from self._sandbox_uploaded()
            if self._job.get("output_data") or self._to_grid:
                yield JobStatus(Major.COMPLETING, Minor.OUTPUT_DATA_UPLOADED)
            if status is Status.COMPLETED:
                if self.current.status != Major.COMPLETING:  # no payload, and nothing declared that goes out
                    yield JobStatus(Major.COMPLETING, Minor.UPLOADING_JOB_OUTPUTS)
                yield JobStatus(Major.COMPLETED, Minor.PENDING_REQUESTS)
            else:
                yield JobStatus(Major.DONE, Minor.EXEC_COMPLETE)

    def _stage_out_failed(self, failure: Failure) -> Iterator[JobStatus]:
        if failure.kind != "StagingFailed":
            yield JobStatus(Major.FAILED, _word(failure))
            return
        if self.current.minor == Minor.UPLOADING_OUTPUT_SANDBOX and self._sandbox.is_whole:
            yield from self._sandbox_uploaded()
        if self._job.get("output_data") and self._sandbox.is_whole:
            yield JobStatus(Major.FAILED, Minor.UPLOADING_OUTPUT_DATA)
        self.cause = Minor.UPLOADING_JOB_OUTPUTS
        yield from self._end_of_failed()

    def _end_of_failed(self) -> Iterator[JobStatus]:
        if self.cause:
            yield JobStatus(application=f"Failed {self.cause} ")
            yield JobStatus(Major.RESCHEDULED, self.cause)
        elif self._pending:
            yield JobStatus(Major.FAILED, Minor.PENDING_REQUESTS)
        elif self.current.status != Major.FAILED:
            yield JobStatus(Major.FAILED)


class _Sandbox:
    """What has become of the files of an output sandbox."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._open = set(patterns)
        self._patterns = frozenset(self._open)
        self.has_arrived = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is known to be lacking; of a pattern it is not known how many files it stands for."""
        return not self._open

    def missing(self, name: str) -> None:
        self._open.discard(name)

    def arrived(self, file: StoredFile) -> None:
        """Take a file that is out for one of the sandbox, if it can be that: a directory's tar too, or all in an archive."""
        name = file.name
        ours = {pattern for pattern in self._patterns if fnmatchcase(name, pattern) or name == f"{pattern}.tar"}
        if not ours and file.lfn is None and name.endswith((".tar.bz2", ".tar.zst")):
            ours = set(self._patterns)
        self._open -= ours
        self.has_arrived = self.has_arrived or bool(ours)


def _payload_exited(outcome: PayloadOutcome) -> Iterator[JobStatus]:
    if outcome.verdict is not None:
        yield JobStatus(Major.FAILED, limit_word(outcome.verdict))
    elif outcome.ended_by is EndedBy.KILL:
        yield JobStatus(Major.FAILED, Minor.RECEIVED_KILL_SIGNAL)
    elif outcome.ended_by is not EndedBy.ITSELF:
        return  # a cancellation claims no end; a coordinator's reason comes with the end of computing
    elif outcome.succeeded:
        yield JobStatus(Major.COMPLETING, Minor.APP_SUCCESS)
    elif outcome.exit_code is None and outcome.signal is None:
        yield JobStatus(Major.FAILED, Minor.APP_THREAD_NOT_COMPLETE)
    else:
        yield JobStatus(Major.COMPLETING, Minor.APP_ERRORS)
        if outcome.exit_code == RESCHEDULE_EXIT_CODE:
            yield JobStatus(minor=Minor.GOING_RESCHEDULE)


def _word(failure: Failure) -> str:
    """The minor status of a failure nothing has been said of yet."""
    match failure:
        case Failure(kind="JobWasKilled"):
            return Minor.RECEIVED_KILL_SIGNAL
        case Failure(kind="LimitExceeded"):
            return Minor.JOB_EXCEEDED_CPU  # while no payload runs only the deadline is kept
        case Failure(kind="InvalidJob"):
            return Minor.ILLEGAL_JOB_JDL
        case Failure(kind="PayloadNotStarted", phase=Phase.PRE_PROCESS):
            return Minor.APP_NOT_FOUND
        case Failure(kind="PayloadNotStarted"):
            return Minor.APP_THREAD_FAILED
        case Failure(kind="StagingFailed", phase=Phase.PAYLOAD):
            return Minor.INPUT_NOT_AVAILABLE
        case _:
            return Minor.EXCEPTION_DURING_EXEC


def _is_for_now(file: Mapping[str, Any]) -> bool:
    return bool(file.get("arrives", "before") == "before")
