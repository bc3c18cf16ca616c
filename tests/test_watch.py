"""Which outputs are finished: the decisions as plain functions, the watching with real files."""

from __future__ import annotations

import fcntl
import os
import signal
from collections.abc import Callable
from math import inf
from pathlib import Path

import anyio
import pytest
from anyio import to_thread
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.staging import watch
from loadmaster.staging.watch import (
    BUSY_SECONDS,
    MOST_TIMES,
    QUIET_SECONDS,
    Closes,
    Content,
    Finished,
    FinishedOutputs,
    Likeness,
    Patterns,
    has_writer,
    likeness,
)
from loadmaster.workdir import Workdir

# -- when to look ----------------------------------------------------------------------------------------------------


def test_a_file_is_looked_at_when_it_has_been_closed_for_a_while() -> None:
    closes = Closes()
    closes.closed("a", 100.0)
    assert closes.due(100.0) == []
    assert closes.next_due == 100.0 + QUIET_SECONDS[0]
    assert closes.due(closes.next_due) == ["a"]
    assert (closes.due(inf), closes.next_due) == ([], inf)


def test_a_file_that_is_closed_again_is_waited_for_again_and_for_longer_each_time() -> None:
    closes = Closes()
    for number, quiet in enumerate(QUIET_SECONDS):
        now = 1000.0 * number
        closes.closed("a", now)
        closes.closed("a", now + quiet / 2)
        assert closes.due(now + quiet) == []
        assert closes.due(now + quiet * 1.5) == ["a"]
        closes.finished("a")
    closes.closed("a", 10_000.0)
    assert closes.next_due == inf


def test_a_file_with_a_writer_is_looked_at_again_some_times_and_afresh_after_a_close() -> None:
    closes = Closes()
    for _ in range(2):
        closes.closed("a", 0.0)
        now = QUIET_SECONDS[0]
        assert closes.due(now) == ["a"]
        for later in BUSY_SECONDS:
            closes.busy("a", now)
            assert closes.due(now + later * 0.9) == []
            now += later
            assert closes.due(now) == ["a"]
        closes.busy("a", now)
        assert closes.next_due == inf


def test_only_so_many_files_are_remembered() -> None:
    closes = Closes(most_files=3)
    for number in range(10):
        closes.closed(f"f{number}", 0.0)
    assert sorted(closes.due(inf)) == ["f0", "f1", "f2"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["close", "finish", "busy"]), st.floats(0, 5)), max_size=200
    )
)
def test_whatever_is_closed_how_often_work_is_bounded_and_no_last_close_is_forgotten(
    steps: list[tuple[str, str, float]],
) -> None:
    """Each file is taken at most `MOST_TIMES`; one that was taken less often is looked at after its last close."""
    closes, now = Closes(), 0.0
    taken = dict.fromkeys("abc", 0)
    closed: set[str] = set()
    looked = 0
    for name, answer, seconds in steps:
        now += seconds
        for due in closes.due(now):
            looked += 1
            assert due in closed
            if answer == "busy":
                closes.busy(due, now)
            elif answer == "finish":
                closes.finished(due)
                taken[due] += 1
        if answer == "close":
            closes.closed(name, now)
            closed.add(name)
            assert len(closes._queue) <= 3
            if taken[name] < MOST_TIMES:
                assert closes.next_due < inf
    assert max(taken.values()) <= MOST_TIMES
    assert looked <= (1 + len(BUSY_SECONDS)) * len(steps)
    rest = closes.due(inf)
    assert len(rest) == len(set(rest))


# -- the same or not -------------------------------------------------------------------------------------------------

WAS = Content(1, 10, 1000, 1000)


@pytest.mark.parametrize(
    ("now", "like"),
    [
        (Content(1, 10, 1000, 1000), Likeness.SAME),
        (Content(2, 10, 1000, 1000), Likeness.OTHER),
        (Content(1, 11, 1000, 1000), Likeness.OTHER),
        (Content(1, 10, 1001, 1001), Likeness.OTHER),
        (Content(1, 10, 1000, 1001), Likeness.UNSURE),
    ],
)
def test_a_file_is_the_same_if_all_that_can_be_seen_is(now: Content, like: Likeness) -> None:
    assert likeness(WAS, now) is like


def test_a_file_that_had_just_changed_may_have_changed_again() -> None:
    assert likeness(Content(1, 10, 1000, 1000, settled=False), WAS) is Likeness.UNSURE


def test_a_content_is_settled_once_it_is_older_than_the_kernels_clock_is_coarse(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
    try:
        changed = os.fstat(descriptor).st_ctime_ns
        assert not Content.of(descriptor, changed + 1_000_000).settled
        assert Content.of(descriptor, changed + 1_000_000_000).settled
    finally:
        os.close(descriptor)


# -- patterns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "found"),
    [
        ("a.root", "a.root", True),
        ("*.root", "a.root", True),
        ("*.root", "d/a.root", False),
        ("*.root", ".a.root", False),
        ("d/*.root", "d/a.root", True),
        ("d", "d/e/f", True),
        ("*", ".0123.part", False),
        ("[ab].root", "[ab].root", True),
        ("[ab].root", "a.root", True),
        ("d/e", "d", False),
    ],
)
def test_patterns_match_as_in_a_shell(pattern: str, name: str, found: bool, workdir: Workdir) -> None:
    """And as the outputs are looked for at the end."""
    assert (Patterns([pattern]).find(name) == pattern) is found
    path = workdir.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    expanded = {
        inside
        for match in workdir.matches(pattern)
        for inside in (workdir.files_below(match) if workdir.is_directory(match) else [match])
    }
    assert (name in expanded) is found


def test_only_directories_that_lead_somewhere_are_watched() -> None:
    patterns = Patterns(["a.root", "d/*/x", "results"])
    assert [patterns.lead_to(name) for name in ("", "d", "d/e", "d/e/x/y", "results/any/thing")] == [True] * 5
    assert [patterns.lead_to(name) for name in ("b", "e/f", "d/e/f", "result")] == [False] * 4


# -- writers ---------------------------------------------------------------------------------------------------------


def test_a_writer_is_seen_and_a_reader_is_none(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    ours = os.open(path, os.O_RDONLY)
    try:
        assert not has_writer(ours)
        with path.open("r"):
            assert not has_writer(ours)
        with path.open("a"):
            assert has_writer(ours)
        os.link(path, tmp_path / "b")
        with (tmp_path / "b").open("a"):
            assert has_writer(ours)
        assert not has_writer(ours)
        assert fcntl.fcntl(ours, fcntl.F_GETLEASE) == fcntl.F_UNLCK
    finally:
        os.close(ours)


def test_somebody_who_opens_the_file_meanwhile_ends_nobody(
    tmp_path: Path, as_ordinary_user: Callable[[str], str]
) -> None:
    """The kernel tells whoever has a lease by a signal that ends a process, unless another one is asked for."""
    script = f"""
import fcntl, os, subprocess, sys
from loadmaster.staging import watch
open("a", "w").close()
descriptor = os.open("a", os.O_RDONLY)
real = fcntl.fcntl
def slow(fd, command, argument=0):
    if command == fcntl.F_SETLEASE and argument == fcntl.F_UNLCK:
        writer = subprocess.Popen(["/bin/sh", "-c", "echo x > a"])  # waits for the lease
        try:
            writer.wait(0.5)
        except subprocess.TimeoutExpired:
            print("waits")
        done = real(fd, command, argument)
        writer.wait(10)
        return done
    return real(fd, command, argument)
watch.fcntl.fcntl = slow
print(watch.has_writer(descriptor))
print(os.path.getsize("a"), {int(signal.SIGURG)})
"""
    assert as_ordinary_user(script).split() == ["waits", "False", "2", str(int(signal.SIGURG))]


# -- watching --------------------------------------------------------------------------------------------------------


async def seen(outputs: FinishedOutputs, count: int) -> list[str]:
    """The names of the next ones."""
    found: list[Finished] = []
    with anyio.fail_after(20):
        while len(found) < count:
            found += await outputs.next()
    return sorted(each.name for each in found)


async def write(path: Path, text: str = "content") -> None:
    await to_thread.run_sync(path.write_text, text)


async def test_what_is_there_already_is_found_and_what_comes(workdir: Workdir) -> None:
    await write(workdir.path / "a.dat")
    with FinishedOutputs(workdir, ["*.dat"]) as outputs:
        assert await seen(outputs, 1) == ["a.dat"]
        await write(workdir.path / "b.dat")
        await write(workdir.path / "b.txt")
        await write(workdir.path / "c")
        await to_thread.run_sync((workdir.path / "c").rename, workdir.path / "c.dat")
        assert await seen(outputs, 2) == ["b.dat", "c.dat"]


async def test_a_file_is_told_once_unless_it_changes(workdir: Workdir) -> None:
    with FinishedOutputs(workdir, ["a"]) as outputs:
        await write(workdir.path / "a")
        assert await seen(outputs, 1) == ["a"]
        await to_thread.run_sync((workdir.path / "a").open("ab").close)
        with anyio.move_on_after(QUIET_SECONDS[1] + 0.5) as scope:
            await outputs.next()
        assert scope.cancelled_caught
        await write(workdir.path / "a", "other")
        assert await seen(outputs, 1) == ["a"]


async def test_a_file_is_finished_when_its_last_writer_has_closed_it(workdir: Workdir) -> None:
    with FinishedOutputs(workdir, ["a"]) as outputs:
        writer = await to_thread.run_sync((workdir.path / "a").open, "wb")
        await write(workdir.path / "a", "x")
        with anyio.move_on_after(0.5) as scope:
            await outputs.next()
        assert scope.cancelled_caught
        await to_thread.run_sync(writer.close)
        assert await seen(outputs, 1) == ["a"]


async def test_more_than_the_kernel_remembers_is_looked_for(workdir: Workdir) -> None:
    most = int(await to_thread.run_sync(Path("/proc/sys/fs/inotify/max_queued_events").read_text))
    if most > 100_000:
        pytest.skip("the kernel remembers too much to be overwhelmed here")

    def fill() -> None:
        for number in range(most // 2 + 1000):
            (workdir.path / f"x{number}").touch()
        (workdir.path / "last.dat").write_text("x")

    with FinishedOutputs(workdir, ["*.dat"]) as outputs:
        with anyio.move_on_after(0.2):
            await outputs.next()
        await to_thread.run_sync(fill)
        assert await seen(outputs, 1) == ["last.dat"]


async def test_directories_are_followed_and_only_so_many(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(first: int, last: int) -> None:
        for number in range(first, last):
            (workdir.path / f"d/s{number}").mkdir(parents=True)
            (workdir.path / f"d/s{number}/x").write_text("x")

    monkeypatch.setattr(watch, "MOST_DIRECTORIES", 6)
    with FinishedOutputs(workdir, ["d"]) as outputs:
        with anyio.move_on_after(0.2):
            await outputs.next()
        await to_thread.run_sync(make, 0, 2)
        assert await seen(outputs, 2) == ["d/s0/x", "d/s1/x"]
        await to_thread.run_sync(make, 2, 20)
        await seen(outputs, 2)
        assert len(outputs._watched) == 6


async def test_a_link_in_the_place_of_a_directory_is_not_followed(workdir: Workdir, tmp_path: Path) -> None:
    def swap() -> None:
        (tmp_path / "outside").mkdir()
        (tmp_path / "outside/x").write_text("secret")
        (workdir.path / "d").symlink_to(tmp_path / "outside")
        (workdir.path / "other").mkdir()
        (workdir.path / "other/x").write_text("x")

    with FinishedOutputs(workdir, ["d", "other"]) as outputs:
        with anyio.move_on_after(0.1):
            await outputs.next()
        await to_thread.run_sync(swap)
        assert await seen(outputs, 1) == ["other/x"]
        with anyio.move_on_after(0.3) as scope:
            await outputs.next()
        assert scope.cancelled_caught


async def test_a_directory_that_goes_makes_room_for_another(workdir: Workdir) -> None:
    with FinishedOutputs(workdir, ["d"]) as outputs:
        for _ in range(3):
            await to_thread.run_sync((workdir.path / "d").mkdir)
            await write(workdir.path / "d/x")
            assert await seen(outputs, 1) == ["d/x"]
            await to_thread.run_sync((workdir.path / "d/x").unlink)
            await to_thread.run_sync((workdir.path / "d").rmdir)
            with anyio.move_on_after(0.2):
                await outputs.next()
            assert list(outputs._watched.values()) == [""]
