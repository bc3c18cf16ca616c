"""Results: values that say how a job ended, for programs and for people."""

from __future__ import annotations

import pytest

from loadmaster.errors import JobError, JobWasKilled, StagingFailed
from loadmaster.result import Failure, JobResult, Phase, Status


@pytest.mark.parametrize(
    ("kind", "raised"),
    [
        ("JobWasKilled", JobWasKilled),
        ("StagingFailed", StagingFailed),
        ("NotFound", JobError),
        ("timedelta", JobError),
        ("TheirOwnError", JobError),
    ],
)
def test_a_failure_can_be_raised_again_whatever_a_community_called_it(kind: str, raised: type[JobError]) -> None:
    """A community's own `NotFound(JobError)` came back as our `NotFound`, whose constructor wants a URL: TypeError."""
    result = JobResult("7", 1, Status.FAILED, Failure(kind, "because", Phase.PAYLOAD), None)
    with pytest.raises(raised, match="because") as caught:
        result.raise_for_status()
    assert type(caught.value) is raised
    JobResult("7", 1, Status.DONE, None, None).raise_for_status()
