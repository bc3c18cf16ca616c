"""The exit codes that tell a result to a shell."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loadmaster.description import RESCHEDULE_EXIT_CODE
from loadmaster.result import EndedBy, JobResult, Phase, Status

if TYPE_CHECKING:
    from loadmaster.bundle import Ended  # with sqlite3, loaded when used

OK: Final = 0
NOT_PREPARED: Final = 1
PAYLOAD_FAILED: Final = 2
NOT_DELIVERED: Final = 3
RESCHEDULE: Final = 4

USAGE: Final = 64
"""BSD's EX_USAGE. argparse's own 2 is a payload that failed."""

BAD_USAGE: Final = f"{USAGE} the words of the command make no sense."

TABLE: Final = f"""Exit codes: 0 done or completed; 1 the description is bad or the job could not be prepared; 2 the
payload failed or was stopped by a limit; 3 outputs, or the --result, could not be delivered; 4 reschedule; 130, 143 and 129
told to stop by SIGINT, SIGTERM or SIGHUP; {BAD_USAGE}"""

LOOKED: Final = f"Exit codes: 0 it is told; 1 there is no such journal or job, or it cannot be read; {BAD_USAGE}"


def part_code(ended: Ended) -> int:
    """The exit code of a part of a job: as that of the job, if it ended with this."""
    if ended.result is not None:
        return exit_code(ended.result)
    if ended.failure is not None:
        if ended.failure.kind in {"PayloadLost", "RescheduleJob", "HoldJob"}:
            return RESCHEDULE
        return NOT_PREPARED if ended.failure.kind == "PayloadNotStarted" else PAYLOAD_FAILED
    if ended.outcome is None or ended.outcome.succeeded:
        return OK
    if ended.outcome.exit_code == RESCHEDULE_EXIT_CODE or ended.outcome.ended_by in {
        EndedBy.LOST,
        EndedBy.CANCELLATION,
    }:
        return RESCHEDULE
    return PAYLOAD_FAILED


def exit_code(result: JobResult) -> int:
    """The exit code that tells a result to a shell."""
    if result.failure is None:
        return OK
    if result.status is Status.RESCHEDULED:
        return RESCHEDULE
    match result.failure.phase:
        case Phase.STAGE_IN | Phase.PRE_PROCESS:
            return NOT_PREPARED
        case Phase.STAGE_OUT:
            return NOT_DELIVERED
        case _:
            return NOT_PREPARED if result.failure.kind == "PayloadNotStarted" else PAYLOAD_FAILED
