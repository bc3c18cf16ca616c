"""DIRAC's words for where a job stands: its statuses, which may follow which, its minor statuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from loadmaster.result import Verdict


class Major(StrEnum):
    """DIRAC's statuses of a job."""

    SUBMITTING = "Submitting"
    RECEIVED = "Received"
    CHECKING = "Checking"
    STAGING = "Staging"
    SCOUTING = "Scouting"
    WAITING = "Waiting"
    MATCHED = "Matched"
    RESCHEDULED = "Rescheduled"
    RUNNING = "Running"
    STALLED = "Stalled"
    COMPLETING = "Completing"
    DONE = "Done"
    COMPLETED = "Completed"
    FAILED = "Failed"
    DELETED = "Deleted"
    KILLED = "Killed"


MAY_FOLLOW: Final[Mapping[Major, frozenset[Major]]] = {
    status: frozenset(map(Major, after.split()))
    for status, after in {
        Major.SUBMITTING: "Received Checking Deleted Killed",
        Major.RECEIVED: "Scouting Checking Staging Waiting Failed Deleted Killed",
        Major.CHECKING: "Scouting Staging Waiting Rescheduled Failed Deleted Killed",
        Major.SCOUTING: "Checking Failed Stalled Killed",
        Major.STAGING: "Checking Waiting Failed Killed",
        Major.WAITING: "Matched Rescheduled Deleted Killed",
        Major.MATCHED: "Running Failed Rescheduled Killed",
        Major.RESCHEDULED: "Waiting Received Deleted Failed Killed",
        Major.RUNNING: "Stalled Done Failed Rescheduled Completing Killed Received",
        Major.STALLED: "Running Failed Killed",
        Major.COMPLETING: "Done Failed Completed Stalled Killed",
        Major.DONE: "Deleted",
        Major.COMPLETED: "Done Failed",
        Major.FAILED: "Rescheduled Deleted",
        Major.KILLED: "Deleted",
        Major.DELETED: "",
    }.items()
}
"""Which status a server lets follow which. It keeps the one it has when it is asked for another.

Rescheduled after Completing is asked for all the same, by DIRAC's wrapper and by us, for the cause and the application
status that come with it: what makes the job run again is the order to reschedule it.
"""


class Minor(StrEnum):
    """DIRAC's minor statuses, those that are said here and those that others say. Any other text may stand there, too."""

    JOB_INITIALIZATION = "Job Initialization"
    JOB_WRAPPER_INITIALIZATION = "Job Wrapper Initialization"
    JOB_WRAPPER_EXECUTION = "JobWrapper execution"
    DOWNLOADING_INPUT_SANDBOX = "Downloading InputSandbox"
    DOWNLOADING_INPUT_SANDBOX_LFN = "Downloading InputSandbox LFN(s)"
    FAILED_DOWNLOADING_INPUT_SANDBOX = "Failed Downloading InputSandbox"
    FAILED_DOWNLOADING_INPUT_SANDBOX_LFN = "Failed Downloading InputSandbox LFN(s)"
    INPUT_DATA_RESOLUTION = "Input Data Resolution"
    INPUT_NOT_AVAILABLE = "Input Data Not Available"
    APPLICATION = "Application"
    APP_NOT_FOUND = "Application not found"
    APP_THREAD_FAILED = "Application thread failed"
    APP_THREAD_NOT_COMPLETE = "Application thread did not complete"
    APP_SUCCESS = "Application Finished Successfully"
    APP_ERRORS = "Application Finished With Errors"
    GOING_RESCHEDULE = "Going to reschedule job"
    JOB_RESCHEDULED = "Job Rescheduled"
    RESOLVING_OUTPUT_SANDBOX = "Resolving Output Sandbox"
    UPLOADING_OUTPUT_SANDBOX = "Uploading Output Sandbox"
    OUTPUT_SANDBOX_UPLOADED = "Output Sandbox Uploaded"
    UPLOADING_OUTPUT_DATA = "Uploading Output Data"
    OUTPUT_DATA_UPLOADED = "Output Data Uploaded"
    UPLOADING_JOB_OUTPUTS = "Uploading Outputs"
    EXEC_COMPLETE = "Execution Complete"
    PENDING_REQUESTS = "Pending Requests"
    REQUESTS_DONE = "Requests done"
    FAILED_SENDING_REQUESTS = "Failed sending requests"
    EXCEPTION_DURING_EXEC = "Exception During Execution"
    RECEIVED_KILL_SIGNAL = "Received Kill signal"
    MARKED_FOR_TERMINATION = "Marked for termination"
    WATCHDOG_STALLED = "Watchdog identified this job as stalled"
    STALLED_PILOT_NOT_RUNNING = "Job stalled: pilot not running"
    JOB_EXCEEDED_CPU = "Job has reached the CPU limit of the queue"
    JOB_EXCEEDED_CPU_LIMIT = "Job has exceeded maximum CPU time limit"
    JOB_EXCEEDED_WALL_CLOCK = "Job has exceeded maximum wall clock time"
    JOB_EXCEEDED_LOAD = "Job exceeded maximum load average"
    JOB_INSUFFICIENT_DISK = "Job has insufficient disk space to continue"
    ILLEGAL_JOB_JDL = "Illegal Job JDL"
    NO_CANDIDATE_SITE_FOUND = "No candidate sites available"
    PILOT_AGENT_SUBMISSION = "Pilot Agent Submission"
    RECEIVED_BY_AGENT = "Job Received by Agent"
    INSTALLING_SOFTWARE = "Installing Software"
    SUBMITTING_TO_CE = "Submitting To CE"
    PAYLOAD_FAILED = "Payload failed"

    @classmethod
    def _missing_(cls, value: object) -> Minor | None:
        """The words of dirac-cwl's wrapper for the same things."""
        return {
            "Initializing Job": cls.JOB_INITIALIZATION,
            "Resolving Input Data": cls.INPUT_DATA_RESOLUTION,
            "Executing Payload": cls.APPLICATION,
        }.get(str(value))


LIMIT_WORDS: Final[Mapping[str, str]] = {
    "wall time": Minor.JOB_EXCEEDED_WALL_CLOCK,
    "CPU time": Minor.JOB_EXCEEDED_CPU_LIMIT,
    "deadline": Minor.JOB_EXCEEDED_CPU,
    "CPU ratio": Minor.WATCHDOG_STALLED,
    "free disk": Minor.JOB_INSUFFICIENT_DISK,
}
"""What DIRAC's watchdog says of the limits it has; of others it is said that the job has exceeded the maximum."""

MINOR_CHARACTERS: Final = 128
APPLICATION_CHARACTERS: Final = 255
"""What the columns of DIRAC's table hold."""


@dataclass(frozen=True, slots=True)
class JobStatus:
    """What is said of a job at one moment. An empty part is left as it was."""

    status: str = ""
    minor: str = ""
    application: str = ""

    def over(self, before: JobStatus) -> JobStatus:
        """The job's whole status, if it was `before`."""
        return JobStatus(
            self.status or before.status, self.minor or before.minor, self.application or before.application
        )

    def to_dirac(self, source: str = "JobWrapper") -> dict[str, str]:
        """The entry of `setJobStatusBulk`, as DIRAC's wrapper sends it: nothing empty, no single quotes."""
        said = {
            "Status": self.status,
            "MinorStatus": self.minor[:MINOR_CHARACTERS],
            "ApplicationStatus": self.application[:APPLICATION_CHARACTERS],
        }
        return {"Source": source, **{key: str(text).replace("'", "") for key, text in said.items() if text}}


def limit_word(verdict: Verdict) -> str:
    """The minor status of a job that was over a limit."""
    return LIMIT_WORDS.get(verdict.limit, f"Job has exceeded maximum {verdict.limit}")
