"""Many files of a manifest: what is there is left alone, what fails is named once, and nothing is ever half there."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from conftest import until
from loadmaster import Site, open_transfers
from loadmaster.console.account import Record, Report, told
from loadmaster.console.gauge import LineGauge, Pace, SilentGauge, duration
from loadmaster.console.manifest import BadManifest, Manifest
from loadmaster.console.orders import Orders
from loadmaster.console.spool import PREFIX, open_spool
from loadmaster.console.stage import Ended, Outcome, Stage, Tally, Terms, stage
from loadmaster.errors import AccessDenied, CannotCopy, ChecksumMismatch, StorageUnavailable
from loadmaster.names import file_url
from loadmaster.staging.parts import PartOfPath, part_name
from loadmaster.storage.base import FileInfo, Storage, Transfer
from loadmaster.testing import Faults, MemoryStorage

SITE = Site(retry_seconds=0.001)


class Heard:
    """Listens."""

    def __init__(self) -> None:
        self.all: list[Ended] = []
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def ended(self, ended: Ended) -> None:
        self.all.append(ended)

    async def follow(self, staging: Stage) -> None:
        await anyio.sleep_forever()

    def of(self, outcome: Outcome) -> list[int]:
        """The lines that ended so."""
        return sorted(ended.entry.line for ended in self.all if ended.outcome is outcome)

    @property
    def reasons(self) -> list[str]:
        return [ended.reason for ended in self.all if ended.reason is not None]


def manifest_of(base: Path, lines: Sequence[dict[str, Any]]) -> Manifest:
    text = "".join(json.dumps(line) + "\n" for line in lines)
    return Manifest.read(io.BytesIO(text.encode()), "m", str(base))


Staging = Callable[..., Any]


@pytest.fixture
def move(tmp_path: Path) -> Staging:
    """Stage some lines; what was heard, and the tally."""

    async def move(
        *lines: dict[str, Any], storages: dict[str, Storage] | None = None, site: Site = SITE, **terms: Any
    ) -> tuple[Heard, Tally]:
        heard = Heard()
        async with staging(tmp_path, *lines, storages=storages, site=site, heard=heard, **terms) as stage:
            tally = await stage.run()
        return heard, tally

    return move


@asynccontextmanager
async def staging(
    base: Path,
    *lines: dict[str, Any],
    heard: Heard,
    storages: dict[str, Storage] | None = None,
    site: Site = SITE,
    **terms: Any,
) -> AsyncIterator[Stage]:
    manifest = await anyio.to_thread.run_sync(manifest_of, base, lines)
    try:
        async with open_transfers(site, storages=storages) as transfers:
            yield Stage(manifest, transfers, Terms(**terms), heard)
    finally:
        manifest.close()


def adler32(content: bytes) -> str:
    return f"adler32:{zlib.adler32(content):08x}"


def files_in(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def some(tmp_path: Path) -> list[dict[str, Any]]:
    """Twelve files, in `in`, to be copied to `out/deep`."""
    (tmp_path / "in").mkdir()
    for number in range(12):
        (tmp_path / "in" / str(number)).write_bytes(os.urandom(100 + number))
    return [{"source": f"in/{number}", "target": f"out/deep/{number}"} for number in range(12)]


# -- what is there is left alone ---------------------------------------------------------------------------------


async def test_files_are_copied_and_running_it_again_does_nothing(
    move: Staging, some: list[dict[str, Any]], tmp_path: Path
) -> None:
    heard, tally = await move(*some)
    assert heard.of(Outcome.MOVED) == list(range(1, 13))
    assert files_in(tmp_path / "out" / "deep") == files_in(tmp_path / "in")
    assert (tally.moved, tally.attempts, tally.left) == (12, 12, 0)
    assert tally.moved_bytes == sum(range(100, 112))
    heard, tally = await move(*some)
    assert heard.of(Outcome.THERE) == list(range(1, 13))
    assert (tally.moved, tally.attempts, tally.there_bytes) == (0, 0, sum(range(100, 112)))


async def test_only_what_is_missing_or_of_another_size_is_done_again(
    move: Staging, some: list[dict[str, Any]], tmp_path: Path
) -> None:
    await move(*some)
    (tmp_path / "out" / "deep" / "3").unlink()
    (tmp_path / "out" / "deep" / "5").write_bytes(b"short")
    (tmp_path / "out" / "deep" / "7").write_bytes(b"x" * 107)  # the right size: nobody looks closer unless told to
    heard, _ = await move(*some)
    assert heard.of(Outcome.MOVED) == [4, 6]
    heard, _ = await move(*some, verify=True)
    assert heard.of(Outcome.MOVED) == [8]
    heard, _ = await move(*some, everything=True)
    assert heard.of(Outcome.MOVED) == list(range(1, 13))


@pytest.mark.parametrize("size", [100, 3 * 1024 * 1024])
async def test_a_checksum_in_the_manifest_is_looked_at_in_what_is_there(
    move: Staging, tmp_path: Path, size: int
) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    line = {"source": "a", "target": "b", "size": size, "checksum": adler32(content)}
    (tmp_path / "b").write_bytes(b"x" * size)
    heard, _ = await move(line)
    assert heard.of(Outcome.MOVED) == [1]
    assert (tmp_path / "b").read_bytes() == content
    heard, _ = await move(line)
    assert heard.of(Outcome.THERE) == [1]


async def test_a_server_is_asked_what_it_has(move: Staging, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    storage = Faults(MemoryStorage())
    lines = [
        {"source": "a", "target": "memory://h/size", "size_bytes": 7},
        {"source": "a", "target": "memory://h/sum", "checksum": adler32(b"content")},
        {"source": "a", "target": "memory://h/neither"},
    ]
    for moved in ([1, 2, 3], []):
        storage.calls.clear()
        heard, _ = await move(*lines, storages={"memory": storage})
        assert heard.of(Outcome.MOVED) == moved
        assert [operation for operation, _ in storage.calls].count("upload") == len(moved)
    await storage.remove("memory://h/sum")
    assert (await move(*lines, storages={"memory": storage}))[0].of(Outcome.MOVED) == [2]
    assert (await move(*lines, storages={"memory": storage}, verify=True))[0].of(Outcome.THERE) == [1, 2, 3]


async def test_a_server_that_cannot_say_is_tried(move: Staging, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    storage = Faults(MemoryStorage())
    storage.fail("stat")
    heard, _ = await move({"source": "a", "target": "memory://h/a"}, storages={"memory": storage})
    assert heard.of(Outcome.MOVED) == [1]


# -- what fails is named once ------------------------------------------------------------------------------------


async def test_every_failure_is_told_once_and_holds_up_no_other(
    move: Staging, some: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    bad = [
        {"source": "nowhere", "target": "out/a"},
        {"source": "in/1", "target": "directory"},
        {"source": "in/2", "target": "fifo"},
        {"source": "in", "target": "out/b"},
        {"source": "in/3", "target": "out/c", "size": 5},
        {"source": "in/4", "target": "out/d", "checksum": "0"},
        {"source": "in/4", "target": "/dev/null", "size": 5},
        {"source": "in/4", "target": "in/4/below"},
    ]
    heard, tally = await move(*bad, *some)
    assert heard.of(Outcome.FAILED) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert heard.of(Outcome.MOVED) == list(range(9, 21))
    assert len(heard.all) == 20
    assert all(heard.reasons)
    assert (tally.failed, tally.left) == (8, 0)
    assert sorted(files_in(tmp_path / "out")) == sorted(f"deep/{number}" for number in range(12))
    assert (tmp_path / "fifo").is_fifo()
    assert Path("/dev/null").is_char_device()


async def test_what_is_sent_must_be_what_the_manifest_says(move: Staging, tmp_path: Path) -> None:
    """Nothing is read twice, so it is known when it has been sent; then it is taken back."""
    (tmp_path / "a").write_bytes(b"other content")
    storage = MemoryStorage()
    heard, _ = await move({"source": "a", "target": "memory://h/a", "checksum": "1"}, storages={"memory": storage})
    assert heard.of(Outcome.FAILED) == [1]
    assert "not what is wanted" in heard.reasons[0]
    assert storage.files == {}


async def test_what_may_succeed_later_is_tried_again_and_counted(move: Staging, tmp_path: Path) -> None:
    storage = Faults(MemoryStorage({"memory://h/a": b"content"}))
    storage.fail("download", at=1)
    storage.corrupt("download", at=2)
    line = {"source": "memory://h/a", "target": "a", "checksum": adler32(b"content")}
    heard, tally = await move(line, storages={"memory": storage})
    assert heard.of(Outcome.MOVED) == [1]
    assert (tally.moved, tally.attempts) == (1, 3)
    assert (tmp_path / "a").read_bytes() == b"content"


async def test_a_storage_that_is_not_there_is_a_bad_manifest(tmp_path: Path) -> None:
    lines = (
        {"source": "a", "target": "b"},
        {"source": "odd://h/a", "target": "c"},
        {"source": "a", "target": "odd://h/d"},
    )
    async with staging(tmp_path, *lines, heard=Heard()) as it:
        with pytest.raises(BadManifest) as told:
            await it.check()
    assert [problem.partition(":")[0] for problem in told.value.problems] == ["line 2", "line 3"]


# -- from server to server ---------------------------------------------------------------------------------------


def spools() -> list[str]:
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith(PREFIX)]


def spooled() -> int:
    """Files in the only spool there is."""
    [spool] = spools()
    return len(os.listdir(Path(tempfile.gettempdir()) / spool))


async def test_files_go_from_server_to_server_through_a_spool_that_is_bounded(move: Staging) -> None:
    source = MemoryStorage({f"one://h/{number}": os.urandom(2000) for number in range(100)})
    target, most = Faults(MemoryStorage()), 0
    wrapped = target.move

    async def counting(transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        nonlocal most
        most = max(most, await anyio.to_thread.run_sync(spooled))
        await wrapped(transfers, ended)

    target.move = counting  # type: ignore[method-assign]
    lines = [{"source": f"one://h/{number}", "target": f"two://h/{number}"} for number in range(100)]
    heard, tally = await move(*lines, storages={"one": source, "two": target}, site=Site(streams=2))
    assert heard.of(Outcome.MOVED) == list(range(1, 101))
    inner: Any = target
    assert {url[3:]: data for url, data in inner._storage.files.items()} == {
        url[3:]: data for url, data in source.files.items()
    }
    assert tally.attempts == 200
    assert 0 < most <= 4
    assert spools() == []


async def test_what_a_server_can_copy_does_not_pass_through_us(move: Staging) -> None:
    server = Faults(MemoryStorage({f"one://h/{number}": os.urandom(2000) for number in range(30)}))
    lines = [{"source": f"one://h/{number}", "target": f"one://h/copy{number}"} for number in range(30)]
    heard, tally = await move(*lines, storages={"one": server})
    assert heard.of(Outcome.MOVED) == list(range(1, 31))
    assert {operation for operation, _ in server.calls} == {"stat", "copy"}
    assert (tally.attempts, tally.moved_bytes) == (30, 60_000)
    assert spools() == []


async def test_what_a_server_does_not_copy_passes_through_us_and_it_is_not_asked_again(
    move: Staging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadmaster.staging.party.LOOK_AHEAD", 64)
    memory = MemoryStorage({f"one://h/{number}": os.urandom(2000) for number in range(300)})
    server = Faults(memory)
    server.fail("copy", error=lambda url: CannotCopy(url, "no"))
    lines = [{"source": f"one://h/{number}", "target": f"one://h/copy{number}"} for number in range(300)]
    heard, _ = await move(*lines, storages={"one": server}, everything=True)
    assert heard.of(Outcome.MOVED) == list(range(1, 301))
    assert all(memory.files[f"one://h/copy{number}"] == memory.files[f"one://h/{number}"] for number in range(300))
    tried = sum(operation == "copy" for operation, _ in server.calls)
    assert 0 < tried < 300
    assert sum(ended.attempts for ended in heard.all) == 600 + tried
    assert spools() == []


async def test_one_copy_that_is_refused_is_moved_and_the_others_are_copied(move: Staging) -> None:
    server = Faults(MemoryStorage({f"one://h/{name}": name.encode() for name in "abc"}))
    server.fail("copy", at=1, error=lambda url: AccessDenied(url, "not this one"))
    server.fail("copy", at=3)
    lines = [
        {"source": f"one://h/{name}", "target": f"one://h/{name}2", "checksum": adler32(name.encode())}
        for name in "abcd"
    ]
    heard, _ = await move(*lines, storages={"one": server}, site=Site(streams=1, retry_seconds=0.001))
    assert heard.of(Outcome.MOVED) == [1, 2, 3]
    assert heard.of(Outcome.FAILED) == [4]
    assert "there is no such file" in heard.reasons[0]
    assert [operation for operation, _ in server.calls].count("upload") == 1


async def test_each_leg_may_fail(move: Staging) -> None:
    source = MemoryStorage({"one://h/a": b"a", "one://h/b": b"b"})
    target = Faults(MemoryStorage())
    target.fail("upload", at=1)
    lines = [
        {"source": f"one://h/{name}", "target": f"two://h/{name}", "checksum": adler32(name.encode())} for name in "abc"
    ]
    heard, _ = await move(*lines, storages={"one": source, "two": target}, site=Site(streams=1, retry_seconds=0.001))
    assert heard.of(Outcome.MOVED) == [1, 2]
    assert heard.of(Outcome.FAILED) == [3]
    assert sorted(ended.attempts for ended in heard.all) == [1, 2, 3]
    assert spools() == []


async def test_a_spool_that_a_dead_run_left_is_removed_and_no_other() -> None:
    temporary = Path(tempfile.gettempdir())
    dead = Path(tempfile.mkdtemp(prefix=PREFIX))
    (dead / "1").write_bytes(b"half")
    async with open_spool() as living:
        first = await living.place()
        assert not dead.exists()
        async with open_spool() as other:
            await other.place()
            assert len(spools()) == 2
        assert len(spools()) == 1
        assert Path(first.removeprefix("file://")).parent.exists()
    assert spools() == []
    assert list(temporary.glob("loadmaster-*")) == []


# -- enough, too late, gone --------------------------------------------------------------------------------------


class Gated:
    """A storage that moves when it is told to."""

    def __init__(self, storage: Storage) -> None:
        self.abilities = storage.abilities
        self.stat, self.remove = storage.stat, storage.remove
        self._storage = storage
        self.open = anyio.Event()
        self.begun: list[str] = []

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        self.begun += [transfer.url for transfer in transfers]
        await self.open.wait()
        await self._storage.move(transfers, ended)


def gated(count: int) -> tuple[Gated, list[dict[str, Any]]]:
    storage = Gated(MemoryStorage({f"memory://h/{number}": b"x" * 10 for number in range(count)}))
    return storage, [{"source": f"memory://h/{number}", "target": f"out/{number}"} for number in range(count)]


async def test_enough_finishes_what_is_under_way_and_begins_nothing(tmp_path: Path) -> None:
    storage, lines = gated(3000)
    two = Site(streams=2)
    async with (
        staging(tmp_path, *lines, heard=Heard(), storages={"memory": storage}, site=two) as it,
        anyio.create_task_group() as group,
    ):
        group.start_soon(it.run)
        await until(lambda: len(storage.begun) >= 2)
        it.begin_no_more()
        await anyio.wait_all_tasks_blocked()
        begun = len(storage.begun)
        storage.open.set()
    assert len(storage.begun) == begun < 200
    assert it.tally.moved == begun == len(files_in(tmp_path / "out"))
    assert it.tally.left == 3000 - begun
    assert it.tally.failed == 0


async def test_what_is_not_there_at_the_deadline_has_failed_and_is_named(tmp_path: Path) -> None:
    storage, lines = gated(3000)
    heard = Heard()
    async with staging(
        tmp_path, *lines, heard=heard, storages={"memory": storage}, site=Site(streams=2), deadline_seconds=0.3
    ) as it:
        with anyio.fail_after(10):
            await it.run()
    assert heard.of(Outcome.FAILED) == list(range(1, 3001))
    assert (it.tally.failed, it.tally.left) == (3000, 0)
    assert [reason for reason in heard.reasons if "within 0.3 s" not in reason] == []
    assert not (tmp_path / "out").exists() or files_in(tmp_path / "out") == {}


async def test_cancelled_it_leaves_nothing_half(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, 8 * 1024**3)
    lines = [{"source": "big", "target": f"out/{number}"} for number in range(3)]
    async with staging(tmp_path, *lines, heard=Heard(), site=Site(streams=3)) as it, anyio.create_task_group() as group:
        group.start_soon(it.run)
        await until(lambda: (tmp_path / "out").exists() and len(list((tmp_path / "out").iterdir())) == 3)
        group.cancel_scope.cancel()
    assert list((tmp_path / "out").iterdir()) == []


async def test_orders_are_obeyed(tmp_path: Path) -> None:
    """The first finishes what is under way, the second leaves."""
    site = Site(streams=1)
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    orders, heard = Orders(reader), Heard()
    big = tmp_path / "big"
    big.touch()
    os.truncate(big, 8 * 1024**3)
    lines = [{"source": "big", "target": f"out/{number}"} for number in range(3)]
    manifest = await anyio.to_thread.run_sync(manifest_of, tmp_path, lines)
    tallies: list[Tally] = []

    async def run() -> None:
        tallies.append(await stage(manifest, site, Terms(), heard, orders))

    try:
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            await until(lambda: (tmp_path / "out").exists() and len(list((tmp_path / "out").iterdir())) == 1)
            for words in ("no more files are begun", "leaving"):
                orders.seen.append(2)
                os.write(writer, b"!")
                await until(lambda words=words: any(words in line for line in heard.lines))  # type: ignore[misc]
    finally:
        manifest.close()
        os.close(reader)
        os.close(writer)
    assert (tallies[0].left, tallies[0].moved) == (3, 0)
    assert list((tmp_path / "out").iterdir()) == []


# -- parts ---------------------------------------------------------------------------------------------------------


class Ranges(MemoryStorage):
    """Remembers what was asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.asked: list[int] = []

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        self.asked += [transfer.first_byte for transfer in transfers]
        await super().move(transfers, ended)


CONTENT = os.urandom(5 * 1024 * 1024)


def a_part(tmp_path: Path, content: bytes) -> Path:
    part = tmp_path / "out" / part_name("a")
    part.parent.mkdir()
    part.write_bytes(content)
    return part


@pytest.mark.parametrize(
    ("resume", "part", "asked"),
    [
        (True, CONTENT[: 3 * 1024 * 1024], [3 * 1024 * 1024]),
        (True, b"x" * 3 * 1024 * 1024, [3 * 1024 * 1024, 0]),  # not what it should be: seen at the end, done again
        (True, CONTENT[:1000], [0]),  # not worth it
        (True, CONTENT + b"x", [0]),
        (False, CONTENT[: 3 * 1024 * 1024], [0]),
    ],
    ids=["continued", "wrong", "little", "too much", "not asked for"],
)
async def test_what_a_dead_run_left_is_continued_or_written_over(
    move: Staging, tmp_path: Path, resume: bool, part: bytes, asked: list[int]
) -> None:
    left = a_part(tmp_path, part)
    storage = Ranges({"memory://h/a": CONTENT})
    line = {"source": "memory://h/a", "target": "out/a", "size_bytes": len(CONTENT), "checksum": adler32(CONTENT)}
    heard, _ = await move(line, storages={"memory": storage}, resume=resume)
    assert heard.of(Outcome.MOVED) == [1]
    assert storage.asked == asked
    assert (tmp_path / "out" / "a").read_bytes() == CONTENT
    assert not left.exists()


async def test_a_part_that_cannot_be_trusted_is_not_continued(move: Staging, tmp_path: Path) -> None:
    """Without a checksum nobody could tell whether both halves are of one file."""
    a_part(tmp_path, b"x" * 3 * 1024 * 1024)
    storage = Ranges({"memory://h/a": CONTENT})
    await move({"source": "memory://h/a", "target": "out/a"}, storages={"memory": storage}, resume=True)
    assert storage.asked == [0]
    assert (tmp_path / "out" / "a").read_bytes() == CONTENT


class Breaking(MemoryStorage):
    """Sends the first three megabytes and no more."""

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        await anyio.to_thread.run_sync(self._break, transfers)
        ended(transfers)

    def _break(self, transfers: Sequence[Transfer]) -> None:
        for transfer in transfers:
            descriptor = transfer.local.open()
            os.write(descriptor, CONTENT[: 3 * 1024 * 1024])
            os.close(descriptor)
            transfer.result = StorageUnavailable(transfer.url, "broke off")
            transfer.local.discard()


@pytest.mark.parametrize("resume", [True, False])
async def test_a_part_is_kept_for_the_next_run_when_that_is_wanted(move: Staging, tmp_path: Path, resume: bool) -> None:
    line = {"source": "memory://h/a", "target": "out/a", "size_bytes": len(CONTENT), "checksum": adler32(CONTENT)}
    site = Site(retries=0)
    heard, _ = await move(line, storages={"memory": Breaking()}, resume=resume, site=site)
    assert heard.of(Outcome.FAILED) == [1]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ([part_name("a")] if resume else [])
    storage = Ranges({"memory://h/a": CONTENT})
    heard, _ = await move(line, storages={"memory": storage}, resume=resume, site=site)
    assert heard.of(Outcome.MOVED) == [1]
    assert storage.asked == [3 * 1024 * 1024 if resume else 0]
    assert files_in(tmp_path / "out") == {"a": CONTENT}


def test_two_processes_do_not_write_to_one_part(tmp_path: Path) -> None:
    one, other = PartOfPath(tmp_path / "a"), PartOfPath(tmp_path / "a")
    descriptor = one.open()
    with pytest.raises(StorageUnavailable, match="another process is bringing it in"):
        other.open()
    other.discard()
    os.write(descriptor, b"content")
    one.keep(descriptor, FileInfo(7))
    os.close(descriptor)
    assert files_in(tmp_path) == {"a": b"content"}
    descriptor = other.open()
    other.discard()
    os.close(descriptor)
    assert files_in(tmp_path) == {"a": b"content"}


def small(tmp_path: Path, name: str = "a", **options: Any) -> PartOfPath:
    return PartOfPath(tmp_path / "new" / name, size_bytes=7, **options)


@pytest.mark.parametrize("sync", [False, True])
def test_a_small_file_has_no_name_before_it_is_whole(tmp_path: Path, sync: bool) -> None:
    part = small(tmp_path, sync=sync)
    for _ in range(2):  # into its directory, then over itself
        descriptor = part.open()
        os.write(descriptor, b"content")
        assert all(path.name == "a" for path in (tmp_path / "new").iterdir())
        part.keep(descriptor, FileInfo(7))
        os.close(descriptor)
        assert files_in(tmp_path) == {"new/a": b"content"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_two_that_bring_in_the_same_small_file_do_not_meet(tmp_path: Path) -> None:
    one, other = small(tmp_path), small(tmp_path)
    descriptors = [one.open(), other.open()]
    os.write(descriptors[0], b"content")
    os.write(descriptors[1], b"half")
    one.keep(descriptors[0], FileInfo(7))
    with pytest.raises(ChecksumMismatch, match="4 bytes, expected 7"):
        other.keep(descriptors[1], FileInfo(4))
    other.discard()
    os.write(descriptors[1], b"way")
    other.keep(descriptors[1], FileInfo(7))
    for descriptor in descriptors:
        os.close(descriptor)
    assert files_in(tmp_path) == {"new/a": b"halfway"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_a_small_file_does_not_take_the_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "new" / "a").mkdir(parents=True)
    part = small(tmp_path)
    descriptor = part.open()
    os.write(descriptor, b"content")
    with pytest.raises(IsADirectoryError):
        part.keep(descriptor, FileInfo(7))
    part.discard()
    os.close(descriptor)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]


def test_where_no_file_is_without_a_name_a_small_one_is_written_beside_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS. The kernel's answer is given here: no such file system can be had in a test."""
    real = os.open

    def refusing(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", refusing)
    part = small(tmp_path)
    descriptor = part.open()
    os.write(descriptor, b"content")
    assert [path.name for path in (tmp_path / "new").iterdir()] == [part_name("a")]
    part.keep(descriptor, FileInfo(7))
    os.close(descriptor)
    assert files_in(tmp_path) == {"new/a": b"content"}


def test_a_part_in_the_way_that_is_no_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / part_name("a")).symlink_to("victim")
    part = PartOfPath(tmp_path / "a")
    with pytest.raises(OSError, match="symbolic links"):
        part.open()
    part.discard()
    assert (tmp_path / "victim").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["a", "n" * 255, "ü" * 127])
def test_a_part_has_a_name_that_fits_and_is_hidden(name: str) -> None:
    assert part_name(name).startswith(".")
    assert len(os.fsencode(part_name(name))) <= 255
    assert part_name(name) != part_name(name[:-1] + "b")


# -- what is told --------------------------------------------------------------------------------------------------


def test_what_came_of_each_file_is_recorded(tmp_path: Path, some: list[dict[str, Any]]) -> None:
    lines = [*some, {"source": "nowhere", "target": "x"}]
    said, never = io.StringIO(), os.pidfd_open(os.getpid())
    manifest = manifest_of(tmp_path, lines)
    with (tmp_path / "events").open("w") as events, Record.open(events) as record:
        report = Report(SilentGauge(said), record, manifest)
        tally = anyio.run(stage, manifest, SITE, Terms(), report, Orders(never))
        summary = json.loads(record.summary(tally))
    manifest.close()
    os.close(never)
    written = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert sorted(each["line"] for each in written) == list(range(1, 14))
    assert {each["outcome"] for each in written} == {"moved", "failed"}
    moved = next(each for each in written if each["line"] == 1)
    assert moved["checksum"] == adler32((tmp_path / "in" / "0").read_bytes())
    assert (summary["files"], summary["moved"], summary["failed"], summary["left"]) == (13, 12, 1, 0)
    assert [failure["line"] for failure in summary["failures"]] == [13]
    assert said.getvalue().count("nowhere") == 1
    assert said.getvalue().count("\n") == 1


def test_a_pace_is_a_line_for_a_person() -> None:
    pace = Pace(1200, 5000, 10**9, 5 * 10**9, 812.4, 7.3e7, 54.6, failed=2)
    assert str(pace) == "1,200 of 5,000 files, 2 failed, 1.0 GB of 5.0 GB, 812 files/s, 73.0 MB/s, 55 s left"
    assert str(Pace(0, 5, 0, None, 0, 0, None)) == "0 of 5 files, 0 B, 0 files/s, 0 B/s"
    assert [duration(seconds) for seconds in (0.24, 7, 99, 200, 7000)] == ["0.24 s", "7.0 s", "99 s", "3 min", "1.9 h"]


def test_a_log_has_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("loadmaster.console.gauge.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    gauge = LineGauge(stream)
    for _ in range(100):
        now[0] += 0.5
        gauge.move(Pace(1, 2, 3, None, 4, 5, None))
    assert stream.getvalue().count("1 of 2 files") == 5


def test_a_tally_is_told_in_a_line() -> None:
    tally = Tally(20, moved=12, there=3, failed=2, moved_bytes=24_000_000, attempts=19, seconds=2)
    assert told(tally) == (
        "12 files moved, 24.0 MB in 2.0 s (6 files/s, 12.0 MB/s); 3 were there already; 5 retries; 2 failed; 3 not begun"
    )


# -- the command -----------------------------------------------------------------------------------------------------


def command(directory: Path, *arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "loadmaster", "stage", *arguments],
        cwd=directory, input=given, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture
def manifest(tmp_path: Path, some: list[dict[str, Any]]) -> Iterator[Path]:
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in some))
    yield path


def test_the_command_moves_and_then_has_nothing_to_do(manifest: Path, tmp_path: Path) -> None:
    done = command(tmp_path, "m.jsonl")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("12 files moved, 1.3 kB in ")
    assert files_in(tmp_path / "out" / "deep") == files_in(tmp_path / "in")
    done = command(tmp_path, "-", given=manifest.read_text())
    assert done.returncode == 0
    assert "12 were there already" in done.stdout


def test_a_failure_is_3_and_named_once(manifest: Path, tmp_path: Path) -> None:
    with manifest.open("a") as file:
        file.write('{"source": "nowhere", "target": "out/x"}\n')
    done = command(tmp_path, "m.jsonl", "--summary", "s.json", "--events", "e.jsonl")
    assert done.returncode == 3
    assert done.stderr.count("nowhere: No such file or directory") == 1
    assert done.stderr.startswith("line 13: ")
    assert "1 failed" in done.stdout
    assert [each["line"] for each in json.loads((tmp_path / "s.json").read_text())["failures"]] == [13]
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 13
    done = command(tmp_path, "m.jsonl", "--quiet")
    assert (done.returncode, done.stdout) == (3, "")
    assert len(done.stderr.splitlines()) == 1


def test_a_bad_manifest_is_1_and_nothing_is_begun(manifest: Path, tmp_path: Path) -> None:
    with manifest.open("a") as file:
        file.write('{"source": "in/1"}\n\n{"source": "in/1", "target": "out/deep/1"}\nnonsense\n')
    done = command(tmp_path, "m.jsonl")
    assert done.returncode == 1
    assert [line.partition(": ")[2].partition(":")[0] for line in done.stderr.splitlines()] == [
        "line 13",
        "line 15",
        "line 16",
    ]
    assert not (tmp_path / "out").exists()
    assert command(tmp_path, "nowhere.jsonl").stderr == "nowhere.jsonl: No such file or directory\n"
    assert command(tmp_path, "-", given='{"source": "odd://h/a", "target": "b"}').returncode == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--streams", "0"], "a number from 1 to 256 is expected"),
        (["--retries", "many"], "a number from 0 to 100 is expected"),
        (["--deadline", "soon"], "a time is expected: seconds, or with a unit, as 90, 30s, 5m"),
    ],
)
def test_options_that_mean_nothing_are_told(manifest: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = command(tmp_path, "m.jsonl", *options)
    assert done.returncode == 64
    assert message in done.stderr


@pytest.mark.parametrize("option", ["--events", "--summary"])
def test_a_record_that_cannot_be_written_is_told_before_anything_moves(
    manifest: Path, tmp_path: Path, option: str
) -> None:
    done = command(tmp_path, "m.jsonl", option, "m.jsonl/below")
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()


async def test_a_full_target_is_named_and_no_work_directory(move: Staging, tmp_path: Path, small_disk: Path) -> None:
    """`the work directory: No space left on device`, of a command that has none."""
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    heard, tally = await move({"source": "large", "target": str(small_disk / "large")})
    assert tally.failed == 1
    assert heard.reasons == [f"{file_url(small_disk / 'large')}: No space left on device"]


def test_a_record_on_a_full_disk_stops_nothing(manifest: Path, tmp_path: Path) -> None:
    done = command(tmp_path, "m.jsonl", "--events", "/dev/full")
    assert done.returncode == 0
    assert "/dev/full: no more events are written: No space left on device" in done.stderr


def test_a_live_gauge_works_on_a_terminal(manifest: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    big = tmp_path / "in" / "big"
    big.touch()
    os.truncate(big, 1024**3)
    with manifest.open("a") as file:
        file.write(json.dumps({"source": "in/big", "target": "out/big", "size_bytes": 1024**3}) + "\n")
    words = " ".join([sys.executable, "-m", "loadmaster", "stage", "m.jsonl"])
    done = subprocess.run(
        ["script", "-qec", words, "/dev/null"], cwd=tmp_path, capture_output=True, text=True, timeout=50,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "of 13 files" in done.stdout
    assert "13 files moved" in done.stdout
    (tmp_path / "out" / "big").unlink()
