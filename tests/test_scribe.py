"""The thread of one file: in order, to its end or not at all, and gone when it is left."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest

from conftest import until
from loadmaster.scribe import NAME, Scribe


@asynccontextmanager
async def scribe() -> AsyncIterator[Scribe]:
    made = Scribe()
    try:
        yield made
    finally:
        await made.leave()


def scribes() -> int:
    return sum(thread.name == NAME for thread in threading.enumerate())


async def test_what_it_is_given_is_done_in_that_order_by_one_thread() -> None:
    done, threads = list[int](), set[int]()

    def work(number: int) -> int:
        done.append(number)
        threads.add(threading.get_ident())
        return -number

    async with scribe() as one, anyio.create_task_group() as group:

        async def ask(number: int) -> None:
            assert await one.do(partial(work, number)) == -number

        for number in range(50):
            group.start_soon(ask, number)
    assert sorted(done) == list(range(50))
    assert len(threads) == 1
    assert threading.get_ident() not in threads


async def test_what_it_raises_is_raised_and_the_next_one_is_done() -> None:
    async with scribe() as one:
        with pytest.raises(ZeroDivisionError):
            await one.do(lambda: 1 // 0)
        assert await one.do(lambda: 42) == 42


async def test_cancellation_waits_for_what_is_not_to_be_abandoned() -> None:
    held, done = threading.Event(), list[int]()

    def work() -> None:
        assert held.wait(30)
        done.append(1)

    async with scribe() as one, anyio.create_task_group() as group:
        group.start_soon(one.do, work)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
        held.set()
    assert done == [1]


async def test_abandoned_what_was_begun_goes_on_and_what_was_not_is_not_done() -> None:
    held, begun, done = threading.Event(), threading.Event(), list[str]()

    def work(name: str) -> None:
        begun.set()
        assert held.wait(30)
        done.append(name)

    async with scribe() as one:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(one.do, abandon_on_cancel=True), partial(work, "begun"))
            await until(begun.is_set)
            group.start_soon(partial(one.do, abandon_on_cancel=True), partial(work, "waiting"))
            await anyio.wait_all_tasks_blocked()
            group.cancel_scope.cancel()
        assert done == []
        held.set()
        await one.do(lambda: None)
        assert done == ["begun"]


async def test_nobody_waits_for_one_who_is_dismissed_and_he_goes_when_he_can() -> None:
    held = threading.Event()
    one = Scribe()
    with anyio.move_on_after(0.01):
        await one.do(lambda: held.wait(30), abandon_on_cancel=True)
    one.dismiss()
    assert scribes() == 1
    held.set()
    await until(lambda: scribes() == 0)
