"""A directory for files on their way from one server to another. What a run that died has left, the next one removes."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Final

import anyio
from anyio import to_thread

from loadmaster.names import file_url, local_path

PREFIX: Final = "loadmaster-spool-"

REMOVAL_SECONDS: Final = 60.0
"""How long a run that is cancelled may take to remove its spool, before the next one does."""


class Spool:
    """Places for files, in a directory that is made when the first one is needed. Made by `open_spool`."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._lock = -1
        self._making = anyio.Lock()
        self._numbers = count(1)

    async def place(self) -> str:
        """The URL of a new place."""
        async with self._making:
            if self._path is None:
                await to_thread.run_sync(self._make)
        return file_url(f"{self._path}/{next(self._numbers)}")

    async def remove(self, url: str) -> None:
        """Remove what is in a place."""
        await to_thread.run_sync(lambda: local_path(url).unlink(missing_ok=True))

    def _make(self) -> None:
        remove_abandoned(Path(tempfile.gettempdir()))
        path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._path = path

    def close(self) -> None:
        """Remove everything. Blocks."""
        if self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._lock)
            self._path = None


@asynccontextmanager
async def open_spool() -> AsyncIterator[Spool]:
    """A spool in the temporary directory, removed however one leaves."""
    spool = Spool()
    try:
        yield spool
    finally:
        with anyio.move_on_after(REMOVAL_SECONDS, shield=True):
            await to_thread.run_sync(spool.close, abandon_on_cancel=True)


def remove_abandoned(directory: Path) -> None:
    """Remove the spools of this user's whose process is gone: the kernel has dropped its lock."""
    for path in directory.glob(f"{PREFIX}*"):
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                found = os.fstat(descriptor)
                if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(descriptor)
