"""The local ends of transfers: files of a work directory, and files by path.

Their methods block and are called in a storage's threads. A name never holds half a file: what comes in is written beside
it, verified, and renamed.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from loadmaster.errors import ChecksumMismatch
from loadmaster.storage.base import FileInfo
from loadmaster.storage.checksums import Checksum
from loadmaster.workdir import Workdir


class Folder(Protocol):
    """Where files come in: a `Workdir`, or a directory by its path."""

    def create(self, name: str, *, append: bool = True) -> int:
        """A descriptor of a new file, for reading and writing."""
        ...

    def reopen_file(self, name: str) -> int:
        """A descriptor of a file that was created, for writing on."""
        ...

    def rename(self, old: str, new: str) -> None:
        """Give it its final name, over whatever has it."""
        ...

    def remove(self, name: str) -> None:
        """Remove it if it is there."""
        ...


class Incoming:
    """A file that is being brought in."""

    __slots__ = ("_folder", "_name", "_part", "_sync", "checksum", "continues", "resumable", "size_bytes", "url")

    def __init__(
        self,
        folder: Folder,
        name: str,
        *,
        size_bytes: int | None = None,
        checksum: Checksum | None = None,
        sync: bool = False,
    ) -> None:
        """`sync`: whether it is on the disk, and not only on its way there, when it gets its name."""
        self._folder, self._name, self._sync = folder, name, sync
        self._part: str | None = None
        self.size_bytes, self.checksum = size_bytes, checksum
        self.url = ""
        """Where it comes from this time, for the words of errors."""
        self.resumable = False
        """Whether `discard` leaves what has come in, until `forget`."""
        self.continues = 0
        """So many bytes of what has come in are continued by the next `open`."""

    def open(self) -> int:
        """A new file beside it; or what there is, cut to what is continued."""
        if self._part is not None and self.continues:
            descriptor = self._folder.reopen_file(self._part)
            try:
                os.ftruncate(descriptor, self.continues)
            except BaseException:
                os.close(descriptor)
                raise
            return descriptor
        self.forget()
        part = f".{os.urandom(8).hex()}.part"
        descriptor = self._folder.create(part, append=False)
        self._part = part
        return descriptor

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Give it its name. Raises `ChecksumMismatch`."""
        try:
            verify(FileInfo(self.continues + info.size_bytes, info.checksum), self.size_bytes, self.checksum, self.url)
        except ChecksumMismatch:
            self.resumable = False
            raise
        if self._part is not None:
            if self._sync:
                os.fsync(descriptor)
            self._folder.rename(self._part, self._name)
            self._part = None

    def discard(self) -> None:
        """Remove what was written, unless it may be continued."""
        if not self.resumable:
            self.forget()

    def forget(self) -> None:
        """Remove what was written."""
        if self._part is not None:
            with suppress(OSError):
                self._folder.remove(self._part)
            self._part = None


class IncomingPath(Incoming):
    """A file by its path, being brought in. Its directory is made; what has its name is replaced."""

    __slots__ = ()

    def __init__(
        self,
        path: Path | str,
        *,
        size_bytes: int | None = None,
        checksum: Checksum | None = None,
        sync: bool = False,
    ) -> None:
        parent, _, name = str(path).rpartition("/")
        super().__init__(Directory(parent), name, size_bytes=size_bytes, checksum=checksum, sync=sync)


class Directory:
    """A directory by its path, made when a file comes in."""

    __slots__ = ("_path",)

    def __init__(self, path: Path | str) -> None:
        self._path = str(path) or "."

    def create(self, name: str, *, append: bool = True) -> int:
        """A descriptor of a new file; the directory and its parents are made."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if append else 0)
        try:
            return os.open(f"{self._path}/{name}", flags, 0o666)
        except FileNotFoundError:
            os.makedirs(self._path, exist_ok=True)
            return os.open(f"{self._path}/{name}", flags, 0o666)

    def reopen_file(self, name: str) -> int:
        """A descriptor of a file that was created."""
        return os.open(f"{self._path}/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)

    def rename(self, old: str, new: str) -> None:
        """Give a file its final name."""
        os.replace(f"{self._path}/{old}", f"{self._path}/{new}")

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with suppress(FileNotFoundError):
            os.unlink(f"{self._path}/{name}")


class _Outgoing:
    """What outgoing files have in common: they stay as they are."""

    __slots__ = ("continues", "refused", "resumable", "size_bytes", "url")

    def __init__(self) -> None:
        self.url = ""
        self.resumable = False
        self.continues = 0
        self.refused: OSError | None = None
        """What keeps it from leaving."""
        self.size_bytes: int | None = None
        """Known once it has been opened."""

    def open(self) -> int:
        """The file as it is, if it may leave."""
        try:
            descriptor, self.size_bytes = self._open()
        except OSError as exc:
            self.refused = exc
            raise
        return descriptor

    def _open(self) -> tuple[int, int]:
        raise NotImplementedError

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Nothing: it stays."""

    def discard(self) -> None:
        """Nothing: it stays."""

    def forget(self) -> None:
        """Nothing: it stays."""


class Outgoing(_Outgoing):
    """A file of a work directory that is being taken out."""

    __slots__ = ("_name", "_workdir")

    def __init__(self, workdir: Workdir, name: str) -> None:
        super().__init__()
        self._workdir, self._name = workdir, name

    def _open(self) -> tuple[int, int]:
        return self._workdir.open_sized(self._name)


class OutgoingPath(_Outgoing):
    """A file by its path, being taken out."""

    __slots__ = ("_path",)

    def __init__(self, path: Path | str) -> None:
        super().__init__()
        self._path = path

    def _open(self) -> tuple[int, int]:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return descriptor, os.fstat(descriptor).st_size


class Elsewhere(_Outgoing):
    """No file of this machine: the end of a copy within a storage."""

    __slots__ = ()


def verify(info: FileInfo, size_bytes: int | None, checksum: Checksum | None, url: str) -> None:
    """Raise `ChecksumMismatch` when what passed is not what was promised."""
    if size_bytes is not None and info.size_bytes != size_bytes:
        raise ChecksumMismatch(url, f"has {info.size_bytes} bytes, expected {size_bytes}")
    if checksum is not None and info.checksum != checksum:
        passed = info.checksum.digits if info.checksum is not None else "unknown"
        raise ChecksumMismatch(url, f"{checksum.algorithm} {passed}, expected {checksum.digits}")
