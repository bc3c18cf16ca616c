"""Many files of one call: tried again, continued, given up when they stall, in little memory, fair to others."""

from __future__ import annotations

import hashlib
import os
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import anyio
import pytest

from conftest import until
from loadmaster import Site, StagingFailed, open_transfers
from loadmaster.errors import NoSpace, NotFound, StorageError, StorageUnavailable
from loadmaster.names import file_url
from loadmaster.staging import party
from loadmaster.staging.engine import Moved, Transfers, Wanted
from loadmaster.staging.plan import Delivery, Fetch
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import Ability, FileInfo, Replica, Storage, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.testing import Faults, MemoryStorage
from loadmaster.workdir import Workdir
from test_engine import Told, inside

HASTY = Site(retry_seconds=0.001)

Ended = Callable[[Sequence[Transfer]], None]


def sha256(data: bytes) -> Checksum:
    return Checksum("sha256", hashlib.sha256(data).hexdigest())


async def fetched(storage: Storage, workdir: Workdir, *fetches: Fetch, site: Site = HASTY) -> Told:
    told = Told()
    async with open_transfers(site, storages={"memory": storage}) as transfers:
        await transfers.fetch(fetches, workdir, told)
    return told


def fetch(name: str, data: bytes | None = None) -> Fetch:
    checksum = sha256(data) if data is not None else None
    return Fetch(name, (Replica(f"memory://se/{name}"),), len(data) if data is not None else None, checksum)


# -- again ---------------------------------------------------------------------------------------------------------


async def test_what_fails_for_a_while_is_tried_until_it_arrives(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({"memory://se/a": b"cargo"}))
    faults.fail("download", at=1)
    faults.corrupt("download", at=2)
    faults.lie_about_size("download", at=3)
    told = await fetched(faults, workdir, fetch("a", b"cargo"))
    assert len(faults.calls) == 4
    assert [file.name for file in told.files] == ["a"]
    assert (workdir.path / "a").read_bytes() == b"cargo"
    assert inside(workdir) == ["a"]


async def test_patience_ends_and_the_last_reason_is_told(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({"memory://se/a": b"cargo"}))
    faults.fail("download")
    with pytest.raises(StagingFailed, match="a: memory://se/a: out of order"):
        await fetched(faults, workdir, fetch("a"), site=Site(retries=2, retry_seconds=0.001))
    assert len(faults.calls) == 3
    assert inside(workdir) == []


async def test_what_cannot_succeed_is_not_tried_again(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage())
    with pytest.raises(StagingFailed, match="there is no such file"):
        await fetched(faults, workdir, fetch("a"))
    assert len(faults.calls) == 1


async def test_a_storage_that_asks_for_time_gets_it(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({"memory://se/a": b"cargo"}))
    faults.fail("download", at=1, error=lambda url: StorageUnavailable(url, "busy", retry_after=0.3))
    begun = anyio.current_time()
    await fetched(faults, workdir, fetch("a"))
    assert 0.3 <= anyio.current_time() - begun < 5


async def test_a_file_that_waits_for_its_next_attempt_keeps_no_lane(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({"memory://se/a": b"a", "memory://se/b": b"b"}))
    faults.fail("download", at=1, error=lambda url: StorageUnavailable(url, "busy", retry_after=30))
    told = Told()
    with anyio.fail_after(10):
        async with open_transfers(Site(streams=1), storages={"memory": faults}) as transfers:
            await beside(transfers, faults, workdir, told)
    assert inside(workdir) == ["b"]


async def beside(transfers: Transfers, faults: Faults, workdir: Workdir, told: Told) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(transfers.fetch, [fetch("a")], workdir, told)
        await until(lambda: len(faults.calls) == 1)
        await transfers.fetch([fetch("b")], workdir, told)
        group.cancel_scope.cancel()


async def test_an_output_goes_to_failover_when_all_attempts_at_the_wanted_place_are_used_up(workdir: Workdir) -> None:
    (workdir.path / "out").write_bytes(b"cargo")
    wanted, other = Faults(MemoryStorage()), MemoryStorage()
    wanted.fail("upload")
    told = Told()
    async with open_transfers(HASTY, storages={"wanted": wanted, "other": other}) as transfers:
        delivery = Delivery("out", (Replica("wanted://se/a"),), (Replica("other://se/a"),))
        await transfers.deliver([delivery], workdir, told)
    assert told.moved == [("out", "other://se/a", "wanted://se/a")]
    assert len(wanted.calls) == HASTY.retries + 1
    assert other.files == {"other://se/a": b"cargo"}


async def test_a_full_storage_element_is_not_asked_twice(workdir: Workdir) -> None:
    (workdir.path / "out").write_bytes(b"cargo")
    full = Faults(MemoryStorage())
    full.fail("upload", error=lambda url: NoSpace(url, "the quota is full"))
    async with open_transfers(HASTY, storages={"full": full}) as transfers:
        with pytest.raises(StagingFailed, match="the quota is full"):
            await transfers.deliver([Delivery("out", (Replica("full://se/a"),))], workdir, Told())
    assert len(full.calls) == 1


# -- stalled ---------------------------------------------------------------------------------------------------------


async def test_a_transfer_that_stalls_is_given_up_and_tried_again(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({f"memory://se/{name}": b"cargo" for name in "abc"}))
    faults.hang("download", at=2)
    with anyio.fail_after(20):
        told = await fetched(faults, workdir, *map(fetch, "abc"), site=Site(retry_seconds=0.001, stall_seconds=0.1))
    assert sorted(file.name for file in told.files) == ["a", "b", "c"]
    assert len(faults.calls) == 4


class Deaf(MemoryStorage):
    """Hangs at its first call, whoever gives up what; only cancellation helps."""

    hung = 0

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        if not self.hung:
            self.hung += 1
            transfers[0].begin()
            await anyio.sleep_forever()
        await super().move(transfers, ended)


async def test_a_storage_that_does_not_give_up_is_cancelled_and_its_other_files_are_moved(
    workdir: Workdir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(party, "GIVE_UP_SECONDS", 0.05)
    deaf = Deaf({f"memory://se/{name}": b"cargo" for name in "abc"})
    with anyio.fail_after(20):
        told = await fetched(
            deaf, workdir, *map(fetch, "abc"), site=Site(streams=1, retry_seconds=0.001, stall_seconds=0.1)
        )
    assert sorted(file.name for file in told.files) == ["a", "b", "c"]


class Asleep(MemoryStorage):
    """Begins nothing at its first call, and says nothing."""

    calls = 0

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        self.calls += 1
        if self.calls == 1:
            await anyio.sleep_forever()
        await super().move(transfers, ended)


async def test_a_storage_that_begins_nothing_stalls_as_well(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files were taken for waiting inside the storage, and for ever."""
    monkeypatch.setattr(party, "GIVE_UP_SECONDS", 0.05)
    asleep = Asleep({f"memory://se/{name}": b"cargo" for name in "ab"})
    site = Site(streams=1, retry_seconds=0.001, stall_seconds=0.1)
    with anyio.fail_after(20):
        told = await fetched(asleep, workdir, *map(fetch, "ab"), site=site)
    assert sorted(file.name for file in told.files) == ["a", "b"]


class Turns(MemoryStorage):
    """Moves one after another, each in less time than a stall takes, all of them in much more."""

    given_up = 0

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        for transfer in transfers:
            self.given_up += transfer.given_up
            await anyio.sleep(0.1)
            await super().move([transfer], ended)


async def test_what_waits_for_its_turn_inside_a_storage_does_not_stall(workdir: Workdir) -> None:
    names = "abcdefghij"
    turns = Turns({f"memory://se/{name}": b"cargo" for name in names})
    with anyio.fail_after(20):
        told = await fetched(turns, workdir, *map(fetch, names), site=Site(streams=1, retries=0, stall_seconds=0.5))
    assert sorted(file.name for file in told.files) == list(names)
    assert not turns.given_up


class Drip(MemoryStorage):
    """Sends a byte now and then, for ever."""

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        for transfer in transfers:
            transfer.begin()
            while not transfer.given_up:
                transfer.done_bytes += 1
                await anyio.sleep(0.01)
            transfer.result = StorageUnavailable(transfer.url, "as you like")
        ended(transfers)


async def test_a_slow_drip_is_as_good_as_a_stall(workdir: Workdir) -> None:
    site = Site(retries=1, retry_seconds=0.001, stall_seconds=0.2)
    with anyio.fail_after(20), pytest.raises(StagingFailed, match="moved next to nothing for a while"):
        await fetched(Drip(), workdir, fetch("a"), site=site)


async def test_what_is_not_done_at_the_deadline_fails_by_name_and_the_rest_is_there(workdir: Workdir) -> None:
    hanging, busy = Faults(MemoryStorage()), Faults(MemoryStorage())
    hanging.hang("download")
    busy.fail("download", error=lambda url: StorageUnavailable(url, "busy", retry_after=1000))
    storages: dict[str, Storage] = {
        "memory": MemoryStorage({"memory://se/a": b"cargo"}),
        "hanging": hanging,
        "busy": busy,
    }
    told = Told()
    fetches = [Fetch(name, (Replica(f"{name}://se/a"),)) for name in storages]
    with anyio.fail_after(20), pytest.raises(StagingFailed) as caught:
        async with open_transfers(Site(staging_seconds=0.5), storages=storages) as transfers:
            await transfers.fetch(fetches, workdir, told)
    assert sorted(caught.value.problems) == [
        "busy: busy://se/a: not done within 0.5 s (before that: busy://se/a: busy)",
        "hanging: hanging://se/a: not done within 0.5 s",
    ]
    assert inside(workdir) == [file.name for file in told.files] == ["memory"]


# -- continued ---------------------------------------------------------------------------------------------------------


class Torn(MemoryStorage):
    """Breaks off every download after so many bytes, the last of which may be lost on the way to the disk."""

    def __init__(self, files: dict[str, bytes], after_bytes: int) -> None:
        super().__init__(files)
        self.after_bytes = after_bytes
        self.asked: list[tuple[int, str | None]] = []

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        for transfer in transfers:
            self.asked.append((transfer.first_byte, transfer.version))
            await anyio.to_thread.run_sync(self._tear, transfer)
        ended(transfers)

    def _tear(self, transfer: Transfer) -> None:
        passed, rest = transfer.begin(), self.files[transfer.url][transfer.first_byte :]
        transfer.version = "v1"
        descriptor = transfer.local.open()
        try:
            sent = rest[: self.after_bytes]
            os.pwrite(descriptor, sent + b"beyond", transfer.first_byte)
            passed.update(sent)
            transfer.done_bytes = len(sent)
            if len(sent) < len(rest):
                transfer.result = StorageUnavailable(transfer.url, "connection reset")
                transfer.local.discard()
                return
            os.ftruncate(descriptor, transfer.first_byte + len(sent))
            transfer.local.keep(descriptor, transfer.info())
            transfer.result = transfer.info()
        except StorageError as exc:
            transfer.result = exc
            transfer.local.discard()
        finally:
            os.close(descriptor)


LARGE = os.urandom(5_000_000)


@pytest.mark.parametrize("algorithm", ["adler32", "sha256"])
async def test_a_download_that_breaks_off_is_continued_with_its_checksum(workdir: Workdir, algorithm: str) -> None:
    torn = Torn({"memory://se/a": LARGE}, 2_000_000)
    checksum = sha256(LARGE) if algorithm == "sha256" else Checksum("adler32", f"{zlib.adler32(LARGE):08x}")
    told = await fetched(torn, workdir, Fetch("a", (Replica("memory://se/a"),), len(LARGE), checksum))
    assert torn.asked == [(0, None), (2_000_000, "v1"), (4_000_000, "v1")]
    assert (workdir.path / "a").read_bytes() == LARGE
    assert [(file.size_bytes, file.checksum) for file in told.files] == [(len(LARGE), str(checksum))]
    assert inside(workdir) == ["a"]


async def test_what_was_continued_and_is_wrong_begins_anew(workdir: Workdir) -> None:
    class Changed(Torn):
        async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
            if len(self.asked) == 2:
                self.files["memory://se/a"], self.after_bytes = LARGE, len(LARGE)
            await super().move(transfers, ended)

    changed = Changed({"memory://se/a": bytes(len(LARGE))}, 3_000_000)
    await fetched(changed, workdir, fetch("a", LARGE))
    assert [first for first, _ in changed.asked] == [0, 3_000_000, 0]
    assert (workdir.path / "a").read_bytes() == LARGE


async def test_without_a_checksum_another_replica_continues_nothing(workdir: Workdir) -> None:
    torn = Torn({"memory://se/a": LARGE, "memory://se/b": LARGE}, 3_000_000)
    places = (Replica("memory://se/a"), Replica("memory://se/b"))
    with pytest.raises(StagingFailed):
        await fetched(torn, workdir, Fetch("a", places, len(LARGE)), site=Site(retries=0))
    assert [first for first, _ in torn.asked] == [0, 0]
    assert inside(workdir) == []


async def test_what_is_kept_to_be_continued_is_removed_when_nobody_will(workdir: Workdir) -> None:
    torn = Torn({"memory://se/a": LARGE}, 2_000_000)
    with pytest.raises(StagingFailed):
        await fetched(torn, workdir, fetch("a", LARGE), site=Site(retries=1, retry_seconds=0.001))
    assert inside(workdir) == []
    async with anyio.create_task_group() as group:

        async def patiently() -> None:
            await fetched(torn, workdir, fetch("a", LARGE), site=Site(retry_seconds=1000))

        group.start_soon(patiently)
        await until(lambda: len(torn.asked) == 3 and len(inside(workdir)) == 1)
        await anyio.wait_all_tasks_blocked()
        group.cancel_scope.cancel()
    assert inside(workdir) == []


# -- many --------------------------------------------------------------------------------------------------------------


class Null:
    """Moves nothing, and says it did; remembers what was asked for."""

    abilities = Ability.SIDE_BY_SIDE

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        await anyio.lowlevel.checkpoint()
        self.batches.append([transfer.url for transfer in transfers])
        for transfer in transfers:
            transfer.begin()
            transfer.done_bytes = transfer.size_bytes or 0
            transfer.result = transfer.info()
        ended(transfers)

    async def stat(self, url: str) -> FileInfo:
        raise NotFound(url, "nothing is here")

    async def remove(self, url: str) -> None:
        raise NotFound(url, "nothing is here")


async def moved(transfers: Transfers, wanted: Sequence[Wanted]) -> list[Moved]:
    found: list[Moved] = []

    async def ended(each: Moved) -> None:
        found.append(each)

    await transfers.move(iter(wanted), ended)
    return found


async def test_every_wanted_file_ends_exactly_once_also_of_a_source_that_waits(tmp_path: Path) -> None:
    files = {f"memory://se/{number}": b"%d" % number for number in range(3000) if number % 10}
    wanted = [Wanted(f"memory://se/{number}", file_url(tmp_path / f"{number}"), key=number) for number in range(3000)]
    looks: list[Overall] = []
    ended: list[Moved] = []

    async def source() -> AsyncIterator[Wanted]:
        for each in wanted:
            if each.key == 1500:
                await until(lambda: len(ended) == 1500)
            yield each

    async def keep(each: Moved) -> None:
        ended.append(each)

    async with open_transfers(HASTY, storages={"memory": MemoryStorage(files)}) as transfers:
        await transfers.move(source(), keep, overall=looks.append)
    assert sorted(each.wanted.key for each in ended) == list(range(3000))  # type: ignore[type-var]
    for each in ended:
        if not str(each.wanted.key).endswith("0"):
            assert (tmp_path / f"{each.wanted.key}").read_text() == f"{each.wanted.key}"
            assert each.info is not None
        else:
            assert isinstance(each.error, NotFound)
    assert len(os.listdir(tmp_path)) == 2700
    assert (looks[-1].done_files, looks[-1].files) == (3000, 3000)


async def test_uploads_and_downloads_of_one_call_go_their_own_ways(tmp_path: Path) -> None:
    memory = MemoryStorage({"memory://se/in": b"in"})
    (tmp_path / "out").write_bytes(b"out")
    wanted = [
        Wanted("memory://se/in", file_url(tmp_path / "d/in")),
        Wanted(file_url(tmp_path / "out"), "memory://se/out"),
        Wanted(file_url(tmp_path / "none"), "memory://se/none"),
    ]
    async with open_transfers(HASTY, storages={"memory": memory}) as transfers:
        ended = await moved(transfers, wanted)
    assert memory.files["memory://se/out"] == b"out"
    assert (tmp_path / "d/in").read_bytes() == b"in"
    assert [each.wanted.target for each in ended if each.error is not None] == ["memory://se/none"]


async def test_the_biggest_is_begun_first_and_small_ones_go_together() -> None:
    null = Null()
    sizes = [10, 50_000_000, 20, 20_000_000, 30]
    wanted = [Wanted(f"null://se/{size}", f"file:///x/{size}", size) for size in sizes]
    async with open_transfers(Site(streams=1), storages={"null": null}) as transfers:
        await moved(transfers, wanted)
    assert null.batches == [
        ["null://se/50000000"],
        ["null://se/20000000"],
        ["null://se/30", "null://se/20", "null://se/10"],
    ]


class Batches(MemoryStorage):
    """Remembers what it was given together, and in which task."""

    def __init__(self, files: dict[str, bytes], abilities: Ability) -> None:
        super().__init__(files)
        self.abilities = abilities
        self.batches: list[int] = []
        self.tasks: set[int] = set()

    async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
        self.batches.append(len(transfers))
        self.tasks.add(anyio.get_current_task().id)
        await super().move(transfers, ended)


async def test_a_few_small_files_are_one_batch_of_the_task_that_wants_them(workdir: Workdir) -> None:
    content = {f"memory://se/{name}": b"cargo" for name in "abcd"}
    storage = Batches(content, Ability.SIDE_BY_SIDE)
    told = await fetched(storage, workdir, *(fetch(name, b"cargo") for name in "abcd"))
    assert sorted(file.name for file in told.files) == ["a", "b", "c", "d"]
    assert (storage.batches, storage.tasks) == ([4], {anyio.get_current_task().id})


async def test_of_a_few_what_fails_at_first_is_tried_again(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({f"memory://se/{name}": b"cargo" for name in "abcd"}))
    faults.fail("download", at=2)
    faults.corrupt("download", at=3)
    told = await fetched(faults, workdir, *(fetch(name, b"cargo") for name in "abcd"))
    assert sorted(file.name for file in told.files) == ["a", "b", "c", "d"]
    assert len(faults.calls) == 6


async def test_a_storage_that_moves_one_after_another_has_a_lane_for_each_of_a_few(workdir: Workdir) -> None:
    storage = Batches({f"memory://se/{name}": b"cargo" for name in "abcd"}, Ability.NONE)
    await fetched(storage, workdir, *(fetch(name, b"cargo") for name in "abcd"))
    assert storage.batches == [1, 1, 1, 1]
    assert len(storage.tasks) == 4


async def test_files_whose_size_is_not_known_may_be_large_and_have_a_lane_each(workdir: Workdir) -> None:
    storage = Batches({f"memory://se/{name}": b"cargo" for name in "abcd"}, Ability.SIDE_BY_SIDE)
    await fetched(storage, workdir, *map(fetch, "abcd"))
    assert storage.batches == [1, 1, 1, 1]


async def test_a_single_file_that_is_late_fails_at_the_deadline(workdir: Workdir) -> None:
    faults = Faults(MemoryStorage({"memory://se/a": b"cargo"}))
    faults.hang("download")
    with anyio.fail_after(20), pytest.raises(StagingFailed, match=r"not done within 0\.1 s"):
        await fetched(faults, workdir, fetch("a"), site=Site(staging_seconds=0.1))
    assert inside(workdir) == []


async def test_a_job_with_few_files_is_not_kept_waiting_by_one_with_many() -> None:
    order: list[str] = []
    async with open_transfers(Site(streams=2), storages={"null": Null()}) as transfers:

        async def job(name: str, files: int) -> None:
            await moved(transfers, [Wanted(f"null://se/{name}{n}", f"file:///x/{name}{n}") for n in range(files)])
            order.append(name)

        async with anyio.create_task_group() as group:
            group.start_soon(job, "many", 5000)
            await anyio.lowlevel.checkpoint()
            for number in range(3):
                group.start_soon(job, f"few{number}", 50)
    assert order[-1] == "many"


async def test_a_storage_element_has_no_more_streams_than_it_may() -> None:
    class Counting(Null):
        now = most = 0

        async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
            Counting.now += len(transfers)
            Counting.most = max(Counting.most, Counting.now)
            await super().move(transfers, ended)
            Counting.now -= len(transfers)

    site = Site(streams=8, element_streams={"null://scarce": 2})
    async with open_transfers(site, storages={"null": Counting()}) as transfers:
        await moved(transfers, [Wanted(f"null://scarce/{n}", f"file:///x/{n}") for n in range(50)])
    assert Counting.most == 2


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": True})], ids=["uvloop"])
async def test_forty_thousand_files_take_no_more_memory_than_ten_thousand() -> None:
    async def peak(files: int) -> int:
        class Silent(Null):
            async def move(self, transfers: Sequence[Transfer], ended: Ended) -> None:
                await super().move(transfers, ended)
                self.batches.clear()

        count = 0

        async def ended(_: Moved) -> None:
            nonlocal count
            count += 1

        tracemalloc.start()
        async with open_transfers(Site(), storages={"null": Silent()}) as transfers:
            await transfers.move((Wanted(f"null://se/{n}", f"file:///x/{n}", 4096) for n in range(files)), ended)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count == files
        return most

    few, many = await peak(10_000), await peak(40_000)
    print(f"measured: {few / 1e6:.1f} MB for 10,000 files, {many / 1e6:.1f} MB for 40,000")
    assert many < few + 5_000_000  # a kilobyte for each would be thirty
