"""How busy the slots are kept: jobs with stage-in a, payload p, stage-out b, on S slots, beside today's way.

    python benchmarks/overlap.py [--jobs 40 400] [--slots 4] [--rounds 3] [--kinds equal unequal cores stuck] [--quick]
                                 [--json] [--stage-in 0.3] [--payload 0.5] [--stage-out 0.3]

The storage is a server of this machine, in a process of its own, that makes each download and each upload take that long,
whoever else asks. Payloads all take as long (`equal`), or from a fifth to nine fifths of it (`unequal`), or a third of them
have two cores (`cores`); or one more job has an input that never comes (`stuck`), and is killed when the others are done.

The bound: the first inputs have to arrive, the payloads follow each other without a gap, the last outputs have to leave.
A second bound has payloads as long as they are when they are run by hand, with nothing around them: the shell, `sleep` and
`cat` have to be started, too. The peer: the same jobs by the same code, with the slot held from the first byte to the last.

Where the time goes, by the payloads' own clocks (they are of bash, which has one): from the last instruction of one to the
first of the next in its slot, at each hand-over; what comes before the first one runs, beyond its stage-in, and after the
last has ended, beyond its stage-out. How much of a hand-over comes before the grant, and after, as far as events tell.
"""

from __future__ import annotations

import argparse
import math
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Final

import anyio
from _bench import Cell, Report, Spread, interleave

from loadmaster import JobDescription, JobHandle, Ledger, Node, Site, open_transfers, run_job
from loadmaster.events import Event, PayloadExited, PayloadStarted, SlotGranted

SHELL: Final = "/bin/bash"
KINDS: Final = ("equal", "unequal", "cores", "stuck")

SERVER = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
stage_in, stage_out = map(float, sys.argv[1:])
there = {}
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def say(self, code, body=b""):
        self.send_response(code); self.send_header("Content-Length", str(len(body))); self.end_headers()
        if self.command != "HEAD": self.wfile.write(body)
    def do_HEAD(self):
        size = 4096 if self.path.startswith("/in") else there.get(self.path)
        self.say(404) if size is None else self.say(200, b"x" * size)
    def do_GET(self):
        time.sleep(3600 if "/stuck" in self.path else stage_in); self.say(200, b"x" * 4096)
    def do_PUT(self):
        there[self.path] = len(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(stage_out); self.say(201)
class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True
server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@dataclass(frozen=True, slots=True)
class Load:
    """Some jobs, and what they take."""

    jobs: list[JobDescription]
    payloads: list[float]
    """How long each computes, in seconds."""
    stuck: JobDescription | None
    """One more, whose input never comes."""
    clocks: list[Path]
    """Where each writes when it began and ended."""

    def bound(self, slots: int, around: float, more: float = 0.0) -> float:
        """The least that it can take, if each payload takes so much more."""
        seconds = [each + more for each in self.payloads]
        cores = [job.number_of_processors for job in self.jobs]
        packed = sum(each * number for each, number in zip(seconds, cores, strict=True)) / slots
        if len({*seconds}) == len({*cores}) == 1:
            packed = math.ceil(len(seconds) / (slots // cores[0])) * seconds[0]
        return around + max(packed, *seconds)


def load(kind: str, count: int, port: int, payload: float, round_: int, clocks: Path = Path("/nowhere")) -> Load:
    """The jobs of a kind: the same in each round, but for their names."""
    base, chance = f"http://127.0.0.1:{port}", random.Random(count)
    payloads = [payload * chance.uniform(0.2, 1.8) if kind == "unequal" else payload for _ in range(count)]

    def job(number: int, source: str) -> JobDescription:
        return JobDescription(
            job_id=f"{kind}{count}-{round_}-{number}", executable=SHELL,
            arguments=["-c", script(payloads[number], clocks / f"{source}{number}")],
            number_of_processors=2 if kind == "cores" and number % 3 == 0 else 1,
            input_data=[{"source": f"{base}/{source}/{number}", "name": "input", "size_bytes": 4096}],
            output_data=[{"pattern": "output", "target": f"{base}/out/{kind}{count}/{round_}/{number}"}],
        )  # fmt: skip

    jobs = [job(number, "in") for number in range(count)]
    stuck = job(0, "stuck").model_copy(update={"job_id": f"stuck{count}-{round_}"}) if kind == "stuck" else None
    return Load(jobs, payloads, stuck, [clocks / f"in{number}" for number in range(count)])


def script(seconds: float, clock: Path) -> str:
    """What a payload does; it says when it began and ended."""
    return f"began=$EPOCHREALTIME; sleep {seconds:.4f}; cat input > output; echo $began $EPOCHREALTIME > {clock}"


@dataclass(frozen=True, slots=True)
class Took:
    """What a round took, and where a slot was not used."""

    seconds: float
    granted_ms: float
    """From the end of a payload until somebody else has its slot, where all have one core; the median."""
    started_ms: float
    """From there until his payload ran."""
    ran_longer_ms: float
    """Payloads, beyond their sleep; the mean."""
    handed_over_ms: float
    """From the end of a payload until the next one runs, likewise."""
    before_ms: float
    """Until the first payload runs."""
    after_ms: float
    """From the end of the last."""


async def pipelined(work: Load, slots: int, root: Path) -> Took:
    """A node."""
    async with open_transfers(Site()) as transfers, Node(transfers=transfers, ledger=Ledger(slots), root=root) as node:
        events = node.events()
        began, at = time.perf_counter(), time.time()
        stuck = node.submit(work.stuck) if work.stuck else None
        handles = [node.submit(job) for job in work.jobs]
        results = [await handle.wait() for handle in handles]
        took = time.perf_counter() - began
        if stuck is not None:
            stuck.kill("the others are done")
    for result in results:
        result.raise_for_status()
    return _gaps(at, took, slots, work, [event async for event in events])


def _gaps(origin: float, took: float, slots: int, work: Load, events: Sequence[Event]) -> Took:
    granted: dict[str, float] = {}
    starting, longer = [0.0], [0.0]
    sleeps = {job.job_id: seconds for job, seconds in zip(work.jobs, work.payloads, strict=True)}
    for event in events:
        match event:
            case PayloadExited():
                longer.append(event.outcome.wall_seconds - sleeps[event.job_id])
            case SlotGranted():
                granted[event.job_id] = event.time.timestamp()
            case PayloadStarted():
                starting.append(event.time.timestamp() - granted[event.job_id])
    clocks = [tuple(map(float, clock.read_text().split())) for clock in work.clocks]
    ends, starts = sorted(end for _, end in clocks), sorted(start for start, _ in clocks)

    def from_ends_to(times: list[float]) -> float:
        """Who comes into a slot that somebody has left: the first into the first."""
        if {job.number_of_processors for job in work.jobs} != {1} or len(times) <= slots:
            return math.nan
        return 1000 * median(time - end for end, time in zip(ends, times[slots:], strict=False))

    return Took(
        took, from_ends_to(sorted(granted.values())), 1000 * median(starting), 1000 * mean(longer[1:] or longer),
        from_ends_to(starts), 1000 * (starts[0] - origin), 1000 * (origin + took - ends[-1]),
    )  # fmt: skip


async def serial(work: Load, slots: int, root: Path) -> Took:
    """The slot is held from the first byte to the last."""
    ledger, stuck = Ledger(slots), JobHandle()
    began, took = time.perf_counter(), 0.0
    async with open_transfers(Site()) as transfers, anyio.create_task_group() as group:

        async def one(job: JobDescription, handle: JobHandle | None = None) -> None:
            async with ledger.lease(job):
                result = await run_job(job, transfers=transfers, root=root, handle=handle)
            if handle is None:
                result.raise_for_status()

        if work.stuck:
            group.start_soon(one, work.stuck, stuck)
            await anyio.wait_all_tasks_blocked()
        async with anyio.create_task_group() as others:
            for job in work.jobs:
                others.start_soon(one, job)
        took = time.perf_counter() - began
        if work.stuck:
            stuck.kill("the others are done")
    return Took(took, *[math.nan] * 6)


def by_hand(slots: int, seconds: float, root: Path) -> float:
    """How much longer a payload takes than it sleeps when it is run by hand, as many at once as there are slots."""
    (root / "input").write_bytes(b"x" * 4096)

    def one() -> float:
        began = time.perf_counter()
        running = [subprocess.Popen([SHELL, "-c", script(seconds, root / "clock")], cwd=root) for _ in range(slots)]
        for each in running:
            each.wait()
        return time.perf_counter() - began - seconds

    return median(one() for _ in range(5))


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[40, 400])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage-in", type=float, default=0.3)
    parser.add_argument("--payload", type=float, default=0.5)
    parser.add_argument("--stage-out", type=float, default=0.3)
    parser.add_argument("--quick", action="store_true", help="12 jobs, once: to see that it works")
    parser.add_argument("--no-serial", action="store_true", help="without today's way, which takes twice as long")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args()
    if options.quick:
        options.jobs, options.rounds = [12], 1
    report = Report(as_json=options.json)
    words = [sys.executable, "-c", SERVER, str(options.stage_in), str(options.stage_out)]
    rounds = iter(range(10**6))
    with tempfile.TemporaryDirectory() as directory, subprocess.Popen(words, stdout=subprocess.PIPE) as server:
        root, clocks = Path(directory, "root"), Path(directory, "clocks")
        root.mkdir()
        clocks.mkdir()
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())

            def once(kind: str, count: int, way: Callable[[Load, int, Path], Awaitable[Took]]) -> Took:
                work = load(kind, count, port, options.payload, next(rounds), clocks)
                return anyio.run(way, work, options.slots, root)

            ways = {"node": pipelined} | ({} if options.no_serial else {"serial": serial})
            for count in options.jobs:
                more = by_hand(options.slots, options.payload, root)
                found = interleave(
                    {
                        f"{kind}, {name}": partial(once, kind, count, way)
                        for kind in options.kinds
                        for name, way in ways.items()
                    },
                    options.rounds,
                )
                tell(report, found, count, options, port, more)
        finally:
            server.terminate()
    report.close()


def tell(
    report: Report, found: dict[str, list[Took]], count: int, options: argparse.Namespace, port: int, more: float
) -> None:
    """The table of so many jobs."""
    around = options.stage_in + options.stage_out
    rows: list[list[Cell]] = []
    for name, rounds in found.items():
        work = load(name.partition(",")[0], count, port, options.payload, 0)
        bound, by_hand = work.bound(options.slots, around), work.bound(options.slots, around, more)
        times = Spread.of([each.seconds for each in rounds])
        row: list[Cell] = [name, (times, 2), (bound, 2), (times.median / bound, 3), (times.median / by_hand, 3)]
        gaps = [
            (r.handed_over_ms, r.granted_ms, r.started_ms, r.ran_longer_ms, r.before_ms - 1000 * options.stage_in,
             r.after_ms - 1000 * options.stage_out)
            for r in rounds
        ]  # fmt: skip
        rows.append([*row, *((gap, 1) for gap in map(median, zip(*gaps, strict=True)))])
    report.table(
        f"{count} jobs of {options.stage_in} + {options.payload} + {options.stage_out} s on {options.slots} slots; by hand "
        f"a payload takes {1000 * more:.1f} ms longer than it sleeps",
        [
            "",
            "makespan, s",
            "bound, s",
            "over it",
            "by hand",
            "hand-over, ms",
            "granted",
            "started",
            "longer",
            "before",
            "after",
        ],
        rows,
    )


if __name__ == "__main__":
    main()
