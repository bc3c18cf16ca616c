"""What a node costs as jobs become many.

    python benchmarks/node.py [--slots 64] [--jobs 10000] [--quick] [--json]

    fill      a source that takes 50 ms to answer: until every slot has a payload (aim: below 2 s for 64)
    crowd     10,000 jobs submitted, as many payloads of `sleep` as there are slots: memory of each, and how late the event
              loop is for somebody else
    growth    100, 1,000, 10,000 jobs of /bin/true submitted at once: what each costs (aim: the same)

Each in a process of its own. CPU is the process's own, all of its threads, none of its children's; memory is what is
resident here, the payloads' shims apart.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, Final

import anyio
from _bench import machine, print_machine, print_table

from loadmaster import JobDescription, Ledger, Node
from loadmaster.events import PayloadStarted

ANSWER_SECONDS: Final = 0.05
BEAT_SECONDS: Final = 0.005
CROWD_SECONDS: Final = 5.0
PAGE: Final = os.sysconf("SC_PAGESIZE")


def resident_bytes() -> int:
    """What of this process is in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def own_cpu() -> float:
    """Of this process, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def sleeper(number: int) -> JobDescription:
    """A payload that stays."""
    return JobDescription(job_id=f"sleep{number}", executable="/bin/sleep", arguments="600")


class FarAway:
    """A workload system that has as many jobs as one likes, and takes its time."""

    def __init__(self) -> None:
        self.given = 0

    async def next(self, free: int) -> JobDescription | None:
        """One more, after a while."""
        await anyio.sleep(ANSWER_SECONDS)
        self.given += 1
        return sleeper(self.given)

    async def accepted(self, job: JobDescription) -> None:
        """Nothing to do."""

    async def give_back(self, job: JobDescription) -> None:
        """Nothing to do."""


async def computing(node: Node, wanted: int) -> None:
    """Until so many payloads run."""
    running = 0
    async for event in node.events():
        running += isinstance(event, PayloadStarted)
        if running == wanted:
            return


async def fill(slots: int, jobs: int, root: Path) -> dict[str, float]:
    """Seconds until every slot has a payload."""
    async with Node(ledger=Ledger(slots), root=root) as node, anyio.create_task_group() as group:
        began = time.perf_counter()
        group.start_soon(node.serve, FarAway())
        await computing(node, slots)
        took = time.perf_counter() - began
        node.begin_drain()
        node.kill_all("measured", hurry=True)
    return {"seconds": took}


async def crowd(slots: int, jobs: int, root: Path) -> dict[str, float]:
    """Bytes of a waiting and of a running job, and how late the loop is: as they start, and then."""
    late: list[float] = []

    async def beat() -> None:
        while True:
            due = anyio.current_time() + BEAT_SECONDS
            await anyio.sleep_until(due)
            late.append(anyio.current_time() - due)

    async with Node(ledger=Ledger(slots), root=root, ahead=1) as node, anyio.create_task_group() as group:
        await run_some(node, 2 * slots)  # threads, and what is imported late
        before = resident_bytes()
        descriptions = [sleeper(number) for number in range(jobs)]
        described = resident_bytes()
        began = time.perf_counter()
        for job in descriptions:
            node.submit(job)
        submitting = time.perf_counter() - began
        submitted = resident_bytes()
        group.start_soon(beat)
        await computing(node, slots)
        starting, late[:] = sorted(late), []
        running = resident_bytes()
        await anyio.sleep(CROWD_SECONDS)
        then = sorted(late)
        node.begin_drain()
        node.kill_all("measured", hurry=True)
        group.cancel_scope.cancel()
    return {
        "description_bytes": (described - before) / jobs,
        "waiting_bytes": (submitted - described) / jobs,
        "running_bytes": (running - submitted) / slots,
        "submit_us": 1e6 * submitting / jobs,
        "late_starting_p99_ms": 1000 * starting[-1 - len(starting) // 100],
        "late_p50_ms": 1000 * median(then),
        "late_p99_ms": 1000 * then[-1 - len(then) // 100],
        "late_max_ms": 1000 * then[-1],
    }


async def run_some(node: Node, count: int) -> None:
    """So many of /bin/true, to their end."""
    handles = [node.submit(JobDescription(executable="/bin/true")) for _ in range(count)]
    for handle in handles:
        (await handle.wait()).raise_for_status()


async def growth(slots: int, jobs: int, root: Path) -> dict[str, float]:
    """Milliseconds a job, when so many are submitted at once."""
    async with Node(ledger=Ledger(os.cpu_count() or 1), root=root) as node:
        await run_some(node, 50)
        cpu, began = own_cpu(), time.perf_counter()
        await run_some(node, jobs)
        return {
            "cpu_ms": 1000 * (own_cpu() - cpu) / jobs,
            "wall_ms": 1000 * (time.perf_counter() - began) / jobs,
            "resident_mb": resident_bytes() / 1e6,
        }


PARTS: Final = {"fill": fill, "crowd": crowd, "growth": growth}


def apart(part: str, slots: int, jobs: int) -> dict[str, float]:
    """One part, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--part", part, "--slots", str(slots), "--jobs", str(jobs)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    return found


def tell(found: Mapping[str, Any]) -> None:
    """The tables."""
    print_machine(found["machine"])
    crowd = found["crowd"]
    print(f"\n{found['slots']} slots filled from empty in {found['fill']['seconds']:.2f} s, 50 ms an answer")
    print_table(
        f"{found['jobs']} jobs submitted, {found['slots']} running",
        ["", ""],
        [
            ("a description, bytes", f"{crowd['description_bytes']:,.0f}"),
            ("a waiting job beside it, bytes", f"{crowd['waiting_bytes']:,.0f}"),
            ("a running job, bytes", f"{crowd['running_bytes']:,.0f}"),
            ("submit, us", f"{crowd['submit_us']:.0f}"),
            ("loop late as they start, 99 %, ms", f"{crowd['late_starting_p99_ms']:.2f}"),
            ("loop late then, 50 %, ms", f"{crowd['late_p50_ms']:.2f}"),
            ("loop late then, 99 %, ms", f"{crowd['late_p99_ms']:.2f}"),
            ("loop late then, at most, ms", f"{crowd['late_max_ms']:.2f}"),
        ],
    )
    print_table(
        "/bin/true, all submitted at once: ms a job",
        ["jobs", "own CPU", "wall", "resident, MB"],
        [
            (f"{count:,}", f"{row['cpu_ms']:.2f}", f"{row['wall_ms']:.2f}", f"{row['resident_mb']:.0f}")
            for count, row in found["growth"]
        ],
    )


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="a tenth of it: to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loadmaster-node-") as directory, suppress(BrokenPipeError):
        if options.part:
            print(json.dumps(anyio.run(PARTS[options.part], options.slots, options.jobs, Path(directory))))
            return
        jobs = options.jobs // 10 if options.quick else options.jobs
        found = {
            "machine": machine(), "slots": options.slots, "jobs": jobs,
            "fill": apart("fill", options.slots, jobs), "crowd": apart("crowd", options.slots, jobs),
            "growth": [(count, apart("growth", options.slots, count)) for count in (jobs // 100, jobs // 10, jobs)],
        }  # fmt: skip
        if options.json:
            json.dump(found, sys.stdout, indent=2)
            print()
        else:
            tell(found)


if __name__ == "__main__":
    main()
