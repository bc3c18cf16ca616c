"""What DIRAC's wrapper tells besides statuses and parameters: its exit code, heartbeats, the accounting record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC
from enum import IntEnum
from typing import Any, Final

from loadmaster.description import ComputingElement, JobDescription
from loadmaster.dirac.parameters import MEGABYTE
from loadmaster.dirac.words import JobStatus
from loadmaster.events import Event, Heartbeat, PayloadExited
from loadmaster.result import JobResult, Phase, Status, StoredFile

MAX_PEEK_LINES: Final = 20
"""DIRAC's MaxJobPeekLines."""


class ExitCode(IntEnum):
    """What DIRAC's wrapper exits with, and its computing elements look at."""

    DONE = 0
    FAILED = 1
    """The job, in any phase before its outputs; rescheduled, too."""
    OUTPUTS_FAILED = 2
    EXCEPTION = -1
    """The wrapper itself: 255 for who waits. From here on a computing element says "JobWrapper execution error" and the
    agent reschedules the job."""
    REPORT_FAILED = -2
    """The same, and it could not even be reported: 254."""
    NOT_BEGUN = -3
    """The wrapper ended before it had begun: 253."""


def exit_code(result: JobResult) -> ExitCode:
    """What the wrapper of a job with this result exits with. For a job without one it is `EXCEPTION`."""
    if result.status in {Status.DONE, Status.COMPLETED}:
        return ExitCode.DONE
    outputs = result.failure is not None and result.failure.phase is Phase.STAGE_OUT
    return ExitCode.OUTPUTS_FAILED if outputs else ExitCode.FAILED


# -- heartbeats ----------------------------------------------------------------------------------------------------


def heartbeat(
    event: Heartbeat, *, cores: int = 1, load_average: float | None = None, wall_seconds_left: float | None = None
) -> tuple[dict[str, float], dict[str, str]]:
    """The two dictionaries of DIRAC's `sendHeartBeat`: what changes, and the last lines of output under a banner.

    In MB (of 2**20) and seconds; wall time counts each of the cores. What is not known is left out: before there is a
    payload nearly all. DiracX takes both in one.
    """
    dynamic: dict[str, float] = {}
    if load_average is not None:
        dynamic["LoadAverage"] = load_average
    cpu_seconds = 0.0
    if (usage := event.usage) is not None:
        cpu_seconds = usage.cpu_seconds
        dynamic |= {
            "MemoryUsed": usage.rss_bytes / MEGABYTE,
            "CPUConsumed": usage.cpu_seconds,
            "WallClockTime": usage.wall_seconds * cores,
        }
        if usage.free_disk_bytes is not None:
            dynamic["AvailableDiskSpace"] = usage.free_disk_bytes / MEGABYTE
    lines = event.last_lines[-MAX_PEEK_LINES:]
    title = f"Last {len(lines)} lines of application output from Watchdog on {_utc(event)} [UTC]:"
    cpu = f"Last reported CPU consumed for job is {hms(cpu_seconds)} (h:m:s)"
    if wall_seconds_left:
        cpu += f", Wall-clock time left {wall_seconds_left:.0f}s"
    return dynamic, {"StandardOutput": banner(title, cpu) + "".join(f"{line}\n" for line in lines)}


def final_output(event: PayloadExited, *, factor: float = 1.0) -> dict[str, str]:
    """The output of the last heartbeat, which the wrapper sends when the payload has ended; `factor`: of the core."""
    lines, cpu_seconds = event.last_lines[-MAX_PEEK_LINES:], event.outcome.cpu_seconds
    title = f"Last {len(lines)} lines of application output from JobWrapper on {_utc(event)} :"
    cpu = f"CPU Total: {hms(cpu_seconds)} (h:m:s) Normalized CPU Total {cpu_seconds * factor:.1f} s @ HEP'06"
    return {"StandardOutput": banner(title, cpu) + "\n".join(lines)}


def banner(title: str, line: str) -> str:
    """A title and a line between two rules as long as the title."""
    rule = "=" * len(title)
    return f"\n{rule}\n{title}\n{line}\n{rule}\n"


def hms(seconds: float) -> str:
    """Seconds as `hh:mm:ss`; there may be more than 99 hours."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}"


def kill_order(answer: object) -> bool:
    """Whether what `sendHeartBeat` answered orders the job to end. Other orders are not known to DIRAC's wrapper, either."""
    return isinstance(answer, Mapping) and "Kill" in answer


def _utc(event: Event) -> str:
    return str(event.time.astimezone(UTC).replace(tzinfo=None))


# -- accounting ----------------------------------------------------------------------------------------------------


def accounting(
    job: JobDescription,
    ce: ComputingElement,
    result: JobResult,
    status: JobStatus,
    *,
    cores: int = 1,
    disk_bytes: int = 0,
) -> dict[str, Any]:
    """The fields of DIRAC's accounting record of a job, to be sent once; whole seconds, sizes in bytes.

    `status`: the last that was said (`Statuses.current`). `cores`: of the slot; DIRAC counts its wall time for each.
    `disk_bytes`: what the work directory took at the end, which no event tells.
    """
    outcome, sandbox = result.outcome, {file.name for file in job.input_sandbox}
    cpu = int(outcome.cpu_seconds) if outcome is not None else 0
    wall = int(outcome.wall_seconds) if outcome is not None else 0
    data_out = [file for file in result.outputs if file.lfn is not None]
    return {
        "User": job.owner or "unknown",
        "UserGroup": job.owner_group or "unknown",
        "JobGroup": job.extra.get("JobGroup") or "unknown",
        "JobType": job.job_type or "unknown",
        "JobClass": "unknown",
        "ProcessingType": job.extra.get("ProcessingType") or "unknown",
        "Site": ce.site or "unknown",
        "FinalMajorStatus": str(status.status),
        "FinalMinorStatus": str(status.minor),
        "CPUTime": cpu,
        "NormCPUTime": cpu * ce.cpu_normalization_factor,
        "ExecTime": wall * cores,
        "InputDataSize": _bytes(file for file in result.inputs if file.name not in sandbox),
        "InputDataFiles": len(job.input_data),
        "OutputDataSize": _bytes(data_out),
        "OutputDataFiles": len(data_out),
        "DiskSpace": disk_bytes,
        "InputSandBoxSize": _bytes(file for file in result.inputs if file.name in sandbox),
        "OutputSandBoxSize": _bytes(file for file in result.outputs if file.lfn is None),
        "ProcessedEvents": 0,
    }


def _bytes(files: Iterable[StoredFile]) -> int:
    return sum(file.size_bytes for file in files)
