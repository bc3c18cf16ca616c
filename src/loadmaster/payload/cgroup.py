"""A payload's control groups: what it uses as the kernel adds it up, limits the kernel holds, and a kill of all in it.

| what      | from                                              | what it does not see                                     |
| --------- | ------------------------------------------------- | -------------------------------------------------------- |
| CPU       | `cpu.stat`, `cpuacct`                             | who has left for another group: see below                |
| memory    | `memory.stat`: anonymous, shared memory, memfds   | page cache, on purpose; what was swapped out             |
| its peak  | `memory.peak`, `memory.max_usage_in_bytes`        | includes page cache, so that it is no payload's fault    |
| tasks     | `pids.current`                                    | threads count in it                                      |
| I/O       | `io.stat`                                         | what reaches no disk                                     |

A group holds whoever cannot write to another one: a payload of root, or one of the user to whom the groups above are
delegated too, can leave it, and can raise its limits. It is a help to the shim then, not a replacement.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Final, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread

from loadmaster.description import Limits
from loadmaster.payload.cgroupfs import GroupDirectory, figures
from loadmaster.payload.hierarchies import Hierarchies, find_hierarchies
from loadmaster.payload.usage import TreeUsage
from loadmaster.result import Verdict

log = logging.getLogger(__name__)

T = TypeVar("T")

KILL_AGAIN_SECONDS: Final = 0.5
"""Somebody may have been outside the kill's sight, a process just being moved here. One more costs a millisecond."""

_AT_LIMIT: Final = 0.99
"""A peak that is this near to a limit has met it: the last pages are charged by the dozen, and may not have fitted."""


MEMORY_MARGIN: Final = 1.1
"""The kernel kills at so much of the limit: we have judged by then, with a grace, unless it grew faster than we look."""

TASKS_PER_PROCESS: Final = 64
SPARE_TASKS: Final = 1024
"""The kernel counts threads, a limit counts processes; this stops a fork bomb and no program with many threads."""


class OutOfMemory(StrEnum):
    """Why the kernel killed for memory."""

    OWN_LIMIT = "own-limit"
    """The payload used more than was set for it."""
    ELSEWHERE = "elsewhere"
    """The node had none left, or a group above or one that the payload made itself."""


@dataclass(frozen=True, slots=True)
class GroupUsage:
    """What the processes of a group use, and those that are gone used. None: not counted here."""

    user_seconds: float | None = None
    system_seconds: float | None = None
    memory_bytes: int | None = None
    """Anonymous and shared memory, memfds and tmpfs files included, page cache not; each page once."""
    peak_bytes: int | None = None
    """The most that was charged, page cache included."""
    processes: int = 0
    tasks: int | None = None
    """Processes and threads."""
    read_bytes: int | None = None
    written_bytes: int | None = None
    oom_kills: int = 0
    refused_forks: int = 0
    """How often the limit of tasks was met."""

    @property
    def cpu_seconds(self) -> float | None:
        """User and system time together."""
        if self.user_seconds is None or self.system_seconds is None:
            return None
        return self.user_seconds + self.system_seconds

    @property
    def is_enough(self) -> bool:
        """Whether it makes a look at each process unnecessary."""
        return None not in {self.cpu_seconds, self.memory_bytes}

    def added_to(self, found: TreeUsage) -> TreeUsage:
        """What /proc tells, and what it does not see: CPU of children nobody waited for."""
        user, system = self.user_seconds or 0.0, self.system_seconds or 0.0
        if user + system > found.cpu_seconds:
            found = replace(found, user_seconds=user, system_seconds=system)
        return replace(
            found,
            rss_bytes=max(found.rss_bytes, self.memory_bytes or 0),
            threads=max(found.threads, self.tasks or 0),
            processes=found.processes or self.processes,
            read_bytes=max(found.read_bytes, self.read_bytes or 0),
            written_bytes=max(found.written_bytes, self.written_bytes or 0),
        )


class Group:
    """The groups of one payload, one in each hierarchy that is of use. Call `remove` at the end, until it says True.

    Everything blocks for a moment but what is async.
    """

    def __init__(self, hierarchies: Hierarchies, job_id: str) -> None:
        """Make them. Raises OSError, with none made."""
        self._groups: dict[Path, GroupDirectory] = {}
        self._items: dict[str, GroupDirectory] = {}
        self.descriptors: tuple[int, ...] = ()
        """A payload's first process writes `0` to each before it executes anything; close them when it has started."""
        if not hierarchies.directories:
            raise OSError(errno.ENOTSUP, f"no control group can be made here: {'; '.join(hierarchies.refusals)}")
        try:
            for directory in hierarchies.directories:
                self._groups[directory] = GroupDirectory.make(directory, job_id)
                self.descriptors += (self._groups[directory].open_procs(),)
        except BaseException:
            self.remove()
            self.close()
            raise
        self._use({item: self._groups[path] for item, path in hierarchies.items()})

    def _use(self, items: Mapping[str, GroupDirectory]) -> None:
        self._items = dict(items)
        first = next(iter(items.values()))
        self._killing = items.get("kill") or items.get("freeze") or items.get("events") or first
        self._events = items.get("events") or first
        self._cpu, self._memory, self._pids, self._io = map(items.get, ("cpu", "memory", "pids", "io"))
        self._is_memory_limited = False
        self.memory_bytes: int | None = None
        """The limit of memory that was asked for."""

    @classmethod
    def reopen(cls, items: Mapping[str, str], limits: Limits) -> Group:
        """Those an agent that has died made for a payload, and what `items` said of them. Raises OSError."""
        group = cls.__new__(cls)
        group._groups, group.descriptors = {}, ()
        try:
            for path in map(Path, items.values()):
                if path not in group._groups:
                    group._groups[path] = GroupDirectory.open(path)
        except BaseException:
            group.close()
            raise
        group._use({item: group._groups[Path(path)] for item, path in items.items()})
        group.memory_bytes = limits.memory_bytes
        group._is_memory_limited = limits.memory_bytes is not None
        return group

    @property
    def items(self) -> dict[str, str]:
        """Their paths, by what they are of use for."""
        return {item: str(group.path) for item, group in self._items.items()}

    def __repr__(self) -> str:
        return f"<Group {', '.join(map(str, self.directories))}>"

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where they are."""
        return tuple(group.path for group in self._groups.values())

    def close_descriptors(self) -> None:
        """Close what only the start needs. May be called again."""
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors = ()

    # -- limits ------------------------------------------------------------------------------------------------

    def limit_memory(self, size_bytes: int) -> bool:
        """Have the kernel kill for memory beyond so much; whether it will. Call it before the payload starts.

        Page cache counts, but is given back before anybody is killed. Swap does not help a payload: there is none for
        it. v2 kills all of the payload at once, v1 the largest process. `out_of_memory` says that it has happened. A
        caller that wants to be first, with a verdict and a grace, gives some more than its own limit here.
        """
        self._is_memory_limited = self._hold("memory.max", "memory.limit_in_bytes", self._memory, size_bytes)
        if self._is_memory_limited and self._memory is not None:
            for name, value in (
                ("memory.oom.group", "1"), ("memory.swap.max", "0"), ("memory.memsw.limit_in_bytes", str(size_bytes)),
            ):  # fmt: skip
                with suppress(OSError):  # a kernel that does not count swap
                    self._memory.write(name, value)
        return self._is_memory_limited

    def limit_tasks(self, count: int) -> bool:
        """Have the kernel refuse to fork beyond so many processes and threads together; whether it will."""
        return self._hold("pids.max", "pids.max", self._pids, count)

    def _hold(self, v2: str, v1: str, group: GroupDirectory | None, value: int) -> bool:
        try:
            return group is not None and (group.write(v2, str(value)) or group.write(v1, str(value)))
        except OSError as exc:
            log.warning("%r: %s = %d refused: %s", self, v2, value, exc)
            return False

    def verdict(self) -> Verdict | None:
        """That the kernel has killed for the memory that was asked for."""
        if self.memory_bytes is None or self.out_of_memory() is not OutOfMemory.OWN_LIMIT:
            return None
        return Verdict("memory", self.memory_bytes * MEMORY_MARGIN, self.memory_bytes, "bytes", "ended by the kernel")

    def out_of_memory(self) -> OutOfMemory | None:
        """Whether the kernel has killed for memory, and whose limit it was. v1 may take another's limit for ours."""
        if self._oom_kills() == 0:
            return None
        text = _text(self._memory, "memory.events.local") or _text(self._memory, "memory.events")
        if text is not None:
            met = figures(text).get("oom", 0) > 0
        else:  # memory.failcnt would say it, but newer kernels do not count there (6.18: 0 after a kill)
            peak = number(_text(self._memory, "memory.max_usage_in_bytes"))
            most = number(_text(self._memory, "memory.limit_in_bytes"))
            met = peak is not None and most is not None and peak >= most * _AT_LIMIT
        return OutOfMemory.OWN_LIMIT if met and self._is_memory_limited else OutOfMemory.ELSEWHERE

    # -- usage -------------------------------------------------------------------------------------------------

    def usage(self) -> GroupUsage:
        """What is used now; also of a payload that has ended, until `remove`. Costs some 100 us, however many there are."""
        user, system = (self._cpu and cpu_of(self._cpu)) or (None, None)
        memory, io = _text(self._memory, "memory.stat"), _text(self._io, "io.stat")
        read, written = io_of(io) if io is not None else (None, None)
        peak = _text(self._memory, "memory.peak") or _text(self._memory, "memory.max_usage_in_bytes")
        return GroupUsage(
            user_seconds=user,
            system_seconds=system,
            memory_bytes=memory_of(memory) if memory else None,
            peak_bytes=number(peak),
            processes=len(self._killing.pids()),
            tasks=number(_text(self._pids, "pids.current")),
            read_bytes=read,
            written_bytes=written,
            oom_kills=self._oom_kills(),
            refused_forks=figures(_text(self._pids, "pids.events") or "").get("max", 0),
        )

    def _oom_kills(self) -> int:
        text = _text(self._memory, "memory.events") or _text(self._memory, "memory.oom_control") or ""
        return figures(text).get("oom_kill", 0)

    # -- ending ------------------------------------------------------------------------------------------------

    def kill(self) -> None:
        """Kill all who are in it now. Raises OSError. `end` also waits, and does it again for who came late."""
        self._killing.kill()

    def is_populated(self) -> bool:
        """Whether anybody is in it; a zombie is not."""
        return self._events.is_populated()

    async def end(self, seconds: float) -> bool:
        """Kill until nobody is left; whether that was reached in time. Raises OSError."""
        with anyio.move_on_after(seconds):
            while True:
                await _in_thread(self.kill)
                with anyio.move_on_after(KILL_AGAIN_SECONDS):
                    await self.wait_empty()
                    return True
        return False

    async def wait_empty(self) -> None:
        """Return when nobody is in it: at once before the first has joined. Cancellation leaves it as it is."""
        events = self._events.path / "cgroup.events"
        if await _in_thread(events.exists):
            await self._wait_events(events)
        else:
            await self._wait_each()

    async def _wait_events(self, file: Path) -> None:
        """The kernel tells a change of the file as an exception on its descriptor, which an epoll turns into something
        that can be read from: no event loop waits for exceptions."""
        try:
            descriptor = await _in_thread(lambda: os.open(file, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:  # vanished
            return
        try:
            with select.epoll() as changed:
                changed.register(descriptor, select.EPOLLPRI)
                with suppress(OSError):  # vanished while we looked
                    while b"populated 1" in await _in_thread(lambda: os.pread(descriptor, 4096, 0)):
                        await anyio.wait_readable(changed.fileno())
        finally:
            os.close(descriptor)

    async def _wait_each(self) -> None:
        while opened := await _in_thread(self._open_each):
            try:
                for pidfd in opened:
                    await anyio.wait_readable(pidfd)
            finally:
                for pidfd in opened:
                    os.close(pidfd)

    def _open_each(self) -> list[int]:
        """A descriptor of each process that is in it. Raises OSError, with none open."""
        opened: list[int] = []
        try:
            for pid in self._killing.pids():
                with suppress(ProcessLookupError):
                    opened.append(os.pidfd_open(pid))
        except OSError:
            for pidfd in opened:
                os.close(pidfd)
            raise
        return opened

    def remove(self) -> bool:
        """Remove them, with what the payload made in them; whether nothing is left. False while somebody is in one."""
        self.close_descriptors()
        left = [group for group in self._groups.values() if not group.remove()]
        return not left

    def close(self) -> None:
        """Give them up as they are: when they are empty, the next agent that looks for groups here removes them."""
        self.close_descriptors()
        for group in self._groups.values():
            group.close()


def group_of(job_id: str, cgroup: str, limits: Limits) -> Group | None:
    """A group for a payload, the limits that the kernel can hold set in it; None where none can be made.

    `cgroup` is a directory that was delegated to us, or empty for those we are in. What they can do is found out once.
    """
    hierarchies = _hierarchies(cgroup)
    if not hierarchies.directories:
        if cgroup:
            log.warning("%s: no groups can be made: %s", cgroup, "; ".join(hierarchies.refusals))
        return None
    try:
        group = Group(hierarchies, job_id)
    except OSError as exc:
        log.warning("no control group for %s: %s", job_id, exc)
        return None
    if limits.memory_bytes is not None:
        group.memory_bytes = limits.memory_bytes
        group.limit_memory(int(limits.memory_bytes * MEMORY_MARGIN))
    if limits.processes is not None:
        group.limit_tasks(limits.processes * TASKS_PER_PROCESS + SPARE_TASKS)
    return group


@cache
def _hierarchies(cgroup: str) -> Hierarchies:
    """A fact about the node, which costs some 15 ms."""
    return find_hierarchies([Path(cgroup)] if cgroup else [])


# -- what the files say --------------------------------------------------------------------------------------------


def cpu_of(group: GroupDirectory) -> tuple[float, float] | None:
    """User and system seconds."""
    if (total := number(group.read("cpuacct.usage"))) is not None:
        # The exact total, nanoseconds, divided as the ticks are.
        ticks = figures(group.read("cpuacct.stat") or "")
        user, system = ticks.get("user", 0), ticks.get("system", 0)
        share = user / (user + system) if user + system else 1.0
        return total / 1e9 * share, total / 1e9 * (1 - share)
    if (text := group.read("cpu.stat")) is None:
        return None
    found = figures(text)
    return found["user_usec"] / 1e6, found["system_usec"] / 1e6


def memory_of(stat: str) -> int:
    """Anonymous and shared memory in a `memory.stat` of either version, the groups below included.

    Old v1 kernels do not count shared memory apart: there it is what could go to swap, or never leaves.
    """
    found = figures(stat)
    if "anon" in found:
        return found["anon"] + found["shmem"]
    if "total_shmem" in found:
        return found["total_rss"] + found["total_shmem"]
    return found["total_active_anon"] + found["total_inactive_anon"] + found["total_unevictable"]


def io_of(stat: str) -> tuple[int, int]:
    """Bytes read and written in an `io.stat`, all devices together."""
    read = written = 0
    for line in stat.splitlines():
        pairs = dict(word.split("=", 1) for word in line.split()[1:] if "=" in word)
        read += int(pairs.get("rbytes", 0))
        written += int(pairs.get("wbytes", 0))
    return read, written


def number(text: str | None) -> int | None:
    """A file of one number; None for `max`, or no file."""
    text = (text or "").strip()
    return int(text) if text.isdecimal() else None


def _text(group: GroupDirectory | None, name: str) -> str | None:
    return group.read(name) if group is not None else None


async def _in_thread(function: Callable[[], T]) -> T:
    return await to_thread.run_sync(function, limiter=CapacityLimiter(1))
