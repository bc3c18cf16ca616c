"""Starting shims without executing them: a message to a process that is one already, and copies itself.

    agent ─┬─ starter                  (a shim with nothing to do but to copy itself)
           ├─ shim ── payload ─ ...    (the copies: children of the agent's, as if he had executed them)
           └─ shim ── payload ─ ...

To execute a shim takes a thread that waits for it, and half a millisecond until it has come to itself; a message is sent by
the event loop's own thread. shim.c says how it is laid out. There is a starter only where there is a compiled shim.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.description import Containment
from loadmaster.payload.launch import Launch, shim_command, shim_kind
from loadmaster.payload.tree import KILL_SECONDS

log = logging.getLogger(__name__)

FIRST_PASSED: Final = 5
"""What the first descriptor of a message is in the starter; shim.c has the same, and the following two."""
MESSAGE_BYTES: Final = 1 << 16
MOST_PIDS: Final = 4096

HEAD: Final = struct.Struct("=4I")
PID: Final = struct.Struct("=i")

UNTAKEN: Final = 0
"""Instead of a pid: nobody has heard of it so far."""


class Order:
    """A start that was asked for. Call `forget` once it has come to something."""

    def __init__(self, starter: _Running, place: int) -> None:
        self._starter = starter
        self._place = place

    @property
    def pid(self) -> int:
        """Of the shim; -1 when there may be one, 0 as long as there is none."""
        return self._starter.pid_at(self._place)

    def insist(self) -> None:
        """Have the starter go on, if somebody has stopped it."""
        self._starter.signal(signal.SIGCONT)

    async def withdraw(self) -> None:
        """End the starter: an order that it has not taken is taken by nobody then. Bounded; call it shielded."""
        self._starter.signal(signal.SIGKILL)
        try:
            pidfd = os.dup(self._starter.pidfd)  # another one may be started meanwhile
        except OSError:  # has been
            return
        try:
            with anyio.move_on_after(KILL_SECONDS):
                await anyio.wait_readable(pidfd)
        finally:
            os.close(pidfd)

    def forget(self) -> None:
        """Its place is another's from now on."""
        self._starter.free.append(self._place)


class Starter:
    """Starts shims, by a process that is there from the first start on, and again if it was killed.

    What a shim has from its parent (limits, niceness, CPUs, control group, ...) is what the agent had then.
    """

    def __init__(self) -> None:
        self._running: _Running | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Starter {self._running.pid if self._running else 'not running'}>"

    @property
    def pid(self) -> int:
        """Of its process; 0 when there is none."""
        return self._running.pid if self._running is not None else 0

    def prepare(self) -> None:
        """Have its process there. Blocks for a moment when it is not. Without one `order` has nothing to say."""
        if self._running is not None and not self._running.gone:
            return
        with self._lock:
            if self._running is not None:
                if not self._running.gone:
                    return
                log.warning("starter %d: is gone; payloads are started by another", self._running.pid)
                self._running.release()
                self._running = None
            try:
                self._running = _Running()
            except OSError as exc:  # shims can be executed one by one
                log.warning("no starter: %s", exc)

    def order(self, launch: Launch, mode: Containment, report: int) -> Order | None:
        """Ask for a shim, with that end of its report; None if it has to be executed. Does not wait."""
        starter, directory = self._running, str(launch.cwd)
        if (
            starter is None
            or not os.path.isabs(directory)
            or launch.wrapped
            or not starter.free
            or starter.rights != _rights()
        ):
            return None
        place = starter.free.pop()
        starter.claim(place)
        passed = [report, launch.stdout, launch.stderr]

        def numbered(descriptor: int) -> int:
            passed.append(descriptor)
            return FIRST_PASSED + len(passed) - 1

        state = -1 if launch.state < 0 else numbered(launch.state)
        settings = launch.settings(mode, numbered)
        if launch.lock >= 0:
            numbered(launch.lock)
        grace_ms = int(launch.grace_seconds * 1000)
        words = [*map(str, (state, FIRST_PASSED, -1, grace_ms)), mode.value, settings, *launch.argv]
        variables = [f"{name}={value}" for name, value in launch.env.items()]
        text = os.fsencode("\0".join([directory, *words, *variables, ""]))
        whole = text.count(0) == 1 + len(words) + len(variables)  # what has a NUL in itself is Popen's to refuse
        if whole and len(text) <= MESSAGE_BYTES and starter.send(
            HEAD.pack(place, launch.umask, len(words), len(variables)), text, passed
        ):  # fmt: skip
            return Order(starter, place)
        starter.free.append(place)
        return None

    async def close(self) -> None:
        """End its process; the shims stay. Bounded."""
        running, self._running = self._running, None
        if running is None:
            return
        with anyio.CancelScope(shield=True):
            running.signal(signal.SIGKILL)
            with anyio.move_on_after(KILL_SECONDS):
                await anyio.wait_readable(running.pidfd)
            running.release()


@asynccontextmanager
async def open_starter() -> AsyncGenerator[Starter | None, None]:
    """A starter for many payloads; None where shims have to be executed. Its process has ended at the end, at which no
    start may be under way."""
    if await to_thread.run_sync(shim_kind) != "c":
        yield None
        return
    starter = Starter()
    try:
        yield starter
    finally:
        await starter.close()


class _Running:
    """A starter's process, and what we share with it."""

    def __init__(self) -> None:
        """Blocks for about a millisecond; raises OSError."""
        self.rights = _rights()
        self.free = list(range(MOST_PIDS))
        with ExitStack() as stack:
            memory = os.memfd_create("pids", os.MFD_CLOEXEC)
            stack.callback(os.close, memory)
            os.ftruncate(memory, MOST_PIDS * PID.size)
            self._pids: mmap.mmap | bytearray = mmap.mmap(memory, MOST_PIDS * PID.size)
            self._control, control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            stack.enter_context(control)
            with ExitStack() as failed:
                failed.callback(self._unmap)
                failed.enter_context(self._control)
                self._control.setblocking(False)
                passed = (control.fileno(), memory)
                self._popen = subprocess.Popen(
                    [*shim_command(), "starter", *map(str, passed)], env={}, cwd="/", stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=passed, start_new_session=True,
                )  # fmt: skip
                failed.callback(self._popen.wait)
                failed.callback(self._popen.kill)
                self.pid = self._popen.pid
                self.pidfd = os.pidfd_open(self.pid)
                failed.pop_all()

    @property
    def gone(self) -> bool:
        """Whether its process has ended."""
        now = select.poll()
        now.register(self.pidfd, select.POLLIN)
        return bool(now.poll(0))

    def send(self, head: bytes, text: bytes, passed: Sequence[int]) -> bool:
        """Whether a message is on its way."""
        try:
            socket.send_fds(self._control, [head, text], passed)
        except OSError as exc:
            if exc.errno not in {errno.EAGAIN, errno.EPIPE, errno.ECONNRESET, errno.EBADF}:
                log.warning("starter %d: %s", self.pid, exc)
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Signal it, whoever has its pid now."""
        with suppress(OSError):
            signal.pidfd_send_signal(self.pidfd, number)

    def release(self) -> None:
        """Of one that has ended: reap it, and let go of all but what an `Order` may still look at."""
        self._control.close()
        self._unmap()
        with suppress(ChildProcessError):  # the embedding program ignores SIGCHLD, or has waited for it
            os.waitpid(self.pid, os.WNOHANG)
        self._popen.returncode = 0
        os.close(self.pidfd)
        self.pidfd = -1

    def _unmap(self) -> None:
        """A map has a descriptor of its own."""
        shared, self._pids = self._pids, bytearray(self._pids)
        if isinstance(shared, mmap.mmap):
            shared.close()

    def pid_at(self, place: int) -> int:
        """Of a shim, as the process has noted it."""
        pid: int = PID.unpack_from(self._pids, place * PID.size)[0]
        return pid

    def claim(self, place: int) -> None:
        """For another shim."""
        PID.pack_into(self._pids, place * PID.size, UNTAKEN)


def _rights() -> tuple[object, ...]:
    """Whose rights a process has that is started now: an agent that has given its own up must not start with them."""
    return os.getresuid(), os.getresgid(), os.getgroups()
