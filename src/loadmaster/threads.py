"""What blocks for a moment, done in a thread.

A thread that makes system calls gives the interpreter's lock away at each of them and has to get it back: several at once,
beside an event loop that is busy, spend more time on taking turns than on what they are there for (measured with four
slots of /bin/true: three times the system time, and a fifth fewer jobs a second). So an event loop has one thread, a clerk,
for what takes no longer than it should. He takes errands in the order in which they come, and calls the loop once for all
that are done by then. What waits for more than the kernel's files is not for him: to start a process waits for a core, and
on a node whose cores are taken that is milliseconds.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, TypeVar

import anyio
from anyio import lowlevel, to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")

PATIENCE_SECONDS: Final = 0.1
"""An errand that takes longer may hang, on a disk that is gone: another clerk takes the others over. It is ten times what
the longest of them take on a healthy one."""

MOST_PATIENT: Final = 10
"""So many times longer waits somebody who has that many before him, or more."""

LINGER_SECONDS: Final = 1.0
"""A clerk who has had nothing to do for that long goes home."""

BUSY_SECONDS: Final = 0.004
"""What takes the clerk a quarter of that on a quiet machine, and has taken him so long, is not brief at present."""

SPARED: Final = 32
"""So many of that kind he is spared then, before he tries another."""

NAME: Final = "loadmaster clerk"


class _Errand(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._error: BaseException | None = None
        self.over = anyio.Event()
        self.begun = self.withdrawn = False

    def run(self) -> None:
        if self.withdrawn:
            return
        self.begun = True
        try:
            self._result = self._function()
        except BaseException as exc:  # noqa: BLE001 - whoever waits for it has it raised
            self._error = exc

    def outcome(self) -> T:
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # else it holds the frames that hold it
        return self._result


class _Clerks:
    """Those of one event loop: one, and those who hang. All but `_work` and `_finish` is for the loop's thread."""

    def __init__(self) -> None:
        self._loop = weakref.ref(lowlevel.current_token().native_token)
        self._errands = SimpleQueue[_Errand[Any]]()
        self._done = deque[_Errand[Any]]()
        self._called = False
        self._open = 0
        self._clerk: threading.Thread | None = None
        self._since = inf
        """When the clerk began what he does; infinite when he does nothing."""
        self.spared = 0
        """So many errands of `while_brief` go to threads of their own."""

    def take(self, errand: _Errand[Any]) -> int:
        """Have it done; how many others are before it. Raises RuntimeError when there is no thread to be had."""
        self._errands.put(errand)
        self._open += 1
        if self._clerk is None:  # looked at after it was put there: see `_work`
            self._hire()
        return self._open - 1

    def relieve(self) -> None:
        """Have another clerk if this one hangs and there is a thread for one: else this one goes on when he can."""
        if self._clerk is None or time.monotonic() - self._since >= PATIENCE_SECONDS:
            with suppress(RuntimeError):
                self._hire()

    def _hire(self) -> None:
        clerk = threading.Thread(target=self._work, name=NAME, daemon=True)  # one that hangs is no reason to stay
        self._clerk, self._since = clerk, inf
        try:
            clerk.start()
        except RuntimeError:
            self._clerk = None
            raise

    def _work(self) -> None:
        me = threading.current_thread()
        while True:
            try:
                errand = self._errands.get(timeout=LINGER_SECONDS)
            except Empty:
                if self._clerk is me:
                    self._clerk = None
                try:
                    errand = self._errands.get_nowait()  # of somebody who came before that, and saw a clerk
                except Empty:
                    return
                self._clerk = self._clerk or me
            self._since = time.monotonic()
            errand.run()
            self._finish(errand)
            del errand  # it holds what its function holds
            self._clerk = self._clerk or me  # nobody could be hired in his place
            if self._clerk is not me:  # somebody lost patience
                return
            self._since = inf

    def _finish(self, errand: _Errand[Any]) -> None:
        self._done.append(errand)
        loop: Any = self._loop()
        if loop is None or self._called:
            return
        self._called = True
        call_soon = getattr(loop, "run_sync_soon", None) or loop.call_soon_threadsafe  # trio's, asyncio's
        with suppress(RuntimeError):  # the loop is over: nobody waits any more
            call_soon(self._tell)

    def _tell(self) -> None:
        self._called = False
        while self._done:
            self._open -= 1
            self._done.popleft().over.set()


_CLERKS = RunVar[_Clerks]("loadmaster.threads")


async def briefly(function: Callable[[], T], *, abandon_on_cancel: bool = False) -> T:
    """What a function returns that blocks for a moment. Cancellation waits for it, or leaves the clerk to it; it may have
    been done all the same. Raises RuntimeError when there is no thread to be had."""
    await lowlevel.checkpoint_if_cancelled()
    clerks = _clerks()
    errand = _Errand(function)
    try:
        behind = clerks.take(errand)
        while not errand.over.is_set():
            # Who came late looks seldom: a hundred who look ten times a second cost more than what they wait for.
            patience = PATIENCE_SECONDS * min(behind, MOST_PATIENT) if behind else inf
            deadline = anyio.current_time() + patience
            with anyio.CancelScope(shield=not abandon_on_cancel, deadline=deadline) as waiting:
                await errand.over.wait()
            if waiting.cancelled_caught:
                clerks.relieve()
                behind = 0 if errand.begun else behind
    except BaseException:
        errand.withdrawn = True
        raise
    return errand.outcome()


async def while_brief(function: Callable[[], T]) -> T:
    """As `briefly`, for what is brief only where cores are free, as to start a process is. Where they are not, those who
    come at the same time have threads of their own, and wait for cores beside each other."""
    clerks = _clerks()
    if clerks.spared:
        clerks.spared -= 1
        return await to_thread.run_sync(function)

    def timed() -> T:
        began = time.monotonic()
        try:
            return function()
        finally:
            if time.monotonic() - began > BUSY_SECONDS:
                clerks.spared = SPARED

    return await briefly(timed)


def _clerks() -> _Clerks:
    """Those of this event loop."""
    try:
        return _CLERKS.get()
    except LookupError:
        _CLERKS.set(clerks := _Clerks())
        return clerks
