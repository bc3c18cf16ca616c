"""A payload's processes, whoever holds them: what `supervise` asks of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol, TypeVar

from anyio import CapacityLimiter, to_thread

from loadmaster.description import Containment
from loadmaster.payload.process import ExitRecord
from loadmaster.payload.usage import TreeUsage

T = TypeVar("T")

KILL_SECONDS: Final = 30.0
"""A killed process that is still there after this hangs in the kernel, on a dead file system as a rule."""


class Tree(Protocol):
    """A payload's processes. Whoever has one calls `end` or waits, and then `reap`, once."""

    containment: Containment
    shim: str
    """Which shim holds it; empty when none does."""
    pid: int
    start_ticks: int
    started: float
    """Of the monotonic clock."""
    shim_pid: int = 0
    shim_start_ticks: int = 0
    """Of its shim, where it has one: they name it as long as the machine is not started again."""
    fenced: bool = False
    """Whether the payload can neither signal nor trace anybody outside."""
    adopted: bool = False
    """Whether another agent has started it."""
    asked: str = "-"
    """What the shim of a payload that has ended was ordered by whom we do not know; see `ExitRecord`."""

    @property
    def gone(self) -> bool:
        """Whether the payload has ended; what it left may still be there."""
        ...

    async def wait(self) -> None:
        """Return when the payload has ended."""
        ...

    async def end(self, grace_seconds: float) -> bool:
        """End whatever is there: TERM, the grace, KILL. False if something is still there after 30 s more."""
        ...

    @property
    def holds_all(self) -> bool:
        """Once it was reaped: whether nothing of it can be left if `end` has said so, though nobody knows how it ended."""
        return False

    def hurry(self) -> None:
        """Kill it: an `end` that keeps a grace returns soon."""
        ...

    def reap(self) -> ExitRecord:
        """Release everything, and say how the payload ended."""
        ...

    def usage(self) -> TreeUsage:
        """What its processes use now. Blocks."""
        ...


async def in_thread(function: Callable[[], T]) -> T:
    """In one of its own: a kill must not wait for the host's."""
    try:
        return await to_thread.run_sync(function, limiter=CapacityLimiter(1))
    except RuntimeError:  # no thread is to be had: a fork bomb of the same user takes them all
        return function()
