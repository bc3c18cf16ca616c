"""SIGINT, SIGTERM and SIGHUP, for a command that is the whole program."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import anyio

ECHO_SECONDS: Final = 0.1
"""A program that ends another one signals it and then its group, as timeout(1) does, and of a terminal that is closed the
kernel tells and the shell: that is one order. Not SIGINT: two of them are a person's, who wants to leave at once."""


class Orders:
    """SIGINT, SIGTERM and SIGHUP, as something to wait for."""

    def __init__(self, descriptor: int) -> None:
        self.seen: list[int] = []
        self.interrupted = False
        """Whether the event loop was interrupted; once, so that it can clean up."""
        self._descriptor = descriptor
        self._noticed = 0

    async def next(self) -> str:
        """Wait for the next order; its signal's name."""
        while self._noticed == len(self.seen):
            await anyio.wait_readable(self._descriptor)
            os.read(self._descriptor, 1)  # the byte is there: this does not wait
        self._noticed += 1
        return signal.Signals(self.seen[self._noticed - 1]).name

    @property
    def unnoticed(self) -> int:
        """How many orders nobody has taken: more than one while something holds the event loop."""
        return len(self.seen) - self._noticed


@contextmanager
def told_to_stop() -> Iterator[Orders]:
    """SIGINT, SIGTERM and SIGHUP (not under nohup) become orders.

    If the last one has not been noticed, because a coordinator blocks the event loop, the next one interrupts it where it
    is, with KeyboardInterrupt.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    orders, last = Orders(reader), dict[int, float]()

    def take(number: int, frame: FrameType | None) -> None:
        now, before = time.monotonic(), last.get(number, -ECHO_SECONDS)
        last[number] = now
        if number != signal.SIGINT and now - before < ECHO_SECONDS:
            return
        orders.seen.append(number)
        os.write(writer, b"!")
        if orders.unnoticed > 1 and not orders.interrupted:
            orders.interrupted = True
            raise KeyboardInterrupt

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        yield orders
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
