"""A storage that handles one file at a time, made one that is given many.

class Mine:                                     # a storage of few words
    async def download(self, url, target, transfer): ...
    async def upload(self, source, url, transfer): ...
    async def stat(self, url): ...
    async def remove(self, url): ...

storage = OneByOne(Mine(), streams=8)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import anyio
from anyio import to_thread

from loadmaster.errors import CannotCopy, StorageError, StorageUnavailable
from loadmaster.storage.base import Ability, Direction, FileInfo, Transfer
from loadmaster.storage.local import WORK_DIRECTORY, translated
from loadmaster.tasks import for_each


class SingleStorage(Protocol):
    """A storage whose every call is about one file. All methods raise `StorageError`, and nothing but cancellation else."""

    async def stat(self, url: str) -> FileInfo:
        """What is at the URL. Raises `NotFound` when nothing is."""
        ...

    async def download(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        """Write the file to the descriptor of an empty file; what passed. Keep `transfer.done_bytes` up meanwhile.

        `transfer.begin()` gives the checksum to be fed; a storage that has another way to one needs not.
        """
        ...

    async def upload(self, source: int, url: str, transfer: Transfer) -> FileInfo:
        """Store what the descriptor holds, from its beginning, all of it or nothing; what passed."""
        ...

    async def remove(self, url: str) -> None:
        """Remove the file. Raises `NotFound` when there is none."""
        ...


@runtime_checkable
class Copying(Protocol):
    """One that can copy, besides."""

    async def copy(self, transfer: Transfer) -> FileInfo:
        """Copy `transfer.source` to `transfer.url`; what `transfer.copied` says of it. Raises `CannotCopy`."""
        ...


async def copy_by(single: SingleStorage, transfer: Transfer) -> FileInfo:
    """Have it copied, if it can."""
    if not isinstance(single, Copying):
        raise CannotCopy(transfer.url, "this storage does not copy")
    transfer.begun = True
    return await single.copy(transfer)


class OneByOne:
    """The storage that moves each of its transfers by a call of the other: so many at once, in each direction."""

    def __init__(self, single: SingleStorage, *, streams: int = 8, abilities: Ability = Ability.NONE) -> None:
        """`abilities`: what the other one can; parts of files are not among what it may be asked."""
        self.abilities = abilities & ~Ability.RANGES | Ability.SIDE_BY_SIDE
        self.single = single
        self._streams = streams
        self._free = {direction: anyio.Semaphore(streams) for direction in Direction}

    def __repr__(self) -> str:
        return f"<OneByOne {self.single!r}>"

    async def stat(self, url: str) -> FileInfo:
        """As the other says."""
        return await self.single.stat(url)

    async def remove(self, url: str) -> None:
        """As the other does."""
        await self.single.remove(url)

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """Each is told as it ends."""

        async def one(transfer: Transfer) -> None:
            async with self._free[transfer.direction]:
                await self._move(transfer)
            ended([transfer])

        await for_each(transfers, one, self._streams)

    async def _move(self, transfer: Transfer) -> None:
        """Cancelled from the inside when the transfer is given up."""
        with anyio.CancelScope() as scope:
            transfer.when_given_up = scope.cancel
            if transfer.given_up:
                scope.cancel()
            try:
                transfer.result = await self._through_descriptor(transfer)
            except StorageError as exc:
                transfer.result = exc
        if transfer.result is None:
            transfer.result = StorageUnavailable(transfer.url, "given up")

    async def _through_descriptor(self, transfer: Transfer) -> FileInfo:
        """Open, have it moved, keep or discard. The descriptor is closed last, under a shield: it is a local one."""
        if transfer.direction is Direction.COPY:
            try:
                return await copy_by(self.single, transfer)
            finally:
                transfer.local.discard()
        kept = False
        descriptor = None
        try:
            descriptor = await to_thread.run_sync(_open, transfer)
            transfer.begin()
            if transfer.direction is Direction.UPLOAD:
                return await self.single.upload(descriptor, transfer.url, transfer)
            info = await self.single.download(transfer.url, descriptor, transfer)
            await to_thread.run_sync(_keep, transfer, descriptor, info)
            kept = True
            return info
        finally:
            with anyio.move_on_after(10, shield=True):
                await to_thread.run_sync(_close, transfer, descriptor, kept)


def _open(transfer: Transfer) -> int:
    with translated(WORK_DIRECTORY):
        return transfer.local.open()


def _keep(transfer: Transfer, descriptor: int, info: FileInfo) -> None:
    with translated(WORK_DIRECTORY):
        transfer.local.keep(descriptor, info)


def _close(transfer: Transfer, descriptor: int | None, kept: bool) -> None:
    if not kept:
        transfer.local.discard()
    if descriptor is not None:
        os.close(descriptor)
