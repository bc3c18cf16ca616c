"""The threads of a storage over HTTP: one for files that are small and for questions, some for files that are large.

Small files are a matter of the interpreter, and quickest in one thread. With large ones nearly all of the time is the
system's (receiving, writing, checksums), for which several threads have several cores: four files of 512 MiB took 1.6 s
where one thread took 2.5.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, TypeVar

import anyio

from loadmaster.storage.base import Direction, Transfer
from loadmaster.storage.carrier import Pace, Script
from loadmaster.storage.curl import CurlThread, Item
from loadmaster.tasks import single_error

I = TypeVar("I", bound=Item)  # noqa: E741

LARGE_BYTES: Final = 16 * 1024**2
"""From this size on a file, or a part of one, goes by a thread for large ones."""

THREADS: Final = 4
"""For large files, at most; as a rule fewer cores than that are free on a worker node, and more were no faster."""

QUESTIONS_AT_ONCE: Final = 8
"""Questions (size, removal) beside the transfers."""

_ASK: Final = "ask"

Ended = Callable[[Sequence[Transfer]], None]


class Crew:
    """Threads that carry requests, each from when it is first needed until `close`."""

    def __init__(self, name: str, streams: int, settings: Mapping[int, object], pace: Pace) -> None:
        """`streams`: transfers at once, in each direction, whichever threads they are in; one more where there are small
        ones beside as many large ones. `settings`: options of every easy handle."""
        self._streams = streams
        lanes = {direction.value: streams for direction in Direction}
        self._small = CurlThread(name, lanes | {_ASK: QUESTIONS_AT_ONCE}, settings, pace)
        count = min(THREADS, streams, len(os.sched_getaffinity(0)))
        widths = [len(range(number, streams, count)) for number in range(count)]
        self._large = [CurlThread(name, dict.fromkeys(lanes, width), settings, pace) for width in widths]
        self._free = [dict.fromkeys(Direction, width) for width in widths]
        """Of each thread for large files; less than none where some wait in it."""

    async def run(
        self, way: Direction, transfers: Sequence[Transfer], script: Callable[[Transfer], Script], ended: Ended
    ) -> None:
        """As `CurlThread.run`, each in the thread that is for its like."""
        large = [transfer for transfer in transfers if is_large(transfer)]
        if not large:
            await self._run_small(way, transfers, script, ended)
            return
        with single_error():
            async with anyio.create_task_group() as group:
                for transfer in large:
                    group.start_soon(self._run_large, way, transfer, script, ended)
                if small := [transfer for transfer in transfers if not is_large(transfer)]:
                    group.start_soon(self._run_small, way, small, script, ended)

    async def ask(self, question: I, script: Callable[[I], Script]) -> None:
        """Have a question answered."""
        await self._small.run([question], _ASK, script, lambda _: None)

    async def close(self) -> None:
        """End the threads. What is under way is dropped."""
        for thread in (self._small, *self._large):
            await thread.close()

    async def _run_small(
        self, way: Direction, transfers: Sequence[Transfer], script: Callable[[Transfer], Script], ended: Ended
    ) -> None:
        for transfer in transfers:
            transfer.when_given_up = self._small.look
        await self._small.run(transfers, way.value, script, ended)

    async def _run_large(
        self, way: Direction, transfer: Transfer, script: Callable[[Transfer], Script], ended: Ended
    ) -> None:
        with self._thread_of_fewest(way) as thread:
            transfer.when_given_up = thread.look
            await thread.run([transfer], way.value, script, ended)

    @contextmanager
    def _thread_of_fewest(self, way: Direction) -> Generator[CurlThread, None, None]:
        """Lanes that the large have, the small have not."""
        number = max(range(len(self._large)), key=lambda number: self._free[number][way])
        self._free[number][way] -= 1
        self._leave_to_small(way)
        try:
            yield self._large[number]
        finally:
            self._free[number][way] += 1
            self._leave_to_small(way)

    def _leave_to_small(self, way: Direction) -> None:
        left = sum(max(0, free[way]) for free in self._free)
        self._small.set_width(way.value, max(1, left))


def is_large(transfer: Transfer) -> bool:
    """Whether so much is expected of it that it has a thread for large ones."""
    if not transfer.step.sends or transfer.direction is Direction.COPY:
        return False
    size = transfer.size_bytes
    if transfer.last_byte is not None:
        size = transfer.last_byte + 1
    return size is not None and size - transfer.first_byte >= LARGE_BYTES
