"""A local file that gets its name when it is whole: before that it has none (O_TMPFILE), so a process that dies leaves
nothing of it. Where the file system has no such files, or one is to be found again by others, it has a name beside it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from functools import cache
from typing import Final

NO_UNNAMED: Final = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS})
"""What a file system says that has none without a name."""

_CANNOT_LINK: Final = frozenset({errno.EPERM, errno.EXDEV, errno.ENOENT, errno.EMLINK, *NO_UNNAMED})


class NewFile:
    """A file that will be at a path. Raises OSError; what is not given its name, or held, is gone once it is closed."""

    __slots__ = ("_held", "_part", "_path", "descriptor", "is_named")

    def __init__(self, path: str, part: str = "", *, named: bool = False) -> None:
        """Its directory, and those above it, are made. `part`: its name until it is whole, if it needs one; any, if empty.
        `named`: it needs one."""
        folder = path.rpartition("/")[0] or "/"
        self._path = path
        self._part = f"{folder}/{part}" if part else ""
        self._held = False
        self.is_named = named or not _has_proc()
        """Whether it has a name already."""
        try:
            self.descriptor = self._open(folder)
        except FileNotFoundError:
            os.makedirs(folder, exist_ok=True)
            self.descriptor = self._open(folder)

    def _open(self, folder: str) -> int:
        if not self.is_named:
            try:
                return os.open(folder, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o644)
            except OSError as exc:
                if exc.errno not in NO_UNNAMED:
                    raise
                self.is_named = True
        return self._open_named()

    def _open_named(self) -> int:
        self._name_part()
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self._part, flags, 0o644)
        except FileExistsError:  # ours, of an agent that was killed
            os.unlink(self._part)
            return os.open(self._part, flags, 0o644)

    def hold(self) -> str:
        """Keep it as it is, when it is closed, under the name that is returned."""
        self._held = True
        return self._part

    def give_name(self, *, sync: bool = False) -> None:
        """Put it where it belongs, over whatever is there. `sync`: a copy, if it takes one, is on the disk by then."""
        if self.is_named:
            os.replace(self._part, self._path)
            self._held = True
            return
        try:
            self._link(self._path)
        except FileExistsError:  # a link cannot replace it, a renaming can
            self._link_beside()
        except OSError as exc:
            if exc.errno not in _CANNOT_LINK:
                raise
            self._copy(sync=sync)
        else:
            return
        self.is_named = True
        os.replace(self._part, self._path)
        self._held = True

    def _link(self, path: str) -> None:
        # The argument has it follow the link that the name in /proc is.
        os.link(f"/proc/self/fd/{self.descriptor}", path, src_dir_fd=self.descriptor)

    def _name_part(self) -> None:
        """Any name, if it has been given none."""
        if not self._part:
            self._part = f"{self._path.rpartition('/')[0]}/.{os.urandom(8).hex()}.part"

    def _link_beside(self) -> None:
        self._name_part()
        try:
            self._link(self._part)
        except FileExistsError:
            os.unlink(self._part)
            self._link(self._part)

    def _copy(self, *, sync: bool) -> None:
        """It cannot be linked here, which is told only now."""
        whole, size, offset = self.descriptor, os.fstat(self.descriptor).st_size, 0
        self.descriptor, self.is_named = self._open_named(), True
        try:
            while offset < size:
                offset += os.sendfile(self.descriptor, whole, offset, size - offset)
            if sync:
                os.fsync(self.descriptor)
        finally:
            os.close(whole)

    def close(self) -> None:
        """Close it. What has not got its name is removed."""
        os.close(self.descriptor)
        if self.is_named and not self._held:
            with suppress(FileNotFoundError):
                os.unlink(self._part)


@cache
def _has_proc() -> bool:
    """Without it, only root may name an open file."""
    return os.path.isdir("/proc/self/fd")
