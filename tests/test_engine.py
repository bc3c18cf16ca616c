"""Moving files: verified, the next place when one fails, never half, and the event loop none the wiser."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from conftest import until
from loadmaster import InvalidSite, Site, StagingFailed, StoredFile, open_transfers
from loadmaster.errors import StorageUnavailable
from loadmaster.names import file_url
from loadmaster.staging.plan import Delivery, Fetch
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import CatalogEntry, Direction, FileInfo, Replica, Transfer
from loadmaster.storage.catalog import SqliteCatalog
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import LocalStorage
from loadmaster.storage.single import OneByOne
from loadmaster.tasks import for_each
from loadmaster.workdir import Workdir

HASTY = Site(retry_seconds=0.001)

LARGE_BYTES = 64 * 1024**3
"""Of a sparse file: far more than can pass before the test cancels."""


def make_large(path: Path) -> None:
    """Some bytes, and then a hole: of that only the checksum is computed, which takes a while too."""
    with path.open("wb") as file:
        file.write(os.urandom(1024**2))
        file.truncate(LARGE_BYTES)


class Told:
    """Listens, and remembers what it was told."""

    def __init__(self, *, wants_progress: bool = False) -> None:
        self.wants_progress = wants_progress
        self.files: list[StoredFile] = []
        self.moved: list[tuple[str, str, str]] = []
        self.lost: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self.seen: list[tuple[str, str, int, int | None]] = []
        self.looks: list[Overall] = []

    async def staged(self, file: StoredFile) -> None:
        self.files.append(file)

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        self.moved.append((file.name, file.url, wanted))

    async def unregistered(self, file: StoredFile, reason: str) -> None:
        self.unknown.append((file.name, reason))

    async def missing(self, name: str, reason: str) -> None:
        self.lost.append((name, reason))

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        self.seen.append((name, url, done_bytes, size_bytes))

    def overall(self, direction: Direction, overall: Overall) -> None:
        self.looks.append(overall)


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """Where inputs are."""
    path = tmp_path / "there"
    path.mkdir()
    return path


@pytest.fixture
def se(tmp_path: Path) -> Path:
    """A storage element that takes everything."""
    return tmp_path / "se"


@pytest.fixture
def broken_se(tmp_path: Path) -> Path:
    """A storage element that takes nothing: its place is a file."""
    path = tmp_path / "broken"
    path.touch()
    return path


def replica(path: Path, element: str | None = None) -> Replica:
    return Replica(file_url(path), element)


def adler32(data: bytes) -> Checksum:
    return Checksum("adler32", f"{zlib.adler32(data):08x}")


def inside(workdir: Workdir) -> list[str]:
    return sorted(str(path.relative_to(workdir.path)) for path in workdir.path.rglob("*"))


async def fetch(fetches: Sequence[Fetch], workdir: Workdir, told: Told, site: Site | None = None) -> None:
    async with open_transfers(site or HASTY) as transfers:
        await transfers.fetch(fetches, workdir, told)


async def deliver(deliveries: Sequence[Delivery], workdir: Workdir, told: Told, site: Site | None = None) -> None:
    async with open_transfers(site or HASTY) as transfers:
        await transfers.deliver(deliveries, workdir, told)


# -- in ----------------------------------------------------------------------------------------------------------


async def test_an_input_arrives_whole_under_its_name(workdir: Workdir, there: Path, told: Told) -> None:
    (there / "a").write_bytes(b"content")
    await fetch([Fetch("b", (replica(there / "a", "DISK"),), 7, adler32(b"content"), "/vo/a")], workdir, told)
    assert (workdir.path / "b").read_bytes() == b"content"
    assert told.files == [StoredFile("b", file_url(there / "a"), 7, str(adler32(b"content")), "/vo/a", "DISK")]
    assert inside(workdir) == ["b"]


async def test_an_input_may_have_a_directory_in_its_name(workdir: Workdir, there: Path, told: Told) -> None:
    """It was copied, and then had nowhere to go: `HookFailed: stageIn raised FileNotFoundError`."""
    (there / "a").write_bytes(b"content")
    await fetch([Fetch("data/run/a", (replica(there / "a"),))], workdir, told)
    assert (workdir.path / "data" / "run" / "a").read_bytes() == b"content"


async def test_a_replica_with_other_content_is_passed_over(workdir: Workdir, there: Path, told: Told) -> None:
    (there / "bad").write_bytes(b"consent")
    (there / "good").write_bytes(b"content")
    sources = (replica(there / "nowhere"), replica(there / "bad"), replica(there / "good"))
    await fetch([Fetch("a", sources, 7, adler32(b"content"))], workdir, told)
    assert (workdir.path / "a").read_bytes() == b"content"
    assert [file.url for file in told.files] == [file_url(there / "good")]


async def test_when_no_replica_is_right_each_is_named_with_its_reason(
    workdir: Workdir, there: Path, told: Told
) -> None:
    """Only the last was named, and the first is the one the site wants to know of."""
    (there / "other").write_bytes(b"consent")
    (there / "short").write_bytes(b"con")
    sources = (replica(there / "nowhere"), replica(there / "other"), replica(there / "short"))
    with pytest.raises(StagingFailed) as caught:
        await fetch([Fetch("a", sources, 7, adler32(b"content"))], workdir, told)
    assert caught.value.problems == (
        f"a: {file_url(there / 'nowhere')}: No such file or directory; "
        f"{file_url(there / 'other')}: adler32 {adler32(b'consent').digits}, expected {adler32(b'content').digits}; "
        f"{file_url(there / 'short')}: has 3 bytes, expected 7",
    )
    assert inside(workdir) == []
    assert told.files == []


async def test_all_inputs_are_tried_and_those_that_fail_are_named_together(
    workdir: Workdir, there: Path, told: Told
) -> None:
    (there / "good").touch()
    os.mkfifo(there / "fifo")
    fetches = [Fetch(name, (replica(there / name),)) for name in ("nowhere", "good", "fifo")]
    with anyio.fail_after(10), pytest.raises(StagingFailed, match="cannot bring in: ") as caught:
        await fetch(fetches, workdir, told)
    assert sorted(problem.partition(":")[0] for problem in caught.value.problems) == ["fifo", "nowhere"]
    assert [file.name for file in told.files] == ["good"]
    assert inside(workdir) == ["good"]


async def test_a_kind_of_url_nobody_serves_is_named(workdir: Workdir, told: Told) -> None:
    with pytest.raises(StagingFailed, match=r"no storage for gopher://; there is .*file://"):
        await fetch([Fetch("a", (Replica("gopher://host/a"),))], workdir, told)


async def test_a_cancelled_staging_in_leaves_no_half_file(workdir: Workdir, there: Path, told: Told) -> None:
    for name in "abc":
        make_large(there / name)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(fetch, [Fetch(name, (replica(there / name),)) for name in "abc"], workdir, told)
            await until(lambda: sum(path.stat().st_size > 0 for path in workdir.path.iterdir()) == 3)
            assert not any((workdir.path / name).exists() for name in "abc")
            group.cancel_scope.cancel()
    assert inside(workdir) == []


async def test_a_full_work_directory_is_named_and_has_nothing_half(small_disk: Path, there: Path, told: Told) -> None:
    (there / "large").write_bytes(os.urandom(4 * 1024**2))
    full = await to_thread.run_sync(Workdir.make, small_disk, "job")
    with pytest.raises(StagingFailed, match="large: the work directory: No space left on device"):
        await fetch([Fetch("large", (replica(there / "large"),))], full, told)
    assert inside(full) == []
    await to_thread.run_sync(full.close)


async def test_an_input_whose_name_is_taken_by_a_directory_is_a_staging_failure(
    workdir: Workdir, there: Path, told: Told
) -> None:
    (there / "a").touch()
    (workdir.path / "taken").mkdir()
    with pytest.raises(StagingFailed, match="taken: the work directory: Is a directory"):
        await fetch([Fetch("taken", (replica(there / "a"),))], workdir, told)
    assert inside(workdir) == ["taken"]


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a b%20?#", "日本"])
async def test_names_come_and_go_as_they_are(workdir: Workdir, there: Path, se: Path, told: Told, name: str) -> None:
    (there / name).write_bytes(b"content")
    await fetch([Fetch(name, (replica(there / name),))], workdir, told)
    await deliver([Delivery(name, (replica(se / name),))], workdir, told)
    assert os.listdir(se) == [name]


async def test_an_input_whose_name_is_no_text_arrives_under_a_name_that_is(
    workdir: Workdir, there: Path, told: Told
) -> None:
    source = there / os.fsdecode(b"caf\xe9")
    source.write_bytes(b"content")
    await fetch([Fetch("coffee", (replica(source),))], workdir, told)
    assert (workdir.path / "coffee").read_bytes() == b"content"


def test_an_input_an_ordinary_user_may_not_read_is_named(as_ordinary_user: Callable[[str], str]) -> None:
    script = """
from pathlib import Path
from loadmaster import Site, StagingFailed, open_transfers
from loadmaster.names import file_url
from loadmaster.staging.plan import Fetch
from loadmaster.storage.base import Replica
from loadmaster.workdir import Workdir

class Deaf:
    wants_progress = False
    staged = None

Path("secret").touch(mode=0)
workdir = Workdir.make(Path.cwd() / "root", "job")

async def main():
    async with open_transfers(Site()) as transfers:
        try:
            await transfers.fetch([Fetch("a", (Replica(file_url(Path.cwd() / "secret")),))], workdir, Deaf())
        except StagingFailed as exc:
            print(exc)

anyio.run(main)
assert list(workdir.path.iterdir()) == []
workdir.close()
"""
    said = as_ordinary_user(script)
    assert said.startswith("cannot bring in: a: file://")
    assert said.endswith("/secret: Permission denied\n")


# -- many --------------------------------------------------------------------------------------------------------


class Gate:
    """A storage that lets nobody through before so many are there at once, and counts them."""

    def __init__(self, together: int) -> None:
        self.together = together
        self.now = self.most = self.total = 0
        self.open = anyio.Event()

    async def download(self, url: str, target: int, transfer: Transfer) -> FileInfo:
        self.now += 1
        self.total += 1
        self.most = max(self.most, self.now)
        if self.now >= self.together:
            self.open.set()
        await self.open.wait()
        await anyio.sleep(0)
        self.now -= 1
        return transfer.info()

    async def upload(self, source: int, url: str, transfer: Transfer) -> FileInfo:
        return await self.download(url, source, transfer)

    async def stat(self, url: str) -> FileInfo:
        raise NotImplementedError

    async def remove(self, url: str) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("streams", [1, 3, 16])
async def test_as_many_files_move_at_once_as_there_are_streams_and_no_more(
    workdir: Workdir, told: Told, streams: int
) -> None:
    gate = Gate(streams)
    site = Site(streams=streams)
    with anyio.fail_after(10):
        async with open_transfers(site, storages={"gate": OneByOne(gate, streams=streams)}) as transfers:
            await transfers.fetch([Fetch(f"f{n}", (Replica(f"gate://{n}"),)) for n in range(40)], workdir, told)
    assert (gate.most, gate.total, len(told.files)) == (streams, 40, 40)


async def test_the_first_error_ends_all_lanes_and_is_raised_as_it_is() -> None:
    begun: list[int] = []

    async def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise LookupError("two")
        await anyio.sleep_forever()

    with anyio.fail_after(5), pytest.raises(LookupError, match="two"):
        await for_each(range(10), work, 3)
    assert sorted(begun) == [0, 1, 2]


async def test_progress_is_told_while_files_move_and_only_to_those_who_want_it(workdir: Workdir, there: Path) -> None:
    make_large(there / "large")
    curious, deaf = Told(wants_progress=True), Told()
    async with anyio.create_task_group() as group:
        for listener in (curious, deaf):
            group.start_soon(
                fetch, [Fetch(f"f{id(listener)}", (replica(there / "large"),), LARGE_BYTES)], workdir, listener
            )
        await until(lambda: len(curious.seen) > 0)
        group.cancel_scope.cancel()
    _, url, done, size = curious.seen[0]
    assert (url, size) == (file_url(there / "large"), LARGE_BYTES)
    assert 0 < done < LARGE_BYTES
    assert deaf.seen == []
    assert inside(workdir) == []


# -- out ---------------------------------------------------------------------------------------------------------


async def test_an_output_arrives_whole_where_it_was_wanted(workdir: Workdir, se: Path, told: Told) -> None:
    (workdir.path / "out").write_bytes(b"content")
    await deliver([Delivery("out", (replica(se / "d" / "a", "DISK"),))], workdir, told)
    assert (se / "d" / "a").read_bytes() == b"content"
    assert told.files == [StoredFile("out", file_url(se / "d" / "a"), 7, str(adler32(b"content")), None, "DISK")]


async def test_the_next_storage_element_takes_what_the_first_does_not(
    workdir: Workdir, se: Path, broken_se: Path, told: Told
) -> None:
    (workdir.path / "out").write_bytes(b"content")
    await deliver([Delivery("out", (replica(broken_se / "a"), replica(se / "a")))], workdir, told)
    assert [file.url for file in told.files] == [file_url(se / "a")]
    assert told.moved == []


async def test_failover_takes_what_no_wanted_one_does_and_says_where_it_was_wanted(
    workdir: Workdir, se: Path, broken_se: Path, told: Told
) -> None:
    (workdir.path / "out").write_bytes(b"content")
    wanted = (replica(broken_se / "a"), replica(broken_se / "b"))
    await deliver([Delivery("out", wanted, (replica(broken_se / "c"), replica(se / "a")))], workdir, told)
    assert told.files == []
    assert told.moved == [("out", file_url(se / "a"), file_url(broken_se / "a"))]
    assert (se / "a").read_bytes() == b"content"


async def test_when_nobody_takes_an_output_every_wanted_place_is_named(
    workdir: Workdir, broken_se: Path, told: Told
) -> None:
    (workdir.path / "out").touch()
    wanted = (replica(broken_se / "a"), replica(broken_se / "b"))
    with pytest.raises(StagingFailed) as caught:
        await deliver([Delivery("out", wanted, (replica(broken_se / "c"),))], workdir, told)
    (problem,) = caught.value.problems
    assert problem.index(f"{file_url(broken_se / 'a')}: ") < problem.index(f"{file_url(broken_se / 'b')}: ")


async def test_a_full_storage_element_is_named_and_the_next_one_takes_the_file(
    workdir: Workdir, small_disk: Path, se: Path, told: Told
) -> None:
    with (workdir.path / "out").open("wb") as file:
        file.truncate(4 * 1024**2)
    with pytest.raises(StagingFailed, match=f"out: {file_url(small_disk / 'a')}: No space left on device"):
        await deliver([Delivery("out", (replica(small_disk / "a"),))], workdir, told)
    assert list(small_disk.iterdir()) == []
    await deliver([Delivery("out", (replica(small_disk / "a"), replica(se / "a")))], workdir, told)
    assert [file.url for file in told.files] == [file_url(se / "a")]


async def test_what_the_payload_did_not_make_is_told_and_is_no_failure(workdir: Workdir, se: Path, told: Told) -> None:
    (workdir.path / "made").touch()
    await deliver([Delivery(name, (replica(se / name),)) for name in ("made", "not made")], workdir, told)
    assert told.lost == [("not made", "the payload did not make it")]
    assert [file.name for file in told.files] == ["made"]


async def test_what_may_not_leave_fails_the_delivery_and_the_rest_is_delivered(
    workdir: Workdir, se: Path, there: Path, told: Told
) -> None:
    (there / "secret").write_text("x")
    (workdir.path / "link").symlink_to(there / "secret")
    (workdir.path / os.fsdecode(b"\xff")).touch()
    os.mkfifo(workdir.path / "fifo")
    (workdir.path / "good").touch()
    deliveries = [Delivery(name, (replica(se / str(n)),)) for n, name in enumerate(["link", "\udcff", "fifo", "good"])]
    with anyio.fail_after(10), pytest.raises(StagingFailed, match="cannot deliver: ") as caught:
        await deliver(deliveries, workdir, told)
    assert dict(told.lost)["link"] == "is a symbolic link out of the work directory"
    assert dict(told.lost)["fifo"] == "is a FIFO, not a file"
    assert len(caught.value.problems) == len(told.lost) == 3
    assert os.listdir(se) == ["3"]


def nameless(directory: Path) -> list[int]:
    """The sizes of our open files in a directory that have no name."""
    sizes = []
    for each in Path("/proc/self/fd").iterdir():
        with suppress(OSError):
            if str(each.readlink()).startswith(f"{directory}/#"):
                sizes.append(each.stat().st_size)
    return sizes


async def test_a_cancelled_delivery_leaves_no_half_file(workdir: Workdir, se: Path, told: Told) -> None:
    (se / "d").mkdir(parents=True)
    for name in "abc":
        with (workdir.path / name).open("wb") as file:
            file.truncate(LARGE_BYTES)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            deliveries = [Delivery(name, (replica(se / "d" / name),)) for name in "abc"]
            group.start_soon(deliver, deliveries, workdir, told)
            await until(lambda: sum(size > 0 for size in nameless(se / "d")) == 3)
            group.cancel_scope.cancel()
    assert list((se / "d").iterdir()) == []
    assert told.files == []


# -- logical names -----------------------------------------------------------------------------------------------


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[SqliteCatalog]:
    yield SqliteCatalog(tmp_path / "catalog.sqlite")


async def test_an_output_with_a_logical_name_is_registered_where_it_went(
    workdir: Workdir, se: Path, broken_se: Path, told: Told, catalog: SqliteCatalog
) -> None:
    (workdir.path / "out").write_bytes(b"content")
    site = Site(catalog=str(catalog.path))
    places = (replica(broken_se / "a", "TAPE"), replica(se / "a", "DISK"))
    await deliver([Delivery("out", places, (), "/vo/a")], workdir, told, site)
    entry = CatalogEntry("/vo/a", FileInfo(7, adler32(b"content")), (replica(se / "a", "DISK"),))
    assert await catalog.lookup(["/vo/a"]) == {"/vo/a": entry}


async def test_a_logical_name_with_other_content_is_refused_and_not_overwritten(
    workdir: Workdir, se: Path, told: Told, catalog: SqliteCatalog
) -> None:
    site = Site(catalog=str(catalog.path))
    delivery = Delivery("out", (replica(se / "a"),), (replica(se / "failover"),), "/vo/a")
    (workdir.path / "out").write_bytes(b"content")
    await deliver([delivery], workdir, told, site)
    before = await catalog.lookup(["/vo/a"])
    (workdir.path / "out").write_bytes(b"consent")
    with pytest.raises(StagingFailed, match="LFN:/vo/a: is in the catalog with other content"):
        await deliver([delivery], workdir, told, site)
    assert (se / "a").read_bytes() == b"content"
    assert os.listdir(se) == ["a"]
    assert await catalog.lookup(["/vo/a"]) == before


async def test_what_an_earlier_attempt_delivered_is_not_sent_again(
    workdir: Workdir, se: Path, told: Told, catalog: SqliteCatalog
) -> None:
    site = Site(catalog=str(catalog.path))
    (workdir.path / "out").write_bytes(b"content")
    await deliver([Delivery("out", (replica(se / "a", "DISK"),), (), "/vo/a")], workdir, told, site)
    inode = (se / "a").stat().st_ino
    wanted = (replica(se / "b", "TAPE"), replica(se / "a", "DISK"))
    await deliver([Delivery("out", wanted, (), "/vo/a")], workdir, told, site)
    assert os.listdir(se) == ["a"]
    assert (se / "a").stat().st_ino == inode
    assert [file.storage_element for file in told.files] == ["DISK", "DISK"]


async def test_a_replica_that_the_catalog_knows_but_storage_has_lost_is_sent_again(
    workdir: Workdir, se: Path, told: Told, catalog: SqliteCatalog
) -> None:
    """The catalog was believed: the job said Done and its output was nowhere."""
    delivery = Delivery("out", (replica(se / "a", "DISK"),), (), "/vo/a")
    (workdir.path / "out").write_bytes(b"content")
    await deliver([delivery], workdir, told, Site(catalog=str(catalog.path)))
    (se / "a").unlink()
    await deliver([delivery], workdir, told, Site(catalog=str(catalog.path)))
    assert (se / "a").read_bytes() == b"content"


async def test_an_output_is_not_lost_for_a_catalog_that_is_busy(
    workdir: Workdir, se: Path, told: Told, catalog: SqliteCatalog
) -> None:
    class Busy(SqliteCatalog):
        calls = 0

        async def register(self, entry: CatalogEntry) -> None:
            self.calls += 1
            if self.calls < 3:
                raise StorageUnavailable(str(self.path), "locked")
            await super().register(entry)

    (workdir.path / "out").write_bytes(b"content")
    busy = Busy(catalog.path)
    async with open_transfers(HASTY, catalog=busy) as transfers:
        await transfers.deliver([Delivery("out", (replica(se / "a"),), (), "/vo/a")], workdir, told)
    assert (busy.calls, list(await catalog.lookup(["/vo/a"]))) == (3, ["/vo/a"])


async def test_a_catalog_that_cannot_be_asked_fails_the_staging_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "spoilt").write_bytes(b"not a database" * 100)
    async with open_transfers(Site(catalog=str(tmp_path / "spoilt"))) as transfers:
        with pytest.raises(StagingFailed, match=r"cannot look up inputs: .*spoilt: the catalog cannot be used"):
            await transfers.lookup(["/vo/a"])


async def test_without_a_catalog_nothing_is_known() -> None:
    async with open_transfers(Site()) as transfers:
        assert await transfers.lookup(["/vo/a"]) == {}
        assert repr(transfers) == "<Transfers local: file>"


async def test_a_catalog_that_is_no_file_is_refused() -> None:
    with pytest.raises(InvalidSite, match="only a local file"):
        async with open_transfers(Site(catalog="https://host/catalog")):
            pass


# -- what it costs the loop --------------------------------------------------------------------------------------


ROUNDS = 8
"""Of a quarter of a second: the 99th percentile of one round is its one worst moment."""


async def test_the_event_loop_answers_within_20_ms_while_100_files_of_1_mb_move(
    workdir: Workdir, there: Path, se: Path, told: Told
) -> None:
    """Both ways. The 99th percentile, and beyond what a busy machine is late by when nothing moves."""
    content = os.urandom(1024 * 1024)
    for number in range(100):
        (there / str(number)).write_bytes(content)
    delays: list[float] = []
    checksum = adler32(content)  # a hundred of them, in the loop, were the delay that was measured

    async def tick() -> None:
        while True:
            begun = time.perf_counter()
            await anyio.sleep(0.001)
            delays.append(time.perf_counter() - begun - 0.001)

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        await anyio.sleep(1)
        idle = sorted(delays)
        delays.clear()
        names = [str(number) for number in range(100)]
        fetches = [Fetch(name, (replica(there / name),), None, checksum) for name in names]
        for _ in range(ROUNDS):
            await fetch(fetches, workdir, told)
            await deliver([Delivery(name, (replica(se / name),)) for name in names], workdir, told)
        group.cancel_scope.cancel()
    delays.sort()
    late = delays[int(len(delays) * 0.99)]
    before = idle[int(len(idle) * 0.99)]
    print(f"measured: delay p99 {late * 1000:.2f} ms, max {delays[-1] * 1000:.2f} ms; idle p99 {before * 1000:.2f} ms")
    assert len(told.files) == 200 * ROUNDS
    assert len(delays) > 200
    assert late < 0.020 + before


async def test_a_storage_of_the_embedding_program_replaces_ours(workdir: Workdir, there: Path, told: Told) -> None:
    (there / "a").write_bytes(b"content")

    class Counting(LocalStorage):
        calls = 0

        async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
            Counting.calls += 1
            await super().move(transfers, ended)

    async with open_transfers(Site(), storages={"file": Counting()}) as transfers:
        await transfers.fetch([Fetch("a", (replica(there / "a"),))], workdir, told)
    assert Counting.calls == 1
    assert (workdir.path / "a").read_bytes() == b"content"
