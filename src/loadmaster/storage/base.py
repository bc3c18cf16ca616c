"""What the rest of the house knows of storage: a small protocol, what it moves, and the catalog.

A storage moves *transfers*: one file each, between a URL and a local file. It is given many at once, so that ten
thousand small files cost ten thousand requests and not ten thousand switches of threads and tasks; it says which have
ended in batches. A storage that handles one file at a time is made one of these by `storage.single.OneByOne`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum, Flag, auto
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from loadmaster.errors import CannotCopy, ChecksumMismatch, NotFound, StorageError
from loadmaster.storage.checksums import Checksum, Running, running


class Ability(Flag):
    """What a storage can do beyond moving whole files."""

    NONE = 0
    SIDE_BY_SIDE = auto()
    """One call of `move` moves several at once, within the storage's own streams; without it, one after another."""
    RANGES = auto()
    """A part of a file can be read: a download can be resumed, and split."""
    CHECKSUMS = auto()
    """`stat` knows a checksum without the file being read."""
    RENAME = auto()
    """An upload is written beside its name and renamed: the name never holds half a file, or nothing holds."""
    MULTIPART = auto()
    """An upload comes into being by a last word; what was sent before it can be abandoned."""
    HOLD = auto()
    """An upload can be left one word short of its name, for as long as the caller likes: see `Step`."""
    COPY = auto()
    """A file can be copied within the storage, without its bytes passing through us: see `Direction.COPY`."""


COPY_BYTES_PER_SECOND: Final = 1_000_000
"""A storage that copies says nothing until it has, and may take so long. Slower than this it is given up."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The size of a file and, where it is known without reading it, a checksum."""

    size_bytes: int
    checksum: Checksum | None = None


@dataclass(frozen=True, slots=True)
class Replica:
    """One place a logical file is kept."""

    url: str
    storage_element: str | None = None


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """What a catalog knows of a logical file."""

    lfn: str
    info: FileInfo
    replicas: tuple[Replica, ...]


class LocalFile(Protocol):
    """The local end of a transfer. Its methods block; a storage calls them in a thread of its own, one at a time.

    They raise OSError, which is about this machine and not about the storage, or `StorageError`.
    """

    def open(self) -> int:
        """A descriptor: of a new file to write to (and read from), or of the file to read. The storage closes it."""
        ...

    def keep(self, descriptor: int, info: FileInfo) -> None:
        """All bytes have passed: verify and give a download its name. Raises `ChecksumMismatch`. Nothing for uploads."""
        ...

    def discard(self) -> None:
        """The transfer failed, or was cancelled: remove what was written. Must not raise, also if nothing was opened."""
        ...


class Direction(Enum):
    """Which way the bytes go."""

    DOWNLOAD = "download"
    UPLOAD = "upload"
    COPY = "copy"
    """From one URL of a storage with `Ability.COPY` to another. It ends with `CannotCopy` where the storage finds that it
    cannot after all: two servers, or one that does not know how, or that does not tell the checksum that is wanted."""

    __hash__ = object.__hash__
    """An enum's own is computed from its name, in Python, and for each file several times."""


class Step(Enum):
    """How much of an upload one transfer does. Only a storage with `Ability.HOLD` is asked for less than all of it.

    An upload that is held is nowhere to be seen under its name; what there is of it can be told from a whole file, also
    when nobody comes back for it.
    """

    ALL = "all"
    HOLD = "hold"
    """Send it, and see that it is there, but do not give it its name: `held` has what it takes to do so."""
    PUBLISH = "publish"
    """Give what is held its name, over whatever has it; the result is what was sent. The local file is not opened."""
    ABANDON = "abandon"
    """Remove what is held; what is gone already is no fault. The local file is not opened."""

    @property
    def sends(self) -> bool:
        """Whether the bytes of the file pass."""
        return self is Step.ALL or self is Step.HOLD  # a set of them is looked into by their names, in Python


@dataclass(eq=False, slots=True)
class Held:
    """An upload of which the last word has not been said. It outlives the transfers that make and end it."""

    token: Any = None
    """What the storage knows it by, of whatever type; None before it is there, and once it is published or abandoned."""
    info: FileInfo | None = None
    """What was sent."""


@dataclass(eq=False, slots=True)
class Transfer:
    """One file, or a part of one, to be moved once. Whoever moves it sets `result` and, as bytes pass, `done_bytes`.

    A part (`first_byte`, `last_byte`) is only asked of a storage with `Ability.RANGES`, and only of downloads. Its bytes
    go to the same place of the local file: write with `os.pwrite`, or seek first.
    """

    direction: Direction
    url: str
    local: LocalFile
    algorithm: str = "adler32"
    """Of the checksum that is computed as the bytes pass."""
    size_bytes: int | None = None
    """What is known beforehand of the size of the whole file."""
    source: str = ""
    """Of a copy: where it is now. `url` is where it goes; the local file is not opened."""
    checksum: Checksum | None = None
    """Of a copy: what it has to have."""
    first_byte: int = 0
    last_byte: int | None = None
    """The last one of the part; None for the end of the file."""
    version: str | None = None
    """What the storage calls this content (an ETag). Set by the storage; given again with a part, which is refused with
    `StorageUnavailable` when the content is another by now."""
    passed: Running | None = None
    """The checksum of what has passed. Given for a part that continues another: it has the bytes before it already."""
    begun: bool = False
    """Whether it is under way, or still waits inside the storage."""
    done_bytes: int = 0
    """How many bytes have passed, of this part; may be read from any thread, at any time."""
    result: FileInfo | StorageError | None = None
    """The count of the bytes that passed (`done_bytes`) and the checksum, once they are safe; or why they are not."""
    part: str = ""
    """What an upload is called beside its name for as long as it is not whole, where the storage calls it something: one
    that an agent which comes after this one can tell, and remove. Empty: as the storage likes."""
    step: Step = Step.ALL
    held: Held | None = None
    """For all steps but `ALL`. The storage fills it as the last thing it does, so that no cancellation comes between."""
    given_up: bool = False
    """Nobody wants it any more: it should end soon, with an error. A storage looks at this between blocks."""
    when_given_up: Callable[[], None] | None = None
    """Called, in the event loop's thread, when it is given up. A storage that waits puts here what ends the waiting."""

    def begin(self) -> Running:
        """To be called by the storage when it begins: the checksum, to be given all bytes in their order."""
        self.begun = True
        if self.passed is None:
            self.passed = running(self.algorithm)
        return self.passed

    def info(self) -> FileInfo:
        """What has passed so far."""
        return FileInfo(self.done_bytes, self.passed.result() if self.passed is not None else None)

    def is_source(self, told: FileInfo) -> None:
        """To be called by the storage with what is said of the source of a copy, before anything is copied.

        Raises `ChecksumMismatch` when that is not what is wanted, `CannotCopy` when it is not known.
        """
        if self.size_bytes not in {None, told.size_bytes}:
            raise ChecksumMismatch(self.source, f"has {told.size_bytes} bytes, expected {self.size_bytes}")
        self.size_bytes = told.size_bytes
        wanted = self.checksum
        if wanted is not None and (told.checksum is None or told.checksum.algorithm != wanted.algorithm):
            raise CannotCopy(self.source, f"nobody tells its {wanted.algorithm}")
        if wanted is not None and told.checksum != wanted:
            raise ChecksumMismatch(self.source, f"has {told.checksum}, expected {wanted}")

    def copied(self, source: FileInfo, copy: FileInfo) -> FileInfo:
        """To be called by the storage with what is said of the copy; the result. Raises `ChecksumMismatch`, `CannotCopy`."""
        if copy.size_bytes != source.size_bytes:
            raise ChecksumMismatch(self.url, f"has {copy.size_bytes} bytes, its source {source.size_bytes}")
        known = self.checksum or source.checksum
        if known is not None and copy.checksum is not None and copy.checksum.algorithm == known.algorithm:
            if copy.checksum != known:
                raise ChecksumMismatch(self.url, f"has {copy.checksum}, its source {known}")
        elif self.checksum is not None:
            raise CannotCopy(self.url, f"nobody tells its {self.checksum.algorithm}")
        self.done_bytes = copy.size_bytes
        return copy

    @property
    def quiet_seconds(self) -> float:
        """How much longer nothing may pass than what else is a stall."""
        return (self.size_bytes or 0) / COPY_BYTES_PER_SECOND if self.direction is Direction.COPY else 0.0

    def hold(self, token: Any) -> FileInfo:
        """To be called by the storage when all of an upload is there that is to be held; what has passed."""
        assert self.held is not None  # noqa: S101 - whoever asks for this step brings one
        self.held.token, self.held.info = token, self.info()
        return self.held.info

    def take_held(self) -> Any:
        """What the storage knows a held upload by. Raises `NotFound` when nothing is held."""
        if self.held is None or self.held.token is None:
            raise NotFound(self.url, "nothing is held")
        return self.held.token

    def let_go(self) -> FileInfo:
        """To be called by the storage when what was held is published or removed; what was sent."""
        assert self.held is not None  # noqa: S101 - it was taken
        self.held.token = None
        return self.held.info or FileInfo(0)

    def give_up(self) -> None:
        """Have it end without being done."""
        self.given_up = True
        if self.when_given_up is not None:
            self.when_given_up()


class Storage(Protocol):
    """One kind of storage, reached by URLs. Made by a factory: `async with factory(StorageOptions(...)) as storage`.

    `stat` and `remove` raise `StorageError`, and nothing else but cancellation; `move` puts it into the results.
    """

    abilities: Ability

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        """Move all of these, as many at a time as is good; return when each has its result.

        `ended` is called in the event loop's thread, with those that have ended since it was called last; each is in
        one call. For a download that succeeded, `local.keep` has been called; for all others `local.discard`. An
        OSError of the local file becomes a `StorageError` that names this machine's end (`storage.local.translated`).
        A cancelled call stops soon and leaves no partial file that could be taken for a whole one, here or there.
        """
        ...

    async def stat(self, url: str) -> FileInfo:
        """What is at the URL. Raises `NotFound` when nothing is."""
        ...

    async def remove(self, url: str) -> None:
        """Remove the file. Raises `NotFound` when there is none."""
        ...


@runtime_checkable
class Clears(Protocol):
    """A storage with which an upload that was broken off, by whoever was killed, may leave something."""

    async def clear(self, url: str, parts: Sequence[str]) -> None:
        """Remove what uploads to this URL have left: what has one of these names beside it (`Transfer.part`), and what of
        it has no name. What is not there is no fault. Raises `StorageError`."""
        ...


@dataclass(frozen=True, slots=True)
class StorageOptions:
    """What a kind of storage is made with: the site's words for it, and how much it may do at once."""

    scheme: str = ""
    """Of the URLs it is asked for."""
    streams: int = 8
    """Transfers at once, in each direction."""
    words: Mapping[str, object] = field(default_factory=dict)
    """The table `[storage.<scheme>]` of the site's file; the storage checks it and names what it does not understand."""


StorageFactory: TypeAlias = Callable[[StorageOptions], AbstractAsyncContextManager[Storage]]
"""What a scheme stands for, in our own table and in the entry points of the group `loadmaster.storages`."""


class Catalog(Protocol):
    """Which logical files there are, and where. Methods raise `StorageError`."""

    async def lookup(self, lfns: Sequence[str]) -> Mapping[str, CatalogEntry]:
        """The entries of those that are known."""
        ...

    async def register(self, entry: CatalogEntry) -> None:
        """Add a file, or replicas of one that is known. Raises `AlreadyExists` when it is known with other content."""
        ...


@runtime_checkable
class Unregisters(Protocol):
    """A catalog that can forget, too."""

    async def unregister(self, lfn: str, replica: Replica) -> None:
        """Have a file known without this replica. None is no fault."""
        ...
