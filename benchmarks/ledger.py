"""What a slot costs while many wait for one.

    python benchmarks/ledger.py [--rounds 7] [--quick] [--json]

The decision alone: microseconds for one who joins the line and leaves it again, and for one who leaves his cores to the
next. The sizes of the requests are few, or all different, so that none fits and as many as ever are looked at. Then the
whole lease: so many tasks ask at once for 64 cores, and each leaves at once.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count

import anyio
from _bench import Cell, Report, Spread, interleave

from loadmaster import JobDescription, Ledger
from loadmaster.line import Line
from loadmaster.topology import Cpu

CORES = 64
TIMES = 1000
WAITING = (0, 100, 1_000, 10_000)
CPUS = [Cpu(number, node=number // 16, core=number // 2) for number in range(CORES)]


def join_and_leave(waiting: int, sizes: int) -> Callable[[], float]:
    """One more waits, and gives up: for cores of which one is free, and too little memory beside it."""
    line = Line((CORES, 1000), patience=CORES)
    line.request((CORES - 1, 1000), priority=9)
    for number in range(waiting):
        line.request((1 + number % 3, 1 + number % sizes), priority=number % 2)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(TIMES):
            line.give_back(line.request((1, 2), priority=1))
        return (time.perf_counter() - began) / TIMES * 1e6

    return run


def pass_on(waiting: int, sizes: int) -> Callable[[], float]:
    """The next one is granted what somebody returns, and a new one joins the end of the line."""
    line = Line((CORES, 10**9), patience=CORES)
    number = count()
    tickets = deque(line.request((1, 1 + next(number) % sizes)) for _ in range(CORES + waiting))

    def run() -> float:
        began = time.perf_counter()
        for _ in range(TIMES):
            line.give_back(tickets.popleft())
            tickets.append(line.request((1, 1 + next(number) % sizes)))
        return (time.perf_counter() - began) / TIMES * 1e6

    return run


def lease(jobs: int) -> Callable[[], float]:
    """All at once; microseconds of each, its task included."""
    job = JobDescription(executable="/bin/true")

    async def main() -> None:
        ledger = Ledger(CORES, cpus=CPUS)

        async def one() -> None:
            async with ledger.lease(job):
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for _ in range(jobs):
                group.start_soon(one)

    def run() -> float:
        began = time.perf_counter()
        anyio.run(main)
        return (time.perf_counter() - began) / jobs * 1e6

    return run


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    report = Report(as_json=options.json)
    rows: list[list[Cell]] = []
    for what, make in (("join and leave", join_and_leave), ("pass on", pass_on)):
        for sizes, name in ((3, "few sizes"), (10**6, "all different")):
            found = interleave({str(waiting): partial(make(waiting, sizes)) for waiting in WAITING}, rounds)
            rows.append([f"{what}, {name}", *((Spread.of(found[str(waiting)]), 1) for waiting in WAITING)])
    report.table("us for each, so many waiting", ["", *map(str, WAITING)], rows)
    found = interleave({str(jobs): lease(jobs) for jobs in WAITING[1:]}, rounds)
    rows = [["lease", *((Spread.of(found[str(jobs)]), 1) for jobs in WAITING[1:])]]
    report.table(f"us for each, so many at once on {CORES} cores", ["", *map(str, WAITING[1:])], rows)
    report.close()


if __name__ == "__main__":
    main()
