"""Storage elements that are directories of this machine: `file://` URLs."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final, TypeVar

from anyio import CapacityLimiter, from_thread, to_thread

from loadmaster.errors import AccessDenied, NoSpace, NotFound, StorageError, StorageUnavailable
from loadmaster.names import local_file, local_path
from loadmaster.storage.base import Ability, Direction, FileInfo, Step, StorageOptions, Transfer
from loadmaster.storage.checksums import Running, running
from loadmaster.storage.unnamed import NewFile
from loadmaster.threads import briefly

T = TypeVar("T")

BLOCK_BYTES: Final = 512 * 1024
"""Large enough that the interpreter's share of a copy is small, small enough to stay in a core's cache, and to be written
without the system having to look for memory in one piece: by 1 MiB it took a quarter more CPU where memory was full of
other files, by 2 MiB five times as much at any time."""

CANCELLED_SECONDS: Final = 0.005
"""Between two looks whether the call is cancelled, while small files are copied: a look costs as much as a reading."""

REPORT_SECONDS: Final = 0.1
"""How long a file that has ended may wait to be told of, while others of its batch are copied."""

SMALL_BYTES: Final = 64 * 1024
"""What is smaller is copied in one piece."""

SLOW_SECONDS: Final = 0.002
"""For a small file: a disk that is synced, or is in another machine."""

SMALL_BATCHES: Final = 4
"""Batches of small files at once, where the disk is slow."""

CLONE_BYTES: Final = 1024 * 1024
"""From this size on a file shares the blocks of its source where the file system can."""

_CLONE: Final = 0x40049409  # FICLONE of linux/fs.h, the same on all machines that have Python's wheels
CANNOT_CLONE: Final = frozenset(
    {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EPERM, errno.EBADF}
)
"""What the system says of two files that cannot share blocks."""

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
    """Files by path. Written without a name, synced, named: a name never holds half a file, and nobody else does."""

    abilities = Ability.RANGES | Ability.RENAME | Ability.HOLD | Ability.COPY

    def __init__(self, threads: int = 16, *, sync: bool = True) -> None:
        """`threads`: so many calls at once, each in a thread; none of them is taken from the host's.

        `sync`: whether what was uploaded is on the disk, and not only on its way there, when it is said to be safe.
        """
        self._threads = CapacityLimiter(threads)
        self._small = CapacityLimiter(1)
        self._brief = True
        self._sync = sync

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """All of them one after another, in one thread."""
        if not transfers:
            return
        batch = _Batch(transfers, self._sync, lambda done: from_thread.run_sync(ended, done))
        try:
            if len(transfers) > 1:
                await to_thread.run_sync(batch.move, limiter=self._small)
                self._adapt(batch.seconds / len(transfers))
            else:
                if self._may_be_brief(transfers[0]):
                    await briefly(batch.move_small)
                if not batch.untold:
                    await to_thread.run_sync(batch.move, limiter=self._threads)
            if len(transfers) == 1 and transfers[0].done_bytes < SMALL_BYTES:
                self._brief = batch.seconds < SLOW_SECONDS
        finally:
            batch.close()
            untold, batch.untold, batch.transfers = batch.untold, [], ()  # an idle thread may remember the batch
            if untold:
                ended(untold)

    async def move_small(self, transfers: Sequence[Transfer]) -> None:
        """Move those of a few that are small, in one turn of a thread; the others have no result then, and nothing has
        been done about them."""
        batch = _Batch(transfers, self._sync, lambda done: None)
        try:
            if self._brief:
                await briefly(batch.move_small)
            else:
                await to_thread.run_sync(batch.move_small, limiter=self._threads)
            if batch.untold:
                self._brief = batch.seconds < SLOW_SECONDS * len(batch.untold)
        finally:
            batch.close()
            batch.untold, batch.transfers = [], ()

    def _may_be_brief(self, transfer: Transfer) -> bool:
        """Whether to move it takes no longer than other calls about small files, as far as is known."""
        size = transfer.size_bytes
        return self._brief and (size is None or size < SMALL_BYTES)

    def _adapt(self, seconds: float) -> None:
        """Small files of a fast disk are a matter of the interpreter, and fastest in one thread: four threads that take
        turns at it are five times as slow. Where a file takes milliseconds, it is the disk that is waited for."""
        tokens = int(self._small.total_tokens)
        if seconds > SLOW_SECONDS and tokens == 1:
            self._small.total_tokens = min(SMALL_BATCHES, int(self._threads.total_tokens))
        elif seconds < SLOW_SECONDS / 2 * tokens:
            self._small.total_tokens = 1

    async def stat(self, url: str) -> FileInfo:
        """The size of the file; its checksum is not known without reading it."""
        return await self._in_thread(url, lambda path: FileInfo(_stat_regular(path).st_size))

    async def remove(self, url: str) -> None:
        """Remove the file."""
        await self._in_thread(url, Path.unlink)

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """Remove those of these names beside it."""

        def work(path: Path) -> None:
            for part in parts:
                with suppress(FileNotFoundError, NotADirectoryError):
                    path.with_name(part).unlink()

        await self._in_thread(url, work)

    async def _in_thread(self, url: str, work: Callable[[Path], T]) -> T:
        def job() -> T:
            with translated(url):
                return work(local_path(url))

        return await to_thread.run_sync(job, limiter=self._threads)


@asynccontextmanager
async def open_storage(options: StorageOptions) -> AsyncIterator[LocalStorage]:
    """What `file://` stands for. `[storage.file]` may have `sync = false`: faster, and no promise for a power failure."""
    unknown = set(options.words) - {"sync"}
    sync = options.words.get("sync", True)
    if unknown or not isinstance(sync, bool):
        raise ValueError(f"{', '.join(sorted(unknown)) or 'sync'}: there is `sync`, true or false")
    yield LocalStorage(2 * options.streams, sync=sync)


class _TooLarge(Exception):
    """It cannot be moved in a moment; nothing has been done about it."""


class _Batch:
    """Some transfers, in a thread. What has ended is safe before it is told: directories are synced once for many."""

    def __init__(self, transfers: Sequence[Transfer], sync: bool, tell: Callable[[Sequence[Transfer]], None]) -> None:
        self.transfers = transfers
        self._sync = sync
        self._tell = tell
        self._block = memoryview(b"")
        self._only_small = False
        self._opened: tuple[int, str] | None = None
        """Of an upload that was too large: what it is read from, and what an error should call that."""
        self._unsynced: set[str] = set()
        self.untold: list[Transfer] = []
        self.seconds = 0.0

    def move_small(self) -> None:
        """Move those that are small, and leave the others as they are. In any thread."""
        begun = time.monotonic()
        self._only_small = True
        for transfer in self.transfers:
            self.close()
            with suppress(_TooLarge):
                self._move(transfer)
                self.untold.append(transfer)
        self._only_small = False
        self._sync_directories()
        self.seconds = time.monotonic() - begun

    def close(self) -> None:
        """Close what an upload has not been read from."""
        if self._opened is not None:
            os.close(self._opened[0])
            self._opened = None

    def move(self) -> None:
        """Move them all. Stops between blocks when cancelled."""
        from_thread.check_cancelled()
        begun = told = looked = time.monotonic()
        for transfer in self.transfers:
            self._move(transfer)
            self.untold.append(transfer)
            now = time.monotonic()
            if now - looked > CANCELLED_SECONDS:
                looked = now
                from_thread.check_cancelled()
                if now - told > REPORT_SECONDS:
                    self._sync_directories()
                    done, self.untold = self.untold, []
                    self._tell(done)
                    told = time.monotonic()
        self._sync_directories()
        self.seconds = time.monotonic() - begun

    def _move(self, transfer: Transfer) -> None:
        download = transfer.direction is Direction.DOWNLOAD
        try:
            try:
                path = local_file(transfer.url)
                if download:
                    transfer.result = self._download(transfer, path)
                else:
                    transfer.result = (self._upload if transfer.step.sends else self._end)(transfer, path)
            except (OSError, ValueError) as exc:
                raise translate(exc, transfer.url) from exc
        except StorageError as exc:
            transfer.result = exc
            transfer.local.discard()
        except _TooLarge:
            raise
        except BaseException:
            transfer.local.discard()
            raise
        else:
            if not download:
                transfer.local.discard()

    def _download(self, transfer: Transfer, path: str) -> FileInfo:
        found = _stat_regular(path)
        small = found.st_size < SMALL_BYTES and transfer.first_byte == 0 and transfer.last_byte is None
        if self._only_small and not small:
            raise _TooLarge
        source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = _read_small(transfer, source, found.st_size, transfer.url) if small else b""
            try:
                target = transfer.local.open()
            except (OSError, ValueError) as exc:
                raise translate(exc, WORK_DIRECTORY) from exc
            try:
                if not small:
                    self._copy(transfer, source, transfer.url, target, WORK_DIRECTORY)
                try:
                    if small:
                        _write_small(transfer, target, data)
                    return _kept(transfer, target, found.st_mode)
                except (OSError, ValueError) as exc:
                    raise translate(exc, WORK_DIRECTORY) from exc
            finally:
                os.close(target)
        finally:
            os.close(source)

    def _upload(self, transfer: Transfer, path: str) -> FileInfo:
        """Without a name, synced, named."""
        (source, name), self._opened = self._opened or _origin(transfer), None
        try:
            size = os.fstat(source).st_size
            small = size < SMALL_BYTES
            if self._only_small and not small:
                self._opened = source, name
                raise _TooLarge
            data = _read_small(transfer, source, size, name) if small else b""
            new = NewFile(path, transfer.part, named=transfer.step is Step.HOLD)
            try:
                if small:
                    _write_small(transfer, new.descriptor, data)
                else:
                    self._copy(transfer, source, name, new.descriptor, transfer.url)
                if transfer.source:
                    transfer.is_source(transfer.info())
                if self._sync:
                    os.fsync(new.descriptor)
                if transfer.step is Step.HOLD:
                    return transfer.hold(new.hold())
                new.give_name(sync=self._sync)
            finally:
                new.close()
            self._unsynced.add(path.rpartition("/")[0] or "/")
            return transfer.info()
        finally:
            if self._opened is None:
                os.close(source)

    def _end(self, transfer: Transfer, path: str) -> FileInfo:
        """Give what is held its name, or remove it."""
        part = transfer.take_held()
        if transfer.step is Step.PUBLISH:
            os.replace(part, path)
            self._unsynced.add(path.rpartition("/")[0] or "/")
        else:
            with suppress(FileNotFoundError):
                os.unlink(part)
        return transfer.let_go()

    def _copy(self, transfer: Transfer, source: int, source_name: str, target: int, target_name: str) -> None:
        """Copy what is wanted of the file, the checksum computed as the bytes pass."""
        passed, offset, size = transfer.begin(), transfer.first_byte, os.fstat(source).st_size
        end = size if transfer.last_byte is None else min(size, transfer.last_byte + 1)
        block = self._block_for(end - offset)
        whole = offset == 0 and transfer.last_byte is None
        cloned = whole and size >= CLONE_BYTES and clone(source, target)
        if cloned:  # what is read is what is kept, also if somebody writes to the source meanwhile
            source, source_name, end = target, target_name, os.fstat(target).st_size
        while True:
            # One byte more than there should be: when it does not come, this was the end.
            try:
                count = os.preadv(source, [block[: end - offset + 1]], offset)
            except OSError as exc:
                raise translate(exc, source_name) from exc
            data = block[: min(count, end - offset) if transfer.last_byte is not None else count]
            if data:
                passed.update(data)
                if not cloned:
                    try:
                        _write_all(target, data, offset)
                    except OSError as exc:
                        raise translate(exc, target_name) from exc
                offset += len(data)
                transfer.done_bytes += len(data)
            if offset == end and (count < len(block) or transfer.last_byte is not None):
                return
            if not data or offset > end:
                raise StorageUnavailable(source_name, "changed while it was copied")
            if transfer.given_up:
                raise StorageUnavailable(transfer.url, "given up")
            from_thread.check_cancelled()

    def _block_for(self, size: int) -> memoryview:
        if len(self._block) < min(BLOCK_BYTES, size + 1):
            self._block = memoryview(bytearray(min(BLOCK_BYTES, max(65536, size + 1))))
        return self._block

    def _sync_directories(self) -> None:
        if self._sync:
            for folder in self._unsynced:
                _sync_directory(folder)
        self._unsynced.clear()


def _origin(transfer: Transfer) -> tuple[int, str]:
    """A descriptor of what is to be stored, and what an error should call it."""
    name = transfer.source or WORK_DIRECTORY
    try:
        if not transfer.source:
            return transfer.local.open(), "the output"
        path = local_file(name)
        _stat_regular(path)
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), name
    except (OSError, ValueError) as exc:
        raise translate(exc, name) from exc


def _read_small(transfer: Transfer, source: int, size: int, name: str) -> bytes:
    """All of it by one reading. Most of a small file's cost is calls, of the system and of functions."""
    passed = transfer.begin()
    try:
        data = os.pread(source, size + 1, 0)  # when the one byte more does not come, this was the end
    except OSError as exc:
        raise translate(exc, name) from exc
    if len(data) != size:
        raise StorageUnavailable(name, "changed while it was copied")
    passed.update(data)
    return data


def _write_small(transfer: Transfer, target: int, data: bytes) -> None:
    count = os.pwrite(target, data, 0)
    if count < len(data):
        _write_all(target, memoryview(data)[count:], count)
    transfer.done_bytes = len(data)


def _kept(transfer: Transfer, target: int, mode: int) -> FileInfo:
    """Have the local end keep what has come in."""
    if mode & 0o111 and stat.S_ISREG(os.fstat(target).st_mode):
        os.fchmod(target, 0o644 | mode & 0o111)  # a script stays one
    transfer.local.keep(target, info := transfer.info())
    return info


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, about the thing named."""
    try:
        yield
    except (OSError, ValueError) as exc:
        raise translate(exc, name) from exc


def translate(exc: OSError | ValueError, name: str) -> StorageError:
    """Our error for one of the operating system's, about the thing named."""
    if isinstance(exc, OSError):
        return _ERRORS.get(exc.errno or 0, StorageUnavailable)(name, exc.strerror or str(exc))
    return StorageError(name, str(exc))


def clone(source: int, target: int) -> bool:
    """Whether the empty target has the source's content now, without a byte being copied: they share their blocks."""
    try:
        fcntl.ioctl(target, _CLONE, source)
    except OSError as exc:
        if exc.errno not in CANNOT_CLONE:
            raise
        return False
    return True


def checksum(descriptor: int, algorithm: str = "adler32") -> FileInfo:
    """The size and checksum of what an open descriptor holds. Blocks; stops between blocks if cancelled."""
    return _read_through(descriptor, running(algorithm))


def _read_through(descriptor: int, passed: Running) -> FileInfo:
    offset, block = 0, memoryview(bytearray(BLOCK_BYTES))
    with translated("the file"):
        while count := os.preadv(descriptor, [block], offset):
            from_thread.check_cancelled()
            passed.update(block[:count])
            offset += count
    return FileInfo(offset, passed.result())


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _stat_regular(path: str | Path) -> os.stat_result:
    """Looked at before it is opened: opening a FIFO waits for a writer, opening a device may do anything."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EISDIR, "is a directory" if stat.S_ISDIR(found.st_mode) else "is not a regular file")
    return found


def _sync_directory(path: str) -> None:
    with suppress(OSError):  # some network file systems cannot; the file's own sync has been done
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
