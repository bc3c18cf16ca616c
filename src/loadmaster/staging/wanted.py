"""What a program wants moved, and what came of it."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Self

from loadmaster.errors import StorageError
from loadmaster.names import local_file
from loadmaster.staging.errand import Errand
from loadmaster.staging.files import Elsewhere, OutgoingPath
from loadmaster.staging.parts import PartOfPath
from loadmaster.storage.base import Direction, FileInfo, Replica
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import WORK_DIRECTORY


@dataclass(frozen=True, slots=True)
class Wanted:
    """One file that a program wants moved: from or to a `file://` URL of this machine, or between two URLs for which
    `Transfers.can_copy`."""

    source: str
    target: str
    size_bytes: int | None = None
    checksum: Checksum | None = None
    key: object = None
    """Whatever the program knows it by."""


@dataclass(frozen=True, slots=True)
class Moved:
    """What came of it: what passed, or the last thing that went wrong."""

    wanted: Wanted
    info: FileInfo | None
    error: StorageError | None
    attempts: int


class Each:
    """Errands as they are asked for. Not a generator: one that is left before its end would want to be closed."""

    def __init__(
        self, wanted: Iterable[Wanted] | AsyncIterable[Wanted], errand: Callable[[Wanted], Awaitable[Errand]]
    ) -> None:
        self._later = aiter(wanted) if isinstance(wanted, AsyncIterable) else None
        self._now = iter(()) if isinstance(wanted, AsyncIterable) else iter(wanted)
        self._errand = errand

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Errand:
        if self._later is not None:
            return await self._errand(await anext(self._later))
        for wanted in self._now:
            return await self._errand(wanted)
        raise StopAsyncIteration


def named(error: StorageError, wanted: Wanted) -> StorageError:
    """The error, with the file's name: one of this machine's end only says what ends jobs have there."""
    if error.url != WORK_DIRECTORY:
        return error
    local = next((url for url in (wanted.target, wanted.source) if url.startswith("file://")), wanted.target)
    return type(error)(local, str(error).removeprefix(f"{WORK_DIRECTORY}: "), retry_after=error.retry_after)


def errand_for(wanted: Wanted, sync: bool, keeps: bool) -> Errand:
    """A download if the target is a file of this machine, an upload of one if the source is, else a copy."""
    end: PartOfPath | OutgoingPath | Elsewhere
    within = ""
    if wanted.target.startswith("file://"):
        direction, place = Direction.DOWNLOAD, wanted.source
        end = PartOfPath(
            local_file(wanted.target), size_bytes=wanted.size_bytes, checksum=wanted.checksum, sync=sync, keeps=keeps
        )
    elif wanted.source.startswith("file://"):
        direction, place = Direction.UPLOAD, wanted.target
        end = OutgoingPath(local_file(wanted.source))
    else:
        direction, place, within = Direction.COPY, wanted.target, wanted.source
        end = Elsewhere()
    return Errand(
        wanted.target, direction, (Replica(place),), end, source=within,
        size_bytes=wanted.size_bytes, checksum=wanted.checksum, key=wanted,
    )  # fmt: skip
