"""A job's directory: made, locked, confined, removed.

The payload owns everything in it and is assumed to be hostile: it swaps files for symbolic links, leaves FIFOs,
directories nobody may enter and trees ten thousand deep. So files are opened part by part without following links,
and removal never recurses. The functions that touch the disk block; async callers put them in a worker thread.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import logging
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Final

import anyio

from loadmaster.errors import WorkdirFault
from loadmaster.names import check_local_name
from loadmaster.occupants import hold, is_occupied, note_session, who
from loadmaster.threads import briefly

log = logging.getLogger(__name__)

OURS: Final = 0o1700
MARK: Final = "user.loadmaster"
"""The mode of a work directory, and an attribute of it. Either the sticky bit or the attribute says that we made it, for
a payload may change the mode and some file systems have no attributes. Of what is not ours nothing is ever removed."""

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

REMOVAL_SECONDS: Final = 60.0
"""How long a cancelled job may take to remove its directory before it is left behind, with a warning."""

SIZED_FILES: Final = 100_000
"""A payload may make millions of files; of so many the sizes are added up."""

REMOVAL_PASSES: Final = 20
"""A process that is being killed may still write; the directory is emptied again so many times."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class NotDeliverable(OSError):
    """Something that may not leave the work directory, or come into it; the message says what."""


class Workdir:
    """One job's directory. Every method takes names relative to it and blocks."""

    def __init__(self, path: Path, descriptor: int, *, identity: str = "", continued: bool = False) -> None:
        self.path = path
        self.identity = identity
        """By what the directory can be told from another that is made in its place. Another one after each start of the
        machine: what was in it may not have been on the disk."""
        self.continued = continued
        """Whether it has in it what an earlier agent left there."""
        self._fd = descriptor

    def __repr__(self) -> str:
        return f"<Workdir {self.path}>"

    @classmethod
    def make(cls, root: Path, name: str, *, identity: str | None = None) -> Workdir:
        """An empty directory `<root>/<name>` that no other live job has; what a dead one left there is removed.

        The directory of this `identity` is the job's own, and is gone on with as it is, also while its payload runs. Raises
        `WorkdirFault`. The lock is a `flock` on the directory itself, so the kernel drops it with the process; that of a
        payload, which may outlive it, is apart (occupants.py).
        """
        path = root / check_local_name(name)
        try:
            made = _make_directory(path)
            descriptor = _enter(root, name)
        except OSError as exc:
            raise WorkdirFault(f"{path}: cannot make the work directory: {exc.strerror}") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
                raise BlockingIOError(errno.EAGAIN, "was removed meanwhile")
            if not made and os.listdir(descriptor) and not _is_ours(descriptor):
                raise FileExistsError(errno.EEXIST, "it is not empty, and loadmaster did not make it")
            own = _identity(descriptor)
            continued = not made and own == identity
            if not continued:
                if not made:
                    _check_empty_of_payloads(path, descriptor)
                with suppress(OSError):
                    os.setxattr(descriptor, MARK, b"")
                if not made:
                    _empty(descriptor)
        except BlockingIOError as exc:
            os.close(descriptor)
            raise WorkdirFault(
                f"{path}: another running job has this work directory; give this one its own id"
            ) from exc
        except WorkdirFault:
            os.close(descriptor)
            raise
        except OSError as exc:
            os.close(descriptor)
            raise WorkdirFault(f"{path}: cannot empty what is left of an earlier job: {exc.strerror}") from exc
        return cls(path, descriptor, identity=own, continued=continued)

    def close(self, *, keep: bool = False) -> None:
        """Remove the directory, or only unlock it. Raises `WorkdirFault` when something could not be removed."""
        try:
            if not keep:
                _empty(self._fd)
                self._remove_name()
        except FileNotFoundError:
            log.warning("%s: the payload removed its own work directory", self.path)
        except OSError as exc:
            raise WorkdirFault(f"{self.path}: cannot remove the work directory: {exc.strerror}") from exc
        finally:
            os.close(self._fd)

    def _remove_name(self) -> None:
        """Remove the directory itself, and first what a payload may have put in its place."""
        try:
            self.path.rmdir()
        except OSError as exc:
            if exc.errno not in {errno.ENOTEMPTY, errno.ENOTDIR}:
                raise
            log.warning("%s: the payload put something else in place of its work directory", self.path)
            parent = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if _unlink(self.path.name, parent):
                    return
                other = _enter(self.path.parent, self.path.name)
                try:
                    _empty(other)
                finally:
                    os.close(other)
                os.rmdir(self.path.name, dir_fd=parent)
            finally:
                os.close(parent)

    def create(self, name: str, *, append: bool = True) -> int:
        """A descriptor of a new, empty file for reading and appending, or for writing anywhere in it.

        Parents are made; links are not followed. What has the name is removed, not opened: it may be a FIFO, or be open
        elsewhere.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if append else 0)
        with self._parent(name, make=True) as (parent, last):
            try:
                return os.open(last, flags, 0o644, dir_fd=parent)
            except FileExistsError:
                with suppress(FileNotFoundError):
                    os.unlink(last, dir_fd=parent)
                return os.open(last, flags, 0o644, dir_fd=parent)

    def reopen_file(self, name: str) -> int:
        """A descriptor of a file that was created, for reading and writing; links are not followed."""
        with self._parent(name) as (parent, last):
            return os.open(last, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)

    def make_directory(self, name: str) -> None:
        """A directory, its parents too; links are not followed. None is a fault."""
        with self._parent(name, make=True) as (parent, last), suppress(FileExistsError):
            os.mkdir(last, 0o755, dir_fd=parent)

    def rename(self, old: str, new: str) -> None:
        """Give a file its final name, over whatever has it. Parents are made."""
        with self._parent(old) as (parent, last), self._parent(new, make=True) as (new_parent, new_last):
            os.replace(last, new_last, src_dir_fd=parent, dst_dir_fd=new_parent)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError), self._parent(name) as (parent, last):
            os.unlink(last, dir_fd=parent)

    def open_output(self, name: str) -> int:
        """A descriptor to read a regular file from, by its name or through links that stay inside the directory.

        Raises `NotDeliverable` for links out of the directory, FIFOs, sockets, devices and names no file of ours may
        have, and `OSError` as usual.
        """
        return self.open_sized(name)[0]

    def open_sized(self, name: str) -> tuple[int, int]:
        """As `open_output`, and the file's size."""
        try:
            inside = check_local_name(name)
            kind = 0 if "/" in inside else _mode(inside, self._fd)
            if "/" in inside or stat.S_ISLNK(kind):
                inside, kind = self._behind_links(inside), 0
        except ValueError as exc:
            raise NotDeliverable(errno.EINVAL, str(exc), name) from exc
        with self._parent(inside) as (parent, last):
            kind = kind or os.stat(last, dir_fd=parent, follow_symlinks=False).st_mode
            if not stat.S_ISREG(kind):  # looked at before it is opened: opening a FIFO or a device has effects
                raise NotDeliverable(errno.EPERM, f"is {_what(kind)}, not a file", name)
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise NotDeliverable(errno.EPERM, "was swapped for something that is not a file", name)
        return descriptor, found.st_size

    def _behind_links(self, name: str) -> str:
        """What a name leads to, by its own name. Raises `NotDeliverable` when that is elsewhere."""
        top, real = os.path.realpath(self.path), os.path.realpath(self.path / name)
        if not real.startswith(top + "/"):
            raise NotDeliverable(errno.EPERM, "is a symbolic link out of the work directory", name)
        return check_local_name(real[len(top) + 1 :])

    def matches(self, pattern: str) -> list[str]:
        """The names a pattern stands for: what is called exactly so, else what matches it as in a shell; sorted.

        What a link of the payload's leads to outside of the directory is not among them.
        """
        if os.path.lexists(self.path / check_local_name(pattern)):
            return [pattern]
        top = os.path.realpath(self.path)
        names = sorted(name.rstrip("/") for name in glob.glob(pattern, root_dir=self.path))
        folders = {os.path.dirname(name) for name in names}
        inside = {folder for folder in folders if f"{os.path.realpath(self.path / folder)}/".startswith(f"{top}/")}
        return [name for name in names if os.path.dirname(name) in inside]

    def descriptor(self) -> int:
        """A descriptor of the directory, the caller's to close."""
        return os.dup(self._fd)

    def hold(self) -> int:
        """A descriptor for a payload's shim, the caller's to close: the directory is nobody else's while one is open."""
        return hold(self._fd)

    def note_session(self, leader: int, start_ticks: int) -> None:
        """A payload without a shim has it now."""
        note_session(self._fd, leader, start_ticks)

    def reopen(self) -> None:
        """Let us in again, should the payload have closed the directory to everybody."""
        os.fchmod(self._fd, OURS)

    def open_directory(self, name: str) -> int:
        """A descriptor of a directory below this one, or of this one for an empty name; no link is followed."""
        if not name:
            return os.dup(self._fd)
        with self._parent(name) as (parent, last):
            return os.open(last, _DIRECTORY, dir_fd=parent)

    def is_directory(self, name: str) -> bool:
        """Whether the name is a directory itself, not a link to one."""
        with suppress(OSError):
            return stat.S_ISDIR(os.stat(self.path / check_local_name(name), follow_symlinks=False).st_mode)
        return False

    def seen_size(self, name: str) -> int | None:
        """The size of a file as it looks from outside, links followed; None when nothing can be seen."""
        try:
            return os.stat(self.path / name).st_size
        except (OSError, ValueError):
            return None

    def files_below(self, directory: str) -> Iterator[str]:
        """The names of everything below a directory that is not a directory, without following links, sorted by folder.

        Raises OSError when a part of it cannot be looked into. A list of folders, not recursion: payloads nest deeply.
        """
        folders = [check_local_name(directory)]
        while folders:
            folder = folders.pop()
            with os.scandir(self.path / folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
            yield from (f"{folder}/{entry.name}" for entry in entries if not entry.is_dir(follow_symlinks=False))
            folders += [f"{folder}/{entry.name}" for entry in reversed(entries) if entry.is_dir(follow_symlinks=False)]

    def sizes_of(self, names: Iterable[str], *, at_most_files: int = SIZED_FILES) -> int:
        """The sizes of files, and of all files in directories, added up; of at most so many. What is gone has none."""
        files = chain.from_iterable(self.files_below(name) if self.is_directory(name) else (name,) for name in names)
        total = 0
        with suppress(OSError):  # a directory that may not be looked into: its files cannot be delivered either
            for name in islice(files, at_most_files):
                with suppress(FileNotFoundError):
                    total += os.lstat(self.path / name).st_size
        return total

    @contextmanager
    def _parent(self, name: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory a name is in, and the last part of the name; no link is followed."""
        *folders, last = check_local_name(name).split("/")
        if not folders:
            yield self._fd, last
            return
        descriptor = os.dup(self._fd)
        try:
            for folder in folders:
                if make:
                    with suppress(FileExistsError):
                        os.mkdir(folder, 0o755, dir_fd=descriptor)
                below = os.open(folder, _DIRECTORY, dir_fd=descriptor)
                os.close(descriptor)
                descriptor = below
            yield descriptor, last
        finally:
            os.close(descriptor)


@asynccontextmanager
async def open_workdir(
    root: Path | None, name: str, *, keep: bool | Callable[[], bool] = False, identity: str | None = None,
    at_once: Callable[[Workdir], None] | None = None, afterwards: Callable[[], None] = lambda: None,
) -> AsyncIterator[Workdir]:  # fmt: skip
    """A job's directory below `root`, or below `default_root()`; removed however one leaves, unless it is to be kept.

    One of this `identity` is gone on with as it is; else it is empty. `at_once` is called with it in the thread that makes
    it, `afterwards` in the one that removes it.

    Raises `WorkdirFault` when it cannot be made, is another live job's, or has something in it that is not ours.
    """

    def make() -> Workdir:
        workdir = Workdir.make(root or default_root(), name, identity=identity)
        try:
            if at_once is not None:
                at_once(workdir)
        except BaseException:
            workdir.close()
            raise
        return workdir

    workdir = await briefly(make)
    try:
        yield workdir
    finally:
        with anyio.move_on_after(REMOVAL_SECONDS, shield=True) as scope:
            kept = keep() if callable(keep) else keep
            await briefly(partial(_leave, workdir, kept, afterwards), abandon_on_cancel=True)
        if scope.cancelled_caught:
            log.error("%s: not removed within %.0f s, left behind", workdir.path, REMOVAL_SECONDS)


def _leave(workdir: Workdir, keep: bool, afterwards: Callable[[], None]) -> None:
    _close(workdir, keep)
    afterwards()


def _close(workdir: Workdir, keep: bool) -> None:
    """What came of the job is known by now, so a directory that cannot be removed is left behind, and said."""
    try:
        workdir.close(keep=keep)
    except WorkdirFault as exc:
        log.error("%s; left behind", exc)  # noqa: TRY400 - a sentence, no traceback


def default_root() -> Path:
    """Where work directories go when nobody said: a directory of this user's in the temporary one, made if need be.

    Raises `WorkdirFault` when somebody else could write to it: everybody may make things there. Blocks.
    """
    path = Path(tempfile.gettempdir()) / f"loadmaster-{os.geteuid()}"
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise WorkdirFault(f"{path}: is not a directory that only this user can write to; name another root")
    return path


def take_over(path: Path) -> str | None:
    """The identity of a work directory that was copied here: it is ours from now on. None: there is none. Raises OSError."""
    try:
        descriptor = _enter(path.parent, path.name)
    except FileNotFoundError:
        return None
    try:
        os.fchmod(descriptor, OURS)
        with suppress(OSError):
            os.setxattr(descriptor, MARK, b"")
        return _identity(descriptor)
    finally:
        os.close(descriptor)


def _identity(descriptor: int) -> str:
    return f"{_boot_id()}:{os.fstat(descriptor).st_ino}"


def remove_directory(path: Path) -> None:
    """Remove a directory of ours with all that a payload may have put in it, as deep as it likes. Raises OSError."""
    descriptor = _enter(path.parent, path.name)
    try:
        _empty(descriptor)
    finally:
        os.close(descriptor)
    path.rmdir()


def _what(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a directory", stat.S_IFLNK: "a link"}
    return kinds.get(stat.S_IFMT(mode), "a device")


@cache
def _boot_id() -> str:
    return BOOT_ID.read_text().strip()


def _make_directory(path: Path) -> bool:
    """Make it; False when there is something of that name."""
    with suppress(FileExistsError):
        try:
            path.mkdir(mode=OURS)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(mode=OURS)
        return True
    return False


def _check_empty_of_payloads(path: Path, descriptor: int) -> None:
    """Raise `WorkdirFault` while somebody's payload lives in there, whose agent has died."""
    if is_occupied(descriptor):
        raise WorkdirFault(
            f"{path}: the payload of a job {path.name} still runs in this directory ({who(descriptor)}), and its agent has"
            " died: start an agent with the journal of that one, which goes on with it; or end it; or give this job"
            " another id, or another root"
        )


def _is_ours(descriptor: int) -> bool:
    if os.fstat(descriptor).st_mode & stat.S_ISVTX:
        return True
    try:
        return MARK in os.listxattr(descriptor)
    except OSError:
        return False


def _enter(root: Path, name: str) -> int:
    """A descriptor of a directory in `root`, also when a dead job's payload has closed it."""
    parent = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _permit(name, parent)
        return os.open(name, _DIRECTORY, dir_fd=parent)
    finally:
        os.close(parent)


def _empty(top: int) -> None:
    """Remove everything in a directory. What is deep is first moved up, so no depth is too deep."""
    os.fchmod(top, OURS)  # the payload may have closed its own directory
    for _ in range(REMOVAL_PASSES):
        names = os.listdir(top)
        if not names:
            return
        while names:
            name = names.pop()
            if not _unlink(name, top):
                names += _flatten(name, top)
    raise OSError(errno.ENOTEMPTY, "something keeps writing to it")


def _unlink(name: str, folder: int) -> bool:
    """Remove what is not a directory; False when it is one."""
    try:
        os.unlink(name, dir_fd=folder)  # of a directory no file system of Linux does it
    except FileNotFoundError:
        return True
    except OSError:
        if stat.S_ISDIR(_mode(name, folder)):
            return False
        raise
    return True


def _flatten(name: str, top: int) -> list[str]:
    """Remove one directory of `top`, its own directories becoming `top`'s; their names there."""
    moved = []
    with suppress(FileNotFoundError):
        _permit(name, top)
        folder = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            for entry in os.listdir(folder):
                if not _unlink(entry, folder):
                    _permit(entry, folder)  # a directory can only change its parent when we may write to it
                    moved.append(f".{os.urandom(8).hex()}")
                    os.rename(entry, moved[-1], src_dir_fd=folder, dst_dir_fd=top)
        finally:
            os.close(folder)
        with suppress(OSError):  # somebody still writes: the next pass sees it
            os.rmdir(name, dir_fd=top)
    return moved


def _permit(name: str, folder: int) -> None:
    """Let us into a directory its owner closed, through a descriptor so that no link can be put in its place."""
    if _mode(name, folder) & 0o700 == 0o700:
        return
    handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        os.chmod(f"/proc/self/fd/{handle}", 0o700)
    finally:
        os.close(handle)


def _mode(name: str, folder: int) -> int:
    with suppress(FileNotFoundError):
        return os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    return 0
