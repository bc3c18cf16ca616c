"""What somebody else's code said, and whether it had said it before it was told to stop.

Code that is cancelled may swallow that, and return as if all had been done. So what was returned in the instant of a
cancellation counts for nothing, unless it is known which came first. Looking at the cancellation afterwards does not tell:
it may have been thrown into the code, or into a task of its own, or have found nobody to be thrown into. Therefore it does
not reach the code at all, but a task beside it, which then cancels the code: what has ended before that had not been told.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import anyio
from anyio import lowlevel

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What code returned or raised."""

    first: bool
    """Whether it had ended before it was told to stop: then it has done what it was to do, whoever leaves."""
    _said: tuple[T] | Exception

    def get(self) -> T:
        """What it returned. Raises what it raised."""
        if isinstance(self._said, Exception):
            raise self._said
        return self._said[0]


async def answer_of(code: Callable[[], Awaitable[T]]) -> Answer[T]:
    """Await it to its end, which a cancellation brings about as usual, two turns of the event loop later. It is not begun
    when there is one already.

    A cancellation is raised if the code has let itself be cancelled; else there is an answer, and it comes at the caller's
    next checkpoint. What shields itself, or waits for a thread, has been told all the same.
    """
    await lowlevel.checkpoint_if_cancelled()
    answers: list[Answer[T]] = []
    try:
        async with anyio.create_task_group() as beside:
            with anyio.CancelScope(shield=True) as own:
                beside.start_soon(_pass_on, own)
                answers.append(await _ended(code, own))
            beside.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class():
        if not answers:
            raise
    if not answers:  # it was cancelled, and our own scope has heard of it before the one that is meant
        await lowlevel.checkpoint()
        raise RuntimeError("code was cancelled that nobody had cancelled")
    return answers[0]


async def _ended(code: Callable[[], Awaitable[T]], own: anyio.CancelScope) -> Answer[T]:
    try:
        value = await code()
    except Exception as exc:  # noqa: BLE001 - passed on to whoever gets the answer
        return Answer(not own.cancel_called, exc)
    return Answer(not own.cancel_called, (value,))


async def _pass_on(own: anyio.CancelScope) -> None:
    try:
        await anyio.sleep_forever()
    finally:
        with anyio.CancelScope(shield=True):
            await (
                lowlevel.checkpoint()
            )  # those who were to go on in this turn of the loop do so first, in whatever order
        own.cancel()
