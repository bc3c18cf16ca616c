"""Task groups as we use them: many at once, and out of them one error rather than a group of one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import anyio

from loadmaster.errors import RuntimeFault, StagingFailed

T = TypeVar("T")


@contextmanager
def single_error() -> Iterator[None]:
    """Out of a task group, the error that ended it rather than a group of one; a `RuntimeFault` before any other."""
    try:
        yield
    except ExceptionGroup as group:
        errors = list(leaves(group))
        error = next((each for each in errors if isinstance(each, RuntimeFault)), errors[0])
        raise error from error.__cause__


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group and in the groups in it; an error by itself is one."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """Work on every item, at most so many at a time, in their order. The first error ends the rest and is raised bare."""
    queue = iter(items)

    async def lane(first: T) -> None:
        await work(first)
        for item in queue:
            await work(item)

    lanes = list(islice(queue, at_once))
    if len(lanes) <= 1:
        for first in lanes:
            await lane(first)
        return
    with single_error():
        async with anyio.create_task_group() as group:
            # None of them in this task: on asyncio it would not hear that a cancellation ended the others.
            for first in lanes:
                group.start_soon(lane, first)


async def all_to_their_end(*steps: Callable[[], Awaitable[None]]) -> None:
    """Await the steps side by side; the failure of one does not end the others. Raises `StagingFailed` of them all."""
    failures: list[StagingFailed] = []

    async def one(step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except StagingFailed as exc:
            failures.append(exc)

    await for_each(steps, one, len(steps))
    if failures:
        what = ", ".join(dict.fromkeys(failure.what for failure in failures))
        raise StagingFailed(what, [problem for failure in failures for problem in failure.problems]) from failures[0]
