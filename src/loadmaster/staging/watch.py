"""Which of a payload's outputs are finished while it still runs: told by the kernel (inotify), with nobody polling.

An output is finished when the last who had it open for writing has closed it, or when it is renamed into place. It may be
opened again, and is then finished once more when that is closed; each time it has to be quiet for longer before it counts,
and after `MOST_TIMES` it waits for the payload's end like any other: bounded work, also for a file that is closed every
second.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto
from fnmatch import fnmatchcase
from heapq import heappop, heappush
from math import inf
from typing import Final, Self

import anyio
from anyio import to_thread

from loadmaster.names import check_local_name
from loadmaster.notices import CLOSED, CREATED, FORGOTTEN, IS_DIRECTORY, MOVED_IN, OVERFLOW, Notice, Notices
from loadmaster.workdir import Workdir

QUIET_SECONDS: Final = (0.05, 2.0, 10.0)
"""How long an output has to stay closed before it counts as finished for the first, second and third time."""

MOST_TIMES: Final = len(QUIET_SECONDS)

BUSY_SECONDS: Final = (0.05, 0.5, 5.0)
"""When to look again at a file that had a writer. The kernel tells of a close a moment before the writer is gone; if there
is another one, his close is told of as well."""

MOST_DIRECTORIES: Final = 1000
"""So many are watched; the kernel allows each user some 8000 on old nodes."""

MOST_FILES: Final = 20_000
"""Of so many the closes are remembered; what comes after leaves at the payload's end."""

LOOKS_AT_ONCE: Final = 256
"""Files looked at in one turn of a thread."""

NOTICES_SECONDS: Final = 0.02
"""Between two readings of what the kernel tells: a payload that closes files without end takes no more of the loop."""

SETTLED_SECONDS: Final = 0.02
"""The kernel's clock for files ticks each 4 or 10 ms: a file that changed just now may change again and not show it."""


class Likeness(Enum):
    """Whether a file is still what it was."""

    SAME = auto()
    UNSURE = auto()
    """It looks the same, but only its bytes can tell."""
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class Content:
    """What tells whether a file is still what it was, without reading it."""

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int
    settled: bool = field(default=True, compare=False)
    """Whether it had been as it is for long enough that any later change shows."""

    @classmethod
    def of(cls, descriptor: int, now_ns: int | None = None) -> Self:
        """As an open file is now."""
        found = os.fstat(descriptor)
        now_ns = time.time_ns() if now_ns is None else now_ns
        settled = now_ns - found.st_ctime_ns > SETTLED_SECONDS * 1e9
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns, settled)


def likeness(before: Content, now: Content) -> Likeness:
    """Whether a file that looked so before is still the same. The payload can set back `modified_ns`, not `changed_ns`,
    which in turn also changes with the mode or a link's name."""
    if (before.inode, before.size_bytes, before.modified_ns) != (now.inode, now.size_bytes, now.modified_ns):
        return Likeness.OTHER
    return Likeness.SAME if before.settled and before.changed_ns == now.changed_ns else Likeness.UNSURE


@dataclass(frozen=True, slots=True)
class Finished:
    """An output nobody writes to."""

    name: str
    content: Content


class Patterns:
    """The names that are wanted, and the directories in which there may be some."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = [(pattern.split("/"), pattern) for pattern in patterns]

    def find(self, name: str) -> str | None:
        """The first pattern that a file matches, or a directory that it is in."""
        parts = name.split("/")
        return next((whole for pattern, whole in self._patterns if _matches(parts[: len(pattern)], pattern)), None)

    def lead_to(self, directory: str) -> bool:
        """Whether there may be some in a directory, or below it."""
        parts = directory.split("/")
        return any(
            _matches(parts[: len(pattern)], pattern[: len(parts)]) or not directory for pattern, _ in self._patterns
        )


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """As a shell does it: a `*` does not stand for a leading dot. Or each part is spelled exactly so."""
    return len(parts) == len(pattern) and all(
        part == wanted or (fnmatchcase(part, wanted) and (part[:1] != "." or wanted[:1] == "."))
        for part, wanted in zip(parts, pattern, strict=True)
    )


class Closes:
    """When to look at which file: decided from when each was closed, the times being given."""

    def __init__(self, most_files: int = MOST_FILES) -> None:
        self._most_files = most_files
        self._due: dict[str, float] = {}
        self._queue: list[tuple[float, str]] = []
        self._times: dict[str, int] = {}
        self._busy: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Closes {len(self._due)} to look at, {len(self._times)} finished>"

    def closed(self, name: str, now: float) -> None:
        """Somebody who wrote to it has closed it, or it was renamed into place."""
        times = self._times.get(name, 0)
        known = name in self._due or name in self._times
        if times < MOST_TIMES and (known or len(self._due) + len(self._times) < self._most_files):
            self._busy.pop(name, None)
            self._look(name, now + QUIET_SECONDS[times])

    def busy(self, name: str, now: float) -> None:
        """It was looked at, and has a writer."""
        looks = self._busy[name] = self._busy.get(name, 0) + 1
        if looks <= len(BUSY_SECONDS):
            self._look(name, now + BUSY_SECONDS[looks - 1])

    def finished(self, name: str) -> None:
        """It was looked at, and taken."""
        self._busy.pop(name, None)
        self._times[name] = self._times.get(name, 0) + 1

    @property
    def next_due(self) -> float:
        """When there is something to look at; at the earliest, that is: it may have been closed again since."""
        return self._queue[0][0] if self._queue else inf

    def due(self, now: float, most: int = LOOKS_AT_ONCE) -> list[str]:
        """What is to be looked at now. It is forgotten unless `closed` or `busy` is said of it again."""
        names: list[str] = []
        while self._queue and self._queue[0][0] <= now and len(names) < most:
            _, name = heappop(self._queue)
            if self._due[name] > now:
                heappush(self._queue, (self._due[name], name))
            else:
                del self._due[name]
                names.append(name)
        return names

    def _look(self, name: str, when: float) -> None:
        """Each name is in the queue once, however often it is closed."""
        if name not in self._due:
            heappush(self._queue, (when, name))
        self._due[name] = when


class FinishedOutputs:
    """The outputs of a running payload, each as it is finished. To be used in a `with`: it has a queue of the kernel's."""

    def __init__(self, workdir: Workdir, patterns: Iterable[str]) -> None:
        """Raises OSError when the user has no inotify queue left."""
        self._workdir = workdir
        self._patterns = Patterns(patterns)
        self._watched: dict[int, str] = {}
        self._unseen = [""]
        self._seen: dict[str, Content] = {}
        self._closes = Closes()
        self._notices = Notices()

    def __repr__(self) -> str:
        return f"<FinishedOutputs {len(self._watched)} directories, {self._closes!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._notices.__exit__(*error)

    async def next(self) -> list[Finished]:
        """Wait for the next ones: at least one. A file is among them again when its content is another."""
        while True:
            if self._unseen:
                await to_thread.run_sync(self._look_into_folders, anyio.current_time())
            if names := self._closes.due(anyio.current_time()):
                if found := await self._look_at(names):
                    return found
                continue
            with anyio.move_on_at(self._closes.next_due):
                for notice in await self._notices.next():
                    self._take(notice)
                await anyio.sleep(NOTICES_SECONDS)

    def _take(self, notice: Notice) -> None:
        """Remember what is to be looked at; nothing here touches the disk."""
        if notice.what & OVERFLOW:
            self._unseen = [""]
            return
        if notice.what & FORGOTTEN:
            self._watched.pop(notice.watch, None)
            return
        folder = self._watched.get(notice.watch)
        if folder is None:
            return
        try:
            name = check_local_name(_below(folder, notice.name.decode()))
        except ValueError:  # may not leave under such a name; said when it is to leave
            return
        if notice.what & IS_DIRECTORY:
            if notice.what & (CREATED | MOVED_IN) and self._patterns.lead_to(name):
                self._unseen.append(name)
        elif notice.what & (CLOSED | MOVED_IN) and self._patterns.find(name):
            self._closes.closed(name, anyio.current_time())

    def _look_into_folders(self, now: float) -> None:
        """Watch directories, and what may matter below them, from now on; what is in there already may be finished."""
        while self._unseen:
            folder = self._unseen.pop()
            with suppress(OSError, ValueError):  # gone, swapped, or closed to us
                for name in self._look_into(folder):
                    self._closes.closed(name, now)

    def _look_into(self, folder: str) -> Iterator[str]:
        if len(self._watched) >= MOST_DIRECTORIES and folder not in self._watched.values():
            return
        descriptor = self._workdir.open_directory(folder)
        try:
            # By its descriptor: the payload may put a link in the place of any part of the name. Before it is listed:
            # what comes in between is told of.
            watch = self._notices.watch(f"/proc/self/fd/{descriptor}", CLOSED | MOVED_IN | CREATED)
            self._watched[watch] = folder
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    name = _below(folder, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        if self._patterns.lead_to(name):
                            self._unseen.append(name)
                    elif entry.is_file(follow_symlinks=False) and self._patterns.find(name):
                        yield name
        finally:
            os.close(descriptor)

    async def _look_at(self, names: list[str]) -> list[Finished]:
        looks = await to_thread.run_sync(self._probe, names)
        found = []
        for name, content in looks.items():
            if content is None:
                self._closes.busy(name, anyio.current_time())
            elif self._seen.get(name) != content:
                self._seen[name] = content
                self._closes.finished(name)
                found.append(Finished(name, content))
        return found

    def _probe(self, names: list[str]) -> dict[str, Content | None]:
        """The contents of those that may leave; None for one that has a writer."""
        looks: dict[str, Content | None] = {}
        for name in names:
            with suppress(OSError, ValueError):
                descriptor = self._workdir.open_output(name)
                try:
                    looks[name] = None if has_writer(descriptor) else Content.of(descriptor)
                finally:
                    os.close(descriptor)
        return looks


def has_writer(descriptor: int) -> bool:
    """Whether anybody has a file open for writing. Where the kernel cannot tell, nobody: a close is all we know then.

    A read lease is given only on a file that nobody writes to, to its owner or root; it is given back at once. Who opens
    the file for writing in between waits for that moment, and has the kernel send us a signal: one that is ignored unless
    somebody asks for it, for the usual one, SIGIO, ends a process.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as exc:
        return exc.errno == errno.EAGAIN
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name
