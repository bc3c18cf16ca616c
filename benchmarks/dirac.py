"""The same jobs by DIRAC's JobWrapper and by ours: how long they take, and what they take of the node.

    python benchmarks/dirac.py [--jobs 20] [--slots 4] [--seconds 2] [--rounds 3] [--quick] [--json]

DIRAC's is run as `tests/parity` runs it: its own template, a process for each job, as many at once as there are slots, its
watchdog as it comes. Its services answer at once, from its own memory, its storage is a local directory, and it does not
load the libraries of its connections (M2Crypto, diracx): its times and its memory are understated. Ours: one `Node` in one
process. A job prints a line, has its two logs in the sandbox and writes one file, which is stored and registered. What is
measured of either is a tree of processes, looked at five times a second, payloads included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import anyio
from _bench import Spread, interleave, machine, print_machine, print_table

from loadmaster import ComputingElement, JobDescription, Ledger, Node, Site
from loadmaster.dirac import DiracCoordinator

PARITY = Path(__file__).resolve().parents[1] / "tests" / "parity"
LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Run:
    """What one round of jobs took."""

    makespan: float
    processes: float
    """At once, per slot: the median of all looks while all slots were in use."""
    memory_mb: float
    """The same of proportional sizes (PSS), in 10**6 bytes."""
    cpu_seconds: float
    """Per job, of everything but the payload, which sleeps."""


# -- the trees of processes ----------------------------------------------------------------------------------------


def tree(pid: int) -> Iterator[int]:
    """A process and those below it, as they are now."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text(encoding="ascii").split():
                yield from tree(int(child))


def pss_bytes(pid: int) -> int:
    """The proportional size of a process; 0 when it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class Looks:
    """Looks at the processes below a function's `roots` while it is open, in a thread."""

    def __init__(self, roots: Callable[[], list[int]], slots: int) -> None:
        self._roots, self._slots, self._over = roots, slots, Event()
        self._thread = Thread(target=self._run)
        self.processes: list[int] = []
        self.memory: list[int] = []

    def __enter__(self) -> Looks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(LOOK_SECONDS):
            found = {pid for root in self._roots() for pid in tree(root)}
            self.processes.append(len(found))
            self.memory.append(sum(map(pss_bytes, found)))

    def typical(self, values: list[int]) -> float:
        """The median of the looks in the middle half of the time, when all slots are in use, per slot."""
        middle = values[len(values) // 4 : max(3 * len(values) // 4, 1)]
        return median(middle or [0]) / self._slots


# -- the jobs ------------------------------------------------------------------------------------------------------


def words(number: int, seconds: float) -> dict[str, Any]:
    """One job, in DIRAC's keys."""
    return {
        "JobID": 1000 + number, "JobName": "benchmark", "JobType": "User", "Owner": "someone", "OwnerGroup": "vo_user",
        "VirtualOrganization": "vo", "Executable": "/bin/sh",
        "Arguments": f"-c 'echo begun; sleep {seconds}; echo done > out.root'",
        "StdOutput": "std.out", "StdError": "std.err",
        "OutputSandbox": ["std.out", "std.err"], "OutputData": ["out.root"], "OutputSE": ["SE-USER-A"],
    }  # fmt: skip


def by_dirac(python: Path, jobs: int, slots: int, seconds: float) -> Run:
    """As a pool of slots does it: a wrapper's process for each job."""
    with tempfile.TemporaryDirectory() as directory:
        running: set[int] = set()

        def one(number: int) -> None:
            base = Path(directory) / str(number)
            base.mkdir()
            case = {"name": str(number), "job": words(number, seconds), "ce": {"Site": "LCG.Example.org"}}
            case["wrapper"] = {"CleanUpFlag": "True"}
            (base / "case").write_text(json.dumps(case), encoding="utf-8")
            env = {"PATH": os.defpath, "HOME": str(base), "PARITY_SCRATCH": str(base / "scratch")}
            command = [str(python), str(PARITY / "driver.py"), str(base / "case"), str(base / "answer")]
            with (base / "log").open("w") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as wrapper:
                running.add(wrapper.pid)
                wrapper.wait()
                running.discard(wrapper.pid)
            answer = json.loads((base / "answer").read_text(encoding="utf-8"))
            assert answer["statuses"][-1][:2] == ["Done", "Execution Complete"], answer["statuses"]

        before = os.times()
        began = time.perf_counter()
        with Looks(lambda: list(running), slots) as looks, ThreadPoolExecutor(slots) as pool:
            list(pool.map(one, range(jobs)))
        makespan = time.perf_counter() - began
        after = os.times()
        cpu = (after.children_user + after.children_system - before.children_user - before.children_system) / jobs
        return Run(makespan, looks.typical(looks.processes), looks.typical(looks.memory) / 1e6, cpu)


def by_us(jobs: int, slots: int, seconds: float) -> Run:
    """One node, in one process of its own."""
    before = os.times()
    began = time.perf_counter()
    command = [
        sys.executable,
        __file__,
        "--node",
        "--jobs",
        str(jobs),
        "--slots",
        str(slots),
        "--seconds",
        str(seconds),
    ]
    with subprocess.Popen(command) as process:
        with Looks(lambda: [process.pid], slots) as looks:
            process.wait()
        assert process.returncode == 0
    makespan = time.perf_counter() - began
    after = os.times()
    cpu = (after.children_user + after.children_system - before.children_user - before.children_system) / jobs
    return Run(makespan, looks.typical(looks.processes), looks.typical(looks.memory) / 1e6, cpu)


async def node(jobs: int, slots: int, seconds: float) -> None:
    """Run all jobs, one attempt each."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        site = Site(
            catalog=str(root / "catalog.sqlite"), storage_elements={"SE-USER-A": str(root / "se")},
            sandbox_store=str(root / "sandboxes"), sandbox_format="tar.bz2",
        )  # fmt: skip
        ce = ComputingElement(site="LCG.Example.org")
        async with Node(
            ce, site=site, ledger=Ledger(slots), root=root / "work", coordinator=DiracCoordinator
        ) as running:
            handles = [running.submit(JobDescription.load(words(number, seconds))) for number in range(jobs)]
            for handle in handles:
                (await handle.wait()).raise_for_status()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a payload, which sleeps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 jobs of 0.5 s, one round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--node", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.seconds, options.rounds = 8, 0.5, 1
    if options.node:
        anyio.run(node, options.jobs, options.slots, options.seconds)
        return
    sys.path.insert(0, str(PARITY))
    from environment import VERSION, NotThere, dirac_python

    facts = machine()
    size = (options.jobs, options.slots, options.seconds)
    variants: dict[str, Callable[[], Run]] = {"loadmaster": partial(by_us, *size)}
    missing = ""
    try:
        variants[f"DIRAC {VERSION}"] = partial(by_dirac, dirac_python(), *size)
    except NotThere as reason:
        missing = f"DIRAC {VERSION}: cannot be had: {reason}"
    found = interleave(variants, options.rounds)
    waves = -(-options.jobs // options.slots)
    bound = waves * options.seconds
    if options.json:
        runs = {name: [asdict(run) for run in rounds] for name, rounds in found.items()}
        print(json.dumps({"machine": facts, "bound": bound, "runs": runs, "missing": missing}))
        return
    print_machine(facts)
    rows = []
    for name, rounds in found.items():
        makespan = Spread.of([run.makespan for run in rounds])
        beyond = Spread.of([run.makespan / waves - options.seconds for run in rounds])
        rows.append(
            (
                name, makespan.show(), f"{makespan.median / bound:.2f}", beyond.show(),
                Spread.of([run.processes for run in rounds]).show(), Spread.of([run.memory_mb for run in rounds]).show(),
                Spread.of([run.cpu_seconds for run in rounds]).show(),
            )
        )  # fmt: skip
    print_table(
        f"{options.jobs} jobs of {options.seconds} s on {options.slots} slots; bound {bound:.1f} s",
        (
            "",
            "makespan, s",
            "over the bound",
            "beyond the payload, s a job",
            "processes a slot",
            "PSS a slot, MB",
            "CPU a job, s",
        ),
        rows,
    )
    if missing:
        print(f"\n{missing}")


if __name__ == "__main__":
    main()
