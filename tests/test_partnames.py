"""What uploads are called until they are whole: nobody writes it down, and the next agent can tell."""

from __future__ import annotations

from loadmaster.staging.partnames import TRIES, PartNames
from loadmaster.storage.local import LocalStorage
from loadmaster.testing import MemoryStorage


def names(mark: str = "1", tries: int = TRIES, recorded: list[int] | None = None) -> PartNames:
    async def expect(more: int) -> None:
        if recorded is not None:
            recorded.append(more)

    return PartNames(mark, tries, expect)


async def begun(parts: PartNames, url: str, count: int) -> list[str]:
    found = []
    for _ in range(count):
        await parts.make_room(url)
        found.append(parts.next(url))
    return found


async def test_the_next_agent_knows_all_of_them_and_no_two_are_the_same() -> None:
    recorded: list[int] = []
    parts = names(recorded=recorded)
    urls = [f"dav://host/d/{number}" for number in range(3)]
    used = [name for url in urls for name in await begun(parts, url, TRIES)]
    assert len(set(used)) == len(used)
    assert used == [name for url in urls for name in names().all(url)]
    assert recorded == []


async def test_more_tries_than_anybody_expects_are_recorded_before_they_are_made() -> None:
    recorded: list[int] = []
    used = await begun(names(recorded=recorded), "dav://host/f", 4 * TRIES + 1)
    assert recorded == [2 * TRIES, 4 * TRIES, 8 * TRIES]
    assert set(used) < set(names(tries=recorded[-1]).all("dav://host/f"))


def test_another_attempt_has_other_names() -> None:
    assert set(names("1").all("dav://host/f")).isdisjoint(names("2").all("dav://host/f"))


async def test_a_storage_that_is_asked_removes_these_and_no_others() -> None:
    parts = names().all("mem://se/d/f")
    storage = MemoryStorage({f"mem://se/d/{parts[2]}": b"half", "mem://se/d/f": b"whole", "mem://se/d/.x.part": b"?"})
    await storage.clear("mem://se/d/f", parts)
    assert storage.files.keys() == {"mem://se/d/f", "mem://se/d/.x.part"}
    await LocalStorage().clear("file:///nowhere/at/all", parts)  # nothing there is no fault
