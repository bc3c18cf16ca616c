"""What blocks for a moment, and what happens when it does not end."""

from __future__ import annotations

import threading
import time
from functools import partial

import anyio
import pytest

from conftest import until
from loadmaster import threads
from loadmaster.threads import NAME, briefly, while_brief


def clerks() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == NAME}


@pytest.fixture
def before() -> set[threading.Thread]:
    """Those of other tests, who are still there."""
    return clerks()


class Gate:
    """Something that blocks until it is opened, and knows how many are in it."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.inside = self.most = 0

    def __call__(self) -> None:
        self.inside += 1
        self.most = max(self.most, self.inside)
        assert self.open.wait(30)
        self.inside -= 1


async def test_the_function_runs_in_another_thread_and_what_it_returns_or_raises_comes_back() -> None:
    assert await briefly(threading.get_ident) != threading.get_ident()
    with pytest.raises(ZeroDivisionError):
        await briefly(lambda: 1 // 0)
    assert await briefly(lambda: "and goes on") == "and goes on"


async def test_one_goes_after_another() -> None:
    running, most = 0, 0

    def count() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        sum(range(1000))
        running -= 1

    async with anyio.create_task_group() as group:
        for _ in range(50):
            group.start_soon(partial(briefly, count))
    assert most == 1


async def test_nobody_waits_for_ever_for_one_that_hangs() -> None:
    gate = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(briefly, gate))
        await until(lambda: gate.inside == 1)
        assert await briefly(lambda: "in a thread of its own") == "in a thread of its own"
        gate.open.set()
    assert await briefly(lambda: "in line again") == "in line again"


async def test_a_turn_of_somebody_who_has_left_goes_to_the_next() -> None:
    gate = Gate()
    done: list[int] = []

    async def wait(number: int) -> None:
        await briefly(lambda: done.append(number), abandon_on_cancel=True)

    async with anyio.create_task_group() as group:
        group.start_soon(partial(briefly, gate))
        await until(lambda: gate.inside == 1)
        async with anyio.create_task_group() as leaving:
            leaving.start_soon(wait, 1)
            await anyio.wait_all_tasks_blocked()
            group.start_soon(wait, 2)
            leaving.cancel_scope.cancel()
        gate.open.set()
    assert done == [2]


async def test_cancellation_leaves_a_thread_to_itself_only_if_it_may() -> None:
    gate = Gate()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(partial(briefly, gate, abandon_on_cancel=True))
            await until(lambda: gate.inside == 1)
            scope.cancel()
    assert gate.inside == 1
    gate.open.set()
    await until(lambda: gate.inside == 0)


async def test_one_that_hangs_is_waited_for_once_and_not_by_each_of_the_next() -> None:
    gate = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(briefly, gate))
        await until(lambda: gate.inside == 1)
        await briefly(lambda: "has lost patience")
        for _ in range(2000):  # each of them would wait a tenth of a second
            await briefly(lambda: "needs none")
        assert gate.inside == 1
        gate.open.set()


async def test_many_who_wait_behind_one_that_hangs_need_one_more_thread(before: set[threading.Thread]) -> None:
    gate = Gate()
    async with anyio.create_task_group() as group:
        group.start_soon(partial(briefly, gate))
        await until(lambda: gate.inside == 1)
        async with anyio.create_task_group() as others:
            for _ in range(20):
                others.start_soon(briefly, int)
        assert len(clerks() - before) == 2
        gate.open.set()


async def test_it_goes_home_when_there_is_nothing_to_do_and_the_next_errand_is_done_all_the_same(
    before: set[threading.Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "LINGER_SECONDS", 0.001)
    for _ in range(200):  # some of them come just when it leaves
        assert await briefly(lambda: "done") == "done"
        await anyio.sleep(0.001)
    await until(lambda: not clerks() - before)


async def test_what_takes_him_long_he_is_spared_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "BUSY_SECONDS", 1.0)

    def who(seconds: float) -> str:
        time.sleep(seconds)
        return threading.current_thread().name

    assert await while_brief(partial(who, 0)) == NAME
    assert await while_brief(partial(who, 1.1)) == NAME
    names = [await while_brief(partial(who, 0)) for _ in range(threads.SPARED + 1)]
    assert names.index(NAME) == threads.SPARED
    with pytest.raises(ZeroDivisionError):
        await while_brief(lambda: 1 // 0)


async def test_without_a_thread_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="new thread"):
            await briefly(lambda: pytest.fail("nobody is there to do it"))
    assert await briefly(lambda: "and goes on") == "and goes on"


async def test_one_that_hangs_is_waited_for_where_there_is_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever had lost patience was told that there is no thread, the clerk went home, and the others waited for ever."""
    gate = Gate()
    done: list[int] = []

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async with anyio.create_task_group() as group:
        group.start_soon(partial(briefly, gate))
        await until(lambda: gate.inside == 1)
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for number in range(3):
            group.start_soon(briefly, partial(done.append, number))
        await anyio.sleep(5 * threads.PATIENCE_SECONDS)  # all of them have lost patience
        gate.open.set()
        await until(lambda: len(done) == 3)
