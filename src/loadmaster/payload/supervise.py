"""Start a payload, watch it, end it: the mechanism around its process tree."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.description import Containment, Limits, PayloadSpec
from loadmaster.errors import PayloadNotStarted
from loadmaster.limits import (
    CPU_RATIO,
    UNCHECKED,
    judge,
    needs_pss,
    remembered,
    seconds_until_look,
    seconds_until_walk,
    without_cpu_ratio,
)
from loadmaster.payload.command import argv_of
from loadmaster.payload.containment import DEFAULT, SessionTree, Tree, start_contained
from loadmaster.payload.launch import Launch, Refused
from loadmaster.payload.output import PEEK_LINES, Output
from loadmaster.payload.usage import (
    DirectoryUsage,
    TreeUsage,
    read_directory,
    read_free_disk,
    read_pss,
    read_sizes,
)
from loadmaster.result import EndedBy, PayloadOutcome, Usage, Verdict
from loadmaster.workdir import Workdir

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS: Final = 10.0

LAST_LOOK_SECONDS: Final = 0.1
"""As the first look: a payload that ran for less is not worth one more look at /proc: the kernel's figures have to do."""

NO_LIMITS: Final = Limits()


class Payload:
    """A payload that was started. Whoever has one must call `end`, which is sure to return."""

    def __init__(self, tree: Tree, output: Output) -> None:
        self.tree = tree
        self.last_lines: tuple[str, ...] = ()
        """What a payload that did not succeed had to say at the end."""
        self._output = output
        self._walked: DirectoryUsage | None = None
        self._next_walk_seconds = 0.0
        self._seen = _Seen()
        self._threads = anyio.CapacityLimiter(2)  # its own: limits hold also when the host's threads are all taken

    def __repr__(self) -> str:
        return f"<Payload {self.tree.pid}>"

    @property
    def wall_seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.tree.started

    async def usage(self, limits: Limits = NO_LIMITS) -> Usage:
        """What it uses now, all of its processes together; what is dear to know only as far as the limits need it."""
        return await to_thread.run_sync(self._look, limits, limiter=self._threads)

    def _look(self, limits: Limits) -> Usage:
        found = self.tree.usage()
        pss = read_pss(found.pids) if needs_pss(found.rss_bytes, limits) else None
        self._seen.take(found, pss)
        walked = self._walk() if limits.workdir_bytes is not None else None
        return Usage(
            wall_seconds=self.wall_seconds,
            cpu_seconds=self._seen.cpu_seconds,
            rss_bytes=found.rss_bytes,
            processes=found.processes,
            pss_bytes=pss,
            system_seconds=self._seen.system_seconds,
            threads=found.threads,
            read_bytes=self._seen.read_bytes,
            written_bytes=self._seen.written_bytes,
            workdir_bytes=walked.size_bytes if walked else None,
            workdir_files=walked.files if walked else None,
            free_disk_bytes=read_free_disk(self._output.directory),
            output_bytes=read_sizes((self._output.stdout, self._output.stderr)),
        )

    def _walk(self) -> DirectoryUsage:
        """What the work directory takes, as of the last walk when the next one is not due."""
        begun = self.wall_seconds
        if self._walked is None or begun >= self._next_walk_seconds:
            self._walked = read_directory(self._output.directory)
            ended = self.wall_seconds
            self._next_walk_seconds = ended + seconds_until_walk(ended, ended - begun)
        return self._walked

    async def has_file(self, name: str) -> bool:
        """Whether its work directory has something of this name."""

        def look() -> bool:
            with suppress(OSError):
                os.stat(name, dir_fd=self._output.directory, follow_symlinks=False)
                return True
            return False

        return await to_thread.run_sync(look, limiter=self._threads)

    async def peek(self, lines: int = PEEK_LINES) -> list[str]:
        """The last lines it printed."""
        return await to_thread.run_sync(self._output.peek, lines, limiter=self._threads)

    def hurry(self) -> None:
        """End it now: an `end` that keeps a grace returns soon."""
        self.tree.hurry()

    async def end(self, by: EndedBy, *, grace_seconds: float, verdict: Verdict | None = None) -> PayloadOutcome:
        """Make sure it has ended with everything it started, and say how.

        If it runs: TERM to all of it, KILL to whoever is left after the grace. `by` is who ordered it; a payload that
        had ended before the order ended by itself. Call it shielded; it takes at most the grace and some 30 s.
        """
        if self.tree.gone:
            by, verdict, grace_seconds = EndedBy.ITSELF, None, 0.0
        if self.wall_seconds >= LAST_LOOK_SECONDS:
            await to_thread.run_sync(self._last_look, limiter=self._threads)
        if not await self.tree.end(grace_seconds):
            log.error("process %d: still there although it was killed; left behind", self.tree.pid)
        outcome = self._outcome(by, verdict)
        try:
            if not outcome.succeeded:
                self.last_lines = tuple(await to_thread.run_sync(self._output.last_words, limiter=self._threads))
        finally:
            self._output.close()
        return outcome

    def _last_look(self) -> None:
        """A process that has ended still tells, until it is reaped, what it and all it has waited for used."""
        try:
            self._seen.take_totals(self.tree.usage())
        except OSError as exc:  # no descriptor is free, say: the kill that follows must not depend on it
            log.warning("process %d: its last usage is not known: %s", self.tree.pid, exc)

    def _outcome(self, by: EndedBy, verdict: Verdict | None) -> PayloadOutcome:
        wall = self.wall_seconds
        record, seen = self.tree.reap(), self._seen
        return PayloadOutcome(
            exit_code=record.exit_code,
            signal=record.signal,
            wall_seconds=wall,
            cpu_seconds=max(record.cpu_seconds, seen.cpu_seconds),
            peak_memory_bytes=max(seen.peak_rss_bytes, record.peak_bytes or 0) or None,
            ended_by=by,
            verdict=verdict,
            system_seconds=seen.system_seconds,
            read_bytes=seen.read_bytes,
            written_bytes=seen.written_bytes,
            peak_pss_bytes=seen.peak_pss_bytes or None,
            peak_processes=seen.peak_processes or None,
        )


class _Seen:
    """The most that was seen of a payload. What only grows may seem to shrink: a look is not an instant."""

    def __init__(self) -> None:
        self.cpu_seconds = self.system_seconds = 0.0
        self.read_bytes = self.written_bytes = 0
        self.peak_rss_bytes = self.peak_pss_bytes = self.peak_processes = 0

    def take(self, found: TreeUsage, pss_bytes: int | None) -> None:
        self.take_totals(found)
        self.peak_rss_bytes = max(self.peak_rss_bytes, found.rss_bytes)
        self.peak_pss_bytes = max(self.peak_pss_bytes, pss_bytes or 0)
        self.peak_processes = max(self.peak_processes, found.processes)

    def take_totals(self, found: TreeUsage) -> None:
        self.cpu_seconds = max(self.cpu_seconds, found.cpu_seconds)
        self.system_seconds = max(self.system_seconds, found.system_seconds)
        self.read_bytes = max(self.read_bytes, found.read_bytes)
        self.written_bytes = max(self.written_bytes, found.written_bytes)


async def start(
    spec: PayloadSpec, workdir: Workdir, *, stdout: str, stderr: str, grace_seconds: float = Limits().grace_seconds,
    containment: Sequence[Containment] = DEFAULT,
) -> Payload:  # fmt: skip
    """Start a payload in the first containment the node allows, its output in two files of the work directory.

    Raises `PayloadNotStarted`. Cancelled, it leaves no payload.
    """

    near = containment[0] is Containment.SESSION

    def prepare() -> tuple[Output, Tree | Launch]:
        """What has to be done in a thread, in one: a payload that needs no shim is started with it."""
        argv = argv_of(spec, workdir.path, near=near)
        output = Output(workdir, stdout, stderr)
        launch = Launch(argv, spec.env, workdir.path, output.stdout, output.stderr, grace_seconds)
        if not near:
            return output, launch
        try:
            tree = SessionTree.start(launch)
        except BaseException:
            output.discard()
            raise
        return output, tree

    try:
        output, tree = await to_thread.run_sync(prepare)
        if isinstance(tree, Launch):
            tree = await _start_contained(tree, output, containment)
    except (OSError, Refused) as exc:
        raise PayloadNotStarted(f"cannot start {_shown(spec)}: {exc}") from exc
    return Payload(tree, output)


async def _start_contained(launch: Launch, output: Output, containment: Sequence[Containment]) -> Tree:
    try:
        return await start_contained(launch, wanted=containment)
    except BaseException:
        with anyio.CancelScope(shield=True):  # two unlinks on a local disk
            await to_thread.run_sync(output.discard)
        raise


async def watch(
    payload: Payload, limits: Limits, *, heartbeat_seconds: float, on_sample: Callable[[Usage], None]
) -> Verdict | None:
    """Wait until the payload ends, then None, or until it exceeds a limit, then the verdict.

    It is looked at when a limit could be reached at the earliest, and for heartbeats: the first after a tenth of a
    second, then as long again as it has been running, up to the interval. A payload that is over a limit when it ends
    by itself was not stopped by it.
    """
    samples: tuple[Usage, ...] = (Usage(wall_seconds=0.0),)
    cores = os.cpu_count() or 1
    while True:
        usage, now = samples[-1], datetime.now(UTC)
        beat = min(max(0.1, usage.wall_seconds), heartbeat_seconds)
        look = seconds_until_look(usage, limits, now=now, cores=cores, heartbeat_seconds=beat)
        with anyio.move_on_after(look):
            await payload.tree.wait()
            return None
        clock = Limits(wall_seconds=limits.wall_seconds, deadline=limits.deadline)
        if verdict := judge((replace(usage, wall_seconds=payload.wall_seconds),), clock, now=datetime.now(UTC)):
            return verdict  # the clock alone says so: nothing needs to be looked at
        usage = await payload.usage(limits)
        samples = remembered(samples, usage, limits)
        on_sample(usage)
        verdict = judge(samples, limits, now=datetime.now(UTC))
        if verdict is not None and verdict.limit == CPU_RATIO and await payload.has_file(UNCHECKED):
            limits, verdict = without_cpu_ratio(limits), None
        if verdict is not None:
            return verdict


def _shown(spec: PayloadSpec) -> str:
    command = spec.command if isinstance(spec.command, str) else " ".join(spec.command)
    return repr(command[:80])
