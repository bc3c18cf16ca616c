"""Histories of jobs, for tests of what keeps them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from loadmaster.events import (
    ComputingEnded,
    Event,
    FileStagedIn,
    JobAccepted,
    JobFinished,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    SlotGranted,
    StageInEnded,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.result import PayloadOutcome, Status, StoredFile

LONG_AGO = datetime(2024, 1, 1, 12, tzinfo=UTC)


def a_life(job_id: str, attempt: int = 1, *, began: datetime = LONG_AGO) -> list[Event]:
    """All that is kept of a job that was Done."""
    times = (began + timedelta(seconds=number) for number in range(100))
    file = StoredFile("events", "file:///se/events", 5, "adler32:00000000")
    return [
        JobAccepted(job_id, attempt, next(times), {"executable": "/bin/true", "job_id": job_id}),
        StageInStarted(job_id, attempt, next(times), "/somewhere", "boot:17"),
        FileStagedIn(job_id, attempt, next(times), file),
        StageInEnded(job_id, attempt, next(times)),
        PayloadPrepared(job_id, attempt, next(times), ("/bin/true",), {"PATH": "/bin"}),
        SlotGranted(job_id, attempt, next(times), 1, None),
        PayloadStarted(job_id, attempt, next(times), 4711, 12, "session"),
        PayloadExited(job_id, attempt, next(times), PayloadOutcome(0, None, 1.0, 0.5, 1000)),
        ComputingEnded(job_id, attempt, next(times), None),
        StageOutStarted(job_id, attempt, next(times)),
        JobFinished(job_id, attempt, next(times), Status.DONE, None),
    ]
