"""A node's cache of input files: shared by jobs, by processes, and by whoever comes after they have died.

A directory on a local disk holds, for each key, the file, a record of it and, while it is being filled, a lock:

    <digest>         the content, read-only; <digest>.part while it comes in
    <digest>.json    what is known of it; its time is when it was used last
    <digest>.lock    had by the one who fills it (`locks`)
    total            how many bytes there are; only a hint, counted anew whenever something is evicted

Payloads run as the same user. What one does to the files here is found before they are used again; not so if it forges the
records too. Whoever has to fear that gives payloads no way to this directory.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Final, Literal

import anyio
from anyio import from_thread, to_thread

from loadmaster.errors import InvalidSite
from loadmaster.staging.locks import Locks
from loadmaster.staging.plan import Fetch
from loadmaster.storage.base import FileInfo
from loadmaster.storage.checksums import Checksum, running
from loadmaster.storage.local import CANNOT_CLONE, clone
from loadmaster.workdir import Workdir

log = logging.getLogger(__name__)

Linking = Literal["copy", "hard"]

STRONG: Final = frozenset({"md5", "sha256"})
"""The checksums that name a content. Of two files of some bytes one in thousands has the other's adler32."""

PATIENCE_SECONDS: Final = 120.0
"""Who fills a file and has not written a byte for so long is not waited for."""

SLACK: Final = 20
"""When something has to be evicted, a twentieth of all more: each time the whole directory is looked at."""

STALE_SECONDS: Final = 3600.0
"""What was written beside a record and is so old belongs to nobody."""

SMALL_BYTES: Final = 1024 * 1024
"""What is copied at once, in the thread of the storage that brought it; larger files would hold up its others."""

COPY_BYTES: Final = 64 * 1024 * 1024
"""In one call of the kernel's, between two looks for a cancellation."""

_OURS: Final = re.compile(r"[0-9a-f]{40}(\.part|\.lock|\.json|\.[0-9a-f]{8}\.new)?")
_BOOT: Final = Path("/proc/sys/kernel/random/boot_id")


def key_of(fetch: Fetch) -> str | None:
    """What a file is known by in a cache; None if it has to be fetched each time.

    Its content, where a checksum says what that is; else its logical name, for those files never change; else its URL
    together with size and checksum. A URL alone may have other content tomorrow.
    """
    if fetch.checksum is not None and fetch.checksum.algorithm in STRONG:
        return str(fetch.checksum)
    known = f"{fetch.size_bytes} {fetch.checksum}"
    if fetch.lfn is not None:
        return f"LFN:{fetch.lfn} {known}"
    if fetch.checksum is None or fetch.size_bytes is None:
        return None
    return f"{fetch.sources[0].url} {known}"


@dataclass(frozen=True, slots=True)
class _Record:
    """What is known of an entry, and how its file was when we looked last."""

    key: str
    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    boot: str
    executable: bool
    passed: str
    """The checksum that was computed as the bytes passed, for those who want to know."""
    checksum: str
    """The one the file is checked by."""


class Cache:
    """A cache in a directory. Methods block, but for those that are awaited; may be used from several threads."""

    def __init__(self, root: Path, max_bytes: int, *, link: Linking = "copy") -> None:
        """The directory is made if need be. Raises `InvalidSite` when others can write to it. Blocks.

        `link`: "copy" gives each job a file of its own, that shares its blocks where the file system can (XFS, Btrfs);
        "hard" gives all jobs the same file, read-only. That takes no space, but every use reads the file once: one job may
        have written to it.
        """
        self.root, self.max_bytes, self._link = root, max_bytes, link
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise InvalidSite(f"cache: {root}: {exc.strerror}") from exc
        self._locks = Locks(self._top)
        found = os.fstat(self._top)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            os.close(self._top)
            raise InvalidSite(f"cache: {root}: is not a directory that only this user can write to")
        self._boot = _BOOT.read_text().strip() if _BOOT.exists() else ""
        self._remove_parts()

    def __repr__(self) -> str:
        return f"<Cache {self.root} of {self.max_bytes:,} bytes>"

    def close(self) -> None:
        """Close the directory; what is in it stays."""
        os.close(self._top)

    # -- for those who want a file -----------------------------------------------------------------------------------

    def claim(self, key: str, size_bytes: int | None = None) -> Entry | Filling | None:
        """The file, or the right to bring it in; None while another has that. To be closed in either case."""
        digest = _digest(key)
        if entry := self._entry(key, digest):
            return entry
        if (lock := self._locks.take(digest)) is None:
            return None
        try:
            if entry := self._entry(key, digest):  # brought in since we looked
                self._locks.release(digest, lock)
                return entry
            self._drop(digest)
        except BaseException:
            self._locks.release(digest, lock)
            raise
        return Filling(self, key, digest, lock, size_bytes)

    async def wait(self, key: str, patience_seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait for whoever brings in a file. False when they have stopped writing: do without the cache."""
        digest = _digest(key)
        seen = -1
        while True:
            reader = await to_thread.run_sync(self._locks.reader, digest)
            if reader is None:
                return True
            try:
                with anyio.move_on_after(patience_seconds) as scope:
                    await anyio.wait_readable(reader)
                if not scope.cancelled_caught:
                    return True
                size = await to_thread.run_sync(self._size, f"{digest}.part")
                if size <= seen:
                    return False
                seen = size
            finally:
                os.close(reader)

    @asynccontextmanager
    async def hold(
        self, key: str, size_bytes: int | None = None, patience_seconds: float = PATIENCE_SECONDS
    ) -> AsyncIterator[Entry | Filling | None]:
        """The file, or the right to bring it in, once nobody else is at it; None to do without the cache."""
        claimed = await to_thread.run_sync(self.claim, key, size_bytes)
        while claimed is None:
            if not await self.wait(key, patience_seconds):
                break
            claimed = await to_thread.run_sync(self.claim, key, size_bytes)
        try:
            yield claimed
        finally:
            if claimed is not None:
                with anyio.move_on_after(10, shield=True):  # some calls about files on a local disk
                    await to_thread.run_sync(claimed.close)

    def make_room(self, need_bytes: int) -> int:
        """Evict until so many bytes have been freed, or nothing more can be; how many were: for a disk that is full."""
        with self._accounts() as accounts:
            entries, total = self._scan()
            freed = self._evict(entries, total - need_bytes, total)
            _write_total(accounts, total - freed)
            return freed

    # -- entries -----------------------------------------------------------------------------------------------------

    def _entry(self, key: str, digest: str) -> Entry | None:
        """What is there, if it still is what was brought in."""
        record = self._record(digest)
        if record is None or record.key != key:
            return None
        try:
            descriptor = os.open(digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._top)
        except OSError:
            return None
        try:
            with suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # whoever evicts sees that it is in use
                checked = self._checked(record, descriptor, digest)
                if checked is not None:
                    with suppress(FileNotFoundError):
                        os.utime(f"{digest}.json", dir_fd=self._top)
                    return Entry(self, digest, checked, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        return None

    def _checked(self, record: _Record, descriptor: int, digest: str) -> _Record | None:
        """The record as it is now; None when this is not the file any more. Reads the whole file when in doubt."""
        now = self._seen(record, descriptor)
        if now == record:
            return record
        checksum = Checksum.parse(record.checksum) if record.checksum else None
        torn = replace(now, boot=record.boot) == record  # nobody touched it, but it may not have been on the disk yet
        if (
            now.size_bytes == record.size_bytes
            and checksum is not None
            and (torn or checksum.algorithm in STRONG)
            and _read_through(descriptor, checksum.algorithm) == checksum
            and self._seen(record, descriptor) == now
        ):
            self._write_record(digest, now)
            return now
        log.warning("%s: %s was changed by somebody; it is fetched again", self.root, record.key)
        return None

    def _seen(self, record: _Record, descriptor: int) -> _Record:
        found = os.fstat(descriptor)
        return replace(
            record, size_bytes=found.st_size, mtime_ns=found.st_mtime_ns, ctime_ns=found.st_ctime_ns, inode=found.st_ino,
            boot=self._boot,
        )  # fmt: skip

    def _publish(self, key: str, digest: str, info: FileInfo | None) -> Entry | None:
        """Make an entry of what came in. None when there is no room for it."""
        descriptor = os.open(f"{digest}.part", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top)
        try:
            found = os.fstat(descriptor)
            if not self._reserve(found.st_size):
                os.close(descriptor)
                return None
            passed = info.checksum if info is not None else None
            checksum = passed
            if self._link == "hard" and (checksum is None or checksum.algorithm not in STRONG):
                checksum = _read_through(descriptor, "sha256")
            executable = bool(found.st_mode & 0o111)
            os.fchmod(descriptor, 0o555 if executable else 0o444)
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.replace(f"{digest}.part", digest, src_dir_fd=self._top, dst_dir_fd=self._top)
            record = self._seen(
                _Record(key, 0, 0, 0, 0, "", executable, str(passed or ""), str(checksum or "")), descriptor
            )
            try:
                self._write_record(digest, record, new=True)
            except OSError as exc:  # a full disk: it is for this job only
                log.warning("%s: cannot keep %s: %s", self.root, key, exc.strerror)
                self._unlink(digest)
            return Entry(self, digest, record, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def _record(self, digest: str) -> _Record | None:
        try:
            descriptor = os.open(f"{digest}.json", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top)
            with os.fdopen(descriptor, "rb") as file:
                return _Record(**json.loads(file.read()))
        except (OSError, ValueError, TypeError):  # none, or a damaged one
            return None

    def _write_record(self, digest: str, record: _Record, *, new: bool = False) -> None:
        """Half a record is none. Over another one, it is written beside it."""
        name = f"{digest}.json" if new else f"{digest}.{os.urandom(4).hex()}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            with os.fdopen(os.open(name, flags, 0o600, dir_fd=self._top), "wb", buffering=0) as file:
                file.write(json.dumps({key: getattr(record, key) for key in record.__slots__}).encode())
            if not new:
                os.replace(name, f"{digest}.json", src_dir_fd=self._top, dst_dir_fd=self._top)
        except BaseException:
            self._unlink(name)
            raise

    def _drop(self, digest: str) -> None:
        """Remove an entry, or what is left of one. The record first: without it the rest is nothing."""
        for name in (f"{digest}.json", digest, f"{digest}.part"):
            self._unlink(name)

    def _unlink(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._top)

    def _size(self, name: str) -> int:
        with suppress(OSError):
            return os.stat(name, dir_fd=self._top, follow_symlinks=False).st_size
        return -1

    # -- bytes -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _accounts(self) -> Iterator[int]:
        """The file with the total, nobody else's meanwhile."""
        descriptor = os.open("total", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._top)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for as long as it takes to look at the directory
            yield descriptor
        finally:
            os.close(descriptor)

    def _reserve(self, size: int) -> bool:
        """Count so many bytes more, having evicted others for them. False when they do not fit."""
        if size > self.max_bytes:
            return False
        with self._accounts() as accounts:
            total = _read_total(accounts)
            if total is None or total + size > self.max_bytes:
                entries, total = self._scan()
                if total + size > self.max_bytes:
                    total -= self._evict(entries, self.max_bytes - size - self.max_bytes // SLACK, total)
            if total + size > self.max_bytes:
                _write_total(accounts, total)
                return False
            _write_total(accounts, total + size)
            return True

    def _remove_parts(self) -> None:
        """Those of processes that were killed while they brought something in; they may be large."""
        with os.scandir(self._top) as found:
            is_there = any(item.name.endswith(".part") for item in found)
        if is_there:
            with self._accounts() as accounts:
                _write_total(accounts, self._scan()[1])

    def _scan(self) -> tuple[list[tuple[float, str, int]], int]:
        """The entries by their last use, the sum of their sizes; what dead processes have left is removed."""
        entries: list[tuple[float, str, int]] = []
        with os.scandir(self._top) as found:
            names = {item.name for item in found}
        for name in filter(_OURS.fullmatch, names):  # should somebody have named a directory with something else in it
            digest, _, kind = name.partition(".")
            if kind == "json" and digest in names:
                with suppress(FileNotFoundError):
                    used = os.stat(name, dir_fd=self._top, follow_symlinks=False).st_mtime
                    entries.append((used, digest, os.stat(digest, dir_fd=self._top, follow_symlinks=False).st_size))
            elif kind.endswith("new"):
                self._unlink_stale(name)
            elif kind or f"{digest}.json" not in names:
                self._clear(digest, only=name)
        return sorted(entries), sum(size for _, _, size in entries)

    def _clear(self, digest: str, *, only: str) -> None:
        """Remove something that belongs to no entry, unless it is being filled."""
        lock = self._locks.take(digest)
        if lock is not None:
            if only.endswith((".part", ".json")) or (only == digest and self._record(digest) is None):
                self._unlink(only)
            self._locks.release(digest, lock)

    def _unlink_stale(self, name: str) -> None:
        with suppress(FileNotFoundError):
            if time.time() - os.stat(name, dir_fd=self._top, follow_symlinks=False).st_mtime > STALE_SECONDS:
                self._unlink(name)

    def _evict(self, entries: list[tuple[float, str, int]], goal: int, total: int) -> int:
        """Remove what was used longest ago until the total is no more than the goal; how many bytes that were."""
        freed = 0
        for _, digest, size in entries:
            if total - freed <= goal:
                break
            if self._evict_one(digest):
                freed += size
        return freed

    def _evict_one(self, digest: str) -> bool:
        """False when it is in use: being copied, or linked to by a job."""
        lock = self._locks.take(digest)
        if lock is None:
            return False
        try:
            descriptor = os.open(digest, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._top)
            try:
                if os.fstat(descriptor).st_nlink > 1:
                    return False
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._drop(digest)
            finally:
                os.close(descriptor)
        except (BlockingIOError, FileNotFoundError):
            return False
        finally:
            self._locks.release(digest, lock)
        return True


class Entry:
    """A file that is there and in use, until it is closed. Made by `Cache.claim`."""

    def __init__(self, cache: Cache, digest: str, record: _Record, descriptor: int) -> None:
        self._cache, self._digest, self._record, self._descriptor = cache, digest, record, descriptor
        self.info = FileInfo(record.size_bytes, Checksum.parse(record.passed) if record.passed else None)

    def place(self, workdir: Workdir, name: str) -> bool:
        """Give it to a job. False when somebody has written to it meanwhile: claim it again."""
        part = f".{os.urandom(8).hex()}.part"
        try:
            if self._cache._link != "hard" or not self._link_to(workdir, part):
                self._copy_to(workdir, part)
            now = self._cache._seen(self._record, self._descriptor)
            if replace(now, ctime_ns=self._record.ctime_ns) != self._record:
                workdir.remove(part)
                return False
            if now != self._record and self._cache._link == "hard":  # we made a link
                self._record = now
                self._cache._write_record(self._digest, now)
            workdir.rename(part, name)
            workdir.remove(part)  # two names of one file: renaming one to the other does nothing
        except BaseException:
            with suppress(OSError):
                workdir.remove(part)
            raise
        return True

    def close(self) -> None:
        """It may be evicted."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _link_to(self, workdir: Workdir, part: str) -> bool:
        """By the descriptor, not by a name that somebody may have put something else in the place of."""
        top = workdir.descriptor()
        try:
            os.link(f"/proc/self/fd/{self._descriptor}", part, dst_dir_fd=top, follow_symlinks=True)
        except OSError as exc:
            if exc.errno not in {*CANNOT_CLONE, errno.EMLINK, errno.ENOENT}:
                raise
            return False
        finally:
            os.close(top)
        return True

    def _copy_to(self, workdir: Workdir, part: str) -> None:
        target = workdir.create(part, append=False)
        try:
            try:
                copy(self._descriptor, target)
            except OSError as exc:
                if exc.errno not in {errno.ENOSPC, errno.EDQUOT}:
                    raise
                self._cache.make_room(self._record.size_bytes)
                os.ftruncate(target, 0)
                copy(self._descriptor, target)
            os.fchmod(target, 0o755 if self._record.executable else 0o644)
        finally:
            os.close(target)


class Filling:
    """The right to bring a file in, until it is closed. Made by `Cache.claim`.

    To an `Incoming` it is the directory the file comes into: what is renamed there becomes an entry, and is given to the
    job. `finish` does that for files that are not small; await it in a thread.
    """

    def __init__(self, cache: Cache, key: str, digest: str, lock: int, size_bytes: int | None) -> None:
        self._cache, self._key, self._digest, self._size = cache, key, digest, size_bytes
        self._lock: int | None = lock
        self._arrived = False
        self.workdir: Workdir | None = None
        self.name = ""
        """Who wants it, and by which name."""
        self.info: FileInfo | None = None
        """What came in, to be told before it is renamed."""

    def create(self, name: str, *, append: bool = False) -> int:
        """A new file for the content, room for which is made on the disk if need be."""
        self._cache._unlink(self._part)
        if self._size is not None:
            disk = os.fstatvfs(self._cache._top)
            if (short := self._size - disk.f_bavail * disk.f_frsize) > 0:
                self._cache.make_room(short)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_APPEND if append else 0)
        return os.open(self._part, flags, 0o600, dir_fd=self._cache._top)

    def reopen_file(self, name: str) -> int:
        """The same file, for writing on."""
        return os.open(self._part, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._cache._top)

    def rename(self, old: str, new: str) -> None:
        """The content is whole."""
        self._arrived = True
        self.name = new
        if self._cache._size(self._part) <= SMALL_BYTES:
            self.finish()

    def remove(self, name: str) -> None:
        """The content is not to be had."""
        self._cache._unlink(self._part)

    def finish(self) -> None:
        """Make an entry of it, give it to the job, let others at it. Does so once."""
        if not self._arrived or self._lock is None:
            return
        entry = self._cache._publish(self._key, self._digest, self.info)
        if entry is None:  # no room: it is for this job only
            found = os.open(self._part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._cache._top)
            status = os.fstat(found)
            record = _Record(self._key, 0, 0, 0, 0, "", bool(status.st_mode & 0o111), "", "")
            entry = Entry(self._cache, self._digest, self._cache._seen(record, found), found)
        try:
            self.close()  # others need not wait until our copy is made
            if self.workdir is not None:
                entry.place(self.workdir, self.name)
        finally:
            entry.close()

    def close(self) -> None:
        """Others may bring it in; what is not whole is removed."""
        if self._lock is not None:
            with suppress(OSError):
                self._cache._unlink(self._part)
            self._cache._locks.release(self._digest, self._lock)
            self._lock = None

    @property
    def closed(self) -> bool:
        """Whether it is done, one way or the other."""
        return self._lock is None

    @property
    def _part(self) -> str:
        return f"{self._digest}.part"


def copy(source: int, target: int) -> None:
    """Copy a file by its blocks' numbers where the file system can, else within the kernel, else through us."""
    if clone(source, target):
        return
    size, offset = os.fstat(source).st_size, 0
    while offset < size:
        _heed_cancellation()
        try:
            count = os.copy_file_range(source, target, min(COPY_BYTES, size - offset), offset, offset)
        except OSError as exc:
            if exc.errno not in CANNOT_CLONE:
                raise
            count = 0
        if count == 0:
            data = os.pread(source, SMALL_BYTES, offset)
            if not data:
                return
            count = os.pwrite(target, data, offset)
        offset += count


def _read_through(descriptor: int, algorithm: str) -> Checksum:
    passed, offset = running(algorithm), 0
    while block := os.pread(descriptor, SMALL_BYTES, offset):
        _heed_cancellation()
        passed.update(block)
        offset += len(block)
    return passed.result()


def _digest(key: str) -> str:
    return blake2b(key.encode(errors="surrogateescape"), digest_size=20).hexdigest()


def _read_total(accounts: int) -> int | None:
    with suppress(ValueError):
        return max(0, int(os.pread(accounts, 32, 0)))
    return None


def _write_total(accounts: int, total: int) -> None:
    os.pwrite(accounts, b"%020d" % max(0, total), 0)  # always as long: cutting a file costs more than all else here


def _heed_cancellation() -> None:
    with suppress(RuntimeError):  # in a thread of a storage's own
        from_thread.check_cancelled()
