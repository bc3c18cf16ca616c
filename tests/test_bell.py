"""That something has changed, as something to await."""

from __future__ import annotations

import anyio
import anyio.lowlevel

from loadmaster.bell import Bell


async def test_whoever_waits_hears_the_next_ring_and_nobody_hears_an_old_one() -> None:
    bell = Bell()
    bell.ring()
    heard: list[str] = []

    async def listen(name: str) -> None:
        await bell.wait()
        heard.append(name)

    async with anyio.create_task_group() as group:
        group.start_soon(listen, "a")
        group.start_soon(listen, "b")
        await anyio.wait_all_tasks_blocked()
        assert heard == []
        bell.ring()
        bell.ring()
    assert sorted(heard) == ["a", "b"]
    assert repr(bell) == "<Bell, rung 3 times>"


async def test_a_ring_while_one_was_busy_is_not_missed() -> None:
    bell = Bell()
    before = bell.rings
    await anyio.lowlevel.checkpoint()
    bell.ring()
    with anyio.fail_after(10):
        await bell.wait_beyond(before)


async def test_one_who_is_cancelled_keeps_nobody_from_hearing() -> None:
    bell = Bell()
    async with anyio.create_task_group() as group:
        group.start_soon(bell.wait)
        with anyio.move_on_after(0):
            await bell.wait()
        await anyio.wait_all_tasks_blocked()
        bell.ring()
