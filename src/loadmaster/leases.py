"""A node's slots, for one of its jobs: as the ledger's, and the node's book says where the job stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

from loadmaster.ahead import disk_bytes
from loadmaster.book import COMPUTING, DELIVERING, READY, Book, Entry
from loadmaster.description import JobDescription
from loadmaster.ledger import Slot
from loadmaster.lifecycle import Stage


@dataclass(frozen=True, slots=True)
class Leases:
    """Those of one job."""

    book: Book
    entry: Entry

    @asynccontextmanager
    async def lease(self, job: JobDescription) -> AsyncIterator[Slot]:
        """Wait for a slot and hold it; the one that an earlier agent had for the job, if there is no payload in it."""
        book, entry = self.book, self.entry
        book.move(entry, READY)
        try:
            if entry.slot is not None and entry.held_slot is not None:
                with entry.held_slot:
                    book.move(entry, COMPUTING)
                    yield entry.slot
                    entry.held_slot = None
            else:
                async with book.ledger.lease(job) as slot:
                    book.move(entry, COMPUTING)
                    yield slot
        finally:
            book.move(entry, DELIVERING)

    @contextmanager
    def hold(self, job: JobDescription, slot: Slot) -> Iterator[None]:
        """The slot that an adopted payload has had all the time."""
        self.book.move(self.entry, COMPUTING)
        try:
            yield
        finally:
            self.entry.give_up_slot()
            self.book.move(self.entry, DELIVERING)


def hold_again(book: Book, entry: Entry) -> None:
    """What an earlier agent had for the job is not anybody else's: its disk, and the slot in which its payload may run."""
    entry.disk = ExitStack()
    entry.disk.enter_context(book.ledger.hold_disk(disk_bytes(entry.job)))
    had = entry.handle.life.slot
    if had is not None and entry.handle.stage in {Stage.GRANTED, Stage.RUNNING}:
        entry.slot = Slot(had.cores, had.memory_mb, had.cpus, had.gpus, extras=entry.job.resources)
        entry.held_slot = ExitStack()
        entry.held_slot.enter_context(book.ledger.hold(entry.job, entry.slot))
