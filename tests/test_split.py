"""A large file in several parts: the same bytes, the same checksum, and nothing half when parts go wrong."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence

import anyio
import pytest

from conftest import until
from loadmaster import Site, StagingFailed, open_transfers
from loadmaster.conformance import LocalBytes
from loadmaster.errors import StorageUnavailable
from loadmaster.staging import split
from loadmaster.staging.plan import Fetch
from loadmaster.staging.split import parts_of
from loadmaster.storage.base import Ability, Direction, FileInfo, Replica, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import LocalStorage
from loadmaster.testing import MemoryStorage
from loadmaster.workdir import Workdir
from test_engine import Told, inside
from test_party import HASTY

Ended = Callable[[Sequence[Transfer]], None]

LARGE = os.urandom(8_000_001)
ADLER32 = Checksum("adler32", f"{zlib.adler32(LARGE):08x}")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "PART_BYTES", 1_000_000)


class Wide(MemoryStorage):
    """Has parts, side by side; some of them break off, as it is told: by their first byte, after so many bytes."""

    abilities = Ability.RANGES | Ability.SIDE_BY_SIDE

    def __init__(self, breaks: dict[int, int] | None = None, versions: Sequence[str] = ("v1",)) -> None:
        super().__init__({"memory://se/a": LARGE})
        self.breaks = breaks or {}
        self.versions = list(versions)
        self.asked: list[tuple[int, int | None]] = []

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        async def one(transfer: Transfer) -> None:
            self.asked.append((transfer.first_byte, transfer.last_byte))
            transfer.version = self.versions.pop(0) if len(self.versions) > 1 else self.versions[0]
            whole = transfer.last_byte
            after = self.breaks.pop(transfer.first_byte, None)
            if after is not None:
                transfer.last_byte = transfer.first_byte + after - 1
            await super(Wide, self).move([transfer], lambda _: None)
            if after is not None:
                transfer.last_byte = whole
                transfer.result = StorageUnavailable(transfer.url, "connection reset")
            ended([transfer])

        async with anyio.create_task_group() as group:
            for transfer in transfers:
                group.start_soon(one, transfer)


async def fetched(wide: Wide, workdir: Workdir, site: Site = HASTY, checksum: Checksum | None = ADLER32) -> Told:
    told = Told()
    async with open_transfers(site, storages={"memory": wide}) as transfers:
        await transfers.fetch([Fetch("a", (Replica("memory://se/a"),), len(LARGE), checksum)], workdir, told)
    return told


async def test_a_large_file_comes_in_four_parts_and_is_whole(workdir: Workdir) -> None:
    wide = Wide()
    told = await fetched(wide, workdir)
    assert (workdir.path / "a").read_bytes() == LARGE
    assert sorted(wide.asked) == [(0, 2000000), (2000001, 4000001), (4000002, 6000002), (6000003, 8000000)]
    assert [(file.size_bytes, file.checksum) for file in told.files] == [(len(LARGE), str(ADLER32))]
    assert inside(workdir) == ["a"]


async def test_what_is_missing_of_a_part_is_asked_for_at_once(workdir: Workdir) -> None:
    wide = Wide({0: 500_000, 500_000: 7, 4000002: 1})
    await fetched(wide, workdir)
    assert (workdir.path / "a").read_bytes() == LARGE
    assert sorted(wide.asked)[:3] == [(0, 2000000), (500_000, 2000000), (500_007, 2000000)]
    assert len(wide.asked) == 7


async def test_what_is_whole_from_the_beginning_is_continued_later(workdir: Workdir) -> None:
    breaks = {2000001: 1_000_000, 3000001: 10, 3000011: 10}
    wide = Wide(breaks)
    await fetched(wide, workdir)
    assert (workdir.path / "a").read_bytes() == LARGE
    later = wide.asked[6:]
    assert min(later)[0] == 3000021, "the second attempt begins where the first one was whole"
    assert inside(workdir) == ["a"]


async def test_parts_of_two_versions_are_not_put_together(workdir: Workdir) -> None:
    wide = Wide(versions=["v1", "v1", "v2", "v1", "v3"])
    told = await fetched(wide, workdir, checksum=None)
    assert len(wide.asked) == 8
    assert [file.checksum for file in told.files] == [str(ADLER32)]


async def test_wrong_bytes_are_not_kept_and_not_continued(workdir: Workdir) -> None:
    wide = Wide()
    with pytest.raises(StagingFailed, match="adler32"):
        await fetched(wide, workdir, Site(retries=1, retry_seconds=0.001), Checksum("adler32", "00000001"))
    assert [first for first, _ in wide.asked].count(0) == 2
    assert inside(workdir) == []


async def test_a_cancelled_one_leaves_nothing(workdir: Workdir) -> None:
    class Endless(Wide):
        async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
            for transfer in transfers:
                transfer.begin()
                os.close(await anyio.to_thread.run_sync(transfer.local.open))
            self.asked.append((0, 0))
            await anyio.sleep_forever()

    wide = Endless()
    async with anyio.create_task_group() as group:
        group.start_soon(fetched, wide, workdir)
        await until(lambda: len(wide.asked) == 1)
        assert len(inside(workdir)) == 1
        group.cancel_scope.cancel()
    assert inside(workdir) == []


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({}, 4),
        ({"size_bytes": None}, 1),
        ({"size_bytes": 1_999_999}, 1),
        ({"size_bytes": 2_000_000}, 2),
        ({"first_byte": 6_000_000}, 2),
        ({"algorithm": "sha256"}, 1),
        ({"direction": Direction.UPLOAD}, 1),
    ],
)
def test_what_is_split_and_what_is_not(change: dict[str, object], parts: int) -> None:
    transfer = Transfer(Direction.DOWNLOAD, "memory://se/a", LocalBytes(), size_bytes=len(LARGE))
    for name, value in change.items():
        setattr(transfer, name, value)
    assert parts_of(transfer, Wide(), 8) == parts
    assert parts_of(transfer, LocalStorage(), 8) == 1
    assert parts_of(transfer, Wide(), 1) == 1
    assert not isinstance(transfer.result, FileInfo)
