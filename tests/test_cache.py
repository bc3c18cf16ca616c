"""The node's cache: one transfer for all who want a file, never a wrong byte, never more than its size."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import until
from loadmaster.errors import InvalidSite
from loadmaster.staging import cache as module
from loadmaster.staging.cache import Cache, Entry, Filling, Linking, key_of
from loadmaster.staging.plan import Fetch
from loadmaster.storage.base import FileInfo, Replica
from loadmaster.storage.checksums import Checksum, running
from loadmaster.workdir import Workdir


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path / "cache", 1_000_000)
    yield cache
    cache.close()


@pytest.fixture
def hard(tmp_path: Path) -> Iterator[Cache]:
    cache = Cache(tmp_path / "cache", 1_000_000, link="hard")
    yield cache
    cache.close()


def fill(cache: Cache, key: str, content: bytes = b"content", algorithm: str = "adler32") -> None:
    """Bring a file in, as a transfer does."""
    filling = cache.claim(key, len(content))
    assert isinstance(filling, Filling)
    descriptor = filling.create("x")
    os.write(descriptor, content)
    os.close(descriptor)
    passed = running(algorithm)
    passed.update(content)
    filling.info = FileInfo(len(content), passed.result())
    filling.rename("x", "y")
    filling.finish()
    filling.close()


def got(cache: Cache, key: str, workdir: Workdir, name: str = "got") -> bytes | None:
    """What a job is given; None when it has to be fetched."""
    claimed = cache.claim(key)
    assert claimed is not None
    with contextlib.closing(claimed):
        if isinstance(claimed, Filling):
            return None
        assert claimed.place(workdir, name)
    return (workdir.path / name).read_bytes()


def data_of(cache: Cache) -> Path:
    """The one file in it."""
    (found,) = [path for path in cache.root.iterdir() if "." not in path.name and path.name != "total"]
    return found


def names_in(cache: Cache) -> set[str]:
    return {path.name.partition(".")[2] or "data" for path in cache.root.iterdir() if path.name != "total"}


def stored_bytes(cache: Cache) -> int:
    return sum(path.stat().st_size for path in cache.root.iterdir() if "." not in path.name and path.name != "total")


# -- keys --------------------------------------------------------------------------------------------------------

SOURCE = (Replica("https://host/file"),)
ADLER, SHA = Checksum("adler32", "0a1b2c3d"), Checksum("sha256", "ab" * 32)


def test_a_file_is_known_by_what_cannot_change() -> None:
    assert key_of(Fetch("a", SOURCE, checksum=SHA)) == key_of(Fetch("b", (Replica("s3://b/x"),), checksum=SHA))
    one, other = (key_of(Fetch("a", (Replica(f"https://{host}/x"),), 5, ADLER, "/vo/x")) for host in "ab")
    assert one == other is not None
    assert key_of(Fetch("a", SOURCE, 5, ADLER, "/vo/x")) != key_of(Fetch("a", SOURCE, 5, ADLER, "/vo/y"))
    assert key_of(Fetch("a", SOURCE, 5, ADLER)) != key_of(Fetch("a", (Replica("https://host/other"),), 5, ADLER))
    assert key_of(Fetch("a", SOURCE, 5)) is None
    assert key_of(Fetch("a", SOURCE, checksum=ADLER)) is None


# -- one file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["copy", "hard"])
def test_what_was_brought_in_is_given_to_later_jobs(tmp_path: Path, workdir: Workdir, link: Linking) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1_000_000, link=link)) as first:
        assert got(first, "k", workdir) is None
        fill(first, "k", b"content")
        assert got(first, "k", workdir) == b"content"
    with contextlib.closing(Cache(tmp_path / "cache", 1_000_000, link=link)) as later:
        assert got(later, "k", workdir, "d/again") == b"content"
        assert (workdir.path / "got").samefile(workdir.path / "d" / "again") == (link == "hard")
        assert got(later, "k", workdir) == b"content"
        assert sorted(path.name for path in workdir.path.iterdir()) == ["d", "got"]
        assert names_in(later) == {"data", "json"}
        claimed = later.claim("k")
        assert isinstance(claimed, Entry)
        assert claimed.info == FileInfo(7, Checksum("adler32", f"{zlib.adler32(b'content'):08x}"))
        claimed.close()


def test_a_job_that_writes_to_its_file_writes_to_its_own(cache: Cache, workdir: Workdir) -> None:
    fill(cache, "k", b"content")
    assert got(cache, "k", workdir) == b"content"
    (workdir.path / "got").write_bytes(b"changed")
    assert got(cache, "k", workdir) == b"content"
    assert data_of(cache).stat().st_mode & 0o777 == 0o444


def test_a_script_stays_one(cache: Cache, workdir: Workdir) -> None:
    filling = cache.claim("k")
    assert isinstance(filling, Filling)
    descriptor = filling.create("x")
    os.fchmod(descriptor, 0o755)
    os.close(descriptor)
    filling.workdir = workdir
    filling.rename("x", "first")
    assert (workdir.path / "first").stat().st_mode & 0o777 == 0o755, "a small file is there at once"
    got(cache, "k", workdir)
    assert (workdir.path / "got").stat().st_mode & 0o777 == 0o755


def overwrite(path: Path) -> None:
    path.chmod(0o644)
    path.write_bytes(b"CONTENT")


def overwrite_and_hide(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"CONTENT")
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)


def truncated(path: Path) -> None:
    os.chmod(path, 0o600)
    os.truncate(path, 3)


def a_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


TAMPERINGS = [overwrite, overwrite_and_hide, replaced, truncated, Path.unlink, a_link, a_fifo]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("algorithm", ["adler32", "sha256"])
@pytest.mark.parametrize("link", ["copy", "hard"])
@pytest.mark.parametrize("tamper", TAMPERINGS)
def test_what_somebody_has_changed_is_fetched_again(
    tmp_path: Path, workdir: Workdir, tamper: Callable[[Path], object], link: Linking, algorithm: str
) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1_000_000, link=link)) as cache:
        fill(cache, "k", b"content", algorithm)
        assert got(cache, "k", workdir) == b"content"
        tamper(data_of(cache))
        assert got(cache, "k", workdir) is None
        fill(cache, "k", b"content", algorithm)
        assert got(cache, "k", workdir) == b"content"


@pytest.mark.parametrize("tamper", [overwrite, overwrite_and_hide, truncated])
def test_a_job_that_writes_to_a_file_it_shares_is_found_out(
    hard: Cache, workdir: Workdir, tamper: Callable[[Path], object]
) -> None:
    """The file of the work directory is the one in the cache."""
    fill(hard, "k", b"content")
    got(hard, "k", workdir)
    tamper(workdir.path / "got")
    assert got(hard, "k", workdir, "next") is None


def test_a_file_that_was_only_linked_and_unlinked_is_read_once_and_believed(hard: Cache, workdir: Workdir) -> None:
    fill(hard, "k", b"content")
    for name in ("a", "b"):
        assert got(hard, "k", workdir, name) == b"content"
    (workdir.path / "a").unlink()
    assert got(hard, "k", workdir, "c") == b"content"


def test_after_the_machine_was_started_again_a_file_is_read_before_it_is_believed(
    tmp_path: Path, workdir: Workdir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had not reached the disk may be zeros; its size and times say nothing of that."""
    boot = tmp_path / "boot_id"
    boot.write_text("one")
    monkeypatch.setattr(module, "_BOOT", boot)
    with contextlib.closing(Cache(tmp_path / "cache", 1_000_000)) as cache:
        fill(cache, "good")
        fill(cache, "bad", b"zeros..")
        path = next(path for path in cache.root.iterdir() if path.is_file() and path.read_bytes() == b"zeros..")
        record = path.with_suffix(".json")
        overwrite(path)
        found = path.stat()
        seen = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns, "inode": found.st_ino}
        record.write_text(json.dumps(json.loads(record.read_text()) | seen))
    boot.write_text("two")
    with contextlib.closing(Cache(tmp_path / "cache", 1_000_000)) as cache:
        assert got(cache, "good", workdir) == b"content"
        assert got(cache, "bad", workdir) is None


def test_a_damaged_record_is_none(cache: Cache, workdir: Workdir) -> None:
    for damage in (b"", b"{", b"[]", b'{"key": 1}', b"\xff"):
        fill(cache, "k")
        data_of(cache).with_suffix(".json").write_bytes(damage)
        assert got(cache, "k", workdir) is None


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_others_can_write_to_is_no_place_for_a_cache(tmp_path: Path, mode: int) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(mode)
    with pytest.raises(InvalidSite, match=r"cache: .*is not a directory that only this user can write to"):
        Cache(tmp_path / "cache", 1)
    with pytest.raises(InvalidSite, match=r"cache: .*Not a directory|File exists"):
        (tmp_path / "file").touch()
        Cache(tmp_path / "file", 1)


# -- waiting -----------------------------------------------------------------------------------------------------


async def test_many_who_want_a_file_wait_for_one_transfer(cache: Cache, workdir: Workdir) -> None:
    transfers = 0

    async def job(number: int) -> None:
        nonlocal transfers
        for file in range(20):
            async with cache.hold(f"file {file}") as held:
                if isinstance(held, Filling):
                    transfers += 1
                    descriptor = await to_thread.run_sync(held.create, "x")
                    await to_thread.run_sync(os.write, descriptor, f"content {file}".encode())
                    await anyio.sleep(0.005)  # the transfer
                    os.close(descriptor)
                    held.workdir = workdir
                    await to_thread.run_sync(held.rename, "x", f"{number}/{file}")
                else:
                    assert held is not None
                    assert await to_thread.run_sync(held.place, workdir, f"{number}/{file}")

    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(job, number)
    assert transfers == 20
    for number in range(8):
        for file in range(20):
            assert (workdir.path / str(number) / str(file)).read_bytes() == f"content {file}".encode()


async def test_when_one_fails_the_next_one_tries(cache: Cache) -> None:
    order: list[str] = []

    async def job(name: str) -> None:
        async with cache.hold("k") as held:
            assert isinstance(held, Filling)
            os.close(await to_thread.run_sync(held.create, "x"))
            order.append(name)
            await anyio.sleep(0.01)

    async with anyio.create_task_group() as group:
        for name in "abc":
            group.start_soon(job, name)
    assert sorted(order) == ["a", "b", "c"]
    assert names_in(cache) == set()


async def test_one_that_is_cancelled_while_it_waits_leaves_nothing(cache: Cache) -> None:
    filling = await to_thread.run_sync(cache.claim, "k")
    assert isinstance(filling, Filling)
    with anyio.move_on_after(0.05) as scope:
        async with cache.hold("k"):
            pytest.fail("somebody has it")
    assert scope.cancelled_caught
    await to_thread.run_sync(filling.close)
    with anyio.fail_after(5):
        async with cache.hold("k") as held:
            assert isinstance(held, Filling)


async def test_one_that_writes_nothing_is_not_waited_for_and_one_that_writes_is(cache: Cache) -> None:
    filling = await to_thread.run_sync(cache.claim, "k")
    assert isinstance(filling, Filling)
    descriptor = await to_thread.run_sync(filling.create, "x")
    ended = False

    async def write() -> None:
        nonlocal ended
        for _ in range(10):
            await to_thread.run_sync(os.write, descriptor, b"x")
            await anyio.sleep(0.05)
        ended = True

    async with anyio.create_task_group() as group:
        group.start_soon(write)
        async with cache.hold("k", patience_seconds=0.2) as held:
            assert held is None
            assert ended
    os.close(descriptor)
    await to_thread.run_sync(filling.close)


FILLER = """
import os, sys, time
from pathlib import Path
from loadmaster.staging.cache import Cache
filling = Cache(Path(sys.argv[1]), 1_000_000).claim("k")
os.write(filling.create("x"), b"half")
print("filling", flush=True)
sys.stdin.read()
"""


async def test_one_that_is_killed_is_noticed_at_once_by_those_who_wait(cache: Cache, workdir: Workdir) -> None:
    words = [sys.executable, "-c", FILLER, str(cache.root)]
    other = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None
    assert other.stdout is not None
    with other.stdin, other.stdout:
        assert await to_thread.run_sync(other.stdout.readline) == b"filling\n"
        held: list[object] = []

        async def wait() -> None:
            async with cache.hold("k") as claimed:
                held.append(claimed)

        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.1)  # it waits
            assert held == []
            other.send_signal(signal.SIGKILL)
            with anyio.fail_after(5):
                await until(lambda: bool(held))
        await to_thread.run_sync(other.wait)
    assert isinstance(held[0], Filling)
    assert names_in(cache) == set(), "half a file is gone"


JOB = """
import os, sys
from pathlib import Path
import anyio
from anyio import to_thread
from loadmaster.staging.cache import Cache, Filling
from loadmaster.workdir import Workdir

cache = Cache(Path(sys.argv[1]), 1_000_000)
workdir = Workdir.make(Path(sys.argv[2]), sys.argv[3])
log = os.open(sys.argv[4], os.O_WRONLY | os.O_APPEND)

async def job(number):
    for file in range(20):
        async with cache.hold(f"file {file}") as held:
            if isinstance(held, Filling):
                os.write(log, b"%d\\n" % file)
                descriptor = await to_thread.run_sync(held.create, "x")
                await to_thread.run_sync(os.write, descriptor, b"%d" % file)
                await anyio.sleep(0.005)
                held.workdir = workdir
                await to_thread.run_sync(held.rename, "x", f"{number}/{file}")
            else:
                await to_thread.run_sync(held.place, workdir, f"{number}/{file}")
        assert (workdir.path / f"{number}/{file}").read_bytes() == b"%d" % file

async def main():
    async with anyio.create_task_group() as group:
        for number in range(4):
            group.start_soon(job, number)

anyio.run(main, backend=sys.argv[5])
workdir.close()
"""


def test_two_processes_with_four_jobs_each_make_one_transfer_for_each_file(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "transfers"
    log.touch()
    words = [sys.executable, "-c", JOB, str(cache.root), str(tmp_path / "roots")]
    others = [
        subprocess.Popen([*words, name, str(log), backend]) for name, backend in (("a", "asyncio"), ("b", "trio"))
    ]
    assert [other.wait(30) for other in others] == [0, 0]
    assert sorted(map(int, log.read_text().split())) == list(range(20))


# -- how much ----------------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(tmp_path: Path, workdir: Workdir) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1000)) as cache:
        for key in "abc":
            fill(cache, key, key.encode() * 300)
        assert got(cache, "a", workdir) is not None
        fill(cache, "d", b"d" * 300)
        assert got(cache, "b", workdir) is None
        assert [got(cache, key, workdir) is not None for key in "acd"] == [True, True, True]
        assert stored_bytes(cache) <= 1000


def test_what_is_in_use_is_not_evicted_and_what_finds_no_room_is_for_its_job_only(
    tmp_path: Path, workdir: Workdir
) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1000)) as cache:
        fill(cache, "a", b"a" * 800)
        in_use = cache.claim("a")
        assert isinstance(in_use, Entry)
        filling = cache.claim("b", 800)
        assert isinstance(filling, Filling)
        filling.workdir = workdir
        descriptor = filling.create("x")
        os.write(descriptor, b"b" * 800)
        os.close(descriptor)
        filling.rename("x", "b")
        assert (workdir.path / "b").read_bytes() == b"b" * 800
        assert in_use.place(workdir, "a")
        in_use.close()
        assert got(cache, "a", workdir) == b"a" * 800
        assert got(cache, "b", workdir) is None
        fill(cache, "b", b"b" * 800)
        assert got(cache, "a", workdir) is None, "nobody uses it any more"
        fill(cache, "huge", b"x" * 2000)
        assert got(cache, "huge", workdir) is None
        assert got(cache, "b", workdir) is not None, "not evicted for one that does not fit anyway"


def test_what_a_job_has_a_hard_link_to_is_not_evicted(tmp_path: Path, workdir: Workdir) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1000, link="hard")) as cache:
        fill(cache, "a", b"a" * 600)
        got(cache, "a", workdir)
        fill(cache, "b", b"b" * 600)
        assert got(cache, "a", workdir) is not None
        assert got(cache, "b", workdir) is None
        (workdir.path / "got").unlink()
        fill(cache, "b", b"b" * 600)
        assert got(cache, "b", workdir) is not None


def test_what_a_killed_process_was_bringing_in_is_removed_by_the_next_that_opens_the_cache(tmp_path: Path) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1000)) as cache:
        fill(cache, "a", b"a" * 600)
        words = [sys.executable, "-c", FILLER, str(cache.root)]
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        assert "part" in names_in(cache)
    with contextlib.closing(Cache(tmp_path / "cache", 1000)) as cache:
        assert "part" not in names_in(cache)
        assert stored_bytes(cache) == int((cache.root / "total").read_text()) == 600


def test_what_dead_processes_left_is_counted_and_removed(tmp_path: Path, workdir: Workdir) -> None:
    with contextlib.closing(Cache(tmp_path / "cache", 1000)) as cache:
        fill(cache, "a", b"a" * 600)
        words = [sys.executable, "-c", FILLER, str(cache.root)]
        subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
        assert names_in(cache) == {"data", "json", "part", "lock"}
        data_of(cache).with_name("0" * 40).write_bytes(b"no record")
        (cache.root / "precious").write_bytes(b"somebody else's")
        (cache.root / "total").write_text("nonsense")
        fill(cache, "b", b"b" * 600)
        assert (cache.root / "precious").exists()
        (cache.root / "precious").unlink()
        assert names_in(cache) == {"data", "json"}
        assert stored_bytes(cache) == 600
        assert got(cache, "b", workdir) is not None


def test_a_full_disk_is_made_room_on(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache", 10_000_000)
    workdir = Workdir.make(small_disk, "job")
    try:
        for key in "ab":
            fill(cache, key, key.encode() * 400_000)
        fill(cache, "c", b"c" * 400_000)
        assert stored_bytes(cache) <= 800_000
        assert got(cache, "c", workdir) == b"c" * 400_000, "its copy took another one's place"
    finally:
        workdir.close()
        cache.close()


def test_room_is_made_when_it_is_asked_for(cache: Cache, workdir: Workdir) -> None:
    for key in "abc":
        fill(cache, key, bytes(1000))
    assert cache.make_room(1500) == 2000
    assert got(cache, "c", workdir) is not None
    assert cache.make_room(10**9) == 1000
    assert names_in(cache) == set()


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["fill", "crash", "forget"])), max_size=25))
@settings(max_examples=60, deadline=None)
def test_it_never_holds_more_than_it_may_nor_a_wrong_byte(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]]
) -> None:
    base = tmp_path_factory.mktemp("property")
    workdir = Workdir.make(base, "job")
    cache = Cache(base / "cache", 1000)
    try:
        for key, step in steps:
            content = key.encode() * (100 * (ord(key) - ord("a") + 1))
            found = got(cache, key, workdir)
            assert found in {None, content}
            if step == "crash":
                cache.close()
                (base / "cache" / "total").unlink(missing_ok=True)
                cache = Cache(base / "cache", 1000)
            elif step == "forget":
                for path in (base / "cache").glob("*.json"):
                    path.unlink()
                (base / "cache" / "total").unlink(missing_ok=True)
            elif found is None:
                fill(cache, key, content)
                assert got(cache, key, workdir) == content
            assert stored_bytes(cache) <= 1000 or step == "forget"
    finally:
        cache.close()
        workdir.close()


def test_copies_are_right_whatever_the_file_system_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "source").write_bytes(content)

    def refuses(*_: object) -> int:
        raise OSError(errno.EXDEV, "another file system")

    for _ in range(2):
        with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("wb") as target:
            module.copy(source.fileno(), target.fileno())
        assert (tmp_path / "target").read_bytes() == content
        monkeypatch.setattr(os, "copy_file_range", refuses)


def test_threads_that_want_the_same_file_share_it(cache: Cache, root: Path) -> None:
    """Claims and evictions from many threads: each gets the right bytes, or the right to bring them in."""
    errors: list[BaseException] = []

    def job(number: int) -> None:
        workdir = Workdir.make(root, f"job {number}")
        try:
            for turn in range(60):
                key = str(turn % 3)
                claimed = cache.claim(key)
                if claimed is None:
                    continue
                with contextlib.closing(claimed):
                    if isinstance(claimed, Entry):
                        if claimed.place(workdir, "x"):
                            assert (workdir.path / "x").read_bytes() == key.encode() * 1000
                        continue
                    descriptor = claimed.create("x")
                    os.write(descriptor, key.encode() * 1000)
                    os.close(descriptor)
                    claimed.rename("x", "y")
                if turn % 10 == number:
                    cache.make_room(1)
        except BaseException as exc:
            errors.append(exc)
        finally:
            workdir.close()

    threads = [threading.Thread(target=job, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert "lock" not in names_in(cache)
