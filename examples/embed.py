"""A pilot agent with a node inside: a heartbeat and an HTTP endpoint of its own, jobs from a stand-in of a workload system.
python examples/embed.py        # prints where it answers, what it ran, and how late its own heartbeat was
"""

from __future__ import annotations

import json
from functools import partial

import anyio
from anyio.abc import SocketAttribute, SocketStream

from loadmaster import ComputingElement, JobDescription, JobResult, Ledger, Node

JOBS, BEAT_SECONDS, PORT = 20, 0.02, 0  # port 0: any
BUSY = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done"


class StandInWms:
    """Answers after 50 ms, as a server far away does, and keeps account of what it gave."""

    def __init__(self) -> None:
        self.given = 0
        self.states: dict[str, str] = {}

    async def next(self, free: int) -> JobDescription | None:
        await anyio.sleep(0.05)
        if self.given == JOBS:
            return None
        self.given += 1
        return JobDescription(job_id=str(self.given), executable="/bin/sh", arguments=["-c", BUSY])

    async def accepted(self, job: JobDescription) -> None:
        self.states[job.job_id] = "Matched"

    async def give_back(self, job: JobDescription) -> None:
        self.states[job.job_id] = "Waiting"

    async def ended(self, job: JobDescription, result: JobResult) -> None:
        self.states[job.job_id] = result.status


async def beat(late: list[float]) -> None:
    """The pilot's own work, which has to be on time."""
    while True:
        await anyio.sleep_until(due := anyio.current_time() + BEAT_SECONDS)
        late.append(anyio.current_time() - due)


async def answer(node: Node, client: SocketStream) -> None:
    """`GET /`: the node's figures."""
    async with client:
        await client.receive()
        figures = node.statistics()
        body = json.dumps({"jobs": dict(figures.jobs), "occupancy": figures.occupancy})
        await client.send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


async def main() -> None:
    wms, late = StandInWms(), list[float]()
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", local_port=PORT)
    print("http://{}:{}".format(*listener.extra(SocketAttribute.local_address)), flush=True)
    async with (
        Node(ComputingElement(site="LCG.Example.org"), ledger=Ledger(2)) as node,
        listener,
        anyio.create_task_group() as own,
    ):
        own.start_soon(beat, late)
        own.start_soon(listener.serve, partial(answer, node))
        await node.serve(wms, ended=wms.ended)
        print(node.statistics())
        own.cancel_scope.cancel()
    done = sum(state == "Done" for state in wms.states.values())
    worst = sorted(late)[-len(late) // 100]
    print(f"{done} of {JOBS} jobs done; {len(late)} heartbeats, 99 of 100 less than {worst:.3f} s late")


if __name__ == "__main__":
    anyio.run(main)
