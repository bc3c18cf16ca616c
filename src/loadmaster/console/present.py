"""What of a manifest is there already: each line's target, looked at before anything is moved.

Files of this machine are looked at many in one hop to a thread; a server is asked about some at a time. What is there is
left alone if it has the size and, where the manifest gives one, the checksum that is wanted.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Final

from anyio import to_thread

from loadmaster.console.manifest import Entry
from loadmaster.errors import StorageError
from loadmaster.names import local_file
from loadmaster.staging.engine import Transfers
from loadmaster.storage.base import FileInfo
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import checksum, translated
from loadmaster.tasks import for_each

WINDOW: Final = 256
"""Lines looked at in one hop: the hop costs as much as ten of them."""

WIDE_WINDOW: Final = 1024
"""The same while no server has to be asked: nothing is held up by it."""

SMALL_BYTES: Final = 1024 * 1024
"""A target of up to this size is read among the others of its window, a larger one beside other large ones."""


@dataclass(frozen=True, slots=True)
class Absent:
    """It is to be moved."""


@dataclass(frozen=True, slots=True)
class There:
    """It is there, and right as far as one looked."""

    info: FileInfo


@dataclass(frozen=True, slots=True)
class InTheWay:
    """Something is there that no file may take the place of."""

    what: str


@dataclass(frozen=True, slots=True)
class Unclear:
    """A server has to be asked, or much has to be read."""


Finding = Absent | There | InTheWay
ABSENT: Final = Absent()
UNCLEAR: Final = Unclear()


class Look:
    """A look at what is there already."""

    def __init__(self, transfers: Transfers, *, nowhere: bool = False, verify: bool = False) -> None:
        """`nowhere`: take everything for absent; `verify`: what is there has to prove its content."""
        self._transfers, self._nowhere, self._verify = transfers, nowhere, verify
        self._window = WINDOW

    async def at(self, entries: Iterator[Entry]) -> list[tuple[Entry, Finding]]:
        """What there is of the next lines; nothing when there are no more."""
        window = await to_thread.run_sync(self._at_this_machine, entries)
        asked: dict[int, Finding] = {}

        async def ask(entry: Entry) -> None:
            asked[entry.line] = await self._ask(entry)

        unclear = [entry for entry, finding in window if isinstance(finding, Unclear)]
        self._window = WINDOW if unclear else min(2 * self._window, WIDE_WINDOW)
        await for_each(unclear, ask, self._transfers.site.most_streams)
        return [(entry, asked[entry.line] if isinstance(finding, Unclear) else finding) for entry, finding in window]

    def _at_this_machine(self, entries: Iterator[Entry]) -> list[tuple[Entry, Finding | Unclear]]:
        return [(entry, self._at_path(entry)) for entry in islice(entries, self._window)]

    def _at_path(self, entry: Entry) -> Finding | Unclear:
        if not entry.target.startswith("file://"):
            return ABSENT if self._nowhere else UNCLEAR
        try:
            found = os.stat(local_file(entry.target))
        except (OSError, ValueError):
            return ABSENT  # the attempt to make it will say what is wrong
        if not stat.S_ISREG(found.st_mode):
            return InTheWay("a directory" if stat.S_ISDIR(found.st_mode) else "something that is not a file")
        return ABSENT if self._nowhere else self._is_wanted(entry, found.st_size)

    def _is_wanted(self, entry: Entry, found_bytes: int) -> Finding | Unclear:
        wanted = entry.size_bytes
        if wanted is None and entry.source.startswith("file://"):
            with suppress(OSError, ValueError):
                wanted = os.stat(local_file(entry.source)).st_size
        if wanted is None:
            return UNCLEAR
        if wanted != found_bytes:
            return ABSENT
        if entry.checksum is None:
            return UNCLEAR if self._verify else There(FileInfo(found_bytes))
        if found_bytes > SMALL_BYTES:
            return UNCLEAR
        with suppress(StorageError):
            if read_through(entry.target, entry.checksum.algorithm) == entry.checksum:
                return There(FileInfo(found_bytes, entry.checksum))
        return ABSENT

    async def _ask(self, entry: Entry) -> Finding:
        """By asking servers, and reading. Where nothing can be known the file is moved: that will say why."""
        try:
            found = await self._stat(entry.target)
            source = await self._stat(entry.source) if entry.size_bytes is None else None
            if found.size_bytes != (source.size_bytes if source is not None else entry.size_bytes):
                return ABSENT
            if entry.checksum is None and not self._verify:
                return There(found)
            known = found.checksum.algorithm if found.checksum is not None else "adler32"
            wanted = entry.checksum or await self._checksum(entry.source, source, known)
            if wanted is None:
                return ABSENT
            passed = await self._checksum(entry.target, found, wanted.algorithm)
        except StorageError:
            return ABSENT
        if passed is None:  # a server that keeps none: its word for the size has to do
            return ABSENT if self._verify else There(found)
        return There(FileInfo(found.size_bytes, passed)) if passed == wanted else ABSENT

    async def _stat(self, url: str) -> FileInfo:
        return await (await self._transfers.storage(url)).stat(url)

    async def _checksum(self, url: str, info: FileInfo | None, algorithm: str) -> Checksum | None:
        """Of what is at a URL: read if it is a file of this machine, else as the server knows it."""
        if url.startswith("file://"):
            return await to_thread.run_sync(read_through, url, algorithm)
        known = (info or await self._stat(url)).checksum
        return known if known is not None and known.algorithm == algorithm else None


def read_through(url: str, algorithm: str) -> Checksum | None:
    """The checksum of a file of this machine. Blocks; stops between blocks if cancelled. Raises `StorageError`."""
    with translated(url):
        descriptor = os.open(local_file(url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            return checksum(descriptor, algorithm).checksum
        finally:
            os.close(descriptor)
