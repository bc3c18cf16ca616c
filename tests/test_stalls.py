"""One task looks at the transfers of all parties, for as long as there are any."""

from __future__ import annotations

import anyio

from conftest import until
from loadmaster.staging.stalls import Stalls


class Looked:
    def __init__(self) -> None:
        self.times: list[float] = []

    def look(self, now: float) -> None:
        self.times.append(now)


async def test_every_party_is_asked_to_look_until_it_leaves() -> None:
    stalls, early, late = Stalls(0.02), Looked(), Looked()
    async with anyio.create_task_group() as group:
        group.start_soon(stalls.watch)
        stalls.join(early)
        await until(lambda: len(early.times) > 3)
        assert early.times == sorted(early.times)
        stalls.leave(early)
        seen = len(early.times)
        stalls.join(late)
        await until(lambda: len(late.times) > 3)
        assert len(early.times) == seen
        group.cancel_scope.cancel()


async def test_after_a_time_with_no_party_the_next_one_is_looked_after() -> None:
    stalls, first, second = Stalls(0.02), Looked(), Looked()
    async with anyio.create_task_group() as group:
        group.start_soon(stalls.watch)
        stalls.join(first)
        stalls.leave(first)
        await until(lambda: not stalls._wanted.is_set())  # it waits for somebody to come, and looks at nothing
        stalls.join(second)
        await until(lambda: bool(second.times))
        assert first.times == []
        group.cancel_scope.cancel()
