"""Start a payload, watch it, end it: the mechanism around its process tree."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

import anyio

from loadmaster.description import Limits
from loadmaster.limits import (
    CPU_RATIO,
    SHORTEST_LOOK_SECONDS,
    UNCHECKED,
    WALK_SHARE,
    judge,
    needs_pss,
    remembered,
    seconds_left,
    seconds_until_look,
    seconds_until_walk,
    without_cpu_ratio,
)
from loadmaster.payload.output import PEEK_LINES, Output, Printed
from loadmaster.payload.softstop import SoftStop
from loadmaster.payload.state import StateDirectory
from loadmaster.payload.tree import KILL_SECONDS, Tree
from loadmaster.payload.usage import (
    DirectoryUsage,
    TreeUsage,
    read_directory,
    read_free_disk,
    read_pss,
    read_sizes,
)
from loadmaster.result import EndedBy, PayloadOutcome, Usage, Verdict
from loadmaster.threads import briefly

if TYPE_CHECKING:
    from loadmaster.payload.cgroup import Group

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

HEARTBEAT_SECONDS: Final = 10.0

LAST_LOOK_SECONDS: Final = 0.1
"""As the first look: a payload that ran for less is not worth one more look at /proc: the kernel's figures have to do."""

FEW_PROCESSES: Final = 20
"""Looking at more of them one by one costs more than a millisecond; a control group costs 0.2 ms however many there are."""

LOOK_SECONDS: Final = 10.0
"""A look takes milliseconds; one that takes longer than this hangs, and limits are judged without it."""

LAST_WORDS_SECONDS: Final = 5.0
JOIN_SECONDS: Final = 60.0
"""For a file of 1 GB on a slow disk."""

DISK_FULL_BYTES: Final = 64 * 1024
"""Nobody writes anything of use to a disk with less than that."""

ORPHANED: Final = "O"
"""What a shim's record says when it ended its payload for want of an agent."""

NO_LIMITS: Final = Limits.model_construct()

_NOT_OF_TIME: Final = dict.fromkeys(
    ("cpu_seconds", "memory_bytes", "processes", "workdir_bytes", "free_disk_bytes", "output_bytes", "cpu_ratio")
)
"""What a clock cannot tell."""


class Payload:
    """A payload that was started. Whoever has one must call `end`, which is sure to return."""

    def __init__(
        self, tree: Tree, output: Output, *, group: Group | None = None, soft_stop: SoftStop | None = None,
        kept_bytes: int | None = None, outputs_bytes: Callable[[], int] | None = None, state: StateDirectory | None = None,
        stopped_softly: bool = False,
    ) -> None:  # fmt: skip
        """`stopped_softly`: an earlier agent has asked it to wind down, and nobody asks again."""
        self.tree = tree
        self._state = state
        self.last_lines: tuple[str, ...] = ()
        """What a payload that did not succeed had to say at the end."""
        self.kernels_verdict: Verdict | None = None
        """That the kernel has killed for a limit it holds; some of the payload may still run."""
        self._output = output
        self._group = group
        self._soft_stop = soft_stop
        self._stopped_softly = self._heard_softly = stopped_softly
        self._hurried = self._disk_hangs = False
        self._kept_bytes = kept_bytes
        self._outputs_bytes = outputs_bytes
        self._outputs_known = 0
        self._next_outputs_seconds = 0.0
        self._walked: DirectoryUsage | None = None
        self._next_walk_seconds = 0.0
        self._seen = _Seen()

    def __repr__(self) -> str:
        return f"<Payload {self.tree.pid}>"

    @property
    def wall_seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self.tree.started

    async def usage(self, limits: Limits = NO_LIMITS) -> Usage:
        """What it uses now, all of its processes together; what is dear to know only as far as the limits need it."""
        return await self._in_thread(LOOK_SECONDS, self._look, limits)

    async def _in_thread(self, seconds: float, function: Callable[P, T], *args: P.args, **kw: P.kwargs) -> T:
        """What blocks for a moment. Raises TimeoutError when the moment does not end: on a file server that is gone.

        The thread is left to itself then. In this thread when there is no other to be had: a fork bomb of the same user
        takes them all, and a kill must not depend on one.
        """
        try:
            with anyio.fail_after(seconds):
                return await briefly(partial(function, *args, **kw), abandon_on_cancel=True)
        except RuntimeError:
            return function(*args, **kw)
        except TimeoutError:
            self._disk_hangs = True
            raise

    def _look(self, limits: Limits) -> Usage:
        found, pss = self._look_at_processes(limits)
        self._seen.take(found, pss)
        if self._disk_hangs:  # the clock and /proc still tell
            return self._usage(found, pss)
        walked = self._walk() if limits.workdir_bytes is not None else None
        if self._kept_bytes is not None:
            self._output.trim(self._kept_bytes)
        return replace(
            self._usage(found, pss),
            workdir_bytes=walked.size_bytes if walked else None,
            workdir_files=walked.files if walked else None,
            workdir_whole=walked is None or walked.whole,
            free_disk_bytes=read_free_disk(self._output.directory),
            output_bytes=read_sizes((self._output.stdout, self._output.stderr)),
            outputs_bytes=self._measure_outputs() if limits.deadline is not None else None,
        )

    def _usage(self, found: TreeUsage, pss: int | None) -> Usage:
        """What the processes use."""
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
        )

    def _look_at_processes(self, limits: Limits) -> tuple[TreeUsage, int | None]:
        """CPU, memory and numbers; the second is the memory with each shared page counted once, if it is known."""
        if self._group is None:
            found = self.tree.usage()
            return found, read_pss(found.pids) if needs_pss(found.rss_bytes, limits) else None
        counted = self._group.usage()
        if counted.oom_kills:
            self.kernels_verdict = self._group.verdict()
        if counted.processes > FEW_PROCESSES and counted.is_enough:
            return counted.added_to(TreeUsage()), counted.memory_bytes  # each process costs as much as this
        found = self.tree.usage()
        pss = counted.memory_bytes
        if pss is None and needs_pss(found.rss_bytes, limits):
            pss = read_pss(found.pids)
        return counted.added_to(found), pss

    def _walk(self) -> DirectoryUsage:
        """What the work directory takes, as of the last walk when the next one is not due."""
        begun = self.wall_seconds
        if self._walked is None or begun >= self._next_walk_seconds:
            self._walked = read_directory(self._output.directory)
            ended = self.wall_seconds
            self._next_walk_seconds = ended + seconds_until_walk(ended, ended - begun)
        return self._walked

    def _measure_outputs(self) -> int | None:
        """What would have to be delivered now, as of the last time when the next one is not due."""
        if self._outputs_bytes is None:
            return None
        begun = self.wall_seconds
        if begun >= self._next_outputs_seconds:
            self._outputs_known = self._outputs_bytes()
            ended = self.wall_seconds
            self._next_outputs_seconds = ended + (ended - begun) / WALK_SHARE
        return self._outputs_known

    async def has_file(self, name: str) -> bool:
        """Whether its work directory has something of this name."""

        def look() -> bool:
            with suppress(OSError):
                os.stat(name, dir_fd=self._output.directory, follow_symlinks=False)
                return True
            return False

        return await self._in_thread(LOOK_SECONDS, look)

    async def peek(self, lines: int = PEEK_LINES) -> list[str]:
        """The last lines it printed."""
        return await self._in_thread(LOOK_SECONDS, self._output.peek, lines)

    async def follow(self, told: Printed) -> None:
        """Tell what it prints, until cancelled."""
        try:
            await self._output.follow(told)
        except OSError as exc:
            log.warning("what the payload prints is not shown: %s", exc)

    @property
    def can_be_stopped_softly(self) -> bool:
        """Whether there is a soft stop that has not been asked for."""
        return self._soft_stop is not None and not self._stopped_softly

    def soft_stop_due(self, usage: Usage, limits: Limits, *, now: datetime) -> float:
        """In how many seconds the soft stop is to be asked for; infinite when there is none, or no limit of time."""
        if self._soft_stop is None or self._stopped_softly:
            return inf
        left = seconds_left(usage, limits, now=now)
        # Of a short time the second half: asked as it starts, a payload would only be killed by it.
        return left - min(self._soft_stop.seconds, (usage.wall_seconds + left) / 2)

    async def stop_softly(self) -> bool:
        """Ask it to wind down, once; whether there was somebody to ask."""
        stop, self._stopped_softly = self._soft_stop, True
        if stop is None:
            return False
        try:
            asked = await self._in_thread(LOOK_SECONDS, lambda: stop.ask(self.tree.usage().pids))
        except (OSError, subprocess.SubprocessError) as exc:
            log.warning("process %d: soft stop: %s", self.tree.pid, exc)
            return False
        self._heard_softly = asked > 0
        return self._heard_softly

    def hurry(self) -> None:
        """End it now: an `end` that keeps a grace returns soon."""
        if not self.tree.gone:
            self._hurried = True
            self.tree.hurry()

    async def end(self, by: EndedBy, *, grace_seconds: float, verdict: Verdict | None = None) -> PayloadOutcome:
        """Make sure it has ended with everything it started, and say how.

        If it runs: the soft stop, if it is killed and has one, and a grace for it; TERM to all of it, KILL to whoever is
        left after the grace. `by` is who ordered it; a payload that had ended before the order ended by itself. Call it
        shielded; it takes at most twice the grace and some 30 s.
        """
        ordered, over_limit = time.monotonic(), verdict
        if self.tree.gone and not self._hurried and self.tree.asked == "-":
            by, verdict, grace_seconds = EndedBy.ITSELF, None, 0.0
        elif by is EndedBy.KILL and self.can_be_stopped_softly and await self.stop_softly():
            with anyio.move_on_after(grace_seconds):
                await self.tree.wait()
        if self.wall_seconds >= LAST_LOOK_SECONDS:
            with suppress(TimeoutError):
                await self._in_thread(LAST_WORDS_SECONDS, self._last_look)
        left_behind = not await self.tree.end(grace_seconds)
        emptied = None
        if self._group is not None:  # who had lost the shim is only just being killed
            emptied = await self._empty(self._group)
            left_behind = emptied is False or left_behind
        if left_behind:
            log.error("process %d: still there although it was killed; left behind", self.tree.pid)
        ending = time.monotonic() - ordered
        outcome = self._outcome(by, verdict, ending_seconds=ending, left_behind=left_behind)
        if outcome.ended_by is EndedBy.ITSELF and outcome.has_no_status and self.tree.shim_pid:
            certain = (self.tree.holds_all or emptied is True) and not left_behind
            outcome = self._lost(outcome, over_limit, certain=certain)
        try:
            if self._group is not None:
                outcome = await self._in_thread(LAST_WORDS_SECONDS, self._leave_group, self._group, outcome)
            if not outcome.succeeded:
                words, full = await self._in_thread(LAST_WORDS_SECONDS, self._look_for_reasons)
                self.last_lines, outcome = tuple(words), replace(outcome, disk_full=full)
            if self._output.has_gaps:
                await self._in_thread(JOIN_SECONDS, self._output.join)
        except OSError as exc:  # a full disk, one that hangs: how the payload ended is known all the same
            log.warning("process %d: its last words: %s", self.tree.pid, exc)
        finally:
            self._output.close()
            if self._state is not None:  # what it says stays, until whoever wanted it has it elsewhere
                self._state.close()
        return outcome

    def _lost(self, outcome: PayloadOutcome, verdict: Verdict | None, *, certain: bool) -> PayloadOutcome:
        """Of one whose shim was killed: if nothing of it can be left, it may be run again, as after the death of an agent.

        If something can, that is said; and a payload that could have killed its shim has failed, as it would again. So has
        one that was to be ended for a limit.
        """
        if verdict is not None:
            return replace(outcome, ended_by=EndedBy.LIMIT, verdict=verdict, left_behind=not certain)
        if not certain and not self.tree.fenced:
            return outcome
        log.warning("process %d: its shim was killed: how it ended is not known", self.tree.pid)
        return replace(outcome, ended_by=EndedBy.LOST, left_behind=not certain)

    async def _empty(self, group: Group) -> bool | None:
        """Whether nobody is in the group any more; None when that cannot be known."""
        try:
            return not await self._in_thread(LAST_WORDS_SECONDS, group.is_populated) or await group.end(KILL_SECONDS)
        except OSError as exc:
            log.warning("process %d: %r: %s", self.tree.pid, group, exc)
            return None

    def _leave_group(self, group: Group, outcome: PayloadOutcome) -> PayloadOutcome:
        """What the group has counted to the end, and whether the kernel has judged in it; then it is removed."""
        try:
            counted = group.usage()
            if outcome.verdict is None and (verdict := group.verdict()) is not None:
                outcome = replace(outcome, verdict=verdict, ended_by=EndedBy.LIMIT)
            return replace(
                outcome,
                cpu_seconds=max(outcome.cpu_seconds, counted.cpu_seconds or 0),
                system_seconds=max(outcome.system_seconds, counted.system_seconds or 0),
                node_out_of_memory=outcome.verdict is None and counted.oom_kills > 0,
            )
        except OSError as exc:
            log.warning("process %d: %r: %s", self.tree.pid, group, exc)
            return outcome
        finally:
            if not group.remove():  # somebody hangs in it: the next agent removes it
                group.close()

    def _look_for_reasons(self) -> tuple[list[str], bool]:
        return self._output.last_words(), read_free_disk(self._output.directory) < DISK_FULL_BYTES

    def _last_look(self) -> None:
        """A process that has ended still tells, until it is reaped, what it and all it has waited for used."""
        try:
            self._seen.take_totals(self.tree.usage())
        except OSError as exc:  # no descriptor is free, say: the kill that follows must not depend on it
            log.warning("process %d: its last usage is not known: %s", self.tree.pid, exc)

    def _outcome(
        self, by: EndedBy, verdict: Verdict | None, *, ending_seconds: float, left_behind: bool
    ) -> PayloadOutcome:
        wall = self.wall_seconds
        record, seen = self.tree.reap(), self._seen
        if self.tree.adopted and record.wall_seconds is not None:
            wall = record.wall_seconds
        if record.asked == ORPHANED:
            by, verdict = EndedBy.ORPHANED, None
        return PayloadOutcome(
            exit_code=record.exit_code,
            signal=record.signal,
            wall_seconds=wall,
            cpu_seconds=max(record.tree.cpu_seconds, seen.cpu_seconds),
            peak_memory_bytes=max(seen.peak_rss_bytes, record.tree.peak_bytes or 0) or None,
            ended_by=by,
            verdict=verdict,
            system_seconds=max(record.tree.system_seconds, seen.system_seconds),
            read_bytes=max(record.tree.read_bytes, seen.read_bytes),
            written_bytes=max(record.tree.written_bytes, seen.written_bytes),
            grace_expired=record.grace_expired,
            orphans=record.orphans,
            peak_pss_bytes=seen.peak_pss_bytes or None,
            peak_processes=seen.peak_processes or None,
            stop_signal=self._soft_stop.number if self._soft_stop and self._heard_softly else None,
            ending_seconds=ending_seconds,
            left_behind=left_behind,
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


async def watch(
    payload: Payload, limits: Limits, *, heartbeat_seconds: float, on_sample: Callable[[Usage], Awaitable[None]],
    before_soft_stop: Callable[[], Awaitable[None]] | None = None,
) -> Verdict | None:  # fmt: skip
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
        soft_stop = payload.soft_stop_due(usage, limits, now=now)
        if soft_stop <= 0:
            if before_soft_stop is not None:
                await before_soft_stop()
            await payload.stop_softly()
            continue
        look = min(look, max(soft_stop, SHORTEST_LOOK_SECONDS))
        with anyio.move_on_after(look):
            await payload.tree.wait()
            return None
        clock = limits.model_copy(update=_NOT_OF_TIME)
        if verdict := judge((replace(usage, wall_seconds=payload.wall_seconds),), clock, now=datetime.now(UTC)):
            return verdict  # the clock alone says so: nothing needs to be looked at
        try:
            usage = await payload.usage(limits)
        except OSError as exc:  # no descriptor is free for a moment, the disk hangs: the next look may tell
            log.warning("process %d: a look at it failed: %s", payload.tree.pid, exc)
            usage = replace(usage, wall_seconds=payload.wall_seconds)
        samples = remembered(samples, usage, limits)
        await on_sample(usage)
        verdict = payload.kernels_verdict or judge(samples, limits, now=datetime.now(UTC))
        if verdict is not None and verdict.limit == CPU_RATIO and await payload.has_file(UNCHECKED):
            limits, verdict = without_cpu_ratio(limits), None
        if verdict is not None:
            return verdict
