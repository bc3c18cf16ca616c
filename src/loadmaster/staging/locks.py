"""Locks by name, between processes, that can be waited for without asking again and again.

A lock is a FIFO, open and locked (`flock`) by the one who has it. When that one closes it, or dies, the kernel first drops
the lock and then tells those who have the FIFO open for reading. On a local disk only.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress


class Locks:
    """The locks in a directory. Methods block, but never for a lock."""

    def __init__(self, top: int) -> None:
        """`top`: a descriptor of the directory, which stays the caller's."""
        self._top = top

    def take(self, name: str) -> int | None:
        """A descriptor that is to be released; None when somebody has the lock."""
        path = f"{name}.lock"
        while True:
            with suppress(FileExistsError):
                os.mkfifo(path, 0o600, dir_fd=self._top)
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return None
            if self._is_called(descriptor, path):
                return descriptor
            os.close(descriptor)  # released, and so removed, in that instant

    def release(self, name: str, descriptor: int) -> None:
        """Let others have it."""
        with suppress(FileNotFoundError):
            os.unlink(f"{name}.lock", dir_fd=self._top)
        with suppress(OSError):
            fcntl.flock(
                descriptor, fcntl.LOCK_UN
            )  # in so many words: a child that is just being started may have it too
        os.close(descriptor)

    def reader(self, name: str) -> int | None:
        """A descriptor that is readable once the one who has the lock has gone; None when nobody has it.

        It is opened before the lock is tried: so whoever has the lock then closes it later.
        """
        path = f"{name}.lock"
        while True:
            try:
                reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top)
            except FileNotFoundError:
                return None
            lock = self.take(name)
            if lock is None and self._is_called(reader, path):
                return reader
            os.close(reader)
            if lock is not None:
                self.release(name, lock)
                return None

    def _is_called(self, descriptor: int, path: str) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), os.stat(path, dir_fd=self._top, follow_symlinks=False))
        return False
