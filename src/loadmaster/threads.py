"""What blocks for a moment, done in a thread.

A thread that makes system calls gives the interpreter's lock away at each of them and has to get it back: several at once,
beside an event loop that is busy, spend more time on taking turns than on what they are there for (measured with four
slots of /bin/true: three times the system time, and a fifth fewer jobs a second). So these go one after another, as long
as they are as short as they should be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")

PATIENCE_SECONDS: Final = 0.1
"""Nobody waits longer for those before him, but takes a thread of his own: theirs may hang, on a disk that is gone. It is
ten times what the longest of them take on a healthy one."""


class _Line:
    """Those of one event loop."""

    def __init__(self) -> None:
        self._holder: object | None = None
        self._waiting = deque[anyio.Event]()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One's turn. Who loses patience takes it: from somebody who hangs, so that the next ones need none."""
        holder = await self._wait() if self._holder is not None else object()
        self._holder = holder
        try:
            yield
        finally:
            if self._holder is holder:
                self._pass_on()

    async def _wait(self) -> object:
        turn = anyio.Event()
        self._waiting.append(turn)
        try:
            with anyio.move_on_after(PATIENCE_SECONDS):
                await turn.wait()
        except BaseException:
            if self._holder is turn:
                self._pass_on()
            raise
        finally:
            if not turn.is_set():
                self._waiting.remove(turn)
        return turn

    def _pass_on(self) -> None:
        self._holder = self._waiting.popleft() if self._waiting else None
        if isinstance(self._holder, anyio.Event):
            self._holder.set()


_LINE = RunVar[_Line]("loadmaster.threads")


async def briefly(
    function: Callable[[], T], *, abandon_on_cancel: bool = False, limiter: CapacityLimiter | None = None
) -> T:
    """What a function returns that blocks for a moment. Cancellation waits for it, or leaves the thread to itself, and
    `limiter` says who else waits for a thread, as in `to_thread.run_sync`."""
    try:
        line = _LINE.get()
    except LookupError:
        _LINE.set(line := _Line())
    async with line.turn():
        return await to_thread.run_sync(function, abandon_on_cancel=abandon_on_cancel, limiter=limiter)
