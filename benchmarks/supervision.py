"""What it costs to hold, watch and end payloads.

    python benchmarks/supervision.py [--quick] [--json]

1. ending trees of 1, 100 and 1,000 processes: from the order until nobody is left
   (aim: 50, 100 and 500 ms beyond the grace);
2. how soon an exit is noticed while 200 payloads run (aim: under 5 ms at the 99th percentile);
3. CPU spent on watching 200 idle payloads (aim: nothing worth the name);
4. memory per payload, shim included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import quantiles
from typing import Any, Final

import anyio
from _bench import Spread, machine, print_machine, print_table

from loadmaster.description import Containment, Limits, PayloadSpec
from loadmaster.payload.containment import BEST_FIRST, shim_kind
from loadmaster.payload.supervise import Payload, start, watch
from loadmaster.payload.usage import descendants
from loadmaster.result import EndedBy, Usage
from loadmaster.workdir import Workdir, open_workdir

TREE: Final = "i=1; while [ $i -lt {count} ]; do sleep 1000 & i=$((i+1)); done; echo ready; exec sleep 1000"
KINDS: Final = tuple(kind for kind in BEST_FIRST)


async def launch(stack: AsyncExitStack, root: Path, name: str, command: str, kind: Containment) -> Payload:
    """A payload in a work directory of its own."""
    workdir: Workdir = await stack.enter_async_context(open_workdir(root, name))
    spec = PayloadSpec(command=command, env={"PATH": os.environ["PATH"]})
    return await start(spec, workdir, stdout="std.out", stderr="std.err", grace_seconds=5, containment=[kind])


async def until_printed(payload: Payload, words: str) -> None:
    """Wait until the payload has said so."""
    while words not in await payload.peek(1):
        await anyio.sleep(0.01)


# -- 1. ending -----------------------------------------------------------------------------------------------------


async def kill_tree(root: Path, count: int, kind: Containment) -> float:
    """Milliseconds from the order until the whole tree is gone."""
    async with AsyncExitStack() as stack:
        payload = await launch(stack, root, "tree", TREE.format(count=count), kind)
        await until_printed(payload, "ready")
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


# -- 3. watching, 4. memory -----------------------------------------------------------------------------------------


async def watch_idle(root: Path, count: int, seconds: float, kind: Containment) -> dict[str, float]:
    """CPU of this process for idle payloads that are looked at once a second; memory per payload."""
    async with AsyncExitStack() as stack:
        before = own_memory()
        payloads = [await launch(stack, root, f"i{n}", "/bin/sleep 1000", kind) for n in range(count)]
        ours = (own_memory() - before) / count
        shims = sum(resident(pid) for pid in helpers()) / count
        begun = cpu_seconds()
        async with anyio.create_task_group() as watchers:
            for payload in payloads:
                watchers.start_soon(lambda p: watch(p, Limits(), heartbeat_seconds=1, on_sample=ignore), payload)
            await anyio.sleep(seconds)
            watchers.cancel_scope.cancel()
        used = cpu_seconds() - begun
        async with anyio.create_task_group() as ending:
            for payload in payloads:
                ending.start_soon(lambda p: p.end(EndedBy.KILL, grace_seconds=5), payload)
    return {"cpu_percent": used / seconds * 100, "runtime_kib": ours / 1024, "shim_kib": shims / 1024}


def helpers() -> list[int]:
    """The shims and inits below this process."""
    found = []
    for pid in descendants(os.getpid()):
        try:
            name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if name == "shim" or (name.startswith("python") and pid != os.getpid()):
            found.append(pid)
    return found


def resident(pid: int) -> int:
    """The memory that is a process's own: what it shares with its like does not count twice."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def own_memory() -> int:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds() -> float:
    """CPU of this process, all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def ignore(usage: Usage) -> None:
    """Nobody asks."""


# -- the command ---------------------------------------------------------------------------------------------------


def run(function: Callable[..., Any], *args: Any) -> Any:
    """In a temporary directory, on asyncio."""
    with tempfile.TemporaryDirectory() as root:
        return anyio.run(function, Path(root), *args)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer payloads and rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    rounds, many, seconds = (2, 50, 5) if options.quick else (5, 200, 60)
    sizes = (1, 100, 1000)

    facts = machine() | {"shim": shim_kind()}
    ending = {
        f"{kind}, {size}": Spread.of([run(kill_tree, size, kind) for _ in range(rounds)])
        for size in sizes
        for kind in KINDS
    }
    noticing = {str(kind): quantiles(run(notice, many, kind), n=100) for kind in KINDS}
    watching = {str(kind): run(watch_idle, many, seconds, kind) for kind in KINDS}

    if options.json:
        found = {"machine": facts, "payloads": many, "ending_ms": {k: v.median for k, v in ending.items()}}
        found |= {"noticed_p99_ms": {k: v[98] for k, v in noticing.items()}, "watching": watching}
        print(json.dumps(found))
        return
    print_machine(facts)
    print(f"shim: {facts['shim']}")
    rows = [[str(size), *(ending[f"{kind}, {size}"].show(1) for kind in KINDS)] for size in sizes]
    print_table("ending a tree: ms from the order until nobody is left", ["processes", *map(str, KINDS)], rows)
    rows = [[name, f"{found[49]:.2f}", f"{found[98]:.2f}"] for name, found in noticing.items()]
    print_table(f"an exit noticed while {many} payloads run: ms", ["containment", "median", "99 %"], rows)
    columns = ("cpu_percent", "runtime_kib", "shim_kib")
    rows = [[name, *(f"{found[column]:.1f}" for column in columns)] for name, found in watching.items()]
    heads = ["containment", "% of a core", "KiB here each", "KiB of shim each"]
    print_table(f"watching {many} idle payloads, once a second", heads, rows)


if __name__ == "__main__":
    main()
