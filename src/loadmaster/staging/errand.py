"""One file that somebody wants moved, how far that has come, and in which order many of them go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol, TypeAlias

from loadmaster.errors import ChecksumMismatch, StorageError
from loadmaster.staging.lanes import Road
from loadmaster.staging.partnames import PartNames
from loadmaster.staging.retry import Course
from loadmaster.storage.base import Direction, FileInfo, Held, LocalFile, Replica, Step, Transfer
from loadmaster.storage.checksums import Checksum

BATCH_FILES: Final = 256
"""Small files that are handed to a storage together: the cost of a thread's turn is shared by so many, and a file of
another job waits for no more (some 10 ms). With 64 the event loop and the threads took turns so often that 10,000 files took
a fifth more CPU time, and a third more time."""

BATCH_BYTES: Final = 16 * 1024**2
"""And no more bytes than this, or a single file."""

UNKNOWN_BYTES: Final = 2 * 1024**2
"""What a file of unknown size counts for."""


class End(LocalFile, Protocol):
    """The local end of an errand: it outlives a transfer that has failed."""

    url: str
    """Of the other end, for the words of errors."""
    resumable: bool
    """Whether what has come in is to be kept by `discard`, to be continued."""
    continues: int
    """So many bytes of it are continued by the next `open`."""

    def forget(self) -> None:
        """Nothing more will be done: remove what was kept. Blocks; must not raise."""
        ...


@dataclass(eq=False, slots=True)
class Errand:
    """One file to be moved, to or from the first of its places that will do."""

    name: str
    direction: Direction
    places: tuple[Replica, ...]
    end: End
    failover: tuple[Replica, ...] = ()
    source: str = ""
    """Of a copy within a storage."""
    size_bytes: int | None = None
    checksum: Checksum | None = None
    lfn: str | None = None
    rank: int = 0
    """Those of a lower rank are begun first."""
    step: Step = Step.ALL
    held: Held | None = None
    """What a storage holds of it, for all steps but `ALL`."""
    key: object = None
    """Whatever the one who wants it knows it by."""
    parts: PartNames | None = None
    """What it is called until it is whole, if somebody is to know that."""

    place: int = 0
    """Which of the places it is tried at, counting those for failover after the others."""
    transfers: int = 0
    """How often it was begun."""
    course: Course | None = None
    """What has gone wrong so far, if anything has."""
    errors: dict[int, StorageError] | None = None
    """The last one of each place."""
    moving: Moving | None = None
    """The transfer under way."""
    forgone: bool = False
    rest: Transfer | None = None
    """A transfer that failed on its way, and can be continued."""

    def forgo(self) -> None:
        """It is not wanted any more: it ends soon, and is not tried again."""
        self.forgone = True
        if self.moving is not None:
            self.moving.give_up()

    @property
    def replica(self) -> Replica:
        """Where it is tried now."""
        wanted = len(self.places)
        return self.places[self.place] if self.place < wanted else self.failover[self.place - wanted]

    @property
    def road(self) -> Road:
        """The road it takes now."""
        replica = self.replica
        url = replica.url
        end = url.find("/", url.find("://") + 3)
        return _road(self.direction, url if end < 0 else url[:end], replica.storage_element)

    @property
    def urgency(self) -> tuple[int, int]:
        """What is begun first is the least: by rank, then the biggest, for it takes longest whenever it is begun."""
        return (self.rank, -(self.size_bytes or 0))

    @property
    def weight(self) -> int:
        """How much it fills a batch."""
        return UNKNOWN_BYTES if self.size_bytes is None else self.size_bytes


@lru_cache(maxsize=256)
def _road(direction: Direction, place: str, element: str | None) -> Road:
    """The same object for the same words: it is looked up for each file. `place`: scheme and host of a URL."""
    scheme, _, host = place.partition("://")
    return Road(direction, scheme, element or f"{scheme}://{host}")


Outcome: TypeAlias = FileInfo | StorageError
"""What came of an errand: what passed, or what went wrong at the last."""


@dataclass(eq=False, slots=True)
class Moving(Transfer):
    """A transfer under way for an errand."""

    errand: Errand | None = None
    mark_bytes: int = 0
    mark_time: float = 0.0
    """How far it had come when it was last looked at, and when that was."""
    parts: Sequence[Transfer] = ()
    """What it is moved as, while it is moved as several at once."""

    @property
    def is_begun(self) -> bool:
        """Whether it is under way, or one of its parts is."""
        return self.begun or self.done_bytes > 0 or any(part.begun or part.done_bytes for part in self.parts)

    @property
    def so_far_bytes(self) -> int:
        """How many bytes have passed, in all its parts."""
        return self.done_bytes + sum(part.done_bytes for part in self.parts)


def took_other(errand: Errand, info: FileInfo) -> ChecksumMismatch | None:
    """What a storage took is to be as long as what it was given; what came in was verified before it got its name."""
    if errand.direction is Direction.DOWNLOAD:
        return None
    size = getattr(errand.end, "size_bytes", None)
    if size is not None and info.size_bytes != size:
        return ChecksumMismatch(errand.replica.url, f"took {info.size_bytes} bytes of {size}")
    return None


def told(errand: Errand, last: StorageError) -> str:
    """Why it failed: what each place had to say, in the order of the places."""
    errors = errand.errors or {}
    if last not in errors.values():
        return str(last)
    wanted = [error for place, error in sorted(errors.items()) if place < len(errand.places)] or [last]
    return "; ".join(map(str, wanted))
