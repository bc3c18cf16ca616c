"""What a payload uses: its processes as /proc tells, its files as the disk tells. Everything here blocks, for a moment.

| what                    | where from                               | what it does not see                            |
| ----------------------- | ---------------------------------------- | ----------------------------------------------- |
| CPU, user and system    | /proc/PID/stat, reaped children included | gone children of a process that ignores         |
|                         |                                          | SIGCHLD: only a cgroup knows of them            |
| resident size           | /proc/PID/stat                           | sharing: pages of many count in each            |
| proportional size (PSS) | /proc/PID/smaps_rollup                   | a memfd not mapped: only a memory cgroup does   |
| bytes read and written  | /proc/PID/io, reaped children included   | what reaches no disk and no NFS: tmpfs, pipes   |
| the work directory      | a walk, counting blocks                  | files that are open but have no name any more   |
| free disk               | statvfs                                  | whose bytes they are                            |
"""

from __future__ import annotations

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

BLOCK_BYTES: Final = 512
"""The unit of st_blocks, whatever the file system's own."""

WALK_FILES: Final = 200_000
WALK_SECONDS: Final = 2.0
"""A walk over a work directory ends there and says so. 200,000 files take about 0.5 s when their inodes are cached."""

MOST_OPEN: Final = 64
"""Processes that are waited for at a time: descriptors are few."""

_UNSEEN: Final = (FileNotFoundError, ProcessLookupError, PermissionError)
"""A process that is gone; or another user's, with /proc mounted with hidepid."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# -- processes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat we need. CPU includes the children the process has waited for."""

    state: str
    group: int
    session: int
    user_ticks: int
    system_ticks: int
    reaped_user_ticks: int
    reaped_system_ticks: int
    threads: int
    start_ticks: int
    resident_pages: int


@dataclass(frozen=True, slots=True)
class TreeUsage:
    """CPU, memory and I/O of a payload's processes; CPU and I/O also of those that are gone and were waited for."""

    user_seconds: float = 0.0
    system_seconds: float = 0.0
    rss_bytes: int = 0
    """The resident sizes added up: shared pages count in every process that has them."""
    threads: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    """From and to storage: what the page cache had is not read, what was overwritten there before it left is written."""
    processes: int = 0
    """How many live. A zombie does not."""
    pids: tuple[int, ...] = ()
    """Their numbers, for `read_pss`."""

    @property
    def cpu_seconds(self) -> float:
        """User and system time together."""
        return self.user_seconds + self.system_seconds


def read_stat(pid: int) -> Stat | None:
    """One process, or None when it is gone. Parsed from the last `)`: the name before it is the process's to choose."""
    if (text := _read(f"/proc/{pid}/stat")) is None:
        return None
    fields = text.rpartition(b")")[2].split()
    user, system, reaped_user, reaped_system = map(int, fields[11:15])
    return Stat(
        state=fields[0].decode(),
        group=int(fields[2]),
        session=int(fields[3]),
        user_ticks=user + reaped_user,
        system_ticks=system + reaped_system,
        reaped_user_ticks=reaped_user,
        reaped_system_ticks=reaped_system,
        threads=int(fields[17]),
        start_ticks=int(fields[19]),
        resident_pages=int(fields[21]),
    )


def read_session(session: int) -> TreeUsage:
    """Add up the processes of a session. Reads all of /proc: some 10 us for every process of the machine."""
    found = [
        (stat.start_ticks, pid)
        for name in os.listdir("/proc")
        if name.isdecimal() and (stat := read_stat(pid := int(name))) and stat.session == session
    ]
    # Once more, parents first: see `_Sum`. A parent has started earlier; its number may be higher all the same.
    total = _Sum()
    for _, pid in sorted(found):
        total.add(pid)
    return total.result()


def read_tree(shim: int, *, helpers: int) -> TreeUsage:
    """Add up the processes below a shim, but for the first ones, its helpers. Costs some 30 us for each of them.

    What the shim and its helpers have reaped counts too: orphans that came back to them, and at the end the payload.
    Of a shim that has ended and was not reaped yet this is the whole payload; its I/O is then shown to root only.
    """
    total = _Sum()
    total.add_reaped(shim)
    for number, pid in enumerate(descendants(shim)):
        if number < helpers:
            total.add_reaped(pid)
        else:
            total.add(pid)
    return total.result()


class _Sum:
    """Adds up processes, parents before their children.

    In this order a child that is reaped meanwhile is counted in neither place, and the next look has it. In the other
    it is counted in both, and a payload would be stopped for CPU it has not used.
    """

    def __init__(self) -> None:
        self._user = self._system = self._pages = self._threads = self._read = self._written = 0
        self._pids: list[int] = []

    def add(self, pid: int) -> None:
        """One process and what it has reaped."""
        if (found := read_stat(pid)) is None:
            return
        self._user += found.user_ticks
        self._system += found.system_ticks
        self._add_io(pid)
        if found.state not in "ZX":
            self._pages += found.resident_pages
            self._threads += found.threads
            self._pids.append(pid)

    def add_reaped(self, pid: int) -> None:
        """What a process has reaped, without itself. Its own I/O cannot be told apart: some kilobytes."""
        if (found := read_stat(pid)) is None:
            return
        self._user += found.reaped_user_ticks
        self._system += found.reaped_system_ticks
        self._add_io(pid)

    def _add_io(self, pid: int) -> None:
        """Root sees it of all. Others not of what is not dumpable, as the shim, nor of what has ended and waits."""
        if text := _read(f"/proc/{pid}/io"):
            fields = text.split()  # name: number, seven times
            self._read += int(fields[9])
            self._written += int(fields[11])

    def result(self) -> TreeUsage:
        return TreeUsage(
            user_seconds=self._user / TICKS_PER_SECOND,
            system_seconds=self._system / TICKS_PER_SECOND,
            rss_bytes=self._pages * PAGE_BYTES,
            threads=self._threads,
            read_bytes=self._read,
            written_bytes=self._written,
            processes=len(self._pids),
            pids=tuple(self._pids),
        )


def read_pss(pids: Iterable[int]) -> int:
    """The memory of processes, each shared page divided among those that share it. Walks their page tables.

    Some 30 us for a small process and 6 ms for each resident gigabyte (measured), so ask only when the resident sizes
    added up are in doubt. Of a process that hides its memory (it is not dumpable) the resident size is taken: hiding
    does not help.
    """
    total = 0
    for pid in pids:
        if text := _read(f"/proc/{pid}/smaps_rollup"):
            total += int(text.partition(b"\nPss:")[2].split(maxsplit=1)[0]) * 1024
        elif found := read_stat(pid):
            total += found.resident_pages * PAGE_BYTES
    return total


def descendants(pid: int) -> Iterator[int]:
    """The processes below one, parents first. A work list, not recursion: chains may be hundreds deep."""
    queue = deque(children(pid))
    seen = {pid}
    while queue:
        child = queue.popleft()
        if child not in seen:  # a thread ends, its children go to the next one, and are read twice
            seen.add(child)
            yield child
            queue.extend(children(child))


def children(pid: int) -> list[int]:
    """The children of every thread of a process: a thread other than the first may fork too. None when it is gone."""
    found: list[int] = []
    with suppress(*_UNSEEN):
        for task in os.listdir(f"/proc/{pid}/task"):
            if text := _read(f"/proc/{pid}/task/{task}/children"):
                found += map(int, text.split())
    return found


def open_group(group: int, at_most: int = MOST_OPEN) -> list[int]:
    """A pidfd of each process of a group that has not ended, of so many at most.

    Reads all of /proc; raises OSError, with none open.
    """
    return open_processes(_all_processes(), lambda stat: stat.group == group, at_most)


def open_session(session: int, start_ticks: int, at_most: int = MOST_OPEN) -> list[int]:
    """The same of a session, whose leader started then."""
    return open_processes(
        _all_processes(), lambda stat: stat.session == session and stat.start_ticks >= start_ticks, at_most
    )


def open_processes(
    pids: Iterable[int], wanted: Callable[[Stat], bool] = lambda _: True, at_most: int = MOST_OPEN
) -> list[int]:
    """A pidfd of each of those wanted that have not ended, of so many at most. Raises OSError, with none open."""
    found: list[int] = []
    try:
        for pid in pids:
            if (stat := read_stat(pid)) and stat.state not in "ZX" and wanted(stat):
                with suppress(ProcessLookupError):
                    found.append(os.pidfd_open(pid))
                if len(found) == at_most:
                    break
    except OSError:
        for pidfd in found:
            os.close(pidfd)
        raise
    return found


def _all_processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def _read(path: str) -> bytes | None:
    """A file of /proc, or None."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall()
    except _UNSEEN:
        return None


# -- files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DirectoryUsage:
    """What a directory takes on its disk. Not `whole`: at least that much, the walk was bounded or not let in."""

    size_bytes: int
    files: int
    whole: bool


def read_directory(
    descriptor: int, *, at_most_files: int = WALK_FILES, at_most_seconds: float = WALK_SECONDS
) -> DirectoryUsage:
    """What an open directory and everything below it take on the disk, in blocks: holes do not count.

    Links are not followed and other file systems not entered; a file with several names counts once. The payload may
    swap a directory for a link while we look; the walk then sees something of the same disk it should not, or less. A
    tree whose names are longer together than the system takes (4 KiB), or that nobody may enter, is not `whole`.
    """
    give_up = time.monotonic() + at_most_seconds
    disk = os.fstat(descriptor).st_dev
    linked: set[int] = set()
    size, files, whole = 0, 0, True
    queue = deque(["."])
    while queue:
        folder = queue.popleft()
        try:
            opened = os.open(folder, _DIRECTORY, dir_fd=descriptor)
        except (FileNotFoundError, NotADirectoryError):  # removed or swapped meanwhile
            continue
        except OSError:
            whole = False
            continue
        try:
            own = os.fstat(opened)
            if own.st_dev != disk:
                continue
            size += own.st_blocks * BLOCK_BYTES
            with os.scandir(opened) as entries:
                for entry in entries:
                    if files >= at_most_files or time.monotonic() > give_up:
                        return DirectoryUsage(size, files, whole=False)
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue
                    if stat.S_ISDIR(found.st_mode):
                        queue.append(f"{folder}/{entry.name}")
                        continue
                    files += 1
                    if found.st_nlink == 1 or found.st_ino not in linked:
                        size += found.st_blocks * BLOCK_BYTES
                        if found.st_nlink > 1:
                            linked.add(found.st_ino)
        except OSError:  # a network file system's own troubles
            whole = False
        finally:
            os.close(opened)
    return DirectoryUsage(size, files, whole)


def read_free_disk(descriptor: int) -> int:
    """The bytes that are free to ordinary users on the disk of an open file or directory."""
    found = os.statvfs(descriptor)
    return found.f_bavail * found.f_frsize


def read_sizes(descriptors: Iterable[int]) -> int:
    """The sizes of open files added up, one file counted once. Sizes, not blocks: so much will have to be delivered."""
    found = {(one.st_dev, one.st_ino): one.st_size for one in map(os.fstat, descriptors)}
    return sum(found.values())
