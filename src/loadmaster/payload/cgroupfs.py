"""One control group, which is a directory of the kernel's: made, read, emptied, removed. Everything blocks, for a moment.

Nothing but the groups made here is ever written to. A payload may make groups in its own, as deep and as many as it
likes, so that a walk goes up and down with one descriptor and is bounded.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

PREFIX: Final = "loadmaster"
_OURS: Final = re.compile(PREFIX + r"-[A-Za-z0-9_-]{0,40}-[0-9a-f]{16}", re.ASCII)
_UNFIT: Final = re.compile(r"[^A-Za-z0-9_-]")

WALK_GROUPS: Final = 10_000
"""A payload that has made more groups than this in its own leaves them behind."""

KILL_PASSES: Final = 20
"""Of a group that can be neither killed at once nor frozen: how often its processes are listed and killed in one call."""

_MAKE_ATTEMPTS: Final = 5
_NOT_THERE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.EOPNOTSUPP})
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class GroupDirectory:
    """A group that was made for somebody. Call `remove`, or at least `close`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    def __repr__(self) -> str:
        return f"<GroupDirectory {self.path}>"

    @classmethod
    def make(cls, parent: Path, label: str) -> GroupDirectory:
        """Make a group of a name nobody else has. Raises OSError.

        It is locked as long as somebody here needs it: a group that is empty and not locked was left by an agent that
        died. Not told by a process number in the name: of another container's agent we would not see it.
        """
        for _ in range(_MAKE_ATTEMPTS):
            path = parent / f"{PREFIX}-{_UNFIT.sub('_', label)[:40]}-{secrets.token_hex(8)}"
            path.mkdir(mode=0o755)
            with suppress(FileNotFoundError, BlockingIOError):  # taken for a left one before it was locked
                lock = os.open(path, _DIRECTORY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    path.stat()
                except BaseException:
                    os.close(lock)
                    raise
                return cls(path, lock)
        raise OSError(errno.EAGAIN, "others keep removing the groups made there", str(parent))

    @classmethod
    def open(cls, path: Path) -> GroupDirectory:
        """One that an agent which has died had made. Raises OSError, also for what is none of ours."""
        if not _OURS.fullmatch(path.name) or not (path / "cgroup.procs").exists():
            raise OSError(errno.EINVAL, "no control group that we have made", str(path))
        lock = os.open(path, _DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock)

    # -- its files ---------------------------------------------------------------------------------------------

    def files(self) -> frozenset[str]:
        """The names of what the kernel offers for it."""
        return frozenset(os.listdir(self.path))

    def read(self, name: str) -> str | None:
        """A file of the group, or None: the kernel has none, or the group has vanished."""
        try:
            return read_file(self.path / name)
        except PermissionError:
            self._regain(name)
            return read_file(self.path / name)

    def write(self, name: str, value: str) -> bool:
        """Write a file of the group; False when there is none. Raises OSError when the kernel does not take the value."""
        try:
            return write_file(self.path / name, value)
        except PermissionError:
            self._regain(name)
            return write_file(self.path / name, value)

    def _regain(self, name: str) -> None:
        """A payload that is the same user may have taken our permissions away."""
        with suppress(FileNotFoundError):
            self.path.chmod(0o755)
            (self.path / name).chmod(0o644)

    def open_procs(self) -> int:
        """A descriptor: a process that writes `0` to it is in the group. Raises OSError."""
        return os.open(self.path / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)

    # -- who is in it ------------------------------------------------------------------------------------------

    def pids(self) -> set[int]:
        """The processes in it and in the groups below."""
        found: set[int] = set()
        for directory in _walk(self.path):
            found.update(map(int, _read_procs(directory).split()))
        return found - {0}  # somebody of another pid namespace

    def is_populated(self) -> bool:
        """Whether anybody is in it or below. A zombie is not."""
        if (text := self.read("cgroup.events")) is not None:
            return figures(text).get("populated") == 1
        return bool(self.pids())

    def kill(self) -> None:
        """Kill all who are in it now, and who they are forking. Raises OSError.

        With `cgroup.kill` the kernel does that in one go; else they are frozen while each is killed, where the kernel
        has that; else they are listed and killed until nobody new is found, which a fast fork bomb may outrun.
        """
        if self._kill_at_once():
            self._kill_each()  # it does not reach the threads of a leader that has ended
            return
        self._freeze("1", "FROZEN")
        try:
            seen: set[int] = set()
            for _ in range(KILL_PASSES):
                if not (new := self._kill_each() - seen):
                    break
                seen |= new
        finally:
            self._freeze("0", "THAWED")  # in v1 only then they die

    def _kill_at_once(self) -> bool:
        return self.write("cgroup.kill", "1")

    def _freeze(self, v2: str, v1: str) -> None:
        if not self.write("cgroup.freeze", v2):
            self.write("freezer.state", v1)

    def _kill_each(self) -> set[int]:
        """Kill whoever is listed, twice: before and after a descriptor of it was opened, so that it is that process."""
        killed: set[int] = set()
        opened: dict[int, int] = {}
        try:
            for pid in self.pids():
                with suppress(ProcessLookupError):
                    opened[pid] = os.pidfd_open(pid)
            for pid in self.pids() & opened.keys():
                with suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(opened[pid], signal.SIGKILL)
                    killed.add(pid)
        finally:
            for pidfd in opened.values():
                os.close(pidfd)
        return killed

    # -- its end -----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave it to whoever finds it empty. May be called again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def remove(self) -> bool:
        """Remove it and the groups below; whether nothing is left. False while somebody is in it: it can be tried again."""
        if not _remove(self.path):
            return False
        self.close()
        return True


def remove_left(parent: Path) -> None:
    """Remove the empty groups that agents which have died had made in a directory."""
    for name in _names(parent):
        if not _OURS.fullmatch(name):
            continue
        with suppress(OSError):  # vanished, locked, or not ours to open
            lock = os.open(parent / name, _DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left = GroupDirectory(parent / name, -1)
                if not left.is_populated():  # a payload that outlived its agent, and may be adopted, keeps all it made
                    left.remove()
            finally:
                os.close(lock)


def read_file(path: Path) -> str | None:
    """A file of a group, or None when it is not there. Raises OSError when it is not for us."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall().decode()
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return None
        raise


def write_file(path: Path, value: str) -> bool:
    """Write a file of a group; False when it is not there. Raises OSError when it, or the value, is not for us."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(descriptor, value.encode())
        finally:
            os.close(descriptor)
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return False
        raise
    return True


def figures(text: str) -> dict[str, int]:
    """The `name number` lines of a file."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def _remove(path: Path) -> bool:
    for directory in _walk(path):  # the deepest first
        for name in _names(directory):
            with suppress(OSError):  # somebody is in it, or it has vanished
                os.rmdir(name, dir_fd=directory)
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _walk(top: Path) -> Iterator[int]:
    """A descriptor, good until the next, of every group below and including one, what is below a group before it."""
    try:
        here = _open(str(top))
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return
        raise
    try:
        ahead = [_names(here)]
        visited = 1
        while ahead:
            if ahead[-1] and visited < WALK_GROUPS:
                visited += 1
                with suppress(FileNotFoundError):  # removed meanwhile
                    here = _move(here, ahead[-1].pop())
                    ahead.append(_names(here))
                continue
            yield here
            ahead.pop()
            if ahead:
                here = _move(here, "..")
    except OSError as exc:  # a group vanished below our feet: what is beside it is found by the next walk
        if exc.errno not in _NOT_THERE:
            raise
    finally:
        os.close(here)


def _move(here: int, name: str) -> int:
    there = _open(name, here)
    os.close(here)
    return there


def _open(name: str, directory: int | None = None) -> int:
    try:
        return os.open(name, _DIRECTORY, dir_fd=directory)
    except PermissionError:
        os.chmod(name, 0o755, dir_fd=directory)  # noqa: S103 - as the kernel made it; see `_regain`
        return os.open(name, _DIRECTORY, dir_fd=directory)


def _names(directory: int | Path) -> list[str]:
    """The groups in one; none when it has vanished."""
    try:
        with os.scandir(directory) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return []
        raise


def _read_procs(directory: int) -> str:
    """Who is in an open group itself; nobody when it has vanished, or its processes are listed with those above it."""
    try:
        with open(_open_procs(directory), "rb", buffering=0) as file:
            return file.readall().decode()
    except OSError as exc:
        if exc.errno in _NOT_THERE:
            return ""
        raise


def _open_procs(directory: int) -> int:
    try:
        return os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
    except PermissionError:
        os.chmod("cgroup.procs", 0o644, dir_fd=directory)
        return os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
