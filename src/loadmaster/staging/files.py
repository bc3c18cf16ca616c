"""The local ends of transfers: files of a work directory, and files by path.

Their methods block and are called in a storage's threads. A name never holds half a file: what comes in is written beside
it, verified, and renamed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from loadmaster.errors import ChecksumMismatch
from loadmaster.storage.base import FileInfo
from loadmaster.storage.checksums import Checksum
from loadmaster.workdir import Workdir


class Incoming:
    """A file of a work directory that is being brought in."""

    __slots__ = ("_name", "_part", "_workdir", "checksum", "size_bytes", "url")

    def __init__(
        self, workdir: Workdir, name: str, *, size_bytes: int | None = None, checksum: Checksum | None = None
    ) -> None:
        self._workdir, self._name = workdir, name
        self._part: str | None = None
        self.size_bytes, self.checksum = size_bytes, checksum
        self.url = ""
        """Where it comes from this time, for the words of errors."""

    def open(self) -> int:
        """A new file beside it."""
        self._part = f".{os.urandom(8).hex()}.part"
        return self._workdir.create(self._part, append=False)

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Give it its name. Raises `ChecksumMismatch`."""
        verify(info, self.size_bytes, self.checksum, self.url)
        if self._part is not None:
            self._workdir.rename(self._part, self._name)
            self._part = None

    def discard(self) -> None:
        """Remove what was written."""
        if self._part is not None:
            with suppress(OSError):
                self._workdir.remove(self._part)
            self._part = None


class Outgoing:
    """A file of a work directory that is being taken out. What keeps it from leaving is in `refused`."""

    __slots__ = ("_name", "_workdir", "refused", "size_bytes")

    def __init__(self, workdir: Workdir, name: str) -> None:
        self._workdir, self._name = workdir, name
        self.refused: OSError | None = None
        self.size_bytes: int | None = None

    def open(self) -> int:
        """The file as it is, if it may leave."""
        try:
            descriptor = self._workdir.open_output(self._name)
        except OSError as exc:
            self.refused = exc
            raise
        self.size_bytes = os.fstat(descriptor).st_size
        return descriptor

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Nothing: it stays."""

    def discard(self) -> None:
        """Nothing: it stays."""


class IncomingPath:
    """A file by its path, being brought in. Its directory is made; what has its name is replaced."""

    __slots__ = ("_part", "_path", "_sync", "checksum", "size_bytes", "url")

    def __init__(
        self,
        path: Path,
        *,
        size_bytes: int | None = None,
        checksum: Checksum | None = None,
        sync: bool = False,
    ) -> None:
        """`sync`: whether it is on the disk, and not only on its way there, when it gets its name."""
        self._path, self._sync = path, sync
        self._part: str | None = None
        self.size_bytes, self.checksum = size_bytes, checksum
        self.url = ""

    def open(self) -> int:
        """A new file beside it."""
        part = f"{self._path.parent}/.{os.urandom(8).hex()}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(part, flags, 0o666)
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(part, flags, 0o666)
        self._part = part
        return descriptor

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Give it its name. Raises `ChecksumMismatch`."""
        verify(info, self.size_bytes, self.checksum, self.url)
        if self._part is not None:
            if self._sync:
                os.fsync(descriptor)
            os.replace(self._part, self._path)
            self._part = None

    def discard(self) -> None:
        """Remove what was written."""
        if self._part is not None:
            with suppress(OSError):
                os.unlink(self._part)
            self._part = None


class OutgoingPath:
    """A file by its path, being taken out."""

    __slots__ = ("_path", "refused", "size_bytes")

    def __init__(self, path: Path) -> None:
        self._path = path
        self.refused: OSError | None = None
        self.size_bytes: int | None = None

    def open(self) -> int:
        """The file as it is."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            self.refused = exc
            raise
        self.size_bytes = os.fstat(descriptor).st_size
        return descriptor

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Nothing: it stays."""

    def discard(self) -> None:
        """Nothing: it stays."""


def verify(info: FileInfo, size_bytes: int | None, checksum: Checksum | None, url: str) -> None:
    """Raise `ChecksumMismatch` when what passed is not what was promised."""
    if size_bytes is not None and info.size_bytes != size_bytes:
        raise ChecksumMismatch(url, f"has {info.size_bytes} bytes, expected {size_bytes}")
    if checksum is not None and info.checksum != checksum:
        passed = info.checksum.digits if info.checksum is not None else "unknown"
        raise ChecksumMismatch(url, f"{checksum.algorithm} {passed}, expected {checksum.digits}")
