"""What a journal costs: jobs of /bin/true and of one second, so many at once, with and without; and how soon it is read.

    python benchmarks/journal.py [--jobs 300] [--rounds 5] [--at-once 1 10 100] [--on DIRECTORY] [--quick] [--json]

The journal is on the file system of `--on` (the temporary directory); what a sync takes there is told, for all depends on
it. Every event of every job is synced before anybody is told of it. The last lines: a journal with 100,000 jobs that have
ended and 1,000 that have not, until the 1,000 can be gone on with; and how many events a second it takes by itself.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import anyio
from _bench import Cell, Report, Spread, interleave

from loadmaster import JobDescription, JobHandle, Ledger, Node, Site, open_transfers
from loadmaster.events import (
    ComputingEnded,
    Event,
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
from loadmaster.journal import open_journal
from loadmaster.logbook import Logbook, Record
from loadmaster.result import PayloadOutcome, Status

FINISHED, OPEN = 100_000, 1_000


def life(job_id: str, events: int = 10) -> list[Event]:
    """What a job of one payload and no files leaves."""
    now, env = datetime.now(UTC), {f"VARIABLE_{number}": "value" for number in range(20)}
    return [
        JobAccepted(job_id, 1, now, {"executable": "/bin/true", "job_id": job_id, "environment": env}),
        StageInStarted(job_id, 1, now, f"/scratch/{job_id}", "b3cf8f3e-4a7b-4f5f-9a39-0a6a6a0a8f5e:4711"),
        StageInEnded(job_id, 1, now),
        PayloadPrepared(job_id, 1, now, ("/bin/true",), env),
        SlotGranted(job_id, 1, now, 1, 2000),
        PayloadStarted(job_id, 1, now, 4711, 123456, "pid-namespace", "c"),
        PayloadExited(job_id, 1, now, PayloadOutcome(0, None, 1.0, 0.5, 1_000_000)),
        ComputingEnded(job_id, 1, now, None),
        StageOutStarted(job_id, 1, now),
        JobFinished(job_id, 1, now, Status.DONE, None),
    ][:events]


async def run(jobs: int, at_once: int, seconds: float, scratch: Path, journal: Path | None) -> float:
    """Seconds that the jobs took."""
    payload: dict[str, Any] = {"executable": "/bin/true"}
    if seconds:
        payload = {"executable": "/bin/sleep", "arguments": [str(seconds)]}
    work = [JobDescription(**payload) for _ in range(jobs)]
    async with (
        open_transfers(Site()) as transfers,
        Node(ledger=Ledger(at_once), transfers=transfers, root=scratch, journal=journal, ahead=at_once) as node,
    ):
        began = time.perf_counter()
        for job in work:
            node.submit(job)
        await node.wait_idle()
        took = time.perf_counter() - began
        assert node.statistics().ended["Done"] == jobs
    return took


def measured(jobs: int, at_once: int, seconds: float, disk: Path, kept: bool) -> float:
    with tempfile.TemporaryDirectory(dir=disk) as place:
        root = Path(place) / "scratch"
        root.mkdir()
        return anyio.run(run, jobs, at_once, seconds, root, Path(place) / "journal" if kept else None)


async def events_a_second(disk: Path, at_once: int, jobs: int) -> float:
    """Through handles, as jobs record them."""
    count = 0
    with tempfile.TemporaryDirectory(dir=disk) as place:
        async with open_journal(Path(place)) as journal:

            async def one(numbers: list[int]) -> None:
                nonlocal count
                for number in numbers:
                    handle = JobHandle(journal)
                    handle.open(str(number), 1)
                    for event in life(str(number)):
                        facts = [getattr(event, each.name) for each in fields(event)[3:]]
                        await handle.record(type(event), *facts)
                        count += 1

            began = time.perf_counter()
            async with anyio.create_task_group() as group:
                for lane in range(at_once):
                    group.start_soon(one, list(range(lane, jobs, at_once)))
            return count / (time.perf_counter() - began)


def recovery(disk: Path) -> tuple[float, float]:
    """Seconds until the file is open and the histories are there; and until a node has them all as handles."""
    with tempfile.TemporaryDirectory(dir=disk) as place:
        book = Logbook.open(Path(place))
        for start in range(0, FINISHED, 1000):
            book.add([[Record.of(event) for event in life(str(number))] for number in range(start, start + 1000)])
        book.add([[Record.of(event) for event in life(f"open{number}", 4)] for number in range(OPEN)])
        book.close()

        async def again() -> tuple[float, float]:
            began = time.perf_counter()
            async with open_journal(Path(place)) as journal:
                histories = await journal.open_jobs()
                read = time.perf_counter() - began
                for history in histories:
                    JobHandle.resumed(journal, history.events)
                assert len(histories) == OPEN
                assert (await journal.ended())["Done"] == FINISHED
                return read, time.perf_counter() - began

        return anyio.run(again)


def sync_seconds(disk: Path) -> float:
    with tempfile.NamedTemporaryFile(dir=disk) as file:
        times = []
        for number in range(200):
            os.pwrite(file.fileno(), b"x" * 4096, number * 4096)
            began = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 10, 100])
    parser.add_argument("--on", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--quick", action="store_true", help="100 jobs, one round")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    words = parser.parse_args()
    if words.quick:
        words.jobs, words.rounds = 100, 1
    report = Report(as_json=words.json)
    report.table("a sync of one page, ms", ["", "median of 200"], [["there", (sync_seconds(words.on) * 1000, 2)]])
    rows: list[list[Cell]] = []
    for at_once in words.at_once:
        for seconds in (0.0, 1.0):
            jobs = at_once * 2 if seconds else min(words.jobs, at_once * 50)
            if seconds and at_once == 1:
                jobs = 4
            found = interleave(
                {
                    name: partial(measured, jobs, at_once, seconds, words.on, name == "with")
                    for name in ("without", "with")
                },
                words.rounds,
            )
            without, kept = (Spread.of([jobs / took for took in found[name]]) for name in ("without", "with"))
            ratio = median(b / a for a, b in zip(found["with"], found["without"], strict=True))
            extra = median((a - b) * at_once / jobs for a, b in zip(found["with"], found["without"], strict=True))
            what = "sleep 1" if seconds else "true"
            cost: list[Cell] = [((1 - ratio) * 100, 1), (extra * 1000, 2)]
            rows.append([str(at_once), what, (without, 1), (kept, 1), *cost])
    heads = ["at once", "payload", "jobs/s without", "jobs/s with", "cost, %", "ms more a job"]
    report.table("jobs of a node", heads, rows)
    rows = [
        [
            str(at_once),
            (Spread.of([anyio.run(events_a_second, words.on, at_once, 50 * at_once) for _ in range(3)]), 0),
        ]
        for at_once in words.at_once
    ]
    report.table("the journal alone", ["jobs at once", "events/s"], rows)
    read, resumed = recovery(words.on)
    report.table(
        f"{FINISHED:,} jobs that have ended and {OPEN:,} open, s", ["", "read", "gone on with"],
        [["recovery", (read, 2), (resumed, 2)]],
    )  # fmt: skip
    report.close()


if __name__ == "__main__":
    main()
