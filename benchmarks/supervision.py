"""What it costs to hold, watch and end payloads, in each containment this node allows.

    python benchmarks/supervision.py [--quick] [--json]

1. ending trees of 1, 100 and 1,000 processes: from the order until nobody is left
   (aim: 50, 100 and 500 ms beyond the grace, of which these payloads need none);
2. how soon an exit is noticed while 200 payloads run (aim: under 5 ms at the 99th percentile);
3. CPU of this process for 60 s of 200 idle payloads, each looked at once a second;
4. CPU of one look at trees of 1, 10, 100 and 1,000 processes, beside the same with psutil, and with a control group;
5. memory of the runtime for each of 1, 100 and 1,000 payloads, shim included, in an interpreter of their own.

Where psutil is not installed it is, into a virtual environment that is removed afterwards. Wants some 8,000 processes
and descriptors: what the node does not allow is left out, and named.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import anyio
from _bench import Spread, interleave, machine, print_machine, print_table

from loadmaster.description import Containment, Limits, PayloadSpec
from loadmaster.errors import PayloadNotStarted
from loadmaster.payload.cgroup import Group
from loadmaster.payload.containment import shim_kind
from loadmaster.payload.hierarchies import Hierarchies, find_hierarchies
from loadmaster.payload.ready import start
from loadmaster.payload.supervise import Payload, watch
from loadmaster.payload.usage import descendants
from loadmaster.result import EndedBy, Usage
from loadmaster.workdir import Workdir, open_workdir
from loadmaster.world import BEST_FIRST, World

TREE: Final = "i=1; while [ $i -lt {count} ]; do sleep 1000 & i=$((i+1)); done; echo ready; exec sleep 1000"
KILLED: Final = (1, 100, 1000)
LOOKED_AT: Final = (1, 10, 100, 1000)
AIM_MS: Final = {1: 50, 100: 100, 1000: 500}

LOOK_SECONDS: Final = 0.3
"""So long a look is repeated for one figure: CPU time of a single one is too coarse."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much of everything."""

    rounds: int
    watch_rounds: int
    watch_seconds: float
    held: tuple[int, ...]
    payloads: int = 200


FULL: Final = Size(rounds=5, watch_rounds=3, watch_seconds=60, held=(1, 100, 1000))
QUICK: Final = Size(rounds=2, watch_rounds=1, watch_seconds=10, held=(1, 100), payloads=50)


async def launch(stack: AsyncExitStack, root: Path, name: str, command: str, kind: Containment) -> Payload:
    """A payload in a work directory of its own."""
    workdir: Workdir = await stack.enter_async_context(open_workdir(root, name))
    spec = PayloadSpec(command=command, env={"PATH": os.environ["PATH"]})
    return await start(
        spec,
        workdir,
        stdout="std.out",
        stderr="std.err",
        limits=Limits(grace_seconds=5),
        world=World(containment=(kind,)),
    )


@asynccontextmanager
async def many(root: Path, count: int, kind: Containment) -> AsyncIterator[list[Payload]]:
    """Idle payloads, ended in the end."""
    async with AsyncExitStack() as stack:
        payloads: list[Payload] = []
        try:
            for number in range(count):
                payloads.append(await launch(stack, root, f"i{number}", "/bin/sleep 1000", kind))  # noqa: PERF401
            yield payloads
        finally:
            with anyio.CancelScope(shield=True):
                # A few at once: the end of a session looks at all of /proc, and as many threads at it are no faster.
                places = anyio.Semaphore(4)
                async with anyio.create_task_group() as ending:
                    for payload in payloads:
                        ending.start_soon(end, payload, places)


@asynccontextmanager
async def tree(root: Path, count: int, kind: Containment) -> AsyncIterator[Payload]:
    """A payload of so many processes, all of them there; ended by whoever asked, or in the end."""
    async with AsyncExitStack() as stack:
        payload = await launch(stack, root, "tree", TREE.format(count=count), kind)
        try:
            while "ready" not in await payload.peek(1):
                await anyio.sleep(0.01)
            yield payload
        finally:
            with anyio.CancelScope(shield=True):
                await payload.end(EndedBy.KILL, grace_seconds=5)


async def end(payload: Payload, places: anyio.Semaphore) -> None:
    """Kill it, in its turn."""
    async with places:
        await payload.end(EndedBy.KILL, grace_seconds=5)


async def is_allowed(root: Path, kind: Containment) -> bool:
    """Whether the node allows a containment."""
    try:
        async with many(root, 1, kind):
            return True
    except PayloadNotStarted:
        return False


# -- 1. ending -----------------------------------------------------------------------------------------------------


async def kill_tree(root: Path, count: int, kind: Containment) -> float:
    """Milliseconds from the order until the whole tree is gone."""
    async with AsyncExitStack() as stack:
        payload = await launch(stack, root, "tree", TREE.format(count=count), kind)
        while "ready" not in await payload.peek(1):
            await anyio.sleep(0.01)
        begun = time.perf_counter()
        await payload.end(EndedBy.KILL, grace_seconds=5)
        return (time.perf_counter() - begun) * 1000


# -- 2. noticing ---------------------------------------------------------------------------------------------------


async def notice(root: Path, count: int, kind: Containment) -> list[float]:
    """Milliseconds from each of many exits, as the payload's clock tells it, until `watch` returned."""
    late: list[float] = []

    async def one(number: int) -> None:
        script = f"sleep {1 + number * 0.005}; exec date +%s.%N"
        async with AsyncExitStack() as stack:
            payload = await launch(stack, root, f"n{number}", script, kind)
            await watch(payload, Limits(), heartbeat_seconds=10, on_sample=ignore)
            noticed = time.time()
            printed = float((await payload.peek(1))[0])
            await payload.end(EndedBy.ITSELF, grace_seconds=0)
            late.append((noticed - printed) * 1000)

    async with anyio.create_task_group() as payloads:
        for number in range(count):
            payloads.start_soon(one, number)
    return late


# -- 3. watching ---------------------------------------------------------------------------------------------------


async def watch_idle(root: Path, count: int, seconds: float, kind: Containment) -> float:
    """CPU seconds of this process for idle payloads that are looked at once a second."""
    async with many(root, count, kind) as payloads:
        begun = time.process_time()
        async with anyio.create_task_group() as watchers:
            for payload in payloads:
                watchers.start_soon(lambda p: watch(p, Limits(), heartbeat_seconds=1, on_sample=ignore), payload)
            await anyio.sleep(seconds)
            watchers.cancel_scope.cancel()
        return time.process_time() - begun


async def ignore(usage: Usage) -> None:
    """Nobody asks."""


# -- 4. looking ----------------------------------------------------------------------------------------------------


async def look(root: Path, count: int, kind: Containment, size: Size, peer: Any, groups: Hierarchies) -> dict[str, Any]:
    """CPU milliseconds of one look at a tree, in each way."""
    async with tree(root, count, kind) as payload:
        leader = payload.tree.pid
        ways: dict[str, Callable[[], object]] = {"loadmaster": payload.tree.usage}
        if peer is not None:
            ways["psutil"] = partial(look_with_psutil, peer, leader)
        with payload_group(groups, [leader, *descendants(leader)]) as group:
            if group is not None:
                ways["loadmaster, control group"] = group.usage
            return interleave({name: partial(cpu_of, way) for name, way in ways.items()}, size.rounds)


def cpu_of(way: Callable[[], object]) -> float:
    """CPU milliseconds of one call, of as many as fit."""
    calls, begun, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - begun < LOOK_SECONDS or calls < 2:
        way()
        calls += 1
    return (time.process_time() - used) / calls * 1000


def look_with_psutil(psutil: Any, leader: int) -> tuple[float, int, int, int, int]:
    """What our look says, as psutil's documentation would have it: CPU, resident size, threads, I/O, number."""
    first = psutil.Process(leader)
    cpu, resident, threads, moved, count = 0.0, 0, 0, 0, 0
    for process in [first, *first.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied), process.oneshot():
            times, transfers = process.cpu_times(), process.io_counters()
            cpu += times.user + times.system + times.children_user + times.children_system
            resident += process.memory_info().rss
            threads += process.num_threads()
            moved += transfers.read_bytes + transfers.write_bytes
            count += 1
    return cpu, resident, threads, moved, count


@contextmanager
def payload_group(groups: Hierarchies, pids: Sequence[int]) -> Iterator[Group | None]:
    """Processes in a control group, where one can be made; they leave it by being ended."""
    if not groups.directories:
        yield None
        return
    group = Group(groups, "benchmark")
    try:
        for pid in pids:
            for descriptor in group.descriptors:
                os.write(descriptor, str(pid).encode())
        yield group
    finally:
        group.kill()
        give_up = time.monotonic() + 30
        while not group.remove() and time.monotonic() < give_up:
            time.sleep(0.01)


@contextmanager
def psutil_or_none() -> Iterator[Any]:
    """psutil: the one that is installed, or one that is for the moment; None when it cannot be had."""
    with tempfile.TemporaryDirectory(prefix="loadmaster-peer-") as directory:
        if importlib.util.find_spec("psutil") is not None:
            yield importlib.import_module("psutil")
            return
        try:
            venv.create(directory, with_pip=True)
            subprocess.run(
                [f"{directory}/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "psutil"],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            yield None
            return
        sys.path.extend(map(str, Path(directory).glob("lib/python*/site-packages")))
        yield importlib.import_module("psutil")


# -- 5. memory -----------------------------------------------------------------------------------------------------


async def hold(root: Path, count: int, kind: Containment) -> dict[str, float]:
    """KiB per payload of this process, and of its shims. One payload comes and goes before anything is counted."""
    async with many(root, 1, kind) as payloads:
        await payloads[0].usage()
    own = proportional(os.getpid())
    async with many(root, count, kind) as payloads, anyio.create_task_group() as watchers:
        for payload in payloads:
            watchers.start_soon(lambda p: watch(p, Limits(), heartbeat_seconds=10, on_sample=ignore), payload)
        await anyio.sleep(0)  # they wait now; before the first looks, which are measured above
        runtime = proportional(os.getpid()) - own
        payload_pids = {payload.tree.pid for payload in payloads}
        shims = sum(proportional(pid) for pid in descendants(os.getpid()) if pid not in payload_pids)
        watchers.cancel_scope.cancel()
    return {"runtime_kib": runtime / count / 1024, "shim_kib": shims / count / 1024}


def proportional(pid: int) -> int:
    """The memory of a process, each page divided among those that share it."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:  # a shim does not show its memory to an ordinary user
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def hold_elsewhere(count: int, kind: Containment) -> dict[str, float] | None:
    """The same in an interpreter of its own; None when the node does not allow so many."""
    command = [sys.executable, __file__, "--hold", str(count), str(kind)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        return None
    found: dict[str, float] = json.loads(done.stdout)
    return found


# -- all of it -----------------------------------------------------------------------------------------------------


def measure(size: Size) -> dict[str, Any]:
    """Everything, in figures."""
    kinds = [kind for kind in BEST_FIRST if run(is_allowed, kind)]
    best, groups = kinds[0], find_hierarchies()
    facts = machine() | {"shim": shim_kind(), "user": "root" if os.geteuid() == 0 else "an ordinary user"}
    ending = interleave(
        {f"{kind}, {count}": partial(run, kill_tree, count, kind) for count in KILLED for kind in kinds}, size.rounds
    )
    noticing = interleave({str(kind): partial(run, notice, size.payloads, kind) for kind in kinds}, size.rounds)
    watching = interleave(
        {str(kind): partial(run, watch_idle, size.payloads, size.watch_seconds, kind) for kind in kinds},
        size.watch_rounds,
    )
    with psutil_or_none() as peer:
        facts["psutil"] = getattr(peer, "__version__", None)
        looking = {str(count): run(look, count, best, size, peer, groups) for count in LOOKED_AT}
    holding = interleave(
        {f"{kind}, {count}": partial(hold_elsewhere, count, kind) for count in size.held for kind in kinds},
        size.watch_rounds,
    )
    return {
        "machine": facts,
        "containments": list(map(str, kinds)),
        "refused": [str(kind) for kind in BEST_FIRST if kind not in kinds],
        "control_groups": str(groups),
        "payloads": size.payloads,
        "watch_seconds": size.watch_seconds,
        "ending_ms": spreads(ending),
        "noticed_median_ms": spreads({name: percentiles(rounds, 50) for name, rounds in noticing.items()}),
        "noticed_p99_ms": spreads({name: percentiles(rounds, 99) for name, rounds in noticing.items()}),
        "watching_cpu_seconds": spreads(watching),
        "looked_at_in": str(best),
        "look_cpu_ms": {count: spreads(ways) for count, ways in looking.items()},
        "not_allowed": [name for name, all_ in holding.items() if None in all_],
        "memory_kib": {
            name: {part: Spread.of([one[part] for one in there]) for part in there[0]}
            for name, all_ in holding.items()
            if (there := [one for one in all_ if one is not None])
        },
    }


def spreads(found: Mapping[str, Sequence[float]]) -> dict[str, Spread]:
    """Each one's figures as a median and a range."""
    return {name: Spread.of(values) for name, values in found.items()}


def percentiles(rounds: Sequence[Sequence[float]], percent: int) -> list[float]:
    """One percentile of each round."""
    return [quantiles(one, n=100)[percent - 1] for one in rounds]


def tell(found: Mapping[str, Any]) -> None:
    """The tables."""
    facts, kinds = found["machine"], found["containments"]
    print_machine(facts)
    print(f"shim: {facts['shim']}; {facts['user']}; psutil {facts['psutil'] or 'missing: it cannot be installed here'}")
    print(f"control groups: {found['control_groups']}")
    if found["refused"]:
        print(f"refused by this node: {', '.join(found['refused'])}")
    print_table(
        "ending a tree: ms from the order until nobody is left, median (min..max)",
        ["processes", *kinds, "aim"],
        [
            (f"{count:,}", *(found["ending_ms"][f"{kind}, {count}"].show(1) for kind in kinds), str(AIM_MS[count]))
            for count in KILLED
        ],
    )
    print_table(
        f"an exit noticed while {found['payloads']} payloads run: ms (aim: 99 % under 5)",
        ["containment", "half of them", "99 %"],
        [(kind, found["noticed_median_ms"][kind].show(), found["noticed_p99_ms"][kind].show()) for kind in kinds],
    )
    seconds = found["watch_seconds"]
    print_table(
        f"{found['payloads']} idle payloads for {seconds:.0f} s, each looked at once a second",
        ["containment", "CPU seconds here", "% of a core"],
        [
            (kind, cpu.show(), f"{cpu.median / seconds * 100:.1f}")
            for kind, cpu in found["watching_cpu_seconds"].items()
        ],
    )
    looks = found["look_cpu_ms"]
    ways = list(looks[str(LOOKED_AT[0])])
    print_table(
        f"one look at a tree in {found['looked_at_in']}: CPU ms; at one a second, tenths of a percent of a core",
        ["processes", *ways, *(["psutil takes"] if "psutil" in ways else [])],
        [
            (
                f"{count:,}",
                *(looks[str(count)][way].show() for way in ways),
                *([_ratio(looks[str(count)])] if "psutil" in ways else []),
            )
            for count in LOOKED_AT
        ],
    )
    held = found["memory_kib"]
    print_table(
        "memory per payload: KiB, proportional (Pss); one more of this process, and of shims",
        ["containment, payloads", "here", "shim", "together"],
        [
            (
                name,
                parts["runtime_kib"].show(1),
                parts["shim_kib"].show(1),
                f"{sum(p.median for p in parts.values()):.1f}",
            )
            for name, parts in held.items()
        ],
    )
    if missing := found["not_allowed"]:
        print(f"  not so many are allowed here: {'; '.join(missing)}")


def _ratio(ways: Mapping[str, Spread]) -> str:
    return f"{ways['psutil'].median / ways['loadmaster'].median:.1f} times"


def run(function: Callable[..., Any], *args: Any) -> Any:
    """In a temporary directory, on asyncio."""
    with tempfile.TemporaryDirectory() as root:
        return anyio.run(function, Path(root), *args)


def allow_many_descriptors() -> None:
    """As many as this process may have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and payloads, and 10 s instead of 60")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--hold", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    allow_many_descriptors()
    if options.hold:
        count, kind = options.hold
        print(json.dumps(run(hold, int(count), Containment(kind))))
        return
    found = measure(QUICK if options.quick else FULL)
    if options.json:
        json.dump(found, sys.stdout, default=asdict, indent=2)
        print()
    else:
        tell(found)


if __name__ == "__main__":
    main()
