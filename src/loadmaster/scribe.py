"""A thread for one file, which does what it is given in order: a journal hears from its disk hundreds of times a second.

A thread of a pool costs twice as much each time: a limiter, a context, and several of them awake by turns.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Final, Generic, TypeVar

import anyio
from anyio import lowlevel, to_thread

T = TypeVar("T")

NAME: Final = "loadmaster journal"


class _Work(Generic[T]):
    """What is to be done, and what came of it."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._error: Exception | None = None
        self.over = anyio.Event()
        self.withdrawn = False

    def do(self) -> None:
        if self.withdrawn:
            return
        try:
            self._result = self._function()
        except Exception as exc:  # noqa: BLE001 - whoever waits for it has it raised
            self._error = exc

    def outcome(self) -> T:
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # else it holds the frames that hold it
        return self._result


class Scribe:
    """The thread, for one event loop: the one it is made in. `leave` ends it."""

    def __init__(self) -> None:
        loop: Any = lowlevel.current_token().native_token
        self._call_soon = getattr(loop, "run_sync_soon", None) or loop.call_soon_threadsafe  # trio's, asyncio's
        self._given = SimpleQueue[_Work[Any] | None]()
        self._done = deque[_Work[Any]]()
        self._thread = threading.Thread(target=self._live, name=NAME, daemon=True)
        self._thread.start()

    async def do(self, function: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
        """What the function returns, or raises, once all that was given before is done. Cancellation waits for it; or it is
        not done if it has not been begun, else goes on, and nobody hears what came of it."""
        work = _Work(function)
        self._given.put(work)
        try:
            with anyio.CancelScope(shield=not abandon_on_cancel):  # bounded by the disk, or by whoever cancels
                await work.over.wait()
        except BaseException:
            work.withdrawn = True
            raise
        return work.outcome()

    async def leave(self) -> None:
        """Have the thread end once all is done, and wait for that."""
        self.dismiss()
        with anyio.CancelScope(shield=True):  # bounded: each thing that it was given, somebody has waited for
            await to_thread.run_sync(self._thread.join)

    def dismiss(self) -> None:
        """Have it end once it can: a disk may hold it, and nobody waits for that any more."""
        self._given.put(None)

    def _live(self) -> None:
        while (work := self._given.get()) is not None:
            work.do()
            self._done.append(work)
            del work  # it holds what its function holds
            with suppress(RuntimeError):  # the loop is over: nobody waits any more
                self._call_soon(self._tell)

    def _tell(self) -> None:
        while self._done:
            self._done.popleft().over.set()
