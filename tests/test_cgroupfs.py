"""One control group: made for us alone, walked whatever is in it, removed."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from groups import groups_in_sight, own_v2
from loadmaster.payload.cgroupfs import GroupDirectory, figures, remove_left


@pytest.fixture
def parent() -> Iterator[Path]:
    """A group all of whose groups are ours to look at."""
    before = groups_in_sight()
    if (own := own_v2()) is None or not os.access(own, os.W_OK):
        pytest.skip("no cgroup v2 that we may write to")
    there = GroupDirectory.make(own, "parent")
    yield there.path
    assert there.remove()
    assert groups_in_sight() - before == set(), "a test left control groups behind"


def test_an_empty_group_that_nobody_holds_is_removed_and_others_are_not(parent: Path) -> None:
    held, left = GroupDirectory.make(parent, "held"), GroupDirectory.make(parent, "left")
    left.close()
    (left.path / "below").mkdir()
    for name in ("foreign", "loadmaster-x", "loadmaster-x-0123"):
        (parent / name).mkdir()
    remove_left(parent)
    assert sorted(path.name for path in parent.iterdir() if path.is_dir()) == sorted(
        ["foreign", "loadmaster-x", "loadmaster-x-0123", held.path.name]
    )
    assert held.remove()


def test_a_group_that_somebody_is_in_is_never_removed(parent: Path) -> None:
    left = GroupDirectory.make(parent, "left")
    (left.path / "below").mkdir()
    with subprocess.Popen(["sleep", "60"]) as process:
        left.write("cgroup.procs", str(process.pid))
        left.close()
        remove_left(parent)
        assert (left.path / "below").exists(), "the payload may need it"
        assert left.pids() == {process.pid}
        left.kill()
        assert process.wait() == -9
    remove_left(parent)
    assert not left.path.exists()


def test_making_and_removing_at_once_lose_no_group(parent: Path) -> None:
    """A group is empty, and looks left, between its making and its lock."""
    ended = threading.Event()

    def remove() -> None:
        while not ended.is_set():
            remove_left(parent)

    removing = threading.Thread(target=remove)
    removing.start()
    try:
        for _ in range(300):
            made = GroupDirectory.make(parent, "x")
            assert made.path.exists()
            assert made.remove()
            assert not made.path.exists()
    finally:
        ended.set()
        removing.join()


def test_only_who_is_in_the_group_is_killed(parent: Path) -> None:
    group = GroupDirectory.make(parent, "x")
    with subprocess.Popen(["sleep", "60"]) as ours, subprocess.Popen(["sleep", "60"]) as other:
        group.write("cgroup.procs", str(ours.pid))
        assert group.pids() == {ours.pid}
        group.kill()
        assert ours.wait() == -9
        assert other.poll() is None
        other.kill()
    assert not group.is_populated()
    assert group.remove()


def test_where_no_group_can_be_made_it_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        GroupDirectory.make(tmp_path / "nowhere", "x")


def test_figures_are_read_from_lines_of_two_words() -> None:
    assert figures("a 1\nb 22\nodd\nc max\nd 1 2\n") == {"a": 1, "b": 22}
