"""Start a payload, watch it, end it: the mechanism around one process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.errors import PayloadNotStarted
from loadmaster.limits import Usage, judge, seconds_until_look
from loadmaster.model import EndedBy, Limits, PayloadOutcome, PayloadSpec, Verdict
from loadmaster.payload.command import argv_of
from loadmaster.payload.output import PEEK_LINES, Output
from loadmaster.payload.process import Process
from loadmaster.payload.usage import read_session
from loadmaster.workdir import Workdir

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 10.0

KILL_SECONDS: Final = 30.0
"""A killed process that is still there after this hangs in the kernel, on a dead file system as a rule."""

CONTAINMENT: Final = "session"


class Payload:
    """A payload that was started. Whoever has one must call `end`, which is sure to return."""

    def __init__(self, process: Process, output: Output) -> None:
        self.process = process
        self._output = output
        self.last_lines: tuple[str, ...] = ()
        """What a payload that did not succeed had to say at the end."""
        self._threads = anyio.CapacityLimiter(2)  # its own: limits hold also when the host's threads are all taken
        self._peak_bytes = 0
        self._cpu_seconds = 0.0

    def __repr__(self) -> str:
        return f"<Payload {self.process.pid}>"

    @property
    def wall_seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.process.started

    async def usage(self) -> Usage:
        """What it uses now, all processes of its session together."""
        found = await to_thread.run_sync(read_session, self.process.pid, limiter=self._threads)
        self._cpu_seconds = max(self._cpu_seconds, found.cpu_seconds)
        self._peak_bytes = max(self._peak_bytes, found.memory_bytes)
        return Usage(self.wall_seconds, self._cpu_seconds, found.memory_bytes, found.processes)

    async def peek(self, lines: int = PEEK_LINES) -> list[str]:
        """The last lines it printed."""
        return await to_thread.run_sync(self._output.peek, lines, limiter=self._threads)

    def hurry(self) -> None:
        """End it now: an `end` that keeps a grace returns soon."""
        self.process.kill()

    async def end(self, by: EndedBy, *, grace_seconds: float, verdict: Verdict | None = None) -> PayloadOutcome:
        """Make sure it has ended, and say how.

        If it runs: TERM to its group, KILL to whoever is left after the grace. If it has ended: KILL to what it left
        behind. `by` is who ordered it; a payload that had ended before the order ended by itself. Call it shielded; it
        takes at most the grace and 30 s.
        """
        if self.process.gone:
            by, verdict = EndedBy.ITSELF, None
        else:
            self.process.terminate()
            with anyio.move_on_after(grace_seconds):  # for all: a shell script dies at once, what it runs tidies up
                await self.process.wait()
                await self._wait_rest()
        self.process.kill()
        with anyio.move_on_after(KILL_SECONDS) as leader:
            if not self.process.gone:
                await self.process.wait()
        outcome = self._outcome(by, verdict)
        with anyio.CancelScope(deadline=leader.deadline) as rest:
            await self._wait_rest()
        if leader.cancelled_caught or rest.cancelled_caught:
            log.error("process %d: still there %.0f s after it was killed; left behind", self.process.pid, KILL_SECONDS)
        if not outcome.succeeded:
            self.last_lines = tuple(await to_thread.run_sync(self._output.last_words, limiter=self._threads))
        self._output.close()
        return outcome

    async def _wait_rest(self) -> None:
        try:
            if self.process.has_group():
                await self.process.wait_rest()
        except OSError as exc:  # no descriptor is free, say: the kill must not depend on it
            log.warning("process %d: cannot look for what is left of its group: %s", self.process.pid, exc)

    def _outcome(self, by: EndedBy, verdict: Verdict | None) -> PayloadOutcome:
        wall = self.wall_seconds
        record = self.process.reap()
        peak = max(self._peak_bytes, record.peak_bytes or 0)
        return PayloadOutcome(
            exit_code=record.exit_code,
            signal=record.signal,
            wall_seconds=wall,
            cpu_seconds=max(record.cpu_seconds, self._cpu_seconds),
            peak_memory_bytes=peak or None,
            ended_by=by,
            verdict=verdict,
        )


async def start(spec: PayloadSpec, workdir: Workdir, *, stdout: str, stderr: str) -> Payload:
    """Start a payload in its own session, its output in two files of the work directory.

    Raises `PayloadNotStarted`. Not interrupted by cancellation: either there is a payload to end, or there is none.
    """

    def begin() -> Payload:
        argv = argv_of(spec, workdir.path)
        output = Output(workdir, stdout, stderr)
        try:
            process = Process(argv, env=spec.env, cwd=workdir.path, stdout=output.stdout, stderr=output.stderr)
        except BaseException:
            output.close()
            raise
        return Payload(process, output)

    try:
        return await to_thread.run_sync(begin)
    except OSError as exc:
        raise PayloadNotStarted(f"cannot start {_shown(spec)}: {exc}") from exc


async def watch(
    payload: Payload, limits: Limits, *, heartbeat_seconds: float, on_sample: Callable[[Usage], None]
) -> Verdict | None:
    """Wait until the payload ends, then None, or until it exceeds a limit, then the verdict.

    It is looked at when a limit could be reached at the earliest, and for heartbeats: the first after a tenth of a
    second, then as long again as it has been running, up to the interval.
    """
    usage = Usage(wall_seconds=0.0)
    cores = os.cpu_count() or 1
    while True:
        beat = min(max(0.1, usage.wall_seconds), heartbeat_seconds)
        with anyio.move_on_after(seconds_until_look(usage, limits, cores=cores, heartbeat_seconds=beat)):
            await payload.process.wait()
            return None
        if verdict := judge(replace(usage, wall_seconds=payload.wall_seconds), limits):
            return verdict  # the clock alone says so: nothing needs to be looked at
        usage = await payload.usage()
        on_sample(usage)
        if verdict := judge(usage, limits):
            return verdict


def _shown(spec: PayloadSpec) -> str:
    command = spec.command if isinstance(spec.command, str) else " ".join(spec.command)
    return repr(command[:80])
