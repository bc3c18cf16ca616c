"""Which came first, the end of somebody else's code or the order to stop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import lowlevel

from loadmaster.answers import Answer, answer_of

Code = Callable[[], Awaitable[Any]]


async def asked(code: Callable[[anyio.CancelScope], Awaitable[Any]]) -> tuple[list[Answer[Any]], bool]:
    """The answer, if there was one, of code that has the scope around it; and whether that one was left by cancellation."""
    answers: list[Answer[Any]] = []
    async with anyio.create_task_group() as beside:
        BESIDE.append(beside)
        with anyio.CancelScope() as host:
            answers.append(await answer_of(lambda: code(host)))
            await lowlevel.checkpoint()
        BESIDE.pop()
    return answers, host.cancelled_caught


async def returns(host: anyio.CancelScope) -> str:
    host.cancel()
    return "done"


async def raises(host: anyio.CancelScope) -> str:
    host.cancel()
    raise KeyError("done")


async def returns_when_it_is_woken(host: anyio.CancelScope) -> str:
    """Its last step is due in the turn of the loop in which the cancellation comes."""
    woken = anyio.Event()

    def wake() -> None:
        woken.set()
        host.cancel()

    BESIDE[-1].start_soon(lowlevel_call, wake)
    await woken.wait()
    return "done"


async def lowlevel_call(function: Callable[[], None]) -> None:
    await lowlevel.checkpoint()
    function()


BESIDE: list[anyio.abc.TaskGroup] = []
"""The tasks of the test: not the code's own."""


@pytest.mark.parametrize("code", [returns, raises, returns_when_it_is_woken])
async def test_what_ends_in_the_instant_of_the_cancellation_has_ended(code: Any) -> None:
    for _ in range(20):
        (answer,), left = await asked(code)
        assert answer.first
        assert left
        if code is raises:
            with pytest.raises(KeyError, match="done"):
                answer.get()
        else:
            assert answer.get() == "done"


async def swallows(host: anyio.CancelScope) -> str:
    host.cancel()
    with suppress(BaseException):  # as people write it
        await anyio.sleep_forever()
    return "done"


async def loses_a_task(host: anyio.CancelScope) -> str:
    """What was cancelled is a task of its own; on trio nothing is thrown into the one that waits for it."""
    with suppress(BaseException):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            host.cancel()
    return "done"


async def makes_a_verdict_of_it(host: anyio.CancelScope) -> str:
    try:
        await swallows(host)
    finally:
        raise KeyError("done")


@pytest.mark.parametrize("code", [swallows, loses_a_task, makes_a_verdict_of_it])
async def test_what_ends_because_it_was_cancelled_has_not_ended_by_itself(code: Any) -> None:
    for _ in range(20):
        answers, left = await asked(code)
        assert left
        assert [answer.first for answer in answers] in ([False], [])


async def test_code_that_lets_itself_be_cancelled_has_no_answer() -> None:
    async def waits(host: anyio.CancelScope) -> None:
        host.cancel()
        await anyio.sleep_forever()

    assert await asked(waits) == ([], True)


async def test_code_is_not_begun_for_somebody_who_is_leaving() -> None:
    begun: list[int] = []

    async def begins() -> None:
        begun.append(1)

    with anyio.CancelScope() as host:
        host.cancel()
        await answer_of(begins)
    assert begun == []


async def test_code_that_shields_its_end_is_waited_for_and_was_told() -> None:
    async def finishes(host: anyio.CancelScope) -> str:
        with anyio.CancelScope(shield=True):
            host.cancel()
            await anyio.sleep(0.01)
        return "done"

    for _ in range(20):
        (answer,), left = await asked(finishes)
    assert (answer.get(), answer.first, left) == ("done", False, True)


async def test_an_answer_comes_as_it_is_where_nobody_cancels() -> None:
    async def code() -> int:
        await anyio.sleep(0)
        return 7

    answer = await answer_of(code)
    assert (answer.get(), answer.first) == (7, True)
