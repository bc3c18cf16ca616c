"""What the runtime costs: per job, per import, and beside a payload that prints a lot.

    python benchmarks/overhead.py [--quick] [--json]

All variants run in this process and in turns. CPU is this process's own, all of its threads, none of its children's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, Final

import anyio
from _bench import Spread, interleave, machine, print_machine, print_table

from loadmaster import Coordinator, JobDescription, JobExecutionCoordinator, PayloadSpec, run_job

TRUE: Final = "/bin/true"

SHELL: Final = ("/bin/sh", "-c", TRUE)
"""How a job's command is executed. The shell is a program more, and shows in every comparison with bare ones."""

WARM_UP: Final = 3
"""Jobs of each round that are not counted: the first ones of an event loop start its threads."""

PEEK_EVERY_SECONDS: Final = 0.02
"""Far more often than anybody looks, so that even a short payload gives a median."""

LINE: Final = "event 0000 of the simulation: 17 tracks, 3 vertices, nothing to see here"

BACKENDS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "asyncio": ("asyncio", {"use_uvloop": False}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    rounds: int
    jobs_per_round: int
    imports: int
    output_rounds: int
    output_bytes: int


FULL: Final = Size(rounds=10, jobs_per_round=100, imports=15, output_rounds=5, output_bytes=10**9)
QUICK: Final = Size(rounds=5, jobs_per_round=20, imports=5, output_rounds=3, output_bytes=10**8)


@dataclass(frozen=True, slots=True)
class Cost:
    """What something cost, once."""

    wall_seconds: float
    cpu_seconds: float


@contextmanager
def metered(costs: list[Cost]) -> Iterator[None]:
    """Add what the block costs."""
    cpu, wall = _own_cpu(), time.perf_counter()
    yield
    costs.append(Cost(time.perf_counter() - wall, _own_cpu() - cpu))


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def run_on(backend: str, function: Callable[[], Awaitable[Cost]]) -> Cost:
    """Run a coroutine function on one of the three event loops."""
    name, options = BACKENDS[backend]
    return anyio.run(function, backend=name, backend_options=options)


def present(backend: str) -> bool:
    """Whether the event loop is installed here."""
    return find_spec(backend) is not None


# -- /bin/true, one after the other ------------------------------------------------------------------------------


async def jobs(size: Size, root: Path) -> Cost:
    """One round of `run_job`: a work directory with two log files, events in memory."""
    costs: list[Cost] = []

    async def some(number: int) -> None:
        for _ in range(number):
            result = await run_job(JobDescription(executable=TRUE), root=root)
            result.raise_for_status()

    await some(WARM_UP)
    with metered(costs):
        await some(size.jobs_per_round)
    return costs[0]


async def bare_asyncio(size: Size, *argv: str) -> Cost:
    """asyncio's own subprocesses, in no directory, all three descriptors on /dev/null."""
    costs: list[Cost] = []

    async def some(number: int) -> None:
        null = asyncio.subprocess.DEVNULL
        for _ in range(number):
            process = await asyncio.create_subprocess_exec(*argv, stdin=null, stdout=null, stderr=null)
            await process.wait()

    await some(WARM_UP)
    with metered(costs):
        await some(size.jobs_per_round)
    return costs[0]


def blocking(size: Size, one: Callable[[], object]) -> Cost:
    """One round of something that needs no event loop."""
    costs: list[Cost] = []
    for _ in range(WARM_UP):
        one()
    with metered(costs):
        for _ in range(size.jobs_per_round):
            one()
    return costs[0]


def bare_run(*argv: str) -> None:
    """`subprocess.run`, all three descriptors on /dev/null."""
    null = subprocess.DEVNULL
    subprocess.run(argv, stdin=null, stdout=null, stderr=null, check=True)


def by_hand(root: Path, numbers: Iterator[int], *argv: str) -> None:
    """The least that does what a job does: a directory, two files, a process in it, waited for; the directory removed."""
    directory = root / f"by-hand-{next(numbers)}"
    directory.mkdir()
    with open(directory / "std.out", "wb") as out, open(directory / "std.err", "wb") as err:
        process = subprocess.Popen(
            argv, cwd=directory, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        pidfd = os.pidfd_open(process.pid)
        select.select([pidfd], [], [])
        os.close(pidfd)
        process.wait()
    shutil.rmtree(directory)


def measure_jobs(size: Size, root: Path) -> dict[str, Any]:
    """Milliseconds per job of every variant, and how `run_job` compares."""
    numbers = count()
    variants: dict[str, Callable[[], Cost]] = {
        f"run_job, {backend}": partial(run_on, backend, partial(jobs, size, root))
        for backend in BACKENDS
        if present(backend)
    }
    variants |= {
        "bare asyncio": partial(run_on, "asyncio", partial(bare_asyncio, size, TRUE)),
        "bare asyncio, sh -c": partial(run_on, "asyncio", partial(bare_asyncio, size, *SHELL)),
        "subprocess.run": partial(blocking, size, partial(bare_run, TRUE)),
        "by hand": partial(blocking, size, partial(by_hand, root, numbers, TRUE)),
        "by hand, sh -c": partial(blocking, size, partial(by_hand, root, numbers, *SHELL)),
    }
    per_job = 1000 / size.jobs_per_round
    rows = {
        name: {
            "wall_ms": Spread.of([cost.wall_seconds * per_job for cost in costs]),
            "cpu_ms": Spread.of([cost.cpu_seconds * per_job for cost in costs]),
        }
        for name, costs in interleave(variants, size.rounds).items()
    }
    ours = {name: row["wall_ms"].median for name, row in rows.items() if name.startswith("run_job")}
    peers = {name: row["wall_ms"].median for name, row in rows.items() if name not in ours}
    ratios = {name: {peer: wall / theirs for peer, theirs in peers.items()} for name, wall in ours.items()}
    return {"jobs": size.rounds * size.jobs_per_round, "variants": rows, "wall_ratios": ratios}


# -- import ------------------------------------------------------------------------------------------------------


def measure_import(size: Size, byte_code: Path) -> dict[str, Any]:
    """Milliseconds of fresh interpreters, and what the import spends them on. Page cache and byte code are warm."""
    # Byte code in a place of its own: a source tree where none may be written would be compiled at each start, which
    # an installed package is not (seen: 30 ms more).
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env["PYTHONPYCACHEPREFIX"] = str(byte_code)
    _start("import loadmaster", env)
    bare, full = partial(_start, "pass", env), partial(_start, "import loadmaster", env)
    found = interleave({"bare": bare, "with": full}, size.imports)
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(size.imports):
        for module, self_ms in _import_times(env):
            times[module].append(self_ms)
    modules = {module: median(values) for module, values in times.items()}
    packages: dict[str, float] = defaultdict(float)
    for module, self_ms in modules.items():
        package = module.partition(".")[0]
        packages["standard library" if package in sys.stdlib_module_names else package] += self_ms
    return {
        "interpreter_ms": Spread.of(found["bare"]),
        "with_import_ms": Spread.of(found["with"]),
        "import_ms": Spread.of([full - bare for full, bare in zip(found["with"], found["bare"], strict=True)]),
        "packages_self_ms": _largest(packages),
        "modules_self_ms": _largest(modules),
    }


def _start(code: str, env: Mapping[str, str]) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    return (time.perf_counter() - begun) * 1000


def _import_times(env: Mapping[str, str]) -> list[tuple[str, float]]:
    """Modules and the milliseconds each took for itself, without what it imported. Being watched, it all takes longer."""
    command = [sys.executable, "-X", "importtime", "-c", "import loadmaster"]
    report = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stderr
    fields = [line.removeprefix("import time:").split("|") for line in report.splitlines()[1:]]
    return [(module.strip(), int(self_us) / 1000) for self_us, _, module in fields]


def _largest(figures: Mapping[str, float]) -> dict[str, float]:
    return dict(sorted(figures.items(), key=lambda item: -item[1])[:8])


# -- a payload that prints ---------------------------------------------------------------------------------------


def measure_output(size: Size, root: Path) -> dict[str, Any]:
    """What the runtime spends beside a payload that prints as fast as it can, and how long a look at its output takes."""
    command = f"yes '{LINE}' | head -c {size.output_bytes}"
    peeks: list[float] = []

    class Metering(JobExecutionCoordinator):
        """Meters from just before the payload to just after: making and removing a gigabyte is not the runtime's."""

        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            self.costs: list[Cost] = []
            self.meter = metered(self.costs)
            self.meter.__enter__()
            return PayloadSpec(command=command, env=exeEnv)

        async def postProcess(self) -> None:
            self.meter.__exit__(None, None, None)
            await self.job.report("cost", json.dumps(asdict(self.costs[0])))

    class Peeking(Metering):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            self.job.start_soon(self.look)
            return await super().preProcess(command, exeEnv)

        async def look(self) -> None:
            while True:
                begun = time.perf_counter()
                if await self.job.peek():
                    peeks.append((time.perf_counter() - begun) * 1000)
                await anyio.sleep(PEEK_EVERY_SECONDS)

    async def fly(coordinator: type[Coordinator]) -> Cost:
        job = JobDescription(executable="/bin/sh", arguments=["-c", command])
        result = await run_job(job, coordinator=coordinator, root=root)
        result.raise_for_status()
        return Cost(**json.loads(result.parameters["cost"]))

    def no_runtime() -> Cost:
        costs: list[Cost] = []
        with tempfile.TemporaryFile(dir=root) as out, metered(costs):
            subprocess.run(["/bin/sh", "-c", command], stdin=subprocess.DEVNULL, stdout=out, check=True)
        return costs[0]

    variants: dict[str, Callable[[], Cost]] = {
        "run_job": partial(run_on, "asyncio", partial(fly, Metering)),
        f"run_job, peeking every {PEEK_EVERY_SECONDS * 1000:.0f} ms": partial(run_on, "asyncio", partial(fly, Peeking)),
        "subprocess.run into a file": no_runtime,
    }
    rows = {
        name: {
            "wall_seconds": Spread.of([cost.wall_seconds for cost in costs]),
            "cpu_seconds": Spread.of([cost.cpu_seconds for cost in costs]),
        }
        for name, costs in interleave(variants, size.output_rounds).items()
    }
    return {"bytes": size.output_bytes, "variants": rows, "peek_ms": Spread.of(peeks), "peeks": len(peeks)}


# -- telling -----------------------------------------------------------------------------------------------------


def tell(found: Mapping[str, Any]) -> None:
    """The tables."""
    print_machine(found["machine"])
    flown = found["jobs"]
    print_table(
        f"{flown['jobs']} x {TRUE}, one after the other: ms per job, median (min..max) of the rounds",
        ["", "wall", "own CPU"],
        [(name, row["wall_ms"].show(), row["cpu_ms"].show()) for name, row in flown["variants"].items()],
    )
    print("  run_job and `by hand` write to two files in a directory of the job's; the others to /dev/null.")
    print("  bare asyncio is create_subprocess_exec and wait; by hand is mkdir, Popen, pidfd, rmtree.")
    peers = list(next(iter(flown["wall_ratios"].values())))
    print_table(
        "wall time, as a multiple of (aim: at most 2 times the first)",
        ["", *peers],
        [(name, *(f"{row[peer]:.2f}" for peer in peers)) for name, row in flown["wall_ratios"].items()],
    )
    imported = found["import"]
    print_table(
        "import loadmaster, fresh interpreters: ms, median (min..max) (aim: below 200)",
        ["bare interpreter", "with the import", "the import"],
        [[imported[key].show(0) for key in ("interpreter_ms", "with_import_ms", "import_ms")]],
    )
    pairs = zip(imported["packages_self_ms"].items(), imported["modules_self_ms"].items(), strict=True)
    print_table(
        "where it goes: own ms, the interpreter's start included (-X importtime)",
        ["package", "ms", "  module", "ms"],
        [(package, f"{ms:.1f}", f"  {module}", f"{own:.1f}") for (package, ms), (module, own) in pairs],
    )
    printed = found["output"]
    print_table(
        f"a payload that prints {printed['bytes'] / 1e6:,.0f} MB: seconds, median (min..max)",
        ["", "wall", "own CPU"],
        [(name, row["wall_seconds"].show(3), row["cpu_seconds"].show(4)) for name, row in printed["variants"].items()],
    )
    print(f"  one peek of {printed['peeks']}: {printed['peek_ms'].show()} ms")


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of it: to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="loadmaster-overhead-") as directory:
        root = Path(directory)
        found = {
            "machine": machine(),
            "jobs": measure_jobs(size, root),
            "import": measure_import(size, root / "byte-code"),
            "output": measure_output(size, root),
        }
    if options.json:
        json.dump(found, sys.stdout, default=asdict, indent=2)
        print()
    else:
        tell(found)


if __name__ == "__main__":
    main()
