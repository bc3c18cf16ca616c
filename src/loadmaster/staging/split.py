"""A large file that comes in as several parts at once, for one stream is seldom as fast as the way is wide.

To the one who wants it, it is one transfer: its checksum is combined from those of the parts, and what has come in when
something goes wrong is cut to what is whole from the beginning, so that it can be continued.
"""

from __future__ import annotations

import os
import threading
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.errors import StorageError, StorageUnavailable
from loadmaster.storage.base import Ability, Direction, FileInfo, LocalFile, Storage, Transfer
from loadmaster.storage.checksums import COMBINABLE, Checksum, combined, continuing, running
from loadmaster.storage.local import WORK_DIRECTORY, translated

PART_BYTES: Final = 32 * 1024**2
"""No part is smaller: connecting, and finding the speed of the way, are to be a small part of it."""

PARTS: Final = 4
"""Of one file, at most; servers count connections."""

ATTEMPTS: Final = 3
"""How often what is missing of a part is asked for, at once, before the file waits for its next attempt."""

CLOSE_SECONDS: Final = 10.0


def parts_of(transfer: Transfer, storage: Storage, free_streams: int) -> int:
    """In how many parts it should come; 1 if it should not, or cannot, be split."""
    needed = Ability.RANGES | Ability.SIDE_BY_SIDE
    if transfer.direction is not Direction.DOWNLOAD or storage.abilities & needed != needed:
        return 1
    if transfer.size_bytes is None or transfer.algorithm not in COMBINABLE:
        return 1
    return max(1, min(PARTS, free_streams, (transfer.size_bytes - transfer.first_byte) // PART_BYTES))


async def move_in_parts(storage: Storage, transfer: Transfer, parts: list[Transfer], count: int) -> None:
    """Have it moved as so many parts, and set its result. While they move, the list has them: they know how far it is."""
    before = transfer.begin().result()
    split = _Split(transfer.local)
    parts += [_part(transfer, split, first, last) for first, last in _bounds(transfer, count)]
    transfer.when_given_up = lambda: _give_up(parts)
    try:
        missing = list(parts)
        for _ in range(ATTEMPTS):
            await storage.move(missing, lambda _: None)
            missing = [_rest(part, split) for part in missing if _can_be_continued(part)]
            if not missing or transfer.given_up:
                break
            parts += missing
        error = _what_is_wrong(transfer, parts)
        whole, transfer.done_bytes = _whole(before, transfer, parts)
        transfer.passed, transfer.version = continuing(whole), parts[0].version
        parts.clear()
        try:
            await to_thread.run_sync(split.finish, transfer, error)
            transfer.result = error or transfer.info()
        except StorageError as exc:
            transfer.result = exc
    finally:
        parts.clear()
        with anyio.move_on_after(CLOSE_SECONDS, shield=True):
            await to_thread.run_sync(split.close)


class _Split:
    """The local file that the parts have in common."""

    def __init__(self, local: LocalFile) -> None:
        self._local = local
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._over = False

    def open(self) -> int:
        """A descriptor with a position of its own."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = self._local.open()
            return os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDWR | os.O_CLOEXEC)

    def finish(self, transfer: Transfer, error: StorageError | None) -> None:
        """All parts have ended: keep the whole, or what is whole from the beginning."""
        if self._descriptor is None:
            return
        with translated(WORK_DIRECTORY):
            if error is None:
                self._local.keep(self._descriptor, transfer.info())
                self._over = True
            else:
                os.ftruncate(self._descriptor, transfer.first_byte + transfer.done_bytes)

    def close(self) -> None:
        """Must not raise."""
        if not self._over:
            self._local.discard()
        if self._descriptor is not None:
            os.close(self._descriptor)


class _Piece:
    """The local end of one part: only all of them together are kept, or discarded."""

    def __init__(self, split: _Split) -> None:
        self._split = split

    def open(self) -> int:
        return self._split.open()

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """Not yet."""

    def discard(self) -> None:
        """Not yet."""


def _bounds(transfer: Transfer, count: int) -> list[tuple[int, int]]:
    first, size = transfer.first_byte, transfer.size_bytes or 0
    step = -(-(size - first) // count)
    return [(start, min(start + step, size) - 1) for start in range(first, size, step)]


def _part(transfer: Transfer, split: _Split, first: int, last: int | None) -> Transfer:
    return Transfer(
        Direction.DOWNLOAD, transfer.url, _Piece(split), transfer.algorithm, transfer.size_bytes,
        first_byte=first, last_byte=last, version=transfer.version, passed=running(transfer.algorithm),
    )  # fmt: skip


def _rest(part: Transfer, split: _Split) -> Transfer:
    return _part(part, split, part.first_byte + part.done_bytes, part.last_byte)


def _can_be_continued(part: Transfer) -> bool:
    """What broke off after a while may be asked for again at once; what did not even begin has to wait for its turn."""
    error = part.result
    return isinstance(error, StorageError) and error.retryable and not error.retry_after and part.done_bytes > 0


def _give_up(parts: list[Transfer]) -> None:
    for part in parts:
        part.give_up()


def _whole(before: Checksum, transfer: Transfer, parts: list[Transfer]) -> tuple[Checksum, int]:
    """The checksum of what is whole from the beginning, and how many bytes of it are new."""
    if _changed(parts):
        return before, 0
    whole, end = before, transfer.first_byte
    for part in sorted(parts, key=lambda part: (part.first_byte, part.done_bytes)):
        if part.first_byte == end and part.done_bytes and part.passed is not None:
            whole = combined(whole, part.passed.result(), part.done_bytes)
            end += part.done_bytes
    return whole, end - transfer.first_byte


def _changed(parts: list[Transfer]) -> bool:
    return len({part.version for part in parts if part.done_bytes}) > 1


def _what_is_wrong(transfer: Transfer, parts: list[Transfer]) -> StorageError | None:
    """Why it is not whole, if it is not."""
    if _changed(parts):
        return StorageUnavailable(transfer.url, "changed while its parts were read")
    if sum(part.done_bytes for part in parts) == (transfer.size_bytes or 0) - transfer.first_byte:
        return None
    errors = [part.result for part in parts if isinstance(part.result, StorageError)]
    return errors[-1] if errors else StorageUnavailable(transfer.url, "its parts are not as long as they should be")
