"""Where control groups can be made, found in the words of several kinds of nodes, and for real."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from groups import groups_in_sight, own_v2
from loadmaster.payload.cgroupfs import GroupDirectory
from loadmaster.payload.hierarchies import (
    V1,
    V2,
    Candidate,
    Hierarchies,
    candidates_of,
    choose,
    find_hierarchies,
    own_candidates,
)

UNIFIED = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"

V1_NODE = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
"""


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    before = groups_in_sight()
    yield
    assert groups_in_sight() - before == set(), "a test left control groups behind"


# -- where we are ------------------------------------------------------------------------------------------------


def test_on_a_unified_node_there_is_one_hierarchy() -> None:
    found = list(own_candidates("0::/user.slice/pilot.service\n", UNIFIED))
    assert found == [Candidate(Path("/sys/fs/cgroup/user.slice/pilot.service"), V2)]


def test_on_a_v1_node_each_useful_one_is_found() -> None:
    text = "9:name=systemd:/x\n5:devices:/x\n4:memory:/condor/slot1\n2:cpu,cpuacct:/condor/slot1\n"
    found = [one.path for one in own_candidates(text, V1_NODE)]
    assert found == [Path("/sys/fs/cgroup/memory/condor/slot1"), Path("/sys/fs/cgroup/cpu,cpuacct/condor/slot1")]


def test_on_a_hybrid_node_v2_comes_first() -> None:
    mounts = V1_NODE + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    found = [one.kind for one in own_candidates("4:memory:/a\n0::/b\n", mounts)]
    assert found == [V2, V1]


@pytest.mark.parametrize(
    ("root", "path", "directory"),
    [
        ("/docker/abc", "/docker/abc", "/sys/fs/cgroup"),
        ("/docker/abc", "/docker/abc/job", "/sys/fs/cgroup/job"),
        ("/docker/abc", "/docker/abcdef", None),
        ("/docker/abc", "/", None),
        ("/", "/../../other", None),
        ("/..", "/", None),
    ],
)
def test_in_a_container_only_what_is_mounted_is_in_sight(root: str, path: str, directory: str | None) -> None:
    mounts = UNIFIED.replace(" / ", f" {root} ", 1)
    found = [str(one.path) for one in own_candidates(f"0::{path}\n", mounts)]
    assert found == ([directory] if directory else [])


def test_a_mount_with_a_space_in_its_name_is_read() -> None:
    mounts = UNIFIED.replace("/sys/fs/cgroup", "/my\\040groups")
    assert [one.path for one in own_candidates("0::/\n", mounts)] == [Path("/my groups")]


def test_a_group_with_a_colon_in_its_name_is_read() -> None:
    assert [str(one.path) for one in own_candidates("0::/a:b\n", UNIFIED)] == ["/sys/fs/cgroup/a:b"]


def test_the_last_mount_of_several_is_the_one_in_sight() -> None:
    mounts = UNIFIED + UNIFIED.replace("/sys/fs/cgroup", "/later")
    assert [str(one.path) for one in own_candidates("0::/\n", mounts)] == ["/later"]


def test_without_any_hierarchy_nothing_is_found() -> None:
    assert list(own_candidates("", "22 1 0:1 / / rw - ext4 /dev/sda rw\n")) == []


def test_a_delegated_directory_belongs_to_the_mount_it_is_below() -> None:
    mounts = V1_NODE + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    given = [Path("/sys/fs/cgroup/unified/site"), Path("/sys/fs/cgroup/memory/site"), Path("/tmp")]
    assert [(one.path, one.kind) for one in candidates_of(given, mounts)] == [(given[0], V2), (given[1], V1)]


# -- what there is -----------------------------------------------------------------------------------------------


def test_what_a_delegated_group_has_comes_first_and_the_rest_from_our_own() -> None:
    delegated, own, v1 = Candidate(Path("/d"), V2, True), Candidate(Path("/o"), V2), Candidate(Path("/m"), V1)
    core = {"cgroup.kill", "cgroup.events", "cgroup.freeze", "cpu.stat"}
    found = choose(
        [
            (delegated, frozenset(core | {"pids.max"})),
            (own, frozenset(core)),
            (v1, frozenset({"memory.limit_in_bytes", "cpu.stat"})),
        ]
    )
    assert found == Hierarchies(kill=Path("/d"), events=Path("/d"), cpu=Path("/d"), pids=Path("/d"), memory=Path("/m"))
    assert found.directories == (Path("/d"), Path("/m"))


def test_an_older_kernel_freezes_before_it_kills() -> None:
    found = choose([(Candidate(Path("/o"), V2), frozenset({"cgroup.freeze", "cgroup.events", "cpu.stat"}))])
    assert (found.kill, found.freeze) == (None, Path("/o"))


def test_the_throttling_figures_of_v1_are_not_taken_for_cpu_time() -> None:
    assert choose([(Candidate(Path("/c"), V1), frozenset({"cpu.stat"}))]).cpu is None


def test_nothing_is_told_with_its_reasons() -> None:
    assert str(choose([], ["/o: Permission denied"])) == "none (/o: Permission denied)"


# -- for real ----------------------------------------------------------------------------------------------------


def test_an_ordinary_user_to_whom_nothing_is_delegated_has_nothing(as_ordinary_user: Callable[[str], str]) -> None:
    said = as_ordinary_user("from loadmaster.payload.hierarchies import *; print(find_hierarchies())")
    if "none (" not in said:
        pytest.skip(f"here ordinary users have groups: {said}")
    assert os.strerror(errno.EACCES) in said or os.strerror(errno.EROFS) in said or said == "none ()\n"


def test_a_directory_that_is_no_control_group_is_refused_by_name(tmp_path: Path) -> None:
    assert f"{tmp_path}: no control group" in find_hierarchies([tmp_path]).refusals


def test_a_delegated_directory_that_is_not_there_is_refused_by_name() -> None:
    if (own := own_v2()) is None:
        pytest.skip("no cgroup v2 in sight")
    assert f"{own / 'nowhere'}: No such file or directory" in find_hierarchies([own / "nowhere"]).refusals


@pytest.fixture
def delegated() -> Iterator[GroupDirectory]:
    if (own := own_v2()) is None or not os.access(own, os.W_OK):
        pytest.skip("no cgroup v2 that we may write to")
    there = GroupDirectory.make(own, "delegated")
    yield there
    assert there.remove()


def test_a_delegated_group_wins_and_its_groups_get_what_controllers_it_has(delegated: GroupDirectory) -> None:
    found = find_hierarchies([delegated.path])
    assert (found.kill, found.cpu) == (delegated.path, delegated.path)
    available = (delegated.read("cgroup.controllers") or "").split()
    for item in ("memory", "pids", "io"):
        assert (getattr(found, item) == delegated.path) is (item in available)
    enabled = (delegated.read("cgroup.subtree_control") or "").split()
    assert set(enabled) == {"memory", "pids", "io"} & set(available)


def test_a_delegated_group_with_somebody_in_it_is_left_as_it_is(delegated: GroupDirectory) -> None:
    """No controller can be enabled there, and its processes are not ours to move: kill and CPU are what remains."""
    with subprocess.Popen(["sleep", "60"]) as process:
        delegated.write("cgroup.procs", str(process.pid))
        found = find_hierarchies([delegated.path])
        process.kill()
    assert (found.kill, found.cpu) == (delegated.path, delegated.path)
    assert found.memory != delegated.path
    assert (delegated.read("cgroup.subtree_control") or "").split() == []


def test_looking_leaves_our_own_groups_as_they_are() -> None:
    before = Path("/proc/self/cgroup").read_text(), groups_in_sight()
    find_hierarchies()
    assert (Path("/proc/self/cgroup").read_text(), groups_in_sight()) == before
