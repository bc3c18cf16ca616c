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

import errno
import logging
import os
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Protocol

import anyio
from anyio import CapacityLimiter, to_thread

from loadmaster.description import Containment, Isolation
from loadmaster.payload.isolation import isolated
from loadmaster.payload.launch import Launch, Refused, shim_command
from loadmaster.payload.launch import shim_kind as shim_kind
from loadmaster.payload.process import Account, ExitRecord, Process
from loadmaster.payload.sweep import kill_below, kill_session
from loadmaster.payload.usage import BLOCK_BYTES, TreeUsage, read_session, read_stat, read_tree

log = logging.getLogger(__name__)

KILL_SECONDS: Final = 30.0
"""A killed process that is still there after this hangs in the kernel, on a dead file system as a rule."""

ANSWER_SECONDS: Final = {Containment.PID_NAMESPACE: 10.0, Containment.CGROUP: 2.0, Containment.SUBREAPER: 2.0}
"""How long a shim has for a kill before we do it ourselves: a thousand processes take it a quarter of a second. What a
namespace holds cannot hinder it, and a status is lost that we do not wait for."""

LOOK_SECONDS: Final = 0.2
"""Between two kills of our own; the shim's end is noticed at once."""

BEGIN_SECONDS: Final = 1.0
"""A start takes some milliseconds; one that takes longer than this hangs on a program far away, and can be cancelled."""

LACKS: Final = (errno.EAGAIN, errno.ENOMEM)
"""What a busy node says, and what says nothing of what it allows."""

_USUALLY_IGNORED: Final = 1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1
"""By Python; Popen resets these by itself."""


class Tree(Protocol):
    """A payload's processes. Whoever has one calls `end` or waits, and then `reap`, once."""

    containment: Containment
    shim: str
    """Which shim holds it; empty when none does."""
    pid: int
    start_ticks: int
    started: float

    @property
    def gone(self) -> bool:
        """Whether the payload has ended; what it left may still be there."""
        ...

    async def wait(self) -> None:
        """Return when the payload has ended."""
        ...

    async def end(self, grace_seconds: float) -> bool:
        """End whatever is there: TERM, the grace, KILL. False if something is still there after 30 s more."""
        ...

    def hurry(self) -> None:
        """Kill it: an `end` that keeps a grace returns soon."""
        ...

    def reap(self) -> ExitRecord:
        """Release everything, and say how the payload ended."""
        ...

    def usage(self) -> TreeUsage:
        """What its processes use now. Blocks."""
        ...


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


class ShimTree(Tree):
    """A payload below a shim (shim.c), which is below us."""

    def __init__(self, containment: Containment, launch: Launch) -> None:
        """Start the shim. Blocks for about a millisecond; raises OSError, or `Refused` when it cannot be executed."""
        self.containment = containment
        self.shim = shim_kind()
        self.pid = self.start_ticks = 0
        self.fenced = False
        """Whether the payload can neither signal nor trace anybody outside."""
        self.started = time.monotonic()
        self._group = launch.group
        self._text = b""
        self._helpers = int(containment is Containment.PID_NAMESPACE)
        if launch.isolation is Isolation.BUBBLEWRAP:
            self._helpers += 2
        mode = Containment.SUBREAPER if containment is Containment.CGROUP else containment
        command = shim_command()
        with _Channels(launch, mode) as channels:
            try:
                self._popen = subprocess.Popen(
                    [*command, *channels.words, *launch.argv], env={}, cwd=launch.cwd, stdin=subprocess.DEVNULL,
                    stdout=launch.stdout, stderr=launch.stderr, pass_fds=channels.passed, start_new_session=True,
                    umask=launch.umask,
                )  # fmt: skip
            except OSError as exc:
                if exc.errno in LACKS:
                    raise OSError(exc.errno, _lack(exc.errno, "fork")) from exc
                if exc.filename == command[0]:
                    raise Refused(f"{containment}: the shim cannot be executed: {exc}") from exc
                raise
            self._report = channels.report.detach()
            self._pidfd = self._open()

    def _open(self) -> int:
        """A descriptor that can be read from once the shim has ended. Raises OSError, and then nothing is left."""
        try:
            return os.pidfd_open(self._popen.pid)
        except ProcessLookupError:  # it has, and was reaped by a kernel whose embedding program ignores SIGCHLD
            return os.eventfd(1)
        except OSError:
            self._popen.send_signal(signal.SIGUSR1)
            self._popen.wait()
            os.close(self._report)
            raise

    async def begin(self) -> None:
        """Wait until the payload runs. Raises `Refused`, or OSError when it cannot be executed or no process be had."""
        while b"\n\n" not in self._text and not self._text.startswith(b"refused"):
            await anyio.wait_readable(self._report)
            if not (more := os.read(self._report, 65536)):
                break
            self._text += more
        facts = _facts(self._text)
        if "refused" in facts:
            if (number := int(facts["errno"])) in LACKS:
                raise OSError(number, _lack(number, facts["what"]))
            raise Refused(f"{self.containment}: {facts['what']}: {facts['reason']}")
        if "payload_pid" not in facts:  # it may have been started: not a matter for a weaker containment
            raise OSError(errno.EPROTO, "the shim ended before it said what it had started")
        _check_started(facts)
        self.pid, self.start_ticks = int(facts["payload_pid"]), int(facts["payload_start"])
        self.fenced = facts["fenced"] == "1"

    @property
    def gone(self) -> bool:
        try:
            return os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except OSError:  # somebody else has reaped it
            return True

    async def wait(self) -> None:
        await anyio.wait_readable(self._pidfd)

    async def end(self, grace_seconds: float) -> bool:
        """The grace is the one the shim was started with; a shorter one here is kept by killing earlier.

        A shim that does not answer, because the payload has stopped or hindered it, is done without.
        """
        if not self.gone:
            self._order(signal.SIGTERM)
            with anyio.move_on_after(grace_seconds + 1):
                await self.wait()
        if not self.gone:
            self._order(signal.SIGUSR1)
            with anyio.move_on_after(ANSWER_SECONDS[self.containment]):
                await self.wait()
        with anyio.move_on_after(KILL_SECONDS) as killing:
            while not self.gone:
                await self._end_without_shim()
            await self._end_rest()
        return not killing.cancelled_caught

    async def _end_without_shim(self) -> None:
        log.warning("process %d: its shim %d does not answer", self.pid, self._popen.pid)
        found = await _in_thread(self._kill_below)
        self._order(signal.SIGUSR1)
        if not found:  # it has nobody to wait for
            self._signal(signal.SIGKILL)
        with anyio.move_on_after(LOOK_SECONDS):
            await self.wait()

    def _kill_below(self) -> int:
        if self._group is not None:
            self._group.kill()
        if read_stat(self._popen.pid) is None:  # /proc hides it from us (hidepid)
            return kill_below(self.pid) + kill_session(self.pid, self.start_ticks)
        return kill_below(self._popen.pid)

    async def _end_rest(self) -> None:
        """What a shim that was killed has left: those in the group, and those who have stayed in the session."""
        if self._group is not None:
            await _in_thread(self._group.kill)
        self._collect()
        if self.pid and self.containment is not Containment.PID_NAMESPACE and "status" not in _facts(self._text):
            found = await _in_thread(lambda: kill_session(self.pid, self.start_ticks))
            log.warning("process %d: its shim was killed; killed %d of its session", self.pid, found)

    def _collect(self) -> None:
        with suppress(OSError):  # nothing more; or a reset, by somebody who had our end and wrote to it
            while more := os.read(self._report, 65536):
                self._text += more

    def reap(self) -> ExitRecord:
        """The record came through a socket of the shim's own; without it the shim was killed and the status is lost."""
        self._collect()
        os.close(self._report)
        os.close(self._pidfd)
        self._pidfd = -1
        with suppress(ChildProcessError):
            os.waitpid(self._popen.pid, os.WNOHANG)
        self._popen.returncode = 0
        facts = _facts(self._text.partition(b"\n\n")[2])
        if "grace_expired" not in facts:
            return ExitRecord()
        status = int(facts["status"])
        return ExitRecord(
            exit_code=os.WEXITSTATUS(status) if status >= 0 and os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if status >= 0 and os.WIFSIGNALED(status) else None,
            payload=_account(facts, "payload"),
            tree=_account(facts, "tree"),
            asked=facts["asked"],
            orphans=int(facts["orphans"]),
            grace_expired=facts["grace_expired"] == "1",
        )

    def hurry(self) -> None:
        self._order(signal.SIGUSR1)

    def usage(self) -> TreeUsage:
        if not self.fenced:  # the payload may have stopped it, and we would not hear of the end
            self._signal(signal.SIGCONT)
        if not self.gone and read_stat(self._popen.pid) is None:  # /proc hides it from us (hidepid)
            return read_session(self.pid)
        return read_tree(self._popen.pid, helpers=self._helpers)

    def _order(self, number: signal.Signals) -> None:
        self._signal(number)
        self._signal(signal.SIGCONT)  # who has the same user may have stopped it

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:  # its number is another's once it is closed
            with suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, number)


async def start_contained(launch: Launch, wanted: Sequence[Containment]) -> Tree:
    """Start a payload in the first containment of `wanted` that the node allows.

    Raises OSError when it cannot be executed, or the node has no process left for it, and `Refused` when it allows none
    of them, or not its isolation. Cancelled, it leaves nothing.
    """
    refusal = Refused("no containment was named")
    for containment in wanted:
        try:
            if containment is Containment.SESSION:
                return await to_thread.run_sync(SessionTree.start, launch)
            if containment is Containment.CGROUP and launch.group is None:
                raise Refused("cgroup: no group was made for the payload")
            return await _start_shim(containment, launch)
        except Refused as exc:
            refusal = exc
    raise refusal


async def _start_shim(containment: Containment, launch: Launch) -> ShimTree:
    tree = await to_thread.run_sync(lambda: ShimTree(containment, isolated(launch, containment)))
    try:
        # A payload that runs is one, also for somebody who is cancelled just then: he ends it with its grace, and says so.
        with anyio.move_on_after(BEGIN_SECONDS, shield=True):
            await tree.begin()
            return tree
        await tree.begin()
    except BaseException:
        with anyio.CancelScope(shield=True):  # `end` is bounded
            await tree.end(0)
            tree.reap()
        raise
    return tree


class _Channels:
    """What we and a shim say to each other: its first words, the report's two ends, the environment. Closed by `with`.

    A socket: what is a pipe, the payload opens through /proc where it may look at the shim or at us.
    """

    def __init__(self, launch: Launch, mode: Containment) -> None:
        self.report, self._report_of_shim = socket.socketpair()
        self._environment = -1
        try:
            self.report.setblocking(mode is Containment.SESSION)
            self._environment = os.memfd_create("environment", os.MFD_CLOEXEC)
            data = memoryview(b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in launch.env.items()))
            while data:
                data = data[os.write(self._environment, data) :]
        except BaseException:
            self.close()
            raise
        settings = launch.settings(no_new_privileges=mode is not Containment.SESSION)
        own = (self._report_of_shim.fileno(), self._environment)
        self.passed = (*own, *launch.joined)
        self.words = [*map(str, (-1, *own, int(launch.grace_seconds * 1000), mode.value, settings))]

    def __enter__(self) -> _Channels:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close_of_shim(self) -> None:
        """Ours of its ends: the report ends with the shim's."""
        self._report_of_shim.close()

    def close(self) -> None:
        """All that was not detached."""
        self.report.close()
        self._report_of_shim.close()
        if self._environment >= 0:
            os.close(self._environment)
            self._environment = -1


def _start_through_shim(launch: Launch) -> Process:
    """By a shim that becomes the payload. Blocks until it has; raises OSError."""
    command = shim_command()
    with _Channels(launch, Containment.SESSION) as channels:
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
                _check_started(_facts(text))
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


async def _in_thread(function: Callable[[], int | None]) -> int:
    """In one of its own: a kill must not wait for the host's."""
    try:
        return await to_thread.run_sync(function, limiter=CapacityLimiter(1)) or 0
    except RuntimeError:  # no thread is to be had: a fork bomb of the same user takes them all
        return function() or 0


def _check_started(facts: dict[str, str]) -> None:
    if error := int(facts["error"]):
        failed = "" if facts["failed"] == "execute" else f" ({facts['failed']})"
        raise OSError(error, os.strerror(error) + failed)


def _lack(number: int, what: str) -> str:
    """What a node has too little of, in its administrator's words."""
    reason = f"{what}: {os.strerror(number)}"
    if number == errno.ENOMEM:
        return f"{reason}: the node, or our memory cgroup, has no memory left for a process"
    of_user, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = "unlimited" if of_user == resource.RLIM_INFINITY else of_user
    return f"{reason}: a limit of processes is reached: RLIMIT_NPROC ({limit}), a cgroup's pids.max, or the node's"


def _account(facts: dict[str, str], of: str) -> Account:
    return Account(
        user_seconds=int(facts[f"{of}_user_us"]) / 1e6,
        system_seconds=int(facts[f"{of}_system_us"]) / 1e6,
        peak_bytes=int(facts[f"{of}_peak_kib"]) * 1024 or None,
        read_bytes=int(facts[f"{of}_inblock"]) * BLOCK_BYTES,
        written_bytes=int(facts[f"{of}_oublock"]) * BLOCK_BYTES,
    )


def _facts(text: bytes) -> dict[str, str]:
    lines = (line.partition(" ") for line in text.decode(errors="replace").splitlines())
    return {name: value for name, _, value in lines if name}
