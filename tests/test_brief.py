"""A few small local files: all in one turn of a thread, what is not small left as if nobody had tried."""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import anyio
import pytest

from loadmaster import Site, StoredFile, open_transfers
from loadmaster.errors import ChecksumMismatch
from loadmaster.names import file_url
from loadmaster.staging.brief import FEW_FILES, are_few, move_briefly
from loadmaster.staging.errand import Errand
from loadmaster.staging.files import Incoming, Outgoing
from loadmaster.staging.partnames import PartNames
from loadmaster.staging.plan import Delivery, Fetch
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import Direction, FileInfo, Replica, Step
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import SMALL_BYTES, LocalStorage
from loadmaster.workdir import Workdir


class Told:
    def __init__(self) -> None:
        self.wants_progress = True
        self.files: list[StoredFile] = []
        self.looks: list[tuple[Direction, Overall]] = []

    async def staged(self, file: StoredFile) -> None:
        self.files.append(file)

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        raise AssertionError(wanted)

    async def unregistered(self, file: StoredFile, reason: str) -> None:
        raise AssertionError(reason)

    async def missing(self, name: str, reason: str) -> None:
        raise AssertionError(name)

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        pass

    def overall(self, direction: Direction, overall: Overall) -> None:
        self.looks.append((direction, overall))


def adler32(data: bytes) -> Checksum:
    return Checksum("adler32", f"{zlib.adler32(data):08x}")


def inbound(workdir: Workdir, source: Path, name: str, checksum: Checksum | None = None) -> Errand:
    end = Incoming(workdir, name, checksum=checksum)
    return Errand(name, Direction.DOWNLOAD, (Replica(file_url(source)),), end, checksum=checksum)


def outbound(workdir: Workdir, name: str, target: Path, parts: PartNames | None = None) -> Errand:
    return Errand(name, Direction.UPLOAD, (Replica(file_url(target)),), Outgoing(workdir, name), parts=parts)


def at(url: str, size_bytes: int | None = None, step: Step = Step.ALL) -> Errand:
    end = Incoming(Workdir(Path("/"), -1), "name")
    return Errand("name", Direction.DOWNLOAD, (Replica(url),), end, size_bytes=size_bytes, step=step)


@pytest.mark.parametrize(
    ("errands", "few"),
    [
        ([], False),
        ([at("file:///a")] * FEW_FILES, True),
        ([at("file:///a")] * (FEW_FILES + 1), False),
        ([at("file:///a", SMALL_BYTES - 1)], True),
        ([at("file:///a"), at("file:///b", SMALL_BYTES)], False),
        ([at("file:///a"), at("https://host/b", 1)], False),
        ([at("file:///a", 1, Step.HOLD)], False),
    ],
)
def test_what_may_be_a_matter_of_a_moment(errands: Sequence[Errand], few: bool) -> None:
    assert are_few(errands) is few


async def test_the_small_ones_arrive_and_the_others_are_as_if_nobody_had_tried(
    workdir: Workdir, tmp_path: Path
) -> None:
    (tmp_path / "small").write_bytes(b"cargo")
    (tmp_path / "large").write_bytes(bytes(SMALL_BYTES))
    os.mkfifo(tmp_path / "pipe")
    errands = [
        inbound(workdir, tmp_path / "large", "a"),
        inbound(workdir, tmp_path / "small", "b"),
        inbound(workdir, tmp_path / "gone", "c"),
        inbound(workdir, tmp_path / "small", "d", adler32(b"another")),
        inbound(workdir, tmp_path / "pipe", "e"),
        inbound(workdir, tmp_path / "small", "folder/f", adler32(b"cargo")),
    ]
    with anyio.fail_after(30):
        passed = await move_briefly(errands, LocalStorage())
    whole = FileInfo(5, adler32(b"cargo"))
    assert passed == [None, whole, None, None, None, whole]
    assert [errand.transfers for errand in errands] == [0, 1, 0, 0, 0, 1]
    assert all(errand.errors is None and errand.course is None for errand in errands)
    found = sorted(str(path.relative_to(workdir.path)) for path in workdir.path.rglob("*"))
    assert found == ["b", "folder", "folder/f"]


async def test_outputs_are_told_from_what_may_not_leave(workdir: Workdir, tmp_path: Path) -> None:
    """A link out of the directory, a FIFO, one that is large: nothing of them is where outputs go."""
    (workdir.path / "good").write_bytes(b"results")
    (workdir.path / "large").write_bytes(bytes(SMALL_BYTES))
    (workdir.path / "passwd").symlink_to("/etc/passwd")
    os.mkfifo(workdir.path / "pipe")
    names = ["large", "good", "passwd", "pipe", "gone"]
    descriptors = os.listdir("/proc/self/fd")
    with anyio.fail_after(30):
        passed = await move_briefly([outbound(workdir, name, tmp_path / "se" / name) for name in names], LocalStorage())
    assert passed == [None, FileInfo(7, adler32(b"results")), None, None, None]
    assert os.listdir(tmp_path / "se") == ["good"]
    assert (tmp_path / "se" / "good").read_bytes() == b"results"
    assert len(os.listdir("/proc/self/fd")) <= len(descriptors) + 2  # of a thread's waker


async def test_one_that_outlives_its_agent_has_a_name_that_the_next_one_knows(workdir: Workdir, tmp_path: Path) -> None:
    """It is counted as a try, so that what comes after has another."""

    async def never(tries: int) -> None:
        raise AssertionError(tries)

    (workdir.path / "good").write_bytes(b"results")
    target = tmp_path / "se" / "good"
    parts = PartNames("mark", 4, never)
    await move_briefly([outbound(workdir, "good", target, parts)], LocalStorage())
    assert parts.next(file_url(target)) == PartNames("mark", 4, never).all(file_url(target))[1]


async def test_a_job_s_files_of_both_sizes_are_each_told_once(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"cargo")
    (tmp_path / "large").write_bytes(bytes(2 * SMALL_BYTES))
    told = Told()
    async with open_transfers(Site()) as transfers:
        fetches = [Fetch(name, (Replica(file_url(tmp_path / name)),)) for name in ("large", "small")]
        await transfers.fetch(fetches, workdir, told)
        se = tmp_path / "se"
        deliveries = [Delivery(name, (Replica(file_url(se / name)),)) for name in ("large", "small")]
        await transfers.deliver(deliveries, workdir, told)
    assert sorted((file.name, file.size_bytes) for file in told.files) == sorted(
        2 * [("large", 2 * SMALL_BYTES), ("small", 5)]
    )
    assert (se / "small").read_bytes() == b"cargo"
    assert (se / "large").stat().st_size == 2 * SMALL_BYTES


async def test_who_wants_progress_hears_that_they_have_come(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"cargo")
    told = Told()
    async with open_transfers(Site()) as transfers:
        fetches = [Fetch(name, (Replica(file_url(tmp_path / "small")),)) for name in ("a", "b")]
        await transfers.fetch(fetches, workdir, told)
    ((direction, last),) = told.looks
    assert direction is Direction.DOWNLOAD
    assert (last.done_files, last.files, last.done_bytes, last.size_bytes) == (2, 2, 10, 10)


async def test_a_wrong_checksum_is_told_with_its_reason(workdir: Workdir, tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"cargo")
    errand = inbound(workdir, tmp_path / "small", "a", adler32(b"another"))
    assert await move_briefly([errand], LocalStorage()) == [None]
    with pytest.raises(ChecksumMismatch, match="expected"):
        errand.end.keep(-1, FileInfo(5, adler32(b"cargo")))
    assert os.listdir(workdir.path) == []


async def test_cancelled_they_are_there_as_a_whole_or_not_at_all(
    workdir: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread is in the midst of it when the job is cancelled: at the second file, of which some is written."""
    for name in ("a", "b", "c"):
        (tmp_path / name).write_bytes(name.encode() * 100)
    there, go_on = threading.Event(), threading.Event()
    pwrite: Callable[[int, bytes, int], int] = os.pwrite

    def written(descriptor: int, data: bytes, offset: int) -> int:
        if data[:1] == b"b":
            there.set()
            assert go_on.wait(30)
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", written)
    errands = [inbound(workdir, tmp_path / name, name) for name in ("a", "b", "c")]
    ended = anyio.Event()
    async with anyio.create_task_group() as group:

        async def move() -> None:
            try:
                await move_briefly(errands, LocalStorage())
            finally:
                ended.set()

        group.start_soon(move)
        assert await anyio.to_thread.run_sync(there.wait, 30)
        assert "b" not in os.listdir(workdir.path)
        group.cancel_scope.cancel()
        go_on.set()
    assert ended.is_set()
    for path in workdir.path.iterdir():
        assert path.read_bytes() == path.name.encode() * 100
    assert sorted(os.listdir(workdir.path)) == ["a", "b", "c"]
