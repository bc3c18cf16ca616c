"""The exit codes that tell a result to a shell."""

from __future__ import annotations

from typing import Final

from loadmaster.result import JobResult, Phase, Status

OK: Final = 0
NOT_PREPARED: Final = 1
PAYLOAD_FAILED: Final = 2
NOT_DELIVERED: Final = 3
RESCHEDULE: Final = 4

TABLE: Final = """Exit codes: 0 done or completed; 1 the description is bad or the job could not be prepared; 2 the
payload failed or was stopped by a limit; 3 outputs could not be delivered; 4 reschedule; 130 and 143 told to stop by
SIGINT or SIGTERM."""


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
