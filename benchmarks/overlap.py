"""How busy the slots are kept: jobs with stage-in a, payload p, stage-out b, on S slots, beside today's way.

    python benchmarks/overlap.py [--jobs 40] [--slots 4] [--rounds 3] [--stage-in 0.3] [--payload 0.5] [--stage-out 0.3]

The storage is a server of this machine, in a process of its own, that makes each download and each upload take that long,
whoever else asks. The bound: the first inputs have to arrive, the payloads follow each other on S slots, the last outputs
have to leave. The peer: the same jobs by the same code, S at a time, with the slot held from the first byte to the last.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
from _bench import Spread, interleave, machine, print_machine, print_table

from loadmaster import JobDescription, Ledger, Node, Site, open_transfers, run_job

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
        time.sleep(stage_in); self.say(200, b"x" * 4096)
    def do_PUT(self):
        there[self.path] = len(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(stage_out); self.say(201)
class Server(ThreadingHTTPServer):
    request_queue_size = 256
server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


def jobs(count: int, port: int, payload: float, round_: int) -> list[JobDescription]:
    base = f"http://127.0.0.1:{port}"
    return [
        JobDescription(
            job_id=f"r{round_}-{number}",
            executable="/bin/sh",
            arguments=["-c", f"sleep {payload}; cat input > output"],
            input_data=[{"source": f"{base}/in/{number}", "name": "input", "size_bytes": 4096}],
            output_data=[{"pattern": "output", "target": f"{base}/out/{round_}/{number}"}],
        )
        for number in range(count)
    ]


async def pipelined(work: list[JobDescription], slots: int, root: Path) -> float:
    async with open_transfers(Site()) as transfers:
        began = time.perf_counter()
        async with Node(transfers=transfers, ledger=Ledger(slots), root=root) as node:
            handles = [node.submit(job) for job in work]
            results = [await handle.wait() for handle in handles]
        took = time.perf_counter() - began
    for result in results:
        result.raise_for_status()
    return took


async def serial(work: list[JobDescription], slots: int, root: Path) -> float:
    queue = iter(work)
    async with open_transfers(Site()) as transfers:

        async def slot() -> None:
            for job in queue:
                (await run_job(job, transfers=transfers, root=root)).raise_for_status()

        began = time.perf_counter()
        async with anyio.create_task_group() as group:
            for _ in range(slots):
                group.start_soon(slot)
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage-in", type=float, default=0.3)
    parser.add_argument("--payload", type=float, default=0.5)
    parser.add_argument("--stage-out", type=float, default=0.3)
    options = parser.parse_args()
    print_machine(machine())
    words = [sys.executable, "-c", SERVER, str(options.stage_in), str(options.stage_out)]
    rounds = iter(range(10**6))
    with tempfile.TemporaryDirectory() as directory, subprocess.Popen(words, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline())

            def once(way: object) -> float:
                work = jobs(options.jobs, port, options.payload, next(rounds))
                return anyio.run(way, work, options.slots, Path(directory))  # type: ignore[arg-type]

            found = interleave({"node": lambda: once(pipelined), "serial": lambda: once(serial)}, options.rounds)
        finally:
            server.terminate()
    waves = math.ceil(options.jobs / options.slots)
    bound = options.stage_in + waves * options.payload + options.stage_out
    print_table(
        f"{options.jobs} jobs of {options.stage_in} + {options.payload} + {options.stage_out} s on {options.slots} slots; "
        f"bound {bound:.2f} s",
        ("", "makespan, s", "over the bound"),
        [(name, Spread.of(times).show(), f"{Spread.of(times).median / bound:.3f}") for name, times in found.items()],
    )


if __name__ == "__main__":
    main()
