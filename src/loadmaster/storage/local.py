"""Storage elements that are directories of this machine: `file://` URLs."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from anyio import CapacityLimiter, from_thread, to_thread

from loadmaster.errors import AccessDenied, NoSpace, NotFound, StorageError, StorageUnavailable
from loadmaster.names import local_path
from loadmaster.storage.base import FileInfo, Progress

T = TypeVar("T")

BLOCK_BYTES: Final = 1024 * 1024
"""Large enough that the interpreter's share of a copy is small, small enough to stay in a core's cache."""

WORK_DIRECTORY: Final = "the work directory"
"""What an error names that is not the storage's fault."""

_ERRORS: Final[dict[int, type[StorageError]]] = {
    errno.ENOENT: NotFound,
    errno.ENOTDIR: NotFound,
    errno.EACCES: AccessDenied,
    errno.EPERM: AccessDenied,
    errno.EROFS: AccessDenied,
    errno.ENOSPC: NoSpace,
    errno.EDQUOT: NoSpace,
    errno.EFBIG: NoSpace,
    errno.EISDIR: StorageError,
    errno.ELOOP: StorageError,
    errno.ENAMETOOLONG: StorageError,
}


class LocalStorage:
    """Files by path. Written beside the target, synced, renamed: a name never holds half a file."""

    def __init__(self, threads: int = 16) -> None:
        """`threads`: so many calls at once, each in a thread; none of them is taken from the host's."""
        self._threads = CapacityLimiter(threads)

    async def stat(self, url: str) -> FileInfo:
        """The size of the file; its checksum is not known without reading it."""
        return await self._in_thread(url, lambda path: FileInfo(_stat_regular(path).st_size))

    async def download(self, url: str, target: int, progress: Progress) -> FileInfo:
        """Copy the file to the descriptor. `NoSpace` names the work directory when that is what is full."""

        def copy(path: Path) -> FileInfo:
            mode = _stat_regular(path).st_mode
            if mode & 0o111 and stat.S_ISREG(os.fstat(target).st_mode):
                os.fchmod(target, 0o644 | mode & 0o111)  # a script stays one
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                return _copy(source, url, target, WORK_DIRECTORY, progress)
            finally:
                os.close(source)

        return await self._in_thread(url, copy)

    async def upload(self, source: int, url: str, progress: Progress) -> FileInfo:
        """Copy the descriptor's file beside the target, sync it, rename it, sync the directory."""

        def copy(path: Path) -> FileInfo:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.parent / f".{os.urandom(8).hex()}.part"
            target = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            try:
                try:
                    info = _copy(source, "the output", target, url, progress)
                    os.fsync(target)
                finally:
                    os.close(target)
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            _sync_directory(path.parent)
            return info

        return await self._in_thread(url, copy)

    async def remove(self, url: str) -> None:
        """Remove the file."""
        await self._in_thread(url, Path.unlink)

    async def _in_thread(self, url: str, work: Callable[[Path], T]) -> T:
        def job() -> T:
            with translated(url):
                return work(local_path(url))

        return await to_thread.run_sync(job, limiter=self._threads)


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, about the thing named."""
    try:
        yield
    except OSError as exc:
        kind = _ERRORS.get(exc.errno or 0, StorageUnavailable)
        raise kind(name, exc.strerror or str(exc)) from exc
    except ValueError as exc:
        raise StorageError(name, str(exc)) from exc


def _copy(source: int, source_name: str, target: int | None, target_name: str, progress: Progress) -> FileInfo:
    """Copy from the beginning to the end, the checksum computed as the bytes pass. Stops between blocks if cancelled."""
    value, offset, size = zlib.adler32(b""), 0, os.fstat(source).st_size
    block = memoryview(bytearray(min(BLOCK_BYTES, max(4096, size))))
    while True:
        from_thread.check_cancelled()
        with translated(source_name):
            count = os.preadv(source, [block], offset)
        if count == 0:
            if os.fstat(source).st_size != size:
                raise StorageUnavailable(source_name, "changed while it was copied")
            return FileInfo(offset, f"{value:08x}")
        value = zlib.adler32(block[:count], value)
        if target is not None:
            with translated(target_name):
                _write_all(target, block[:count])
        offset += count
        progress.done_bytes = offset


def checksum(descriptor: int) -> FileInfo:
    """The size and adler32 of what an open descriptor holds. Blocks; stops between blocks if cancelled."""
    return _copy(descriptor, "the file", None, "", Progress())


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _stat_regular(path: Path) -> os.stat_result:
    """Looked at before it is opened: opening a FIFO waits for a writer, opening a device may do anything."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EISDIR, "is a directory" if stat.S_ISDIR(found.st_mode) else "is not a regular file")
    return found


def _sync_directory(path: Path) -> None:
    with suppress(OSError):  # some network file systems cannot; the file's own sync has been done
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
