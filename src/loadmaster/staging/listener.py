"""Who is told what becomes of files, and who sends some of them before they are to be delivered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loadmaster.result import StoredFile
from loadmaster.staging.errand import Errand
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import Direction


class Listener(Protocol):
    """Whoever wants to know what a staging does."""

    @property
    def wants_progress(self) -> bool:
        """Whether `progress` and `overall` are worth calling."""
        ...

    async def staged(self, file: StoredFile) -> None:
        """A file has arrived, whole and verified."""

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        """A file is safe, but not where it was wanted."""

    async def unregistered(self, file: StoredFile, reason: str) -> None:
        """A file is there, or safe elsewhere, as is told next; but the catalog could not be told, and may be later."""

    async def missing(self, name: str, reason: str) -> None:
        """A file to be taken out is not there, or may not leave."""

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        """A file is on its way."""

    def overall(self, direction: Direction, overall: Overall) -> None:
        """How far all of them are."""


class Early(Protocol):
    """Outputs that were sent before they were to be delivered."""

    def close(self) -> None:
        """Begin nothing more."""
        ...

    def is_on_its_way(self, name: str) -> bool:
        """Whether it is worth waiting for."""
        ...

    async def landed(self) -> None:
        """Wait for what is on its way."""
        ...

    async def published(self, errands: Sequence[Errand]) -> list[Errand]:
        """The same, but what is there already is only to be published; such an errand has the other one as its `key`."""
        ...


class Quiet:
    """A listener to a party that may have nothing to do for hours."""

    def __init__(self, listener: Listener) -> None:
        self.wants_progress = listener.wants_progress
        self.staged, self.failed_over, self.missing = listener.staged, listener.failed_over, listener.missing
        self.unregistered, self.progress = listener.unregistered, listener.progress
        self._listener = listener
        self._last: tuple[int, int] | None = None

    def overall(self, direction: Direction, overall: Overall) -> None:
        """Tell what has changed."""
        seen = overall.done_files, overall.done_bytes
        if seen != self._last and overall.files:
            self._last = seen
            self._listener.overall(direction, overall)
