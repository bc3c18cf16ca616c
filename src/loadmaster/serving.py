"""Jobs from a source: asked for before there is a slot, and each seen through to its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import anyio
from anyio.abc import TaskGroup

from loadmaster.book import Book, Entry
from loadmaster.description import JobDescription
from loadmaster.errors import NodeClosed, NodeFull
from loadmaster.handle import JOURNAL_SECONDS
from loadmaster.result import JobResult
from loadmaster.sources import JobSource
from loadmaster.tasks import single_error

ASKING: Final = 8
"""So many questions to a source at once: one that takes 50 ms to answer has 64 slots filled in half a second."""

GIVE_BACK_SECONDS: Final = 10.0
"""How long a drained node waits for the answers of a source, to give back what they bring."""


class Serving:
    """A source that a node serves. `take` is asked for each of its jobs, and may refuse with `NodeClosed` or `NodeFull`."""

    def __init__(
        self,
        source: JobSource,
        book: Book,
        take: Callable[[JobDescription], Awaitable[Entry]],
        ended: Callable[[JobDescription, JobResult], Awaitable[None]] | None,
    ) -> None:
        self._source, self._book = source, book
        self._take, self._ended = take, ended
        self._asked, self._more = 0, True

    async def work(self) -> None:
        """Ask until there are no more or the node drains, then see through those that were given."""
        book = self._book
        with single_error():
            async with anyio.create_task_group() as followers, anyio.create_task_group() as asking:
                asking.start_soon(self._stop_asking, asking.cancel_scope)
                while self._asked or self._goes_on:
                    while self._goes_on and self._asked < ASKING and self._room > self._asked:
                        self._asked += 1
                        asking.start_soon(self._ask, followers)
                    await book.change.wait()
                asking.cancel_scope.cancel()

    @property
    def _goes_on(self) -> bool:
        return self._more and not self._book.draining.is_set()

    @property
    def _room(self) -> int:
        return self._book.room(anyio.current_time())

    async def _ask(self, followers: TaskGroup) -> None:
        try:
            job = await self._source.next(max(1, self._room))
            if job is None:
                self._more = False
            else:
                entry = None
                with anyio.move_on_after(JOURNAL_SECONDS, shield=True):  # it is ours by now: it is run or given back
                    entry = await self._taken(job)
                followers.start_soon(self._see_through, job, entry)
        finally:
            self._asked -= 1
        self._book.change.ring()

    async def _taken(self, job: JobDescription) -> Entry | None:
        try:
            return await self._take(job)
        except (NodeClosed, NodeFull):
            return None

    async def _see_through(self, job: JobDescription, entry: Entry | None) -> None:
        """To the end of its last attempt."""
        if entry is None:
            await self._source.give_back(job)
            return
        if entry.recorded is not None:
            await entry.recorded.wait()
        await self._source.accepted(job)
        result = await entry.handle.wait()
        while (following := self._book.entries.get(job.job_id)) and following.handle.attempt > result.attempt:
            entry = following
            result = await entry.handle.wait()
        if entry.given_back:
            await self._source.give_back(job)
        elif self._ended is not None:
            await self._ended(job, result)

    async def _stop_asking(self, asking: anyio.CancelScope) -> None:
        await self._book.draining.wait()
        asking.deadline = anyio.current_time() + GIVE_BACK_SECONDS
        self._book.change.ring()
