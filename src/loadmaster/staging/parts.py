"""A file that comes in by its path, in a run that may die and be started again.

A small file has no name until it is whole (O_TMPFILE): a run that dies leaves nothing of it, and two runs that bring the
same file in do not meet. What has come of a larger one, or where the file system has no such files, is beside the target
under a name that the next run finds: it goes on from there, or writes over it, so that nothing is left lying about. The
one who writes to it has a lock on it; the kernel drops that with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

from loadmaster.errors import ChecksumMismatch, StorageUnavailable
from loadmaster.names import MAX_COMPONENT_BYTES
from loadmaster.staging.files import verify
from loadmaster.storage.base import FileInfo
from loadmaster.storage.checksums import Checksum, Running, running
from loadmaster.storage.local import BLOCK_BYTES
from loadmaster.storage.unnamed import NO_UNNAMED

WORTH_BYTES: Final = 1024 * 1024
"""Less is not worth being kept, and read again."""


class PartOfPath:
    """The local end of a file that comes in. Its directory is made; what has its name is replaced."""

    __slots__ = (
        "_mine",
        "_named",
        "_path",
        "_sync",
        "_unnamed",
        "_wrong",
        "checksum",
        "continues",
        "keeps",
        "resumable",
        "size_bytes",
        "url",
    )

    def __init__(
        self,
        path: Path | str,
        *,
        size_bytes: int | None = None,
        checksum: Checksum | None = None,
        sync: bool = False,
        keeps: bool = False,
    ) -> None:
        """`sync`: whether it is on the disk, and not only on its way there, when it gets its name. `keeps`: whether what
        has come in stays for another run, should this one not finish it."""
        self._path = str(path)
        self._sync, self._wrong = sync, False
        self._mine = False
        """Whether what is beside it was written by us, and not by another process that is at it now."""
        self._unnamed = False
        """Whether what was opened last has no name."""
        self._named = size_bytes is None or size_bytes > WORTH_BYTES
        """Whether it is written under a name from the beginning."""
        self.keeps = keeps
        self.size_bytes, self.checksum = size_bytes, checksum
        self.url = ""
        self.resumable = False
        self.continues = 0

    @property
    def _part(self) -> str:
        folder, separator, name = self._path.rpartition("/")
        return f"{folder}{separator}{part_name(name)}"

    @property
    def is_worth_it(self) -> bool:
        """Whether it is a file of which a part may be kept."""
        return self.size_bytes is None or self.size_bytes > WORTH_BYTES

    def found(self, algorithm: str) -> tuple[int, Running] | None:
        """How much an earlier run has left, and the checksum of that; None when it is not worth it. Blocks."""
        try:
            descriptor = os.open(self._part, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_size < WORTH_BYTES:
                return None
            if self.size_bytes is not None and status.st_size >= self.size_bytes:
                return None  # nothing is left to be asked for, and it was not good enough for its name
            passed, count = running(algorithm), 0
            while block := os.pread(descriptor, BLOCK_BYTES, count):
                passed.update(block)
                count += len(block)
            return count, passed
        finally:
            os.close(descriptor)

    def open(self) -> int:
        """A file beside it, cut to what is continued. Raises `StorageUnavailable` while another process brings it in."""
        self._unnamed = False
        if (
            not self._named
            and not self.continues
            and _can_be_named_later()
            and (descriptor := self._open_unnamed()) >= 0
        ):
            self._unnamed, self.resumable = True, False
            return descriptor
        while True:
            descriptor = self._open()
            try:
                if self._is_ours(descriptor):
                    self._mine = True
                    # Not a new one: what was cut to nothing ext4 begins to write to the disk when it is closed, all of it.
                    if os.fstat(descriptor).st_size != self.continues:
                        os.ftruncate(descriptor, self.continues)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _open_unnamed(self) -> int:
        """A new file in the target's directory; -1 where there are none without a name."""
        folder = self._path.rpartition("/")[0] or ("/" if self._path.startswith("/") else ".")
        flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC
        try:
            try:
                return os.open(folder, flags, 0o666)
            except FileNotFoundError:
                os.makedirs(folder, exist_ok=True)
                return os.open(folder, flags, 0o666)
        except OSError as exc:
            if exc.errno not in NO_UNNAMED:
                raise
            self._named = True
            return -1

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return os.open(self._part, flags, 0o666)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(self._part), exist_ok=True)
            return os.open(self._part, flags, 0o666)

    def _is_ours(self, descriptor: int) -> bool:
        """Lock it. False when it lost its name in that instant: it has been finished, or dropped."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageUnavailable(self._path, "another process is bringing it in") from None
        except OSError as exc:
            if exc.errno not in {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}:  # a file system without locks
                raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EEXIST, "is in the way and not a file", self._part)
        with suppress(FileNotFoundError):
            return os.path.samestat(found, os.stat(self._part, follow_symlinks=False))
        return False

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Give it its name. Raises `ChecksumMismatch`."""
        try:
            verify(FileInfo(self.continues + info.size_bytes, info.checksum), self.size_bytes, self.checksum, self.url)
        except ChecksumMismatch:
            self._wrong = True
            raise
        if self._sync:
            os.fsync(descriptor)
        if self._unnamed:
            self._give_name(descriptor)
        else:
            os.replace(self._part, self._path)
            self._mine = False
        if self._sync:
            _sync_directory(os.path.dirname(self._path))

    def _give_name(self, descriptor: int) -> None:
        """A link cannot replace what has the name: then it is linked beside it, and renamed."""
        this = f"/proc/self/fd/{descriptor}"
        try:
            os.link(this, self._path, src_dir_fd=descriptor)  # the argument has it follow the link that `this` is
        except FileExistsError:
            beside = f"{self._path.rpartition('/')[0]}/.{os.urandom(8).hex()}.part"
            os.link(this, beside, src_dir_fd=descriptor)
            try:
                os.replace(beside, self._path)
            except BaseException:
                os.unlink(beside)
                raise
        except OSError as exc:
            if exc.errno not in {errno.EPERM, errno.EXDEV, *NO_UNNAMED}:
                raise
            self._named = True  # when it is tried again
            raise StorageUnavailable(self._path, f"cannot be linked here: {exc.strerror}") from exc

    def discard(self) -> None:
        """Remove what was written, unless it may be continued."""
        if self._wrong or not self.resumable:
            self.forget()

    def forget(self) -> None:
        """Remove what was written, unless it is kept for another run."""
        if self._mine:
            with suppress(OSError):
                if self._wrong or not self.keeps or os.stat(self._part).st_size < WORTH_BYTES:
                    self._mine = self._wrong = False
                    os.unlink(self._part)


@cache
def _can_be_named_later() -> bool:
    """Whether /proc is there: without it, only root may name an open file."""
    return os.path.isdir("/proc/self/fd")


def part_name(name: str) -> str:
    """What a file is called while it comes in."""
    part = f".{name}.part"
    if len(os.fsencode(part)) > MAX_COMPONENT_BYTES:
        return f".{blake2b(os.fsencode(name), digest_size=16).hexdigest()}.part"
    return part


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
