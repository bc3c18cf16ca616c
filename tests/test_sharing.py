"""Jobs that need the same files: each file is moved once for all of them, and each job has its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import until
from loadmaster import InvalidSite, Site, StagingFailed, StoredFile, open_transfers
from loadmaster.names import file_url
from loadmaster.staging.plan import Fetch
from loadmaster.staging.progress import Overall
from loadmaster.storage.base import Ability, Direction, FileInfo, Replica, Transfer
from loadmaster.storage.checksums import Checksum
from loadmaster.storage.local import LocalStorage
from loadmaster.workdir import Workdir

FILES = 20


class Told:
    """A listener that remembers."""

    def __init__(self, *, wants_progress: bool = False) -> None:
        self.wants_progress = wants_progress
        self.files: list[StoredFile] = []

    async def staged(self, file: StoredFile) -> None:
        self.files.append(file)

    async def failed_over(self, file: StoredFile, wanted: str) -> None:
        raise AssertionError

    async def unregistered(self, file: StoredFile, reason: str) -> None:
        raise AssertionError

    async def missing(self, name: str, reason: str) -> None:
        raise AssertionError

    def progress(self, name: str, url: str, done_bytes: int, size_bytes: int | None) -> None:
        pass

    def overall(self, direction: Direction, overall: Overall) -> None:
        pass


class Counted:
    """Local files, and how often each was asked for; after a while, as over a network."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.moved: list[str] = []
        self._seconds = seconds
        self._inner = LocalStorage()
        self.abilities: Ability = self._inner.abilities

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        self.moved += [transfer.url for transfer in transfers]
        await anyio.sleep(self._seconds)
        await self._inner.move(transfers, ended)

    async def stat(self, url: str) -> FileInfo:
        return await self._inner.stat(url)

    async def remove(self, url: str) -> None:
        await self._inner.remove(url)


def content(number: int) -> bytes:
    return f"content {number} ".encode() * (200_000 if number == 0 else 100)


@pytest.fixture
def fetches(tmp_path: Path) -> list[Fetch]:
    """Twenty files with logical names; one is large enough to be copied by itself."""
    return wanted(tmp_path)


def wanted(base: Path) -> list[Fetch]:
    there = base / "there"
    there.mkdir(exist_ok=True)
    fetches = []
    for number in range(FILES):
        data = content(number)
        (there / str(number)).write_bytes(data)
        checksum = Checksum("adler32", f"{zlib.adler32(data):08x}")
        sources = (Replica(file_url(there / str(number)), "SE"),)
        fetches.append(Fetch(f"in/{number}", sources, len(data), checksum, f"/vo/{number}"))
    return fetches


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(cache=str(tmp_path / "cache"))


@pytest.fixture
def workdirs(root: Path) -> Iterator[list[Workdir]]:
    """Those of eight jobs."""
    workdirs = [Workdir.make(root, str(number)) for number in range(8)]
    yield workdirs
    for workdir in workdirs:
        workdir.close()


@pytest.fixture
def cramped(small_disk: Path) -> Iterator[Workdir]:
    """A work directory on a disk of a megabyte."""
    workdir = Workdir.make(small_disk, "job")
    yield workdir
    workdir.close()


def assert_has_all(workdir: Workdir) -> None:
    for number in range(FILES):
        assert (workdir.path / "in" / str(number)).read_bytes() == content(number)
    assert len(list(workdir.path.rglob("*"))) == FILES + 1, "and nothing else"


async def test_eight_jobs_that_need_the_same_files_move_each_once(
    workdirs: list[Workdir], fetches: list[Fetch], site: Site
) -> None:
    storage = Counted()
    told = [Told(wants_progress=number % 2 == 0) for number in range(8)]
    async with open_transfers(site, storages={"file": storage}) as transfers:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                for workdir, listener in zip(workdirs, told, strict=True):
                    group.start_soon(transfers.fetch, fetches, workdir, listener)
    assert len(storage.moved) == FILES
    for workdir, listener in zip(workdirs, told, strict=True):
        assert_has_all(workdir)
        assert {file.name for file in listener.files} == {fetch.name for fetch in fetches}
        assert {file.checksum for file in listener.files} == {str(fetch.checksum) for fetch in fetches}


async def test_later_jobs_move_nothing(workdirs: list[Workdir], fetches: list[Fetch], site: Site) -> None:
    storage = Counted(0)
    for workdir in workdirs:
        async with open_transfers(site, storages={"file": storage}) as transfers:  # as another process
            await transfers.fetch(fetches, workdir, Told())
        assert_has_all(workdir)
    assert len(storage.moved) == FILES


PROCESS = """
import sys
from pathlib import Path
import anyio
sys.path.insert(0, sys.argv[1])
from test_sharing import Counted, Told, wanted, assert_has_all
from loadmaster import Site, open_transfers
from loadmaster.workdir import Workdir

async def main():
    base, storage = Path(sys.argv[2]), Counted()
    workdirs = [Workdir.make(base / "root", f"{sys.argv[3]}-{number}") for number in range(4)]
    print("ready", flush=True)
    await anyio.to_thread.run_sync(sys.stdin.readline)
    async with open_transfers(Site(cache=str(base / "cache")), storages={"file": storage}) as transfers:
        async with anyio.create_task_group() as group:
            for workdir in workdirs:
                group.start_soon(transfers.fetch, wanted(base), workdir, Told())
    for workdir in workdirs:
        assert_has_all(workdir)
        workdir.close()
    print(len(storage.moved), flush=True)

backend, _, kind = sys.argv[4].partition("-")
anyio.run(main, backend=backend, backend_options={"use_uvloop": True} if kind else {})
"""


@pytest.mark.parametrize("backends", [("asyncio", "trio"), ("asyncio-uvloop", "asyncio-uvloop")], ids=str)
def test_two_processes_of_four_jobs_each_move_each_file_once(
    tmp_path: Path, root: Path, fetches: list[Fetch], backends: tuple[str, str]
) -> None:
    others = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(tmp_path), name, backend],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, backend in zip("ab", backends, strict=True)
    ]
    for other in others:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
    counts = [int(other.communicate("go\n", timeout=40)[0]) for other in others]
    assert [other.returncode for other in others] == [0, 0]
    assert sum(counts) == FILES


async def test_a_process_that_is_killed_in_the_middle_is_taken_over_from(
    tmp_path: Path, root: Path, fetches: list[Fetch], site: Site, workdir: Workdir
) -> None:
    script = PROCESS.replace("Counted()", "Counted(3600)")
    words = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path), "a", "asyncio"]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        assert other.stdin is not None
        other.stdin.write(b"go\n")
        other.stdin.close()
        await until(lambda: len(list(tmp_path.glob("cache/*.lock"))) == FILES, 20)
        storage = Counted(0)
        async with open_transfers(site, storages={"file": storage}) as transfers:
            with anyio.fail_after(20):
                async with anyio.create_task_group() as group:
                    group.start_soon(transfers.fetch, fetches, workdir, Told())
                    await anyio.sleep(0.2)  # it waits for the other one
                    assert storage.moved == []
                    other.send_signal(signal.SIGKILL)
        assert len(storage.moved) == FILES
        assert_has_all(workdir)
    finally:
        other.kill()
        await to_thread.run_sync(other.wait)
        await to_thread.run_sync(clear, root)


def clear(root: Path) -> None:
    """What a dead process left."""
    for left in root.glob("a-*"):
        Workdir.make(root, left.name).close()


async def test_a_file_that_cannot_be_had_fails_each_job_and_keeps_nobody_waiting(
    tmp_path: Path, workdirs: list[Workdir], fetches: list[Fetch]
) -> None:
    site = Site(cache=str(tmp_path / "cache"), retries=0)
    (tmp_path / "there" / "7").unlink()
    (tmp_path / "there" / "8").write_bytes(b"other content")
    workdirs = workdirs[:3]
    failures: list[StagingFailed] = []

    async def job(workdir: Workdir) -> None:
        try:
            await transfers.fetch(fetches, workdir, Told())
        except StagingFailed as exc:
            failures.append(exc)

    async with open_transfers(site, storages={"file": Counted()}) as transfers:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                for workdir in workdirs:
                    group.start_soon(job, workdir)
    assert [sorted(problem.partition(":")[0] for problem in exc.problems) for exc in failures] == [["in/7", "in/8"]] * 3
    for workdir in workdirs:
        assert len(list((workdir.path / "in").iterdir())) == FILES - 2
    assert list(tmp_path.glob("cache/*.part")) == list(tmp_path.glob("cache/*.lock")) == []


async def test_one_job_that_is_cancelled_leaves_its_files_to_the_others(
    tmp_path: Path, workdirs: list[Workdir], fetches: list[Fetch], site: Site, workdir: Workdir
) -> None:
    other = workdirs[0]
    storage = Counted(0.3)
    async with open_transfers(site, storages={"file": storage}) as transfers:
        with anyio.fail_after(20):
            async with anyio.create_task_group() as group:
                with anyio.move_on_after(0.1):
                    group.start_soon(later, transfers, fetches, other)
                    await transfers.fetch(fetches, workdir, Told())
    assert_has_all(other)
    assert list(tmp_path.glob("cache/*.part")) == list(tmp_path.glob("cache/*.lock")) == []


async def later(transfers: Any, fetches: list[Fetch], workdir: Workdir) -> None:
    await anyio.sleep(0.02)
    await transfers.fetch(fetches, workdir, Told())


async def test_the_same_file_by_two_names_in_one_job_is_moved_once(
    fetches: list[Fetch], site: Site, workdir: Workdir
) -> None:
    storage = Counted(0)
    one = fetches[0]
    twice = [one, Fetch("again", one.sources, one.size_bytes, one.checksum, one.lfn)]
    async with open_transfers(site, storages={"file": storage}) as transfers:
        with anyio.fail_after(10):
            await transfers.fetch(twice, workdir, Told())
    assert len(storage.moved) == 1
    assert (workdir.path / "again").read_bytes() == (workdir.path / one.name).read_bytes() == content(0)


async def test_a_file_of_which_only_the_url_is_known_is_moved_each_time(
    fetches: list[Fetch], site: Site, workdir: Workdir
) -> None:
    storage = Counted(0)
    bare = [Fetch(fetch.name, fetch.sources) for fetch in fetches]
    async with open_transfers(site, storages={"file": storage}) as transfers:
        for _ in range(2):
            await transfers.fetch(bare, workdir, Told())
    assert len(storage.moved) == 2 * FILES
    assert_has_all(workdir)


async def test_a_deadline_holds_also_while_another_job_is_waited_for(
    tmp_path: Path, workdirs: list[Workdir], fetches: list[Fetch], workdir: Workdir
) -> None:
    told = Told()
    slow = Site(cache=str(tmp_path / "cache"))
    hurried = Site(cache=str(tmp_path / "cache"), staging_seconds=0.3)
    other = workdirs[0]
    async with (
        open_transfers(slow, storages={"file": Counted(3600)}) as first,
        open_transfers(hurried, storages={"file": Counted(0)}) as second,
        anyio.create_task_group() as group,
    ):
        group.start_soon(first.fetch, fetches, other, Told())
        await until(lambda: len(list(tmp_path.glob("cache/*.lock"))) == FILES)
        with anyio.fail_after(10), pytest.raises(StagingFailed) as failed:
            await second.fetch(fetches, workdir, told)
        assert len(failed.value.problems) >= FILES - 1, "one may still be moved when it is no longer waited for"
        assert len(failed.value.problems) + len(told.files) == FILES
        group.cancel_scope.cancel()


async def test_on_a_full_disk_the_cache_gives_way_to_the_jobs(
    small_disk: Path, cramped: Workdir, tmp_path: Path
) -> None:
    """Its files go; then what does not fit twice is the job's alone."""
    there = tmp_path / "there"
    there.mkdir()
    fetches = []
    for number in range(3):
        data = os.urandom(600_000)
        (there / str(number)).write_bytes(data)
        checksum = Checksum("adler32", f"{zlib.adler32(data):08x}")
        source = (Replica(file_url(there / str(number))),)
        fetches.append(Fetch("in", source, len(data) if number != 2 else None, checksum, f"/vo/{number}"))
    workdir = cramped
    async with open_transfers(Site(cache=str(small_disk / "cache"))) as transfers:
        for number, fetch in enumerate(fetches):
            await transfers.fetch([fetch], workdir, Told())
            assert (workdir.path / "in").read_bytes() == (there / str(number)).read_bytes()
            (workdir.path / "in").unlink()


async def test_a_hundred_files_more_than_are_claimed_at_once_all_arrive(
    tmp_path: Path, workdirs: list[Workdir], site: Site, workdir: Workdir
) -> None:
    (tmp_path / "x").write_bytes(b"x")
    sources = (Replica(file_url(tmp_path / "x")),)
    fetches = [Fetch(f"d/{number}", sources, 1, None, f"/vo/{number}") for number in range(400)]
    other = workdirs[0]
    storage = Counted(0)
    async with open_transfers(site, storages={"file": storage}) as transfers:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as group:
                group.start_soon(transfers.fetch, fetches, workdir, Told())
                group.start_soon(transfers.fetch, list(reversed(fetches)), other, Told())
    assert len(storage.moved) == 400
    assert len(list((workdir.path / "d").iterdir())) == len(list((other.path / "d").iterdir())) == 400


async def test_a_site_whose_cache_cannot_be_one_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, reason in (("https://host/cache", "only a local directory"), (str(tmp_path / "file"), "File exists")):
        with pytest.raises(InvalidSite, match=f"cache: .*{reason}"):
            async with open_transfers(Site(cache=place)):
                pytest.fail("it has none")
