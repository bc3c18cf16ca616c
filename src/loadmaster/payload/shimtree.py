"""A payload below a shim: started, waited for, ended, also when the shim is hindered or killed."""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import signal
import socket
import subprocess
import time
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Final

import anyio

from loadmaster.description import Containment, Isolation
from loadmaster.payload.launch import Group, Launch, Refused, shim_command, shim_kind
from loadmaster.payload.process import Account, ExitRecord
from loadmaster.payload.starter import UNTAKEN, Order, Starter
from loadmaster.payload.sweep import kill_below, kill_init, kill_session
from loadmaster.payload.tree import KILL_SECONDS, Tree, in_thread
from loadmaster.payload.usage import BLOCK_BYTES, TreeUsage, read_session, read_stat, read_tree

log = logging.getLogger(__name__)

ANSWER_SECONDS: Final = {Containment.PID_NAMESPACE: 10.0, Containment.CGROUP: 2.0, Containment.SUBREAPER: 2.0}
"""How long a shim has for a kill before we do it ourselves: a thousand processes take it a quarter of a second. What a
namespace holds cannot hinder it, and a status is lost that we do not wait for."""

LOOK_SECONDS: Final = 0.2
"""Between two kills of our own; the shim's end is noticed at once."""

LACKS: Final = (errno.EAGAIN, errno.ENOMEM)
"""What a busy node says, and what says nothing of what it allows."""


UNHEARD_SECONDS: Final = 2.0
"""A starter that has not heard of a start for that long is told to go on, and after as long again done without."""


class HeldByShim(Tree):
    """A payload below a shim (shim.c), whoever has started that."""

    init_pid: int = 0
    init_start_ticks: int = 0
    """Of process 1 of its namespace, where it has one: when that is gone, all are."""
    _pidfd: int = -1
    _group: Group | None = None
    _helpers: int = 0
    _silent: bool = False
    _over: bool = False
    _reported: bool = False

    @abstractmethod
    def _has_record(self) -> bool:
        """Whether the shim has said how it ended."""

    @property
    def gone(self) -> bool:
        if not self._over:
            self._over = self._pidfd < 0 or is_readable(self._pidfd)
        return self._over

    async def wait(self) -> None:
        await anyio.wait_readable(self._pidfd)
        self._over = True

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
        if self.gone and self._group is None and not self._shim_was_killed:
            return True
        with anyio.move_on_after(KILL_SECONDS) as killing:
            while not self.gone:
                await self._end_without_shim()
            await self._end_rest()
        return not killing.cancelled_caught

    @property
    def _shim_was_killed(self) -> bool:
        """Whether the shim's end came before that of all the others."""
        return bool(self.pid) and not self._has_record()

    async def _end_without_shim(self) -> None:
        if not self._silent:
            log.warning("process %d: its shim %d does not answer", self.pid, self.shim_pid)
            self._silent = True
        found = await in_thread(self._kill_below)
        self._order(signal.SIGUSR1)
        if not found:  # it has nobody to wait for
            self._signal(signal.SIGKILL)
        with anyio.move_on_after(LOOK_SECONDS):
            await self.wait()

    def _kill_below(self) -> int:
        if self._group is not None:
            self._group.kill()
        if read_stat(self.shim_pid) is None:  # /proc hides it from us (hidepid)
            return kill_below(self.pid) + kill_session(self.pid, self.start_ticks)
        return kill_below(self.shim_pid)

    async def _end_rest(self) -> None:
        """What a shim that was killed has left: those in the group, and those who have stayed in the session."""
        if self._group is not None:
            await in_thread(self._group.kill)
        if not self._shim_was_killed:
            return
        if self.containment is Containment.PID_NAMESPACE:  # the kernel is about to
            for pidfd in await in_thread(lambda: kill_init(self.init_pid, self.init_start_ticks)):
                try:
                    await anyio.wait_readable(pidfd)
                finally:
                    os.close(pidfd)
        else:
            found = await in_thread(lambda: kill_session(self.pid, self.start_ticks))
            log.warning("process %d: its shim was killed; killed %d of its session", self.pid, found)

    @property
    def holds_all(self) -> bool:
        """By its namespace; or the shim has said that nobody is left, and only the payload's status was lost."""
        return self.containment is Containment.PID_NAMESPACE or self._reported

    def hurry(self) -> None:
        self._order(signal.SIGUSR1)

    def usage(self) -> TreeUsage:
        if not self.fenced:  # the payload may have stopped it, and we would not hear of the end
            self._signal(signal.SIGCONT)
        if not self.gone and read_stat(self.shim_pid) is None:  # /proc hides it from us (hidepid)
            return read_session(self.pid)
        return read_tree(self.shim_pid, helpers=self._helpers)

    def _order(self, number: signal.Signals) -> None:
        self._signal(number)
        self._signal(signal.SIGCONT)  # who has the same user may have stopped it

    def _signal(self, number: signal.Signals) -> None:
        if self._pidfd >= 0:  # its number is another's once it is closed
            with suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, number)


class NotTaken(Exception):
    """A starter has ended before it heard of a start: nothing was started."""


class ShimTree(HeldByShim):
    """A payload below a shim that is below us."""

    def __init__(self, containment: Containment, launch: Launch) -> None:
        """Only what it will be: `ordered` and `executed` start it."""
        self.containment = containment
        self.shim = "c"
        self.pid = self.start_ticks = 0
        self.started = time.monotonic()
        self._group = launch.group
        self._text = b""
        self._last_words: dict[str, str] = {}
        self._helpers = helpers_of(containment, launch.isolation)
        self._mode = Containment.SUBREAPER if containment is Containment.CGROUP else containment
        self._popen: subprocess.Popen[bytes] | None = None
        self._directory = str(launch.cwd)
        self._order_of: Order | None = None
        self._insisted = False

    @classmethod
    def ordered(cls, containment: Containment, launch: Launch, starter: Starter) -> ShimTree | None:
        """Have a shim started; None if that one cannot. Does not wait; raises OSError."""
        tree = cls(containment, launch)
        report, of_shim = socket.socketpair()
        with report, of_shim:
            report.setblocking(False)
            tree._order_of = starter.order(launch, tree._mode, of_shim.fileno())
            if tree._order_of is None:
                return None
            tree._report = report.detach()
        return tree

    @classmethod
    def executed(cls, containment: Containment, launch: Launch) -> ShimTree:
        """Execute the shim. Blocks for about a millisecond; raises OSError, or `Refused` when it cannot be executed."""
        tree = cls(containment, launch)
        tree.shim = shim_kind()
        tree._execute(launch)
        return tree

    def _execute(self, launch: Launch) -> None:
        command = shim_command()
        with Channels(launch, self._mode) as channels:
            try:
                self._popen = subprocess.Popen(
                    [*command, *channels.words, *launch.argv], env={}, cwd=launch.cwd, stdin=subprocess.DEVNULL,
                    stdout=launch.stdout, stderr=launch.stderr, pass_fds=channels.passed, start_new_session=True,
                    umask=launch.umask,
                )  # fmt: skip
            except OSError as exc:
                if exc.errno in LACKS:
                    raise OSError(exc.errno, lack_of(exc.errno, "fork")) from exc
                if exc.filename == command[0]:
                    raise Refused(f"{self.containment}: the shim cannot be executed: {exc}") from exc
                raise
            self._report = channels.report.detach()
            try:
                self._found(self._popen.pid)
            except OSError:
                self._popen.send_signal(signal.SIGUSR1)
                self._popen.wait()
                os.close(self._report)
                raise

    def _found(self, pid: int) -> None:
        """Have a descriptor that can be read from once the shim has ended. Raises OSError."""
        self.shim_pid = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has, and was reaped by a kernel whose embedding program ignores SIGCHLD
            self._pidfd = os.eventfd(1)

    async def begin(self, *, insist: bool = True) -> None:
        """Wait until the payload runs. Raises `Refused`, `NotTaken`, or OSError when it cannot be executed or no process
        be had. `insist`: that a starter which has stopped is told to go on."""
        facts = await self._first_words(insist=insist)
        if "refused" in facts:
            if (number := int(facts["errno"])) in LACKS:
                raise OSError(number, lack_of(number, facts["what"]))
            if facts["what"] == "directory":
                raise OSError(number, facts["reason"], self._directory)
            if facts["what"] in {"lock", "record"}:  # of the state directory: not a matter for a weaker containment
                raise OSError(number, f"its state directory: {facts['what']}: {facts['reason']}")
            raise Refused(f"{self.containment}: {facts['what']}: {facts['reason']}")
        if "payload_pid" not in facts:  # it may have been started: not a matter for a weaker containment
            raise OSError(errno.EPROTO, "the shim ended before it said what it had started")
        check_started(facts)
        self.pid, self.start_ticks = int(facts["payload_pid"]), int(facts["payload_start"])
        self.shim_start_ticks = int(facts["shim_start"])
        self.init_pid, self.init_start_ticks = int(facts["init_pid"]), int(facts["init_start"])
        self.fenced = facts["fenced"] == "1"

    async def _first_words(self, *, insist: bool = True) -> dict[str, str]:
        """What the shim says of the start, or a starter of why there is none. Knows the shim by then, if there is one."""
        while b"\n\n" not in self._text and not self._text.startswith(b"refused"):
            if not (insist and self._is_unheard):
                await anyio.wait_readable(self._report)
            elif not await self._hears():
                await self._hurry_starter()
                continue
            if more := os.read(self._report, 65536):
                self._text += more
            else:
                break
        facts = facts_of(self._text)
        if self._order_of is not None:
            pid = int(facts.get("shim_pid", self._order_of.pid))
            if not facts and pid == UNTAKEN:
                raise NotTaken
            if pid > 0 and self._pidfd < 0:
                self._found(pid)
        return facts

    async def _hears(self) -> bool:
        with anyio.move_on_after(UNHEARD_SECONDS):
            await anyio.wait_readable(self._report)
            return True
        return False

    @property
    def _is_unheard(self) -> bool:
        return self._order_of is not None and self._order_of.pid == UNTAKEN

    async def _hurry_starter(self) -> None:
        """Who has our user may have stopped it, and all starts wait for it."""
        if self._order_of is None or not self._is_unheard:
            return
        if self._insisted:
            await self._order_of.withdraw()
        self._order_of.insist()
        self._insisted = True

    async def find(self) -> bool:
        """Whether there is a shim to be ended, of a start that is given up. Call it shielded; it is bounded."""
        if self._pidfd >= 0 or self._order_of is None:
            return self._pidfd >= 0
        if self._order_of.pid <= 0:
            await self._order_of.withdraw()
        if self._order_of.pid < 0:  # who has the report says so, or it ends
            with anyio.move_on_after(KILL_SECONDS), suppress(NotTaken):
                await self._first_words()
        elif self._order_of.pid > 0:
            try:
                self._found(self._order_of.pid)
            except OSError:  # no descriptor is free
                os.kill(self.shim_pid, signal.SIGUSR1)
                await in_thread(partial(os.waitpid, self.shim_pid, 0))
        return self._pidfd >= 0

    def _has_record(self) -> bool:
        return bool(self._said())

    def _said(self) -> dict[str, str]:
        """All of what it has said of the end, or nothing."""
        if self._last_words:
            return self._last_words
        with suppress(OSError):  # nothing more; or a reset, by somebody who had our end and wrote to it
            while more := os.read(self._report, 65536):
                self._text += more
        facts = facts_of(self._text.partition(b"\n\n")[2])
        self._last_words = facts if "grace_expired" in facts else {}
        return self._last_words

    def reap(self) -> ExitRecord:
        """The record came through a socket of the shim's own; without it the shim was killed and the status is lost."""
        said = self._said()
        os.close(self._report)
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            with suppress(ChildProcessError):
                os.waitpid(self.shim_pid, os.WNOHANG)
        if self._popen is not None:
            self._popen.returncode = 0
        if self._order_of is not None:
            self._order_of.forget()
        self._reported = bool(said)
        return record_of(said) if said else ExitRecord()


class Channels:
    """What we and a shim say to each other: its first words, the report's two ends, the environment. Closed by `with`.

    A socket: what is a pipe, the payload opens through /proc where it may look at the shim or at us.
    """

    def __init__(self, launch: Launch, mode: Containment) -> None:
        self.report, self._report_of_shim = socket.socketpair()
        self._environment = -1
        try:
            self.report.setblocking(mode is Containment.SESSION)
            self._environment = os.memfd_create("environment", os.MFD_CLOEXEC)
            data = memoryview(os.fsencode("".join([f"{name}={value}\0" for name, value in launch.env.items()])))
            while data:
                data = data[os.write(self._environment, data) :]
        except BaseException:
            self.close()
            raise
        settings = launch.settings(mode)
        own = (self._report_of_shim.fileno(), self._environment)
        hidden = launch.hidden if mode is Containment.PID_NAMESPACE else ()
        self.passed = (*own, *launch.joined, *hidden, *(each for each in (launch.state, launch.lock) if each >= 0))
        self.words = [*map(str, (launch.state, *own, int(launch.grace_seconds * 1000), mode.value, settings))]

    def __enter__(self) -> Channels:
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


def helpers_of(containment: Containment, isolation: Isolation) -> int:
    """How many of the first processes below a shim are not the payload's."""
    return (containment is Containment.PID_NAMESPACE) + 2 * (isolation is Isolation.BUBBLEWRAP)


def is_readable(descriptor: int) -> bool:
    """Whether it can be read from now; a pidfd, whether its process has ended."""
    now = select.poll()
    now.register(descriptor, select.POLLIN)
    return bool(now.poll(0))


def record_of(facts: Mapping[str, str]) -> ExitRecord:
    """What a shim has said of the end. Raises KeyError or ValueError when that is not all there."""
    status = int(facts["status"])
    return ExitRecord(
        exit_code=os.WEXITSTATUS(status) if status >= 0 and os.WIFEXITED(status) else None,
        signal=os.WTERMSIG(status) if status >= 0 and os.WIFSIGNALED(status) else None,
        payload=_account(facts, "payload"),
        tree=_account(facts, "tree"),
        asked=facts["asked"],
        orphans=int(facts["orphans"]),
        grace_expired=facts["grace_expired"] == "1",
        wall_seconds=int(facts["wall_ms"]) / 1000,
    )


def check_started(facts: Mapping[str, str]) -> None:
    """Raise OSError when a report says that nothing could be executed."""
    if error := int(facts["error"]):
        failed = "" if facts["failed"] == "execute" else f" ({facts['failed']})"
        raise OSError(error, os.strerror(error) + failed)


def lack_of(number: int, what: str) -> str:
    """What a node has too little of, in its administrator's words."""
    reason = f"{what}: {os.strerror(number)}"
    if number == errno.ENOMEM:
        return f"{reason}: the node, or our memory cgroup, has no memory left for a process"
    of_user, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    limit = "unlimited" if of_user == resource.RLIM_INFINITY else of_user
    return f"{reason}: a limit of processes is reached: RLIMIT_NPROC ({limit}), a cgroup's pids.max, or the node's"


def _account(facts: Mapping[str, str], of: str) -> Account:
    return Account(
        user_seconds=int(facts[f"{of}_user_us"]) / 1e6,
        system_seconds=int(facts[f"{of}_system_us"]) / 1e6,
        peak_bytes=int(facts[f"{of}_peak_kib"]) * 1024 or None,
        read_bytes=int(facts[f"{of}_inblock"]) * BLOCK_BYTES,
        written_bytes=int(facts[f"{of}_oublock"]) * BLOCK_BYTES,
    )


def facts_of(text: bytes) -> dict[str, str]:
    """The lines of a report: a name, a blank, a value."""
    lines = text.decode(errors="replace").splitlines()
    return {name: value for name, _, value in [line.partition(" ") for line in lines] if name}
