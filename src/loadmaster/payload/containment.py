"""Holding a payload's whole process tree: by what, and starting it in that.

| containment     | what holds                                          | what gets away                                 |
| --------------- | --------------------------------------------------- | ---------------------------------------------- |
| `pid-namespace` | the shim gives the payload a namespace of its own;  | what another daemon starts on request (cron,   |
|                 | ending its first process ends all                   | at, ssh): no user-space runtime holds that     |
| `subreaper`     | orphans come back to the shim, which kills until    | the same, and all once the payload has killed  |
|                 | nobody is left                                      | the shim                                       |
| `session`       | no shim: the process group is signalled             | whatever calls `setsid`                        |

Of those somebody wants, the first that the node allows is taken. A refusal costs one start of
the shim, about two milliseconds.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import anyio
from anyio import to_thread

from loadmaster.description import Containment
from loadmaster.payload.process import UMASK, ExitRecord, Process
from loadmaster.payload.usage import TreeUsage, read_session, read_tree

log = logging.getLogger(__name__)

KILL_SECONDS: Final = 30.0
"""A killed process that is still there after this hangs in the kernel, on a dead file system as a rule."""

_HERE: Final = Path(__file__).parent


class Refused(Exception):
    """The node does not allow a containment; the message says what and why."""


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
    def start(cls, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdout: int, stderr: int) -> SessionTree:
        """Start it. Blocks for about a millisecond; raises OSError."""
        return cls(Process(argv, env=env, cwd=cwd, stdout=stdout, stderr=stderr))

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

    def __init__(
        self, containment: Containment, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path,
        stdout: int, stderr: int, grace_seconds: float,
    ) -> None:  # fmt: skip
        """Start the shim. Blocks for about a millisecond; raises OSError."""
        self.containment = containment
        self.shim = shim_kind()
        self.pid = self.start_ticks = 0
        self.started = time.monotonic()
        self._text = b""
        self._report, report = os.pipe2(os.O_CLOEXEC)
        environment = os.memfd_create("environment", os.MFD_CLOEXEC)
        try:
            os.set_blocking(self._report, False)
            _write_environment(environment, env)
            words = (-1, report, environment, int(grace_seconds * 1000), containment.value, "n")
            self._popen = subprocess.Popen(
                [*_shim(), *map(str, words), *argv], env={}, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=stderr, pass_fds=(report, environment), start_new_session=True, umask=UMASK,
            )  # fmt: skip
        except BaseException:
            os.close(self._report)
            raise
        finally:
            os.close(report)
            os.close(environment)
        self._pidfd = os.pidfd_open(self._popen.pid)

    async def begin(self) -> None:
        """Wait until the payload runs. Raises `Refused`, or OSError when it cannot be executed."""
        while b"\n\n" not in self._text and not self._text.startswith(b"refused"):
            await anyio.wait_readable(self._report)
            if not (more := os.read(self._report, 65536)):
                break
            self._text += more
        facts = _facts(self._text)
        if "refused" in facts or "payload_pid" not in facts:
            raise Refused(f"{self.containment}: {facts.get('what', 'the shim')}: {facts.get('reason', 'ended early')}")
        if error := int(facts["error"]):
            raise OSError(error, os.strerror(error))
        self.pid, self.start_ticks = int(facts["payload_pid"]), int(facts["payload_start"])

    @property
    def gone(self) -> bool:
        try:
            return os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True

    async def wait(self) -> None:
        await anyio.wait_readable(self._pidfd)

    async def end(self, grace_seconds: float) -> bool:
        """The grace is the one the shim was started with; a shorter one here is kept by killing earlier."""
        if not self.gone:
            self._signal(signal.SIGTERM)
            with anyio.move_on_after(grace_seconds + 1):
                await self.wait()
        if not self.gone:
            self._signal(signal.SIGUSR1)
        with anyio.move_on_after(KILL_SECONDS) as killing:
            await self.wait()
        return not killing.cancelled_caught

    def reap(self) -> ExitRecord:
        """The record came through a pipe of the shim's own; without it the shim was killed and the status is lost."""
        with suppress(BlockingIOError):
            while more := os.read(self._report, 65536):
                self._text += more
        os.close(self._report)
        os.close(self._pidfd)
        with suppress(ChildProcessError):
            os.waitpid(self._popen.pid, os.WNOHANG)
        self._popen.returncode = 0
        facts = _facts(self._text)
        if "status" not in facts or (status := int(facts["status"])) < 0:
            return ExitRecord()
        return ExitRecord(
            exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            cpu_seconds=(int(facts["tree_user_us"]) + int(facts["tree_system_us"])) / 1e6,
            peak_bytes=int(facts["tree_peak_kib"]) * 1024,
        )

    def hurry(self) -> None:
        self._signal(signal.SIGUSR1)

    def usage(self) -> TreeUsage:
        return read_tree(self._popen.pid, helpers=int(self.containment is Containment.PID_NAMESPACE))

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)


async def start_contained(
    argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdout: int, stderr: int,
    grace_seconds: float, wanted: Sequence[Containment],
) -> Tree:  # fmt: skip
    """Start a payload in the first containment of `wanted` that the node allows.

    Raises OSError when it cannot be executed, `Refused` when the node allows none of them. Cancelled, it leaves nothing.
    """
    refusal = Refused("no containment was named")
    for containment in wanted:
        if containment is Containment.SESSION:
            return await to_thread.run_sync(
                lambda: SessionTree.start(argv, env=env, cwd=cwd, stdout=stdout, stderr=stderr)
            )
        tree = await to_thread.run_sync(
            lambda kind: ShimTree(
                kind, argv, env=env, cwd=cwd, stdout=stdout, stderr=stderr, grace_seconds=grace_seconds
            ),
            containment,
        )
        try:
            await tree.begin()
        except Refused as exc:
            await _abandon(tree)
            refusal = exc
        except BaseException:
            await _abandon(tree)
            raise
        else:
            return tree
    raise refusal


async def _abandon(tree: ShimTree) -> None:
    with anyio.CancelScope(shield=True):  # `end` is bounded
        await tree.end(0)
        tree.reap()


def shim_kind() -> str:
    """Which shim this installation has: `c`, or its `python` twin where no compiler was found."""
    return "c" if os.access(_HERE / "shim", os.X_OK) else "python"


def _shim() -> list[str]:
    if shim_kind() == "c":
        return [str(_HERE / "shim")]
    return [sys.executable, "-I", "-S", str(_HERE / "shim.py")]


def _write_environment(descriptor: int, env: Mapping[str, str]) -> None:
    data = memoryview(b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items()))
    while data:
        data = data[os.write(descriptor, data) :]


def _facts(text: bytes) -> dict[str, str]:
    lines = (line.partition(" ") for line in text.decode(errors="replace").splitlines())
    return {name: value for name, _, value in lines if name}
