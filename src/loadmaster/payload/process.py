"""One process in a session of its own: start it, know when it is gone, end its group, reap it.

Popen and a pidfd rather than the event loop's own subprocesses: those need a child watcher or SIGCHLD, which belong
to the embedding program, and they cost two to ten times as much (measured: 2,750 starts a second against 2,100 on
asyncio, 1,160 on trio, 490 on uvloop).
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio import CapacityLimiter, to_thread

from loadmaster.payload.launch import UMASK
from loadmaster.payload.usage import BLOCK_BYTES, open_group, read_stat


@dataclass(frozen=True, slots=True)
class Account:
    """What the kernel has added up of processes that were reaped."""

    user_seconds: float = 0.0
    system_seconds: float = 0.0
    peak_bytes: int | None = None
    """The most memory that any one of them had resident."""
    read_bytes: int = 0
    written_bytes: int = 0
    """From and to storage, page cache apart, as the kernel counts it for everybody and not for root alone."""

    @property
    def cpu_seconds(self) -> float:
        """User and system time together."""
        return self.user_seconds + self.system_seconds

    @classmethod
    def of(cls, usage: resource.struct_rusage, *, least_peak_kib: int = 0) -> Account:
        """Of a wait4. A peak of no more than `least_peak_kib` is not the process's own."""
        return cls(
            user_seconds=usage.ru_utime,
            system_seconds=usage.ru_stime,
            peak_bytes=usage.ru_maxrss * 1024 if usage.ru_maxrss > least_peak_kib else None,
            read_bytes=usage.ru_inblock * BLOCK_BYTES,
            written_bytes=usage.ru_oublock * BLOCK_BYTES,
        )


NOTHING = Account()


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How a payload ended. Without exit code and signal its status is lost: somebody else reaped it, or killed the shim."""

    exit_code: int | None = None
    signal: int | None = None
    payload: Account = NOTHING
    """Its first process and those it has waited for."""
    tree: Account = NOTHING
    """All that were reaped, orphans too where a shim collects them; without one, the same."""
    asked: str = "-"
    """Who ordered the shim to end it: `-` nobody, `T` politely, `K` at once; `O`: there was no agent any more."""
    orphans: int = 0
    """Processes that came back to the shim."""
    grace_expired: bool = False
    """Whether somebody did not end when asked."""
    wall_seconds: float | None = None
    """As the shim's clock had it; None where there is none."""

    @property
    def cpu_seconds(self) -> float:
        """Of the tree."""
        return self.tree.cpu_seconds

    @property
    def peak_bytes(self) -> int | None:
        """Of the tree."""
        return self.tree.peak_bytes


class Process:
    """A started process, leader of its own session and group. Call `reap` exactly once, at the end."""

    def __init__(
        self, argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, stdout: int, stderr: int,
        umask: int = UMASK, pass_fds: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """Start it. Blocks for about a millisecond; raises OSError. Nothing is inherited but descriptors that are named.

        And what Popen leaves: signals that we ignore, but for those that Python does by itself, and signals blocked.
        """
        self.started = time.monotonic()
        self._popen = subprocess.Popen(
            argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            start_new_session=True, umask=umask, pass_fds=pass_fds,
        )  # fmt: skip
        self.pid = self._popen.pid
        try:
            self._pidfd = self._open()
            own = read_stat(self.pid)
        except BaseException:
            self._signal_group(signal.SIGKILL)
            self._popen.wait()
            raise
        self.start_ticks = own.start_ticks if own else 0
        # A started process takes over our own peak as its first: it shares our memory until it executes something.
        self._inherited_peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __repr__(self) -> str:
        return f"<Process {self.pid}{' gone' if self._popen.returncode is not None else ''}>"

    @property
    def gone(self) -> bool:
        """Whether the process, all its threads included, has ended. Its children may still be there."""
        try:
            return os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except OSError:  # somebody else has reaped it
            return True

    async def wait(self) -> None:
        """Return when the process has ended. Does not reap it; cancellation leaves it as it is."""
        await anyio.wait_readable(self._pidfd)

    async def wait_rest(self) -> None:
        """Return when nobody is left of the group but the leader; what has ended and was not reaped counts as gone."""
        while self.has_group() and (rest := await to_thread.run_sync(open_group, self.pid, limiter=CapacityLimiter(1))):
            try:
                for pidfd in rest:
                    await anyio.wait_readable(pidfd)
            finally:
                for pidfd in rest:
                    os.close(pidfd)

    def terminate(self) -> None:
        """Ask every process of the group to end, also stopped ones."""
        self._signal_group(signal.SIGTERM)
        self._signal_group(signal.SIGCONT)

    def kill(self) -> None:
        """End every process of the group."""
        self._signal_group(signal.SIGKILL)

    def reap(self) -> ExitRecord:
        """Release the process and say how it ended. Whoever is left of its group is killed first.

        In this order, because a group's number may be given to somebody else once its leader is reaped.
        """
        self.kill()
        os.close(self._pidfd)
        try:
            pid, status, usage = os.wait4(self.pid, os.WNOHANG)
        except ChildProcessError:  # the embedding program ignores SIGCHLD, or waits for children that are not its own
            self._popen.returncode = 0
            return ExitRecord()
        if pid == 0:
            return ExitRecord()
        self._popen.returncode = os.waitstatus_to_exitcode(status)
        account = Account.of(usage, least_peak_kib=self._inherited_peak_kib)
        return ExitRecord(
            exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            payload=account,
            tree=account,
        )

    def discard(self) -> None:
        """Kill it, and wait: for when the rest of its start has failed. Blocks until it is gone, some milliseconds."""
        self.kill()
        self._popen.wait()
        os.close(self._pidfd)

    def _open(self) -> int:
        """A descriptor that can be read from once the process has ended."""
        try:
            return os.pidfd_open(self.pid)
        except ProcessLookupError:  # it has, and was reaped by a kernel whose embedding program ignores SIGCHLD
            return os.eventfd(1)

    def has_group(self) -> bool:
        """False when nobody is left, the leader reaped: known without a look at all of /proc."""
        try:
            os.killpg(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    def _signal_group(self, number: signal.Signals) -> None:
        if self._popen.returncode is not None:  # reaped: the number may be another's
            return
        with suppress(ProcessLookupError, PermissionError):  # a set-uid payload: containment is more than a group
            os.killpg(self.pid, number)
