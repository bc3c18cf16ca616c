"""Holding a payload's whole process tree: by what, and starting it in that.

| containment     | what holds                                          | what gets away                                 |
| --------------- | --------------------------------------------------- | ---------------------------------------------- |
| `pid-namespace` | the shim gives the payload a namespace of its own;  | what another daemon starts on request (cron,   |
|                 | ending its first process ends all                   | at, ssh): no user-space runtime holds that     |
| `cgroup`        | as `subreaper`, and the kernel kills all in the     | the same, and who may write to another group   |
|                 | group, also once the shim is gone                   | once the shim is gone                          |
| `subreaper`     | orphans come back to the shim, which kills until    | the same; where Linux has no Landlock scopes   |
|                 | nobody is left                                      | (6.12), also all once the shim was killed      |
| `session`       | no shim: the process group is signalled             | whatever calls `setsid`                        |

Of those somebody wants, the first that the node allows is taken. A refusal costs one start of
the shim, about two milliseconds.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.description import Containment, Isolation
from loadmaster.payload.isolation import isolated
from loadmaster.payload.launch import Launch, Refused, shim_command
from loadmaster.payload.launch import shim_kind as shim_kind
from loadmaster.payload.process import ExitRecord, Process
from loadmaster.payload.shimtree import Channels, NotTaken, ShimTree, check_started, facts_of
from loadmaster.payload.starter import Starter
from loadmaster.payload.state import mark_executed
from loadmaster.payload.tree import KILL_SECONDS, Tree
from loadmaster.payload.usage import TreeUsage, read_session

log = logging.getLogger(__name__)

BEGIN_SECONDS: Final = 1.0
"""A start takes some milliseconds; one that takes longer than this hangs on a program far away, and can be cancelled."""


_USUALLY_IGNORED: Final = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
"""By Python; Popen resets these by itself."""


class SessionTree(Tree):
    """A payload that only its process group holds together."""

    containment = Containment.SESSION
    shim = ""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._record: ExitRecord | None = None
        self.pid, self.start_ticks, self.started = process.pid, process.start_ticks, process.started

    @classmethod
    def start(cls, launch: Launch) -> SessionTree:
        """Start it. Blocks for about a millisecond; raises OSError, or `Refused` for its isolation.

        A shim that becomes the payload comes first where Popen alone cannot do it: when there is a group to join, and
        when the embedding program ignores or blocks signals. Without it nice, CPUs and the CPU limit are set once the
        payload runs, and do not reach what it has forked by then.
        """
        launch = isolated(launch, Containment.SESSION)
        if launch.wrapped or launch.joined:
            return cls(_start_through_shim(launch))
        if not _has_usual_signals():
            try:
                return cls(_start_through_shim(launch))
            except Refused as exc:
                log.warning("%s; what this program does with its signals is passed on to the payload", exc)
        process = Process(
            launch.argv, env=launch.env, cwd=launch.cwd, stdout=launch.stdout, stderr=launch.stderr, umask=launch.umask
        )
        try:
            with suppress(ProcessLookupError):  # it was that short
                _hold(process.pid, launch)
        except BaseException:
            process.discard()
            raise
        return cls(process)

    @property
    def gone(self) -> bool:
        return self._process.gone

    async def wait(self) -> None:
        await self._process.wait()

    async def end(self, grace_seconds: float) -> bool:
        process = self._process
        if not process.gone:
            process.terminate()
            with anyio.move_on_after(grace_seconds):  # for all: a shell script dies at once, what it runs tidies up
                await process.wait()
                await self._wait_rest()
        process.kill()
        with anyio.move_on_after(KILL_SECONDS) as killing:
            if not process.gone:
                await process.wait()
            self._record = process.reap()  # now, so that a leader that is only waiting to be reaped is nobody's rest
            await self._wait_rest()
        return not killing.cancelled_caught

    async def _wait_rest(self) -> None:
        try:
            if self._process.has_group():
                await self._process.wait_rest()
        except OSError as exc:  # no descriptor is free, say: the kill must not depend on it
            log.warning("process %d: cannot look for what is left of its group: %s", self.pid, exc)

    def hurry(self) -> None:
        self._process.kill()

    def reap(self) -> ExitRecord:
        return self._record or self._process.reap()

    def usage(self) -> TreeUsage:
        return read_session(self.pid)


async def start_contained(launch: Launch, wanted: Sequence[Containment], starter: Starter | None = None) -> Tree:
    """Start a payload in the first containment of `wanted` that the node allows; by that starter, if it can.

    Raises OSError when it cannot be executed, or the node has no process left for it, and `Refused` when it allows none
    of them, or not its isolation. Cancelled, it leaves nothing.
    """
    if starter is not None:
        await to_thread.run_sync(starter.prepare)
    begun = order(launch, wanted, starter)
    tree, others = begun if begun is not None else await to_thread.run_sync(spawn, launch, wanted)
    return await settled(launch, tree, others, starter)


def order(
    launch: Launch, wanted: Sequence[Containment], starter: Starter | None
) -> tuple[Tree, Sequence[Containment]] | None:
    """As `spawn`, by a starter that is prepared, and without waiting; None for what has to be spawned. Raises OSError."""
    if starter is None or not wanted or launch.isolation not in {Isolation.NONE, Isolation.NAMESPACES}:
        return None
    first = wanted[0]
    if first is Containment.SESSION or (first is Containment.CGROUP and launch.group is None):
        return None
    try:
        tree = ShimTree.ordered(first, isolated(launch, first), starter)
    except Refused:
        return None
    return None if tree is None else (tree, wanted[1:])


def spawn(launch: Launch, wanted: Sequence[Containment]) -> tuple[Tree, Sequence[Containment]]:
    """A tree in the first of `wanted` that can be tried, and those after it: for `settled`, without which nobody knows
    whether a payload runs in it. Blocks for about a millisecond; raises as `start_contained`."""
    refusal = Refused("no containment was named")
    for number, containment in enumerate(wanted, start=1):
        try:
            if containment is Containment.SESSION:
                if launch.state >= 0:
                    mark_executed(launch.state)
                return SessionTree.start(launch), ()
            if containment is Containment.CGROUP and launch.group is None:
                raise Refused("cgroup: no group was made for the payload")
            return ShimTree.executed(containment, isolated(launch, containment)), wanted[number:]
        except Refused as exc:
            refusal = exc
    raise refusal


async def settled(launch: Launch, tree: Tree, others: Sequence[Containment], starter: Starter | None = None) -> Tree:
    """The tree in which the payload runs: this one, or one of the others if it is refused. Raises as `start_contained`;
    cancelled, it leaves nothing."""
    while isinstance(tree, ShimTree):
        try:
            await _begin(tree)
        except NotTaken:
            tree, others = await to_thread.run_sync(spawn, launch, [tree.containment, *others])
        except Refused:
            if not others:
                raise
            begun = order(launch, others, starter)
            tree, others = begun if begun is not None else await to_thread.run_sync(spawn, launch, others)
        else:
            return tree
    return tree


async def _begin(tree: ShimTree) -> None:
    try:
        # A payload that runs is one, also for somebody who is cancelled just then: he ends it with its grace, and says so.
        with anyio.move_on_after(BEGIN_SECONDS, shield=True):
            await tree.begin(insist=False)
            return
        await tree.begin()
    except BaseException:
        with anyio.CancelScope(shield=True):  # both are bounded
            if await tree.find():
                await tree.end(0)
            tree.reap()
        raise


def _start_through_shim(launch: Launch) -> Process:
    """By a shim that becomes the payload. Blocks until it has; raises OSError."""
    command = shim_command()
    with Channels(launch, Containment.SESSION) as channels:
        try:
            process = Process(
                [*command, *channels.words, *launch.argv], env={}, cwd=launch.cwd, stdout=launch.stdout,
                stderr=launch.stderr, umask=launch.umask, pass_fds=channels.passed,
            )  # fmt: skip
        except OSError as exc:
            if exc.filename == command[0]:
                raise Refused(f"session: the shim cannot be executed: {exc}") from exc
            raise
        try:
            channels.close_of_shim()
            text = b""
            while more := channels.report.recv(65536):
                text += more
            if text:
                check_started(facts_of(text))
        except BaseException:
            process.discard()
            raise
    return process


def _has_usual_signals() -> bool:
    """Whether what we start from this thread has its signals as usual, once Popen has reset what Python ignores."""
    with open("/proc/thread-self/status", "rb", buffering=0) as file:
        text = file.readall()
    blocked, ignored = (int(text.partition(name)[2].split(maxsplit=1)[0], 16) for name in (b"SigBlk:", b"SigIgn:"))
    return not blocked and not ignored & ~_USUALLY_IGNORED


def _hold(pid: int, launch: Launch) -> None:
    """What a shim would have done before. Raises OSError."""
    if launch.nice:
        os.setpriority(os.PRIO_PROCESS, pid, os.getpriority(os.PRIO_PROCESS, pid) + launch.nice)
    if launch.cores:
        os.sched_setaffinity(pid, launch.cores)
    if launch.cpu_limit is not None:
        had = resource.prlimit(pid, resource.RLIMIT_CPU)
        soft, hard = (min(new, old) if old >= 0 else new for new, old in zip(launch.cpu_limit, had, strict=True))
        resource.prlimit(pid, resource.RLIMIT_CPU, (soft, hard))
