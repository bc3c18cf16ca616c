"""Reports of a journal's jobs that no server has taken yet, for `loadmaster pending`. An agent has them for itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio

from loadmaster.commands.reporting import OUTBOX
from loadmaster.diracx.outbox import Filed, FileOutbox, ParameterReport, Report, StatusReport


def read_unsent(directory: Path) -> Sequence[Filed]:
    """Those that wait in the journal's directory. Raises `RuntimeFault` while an agent has them."""
    path = directory / OUTBOX

    async def load() -> Sequence[Filed]:
        async with FileOutbox(path) as outbox:
            return (await outbox.load()).filed

    return anyio.run(load) if path.exists() else ()


def drop_unsent(directory: Path, numbers: Iterable[int]) -> None:
    """Have nobody send these. Raises `RuntimeFault` as above."""

    async def drop() -> None:
        async with FileOutbox(directory / OUTBOX) as outbox:
            await outbox.drop(numbers)

    anyio.run(drop)


def name_of(filed: Filed) -> str:
    """What it is called among what is pending."""
    return f"r{filed.number}"


def told(report: Report) -> str:
    """What is still to be said of a job, in a line."""
    match report:
        case StatusReport(job, time, said):
            words = ", ".join(filter(None, (said.status, said.minor, said.application)))
            return f"tell that job {job} is {words}, since {time:%Y-%m-%d %H:%M:%S} UTC"
        case ParameterReport(job, parameters):
            return f"tell of job {job}: {', '.join(sorted(parameters))}"
        case _:
            return f"tell that job {report.job} is to run again"


def facts(filed: Filed) -> Mapping[str, Any]:
    """The same for programs."""
    since = filed.report.time.isoformat() if isinstance(filed.report, StatusReport) else None
    words = {"operation": name_of(filed), "job_id": str(filed.report.job), "kind": "report"}
    return {**words, "what": told(filed.report), "since": since}
