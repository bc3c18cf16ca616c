"""What the rest of the house knows of storage: two small protocols and their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class FileInfo:
    """The size of a file and, where it is known without reading it, its adler32 (eight hex digits)."""

    size_bytes: int
    adler32: str | None = None


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


class Progress:
    """How many bytes of one transfer have passed. Written by the storage, from any thread; read by whoever wants."""

    __slots__ = ("done_bytes",)

    def __init__(self) -> None:
        self.done_bytes = 0


class Storage(Protocol):
    """One kind of storage, reached by URLs.

    Every method raises `StorageError`, and nothing else but cancellation. A cancelled one stops soon and leaves no
    partial file that could be taken for a whole one.
    """

    async def stat(self, url: str) -> FileInfo:
        """What is at the URL. Raises `NotFound` when nothing is."""
        ...

    async def download(self, url: str, target: int, progress: Progress) -> FileInfo:
        """Write the whole file to an open descriptor; the size and adler32 of the bytes that passed."""
        ...

    async def upload(self, source: int, url: str, progress: Progress) -> FileInfo:
        """Store what an open descriptor holds, from its beginning. The URL names the whole file or what it named before.

        Returns the size and adler32 of the bytes that passed, once they are safe.
        """
        ...

    async def remove(self, url: str) -> None:
        """Remove the file. Raises `NotFound` when there is none."""
        ...


class Catalog(Protocol):
    """Which logical files there are, and where. Methods raise `StorageError`."""

    async def lookup(self, lfns: Sequence[str]) -> Mapping[str, CatalogEntry]:
        """The entries of those that are known."""
        ...

    async def register(self, entry: CatalogEntry) -> None:
        """Add a file, or replicas of one that is known. Raises `AlreadyExists` when it is known with other content."""
        ...
