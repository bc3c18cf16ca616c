"""What several tests need to follow a job while it runs, and to act on what happens."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import anyio
from anyio import to_thread

from loadmaster import JobHandle, JobResult
from loadmaster.events import Event


def kinds(events: Iterable[Event]) -> list[str]:
    """The names of events, in order."""
    return [event.kind for event in events]


async def history(handle: JobHandle) -> list[Event]:
    """Every event of a job that is over."""
    return [event async for event in handle.events()]


def happens(kind: type[Event]) -> Callable[[JobHandle], Awaitable[None]]:
    """Something to wait for: the job's first event of this kind."""

    async def happened(handle: JobHandle) -> None:
        async for event in handle.events():
            if isinstance(event, kind):
                return

    return happened


async def killed_when(
    happened: Callable[[JobHandle], Awaitable[object]], run: Callable[[JobHandle], Awaitable[JobResult]]
) -> tuple[JobResult, list[Event]]:
    """Run a job, kill it when something has happened; its result and its events."""
    handle = JobHandle()

    async def killer() -> None:
        await happened(handle)
        assert handle.kill("the user is tired of waiting")

    async with anyio.create_task_group() as tg:
        tg.start_soon(killer)
        result = await run(handle)
        tg.cancel_scope.cancel()
    return result, await history(handle)


class Signpost:
    """A FIFO a payload writes to when it has come so far: `echo > {post}`."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    async def reached(self, _: object = None) -> str:
        """What the payload wrote, once it has."""
        return await to_thread.run_sync(self.path.read_text)


def processes_of(*job_ids: str) -> list[int]:
    """The processes that have one of the jobs' ids in their environment, wherever they have gone."""
    marks = {f"JOBID={job_id}".encode() for job_id in job_ids}
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                environment = Path("/proc", name, "environ").read_bytes()
            except OSError:  # gone, or not ours to look into
                continue
            if not marks.isdisjoint(environment.split(b"\0")):
                found.append(int(name))
    return found
