"""A payload's control groups, with the kernel's own; skipped where nobody may make any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import anyio
import pytest
from anyio import to_thread

from conftest import BECOME_ORDINARY, NOBODY, TEMPORARY, until
from groups import JOIN, ZOO, Join, groups_in_sight, joined, own_v2, v1_only
from loadmaster.payload.cgroup import Group, OutOfMemory, io_of, memory_of, number
from loadmaster.payload.cgroupfs import GroupDirectory
from loadmaster.payload.hierarchies import Hierarchies, find_hierarchies

MB: Final = 1_000_000

HOLD: Final = "print('ready', flush=True); import time; time.sleep(60)"


@pytest.fixture(autouse=True)
def no_group_is_left() -> Iterator[None]:
    before = groups_in_sight()
    yield
    assert groups_in_sight() - before == set(), "a test left control groups behind"


@pytest.fixture(params=["found", "v1"])
def hierarchies(request: pytest.FixtureRequest, tmp_path: Path) -> Hierarchies:
    """What this machine has, and what it would have without v2."""
    found = find_hierarchies() if request.param == "found" else v1_only(tmp_path)
    if not found.directories:
        pytest.skip(f"no control group can be made here: {'; '.join(found.refusals) or 'no hierarchy'}")
    return found


@pytest.fixture
def disk() -> str:
    """A directory whose files are on a disk, not in memory."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", TEMPORARY], capture_output=True, text=True, check=True).stdout
    if kind.strip() in {"tmpfs", "ramfs"}:
        pytest.skip(f"{TEMPORARY} is in memory")
    return TEMPORARY


def needs(hierarchies: Hierarchies, item: str) -> None:
    if getattr(hierarchies, item) is None:
        pytest.skip(f"groups here have no {item}: {hierarchies}")


@pytest.fixture
def group(hierarchies: Hierarchies) -> Iterator[Group]:
    group = Group(hierarchies, "7/../x y")
    yield group
    with anyio.from_thread.start_blocking_portal() as portal:
        assert portal.call(group.end, 20)
    deadline = time.monotonic() + 5
    while not group.remove():
        assert time.monotonic() < deadline, "the group cannot be removed"
    assert not any(path.exists() for path in group.directories)


@pytest.fixture
def join(group: Group, tmp_path: Path) -> Iterator[Join]:
    started: list[subprocess.Popen[str]] = []

    def join(*argv: str) -> subprocess.Popen[str]:
        started.append(joined(group, argv, tmp_path))
        return started[-1]

    yield join
    group.kill()
    for process in started:
        process.kill()
        process.communicate()


def python(script: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", "-c", script)


def zoo(name: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, str(ZOO / f"{name}.py"), *words)


def place(group: Group, parent: Path | None) -> Path:
    return next(path for path in group.directories if path.parent == parent)


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def wait_for(path: Path, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} does not come"
        time.sleep(0.01)


# -- joining -----------------------------------------------------------------------------------------------------


def test_a_hostile_job_id_makes_a_group_in_its_place(group: Group, hierarchies: Hierarchies) -> None:
    assert [path.parent for path in group.directories] == list(hierarchies.directories)
    assert all(path.name.startswith("loadmaster-7____x_y-") for path in group.directories)


def test_a_process_joins_and_we_stay_where_we_are(group: Group, join: Join) -> None:
    before = Path("/proc/self/cgroup").read_text()
    process = join(*python(HOLD))
    assert line(process) == "ready"
    names = Path(f"/proc/{process.pid}/cgroup").read_text()
    assert all(path.name in names for path in group.directories)
    assert Path("/proc/self/cgroup").read_text() == before
    assert group.is_populated()
    assert not group.remove(), "a group with somebody in it cannot be removed"
    assert group.usage().processes == 1


def test_two_payloads_of_one_job_have_groups_of_their_own(hierarchies: Hierarchies, group: Group) -> None:
    second = Group(hierarchies, "7/../x y")
    assert set(second.directories).isdisjoint(group.directories)
    assert second.remove()


def test_where_no_group_can_be_made_it_says_why() -> None:
    with pytest.raises(OSError, match=r"no control group can be made here: /a: Permission denied"):
        Group(Hierarchies(refusals=("/a: Permission denied",)), "7")


def test_a_group_that_is_made_in_part_is_made_not_at_all(hierarchies: Hierarchies) -> None:
    before = groups_in_sight()
    half = Hierarchies(kill=hierarchies.directories[0], memory=Path("/sys/fs/cgroup/nowhere"))
    with pytest.raises(FileNotFoundError):
        Group(half, "7")
    assert groups_in_sight() == before


# -- usage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("1",), ("1", "orphans")], ids=["ignored", "orphans"])
def test_cpu_of_children_nobody_waited_for_is_seen(
    hierarchies: Hierarchies, group: Group, join: Join, tmp_path: Path, words: tuple[str, ...]
) -> None:
    """Zoo r04: of this /proc and the parent's own figures know next to nothing."""
    needs(hierarchies, "cpu")
    output = join(*zoo("r04_cpu_hidden", *words)).communicate(timeout=60)[0]
    burnt = float(output.split()[-1])
    used = group.usage().cpu_seconds
    assert used is not None
    assert burnt > 0.2
    assert burnt * 0.9 < used < burnt * 2 + 2


def test_user_and_system_time_are_told_apart(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    """As the process itself is told them; what it used before it joined is not the group's."""
    needs(hierarchies, "cpu")
    script = (
        "import os, time; before = os.times()[:2]\n"
        "while time.process_time() < 1: os.urandom(1 << 20)\nprint(*before, *os.times()[:2])"
    )
    output = join(*python(script)).communicate(timeout=60)[0]
    user_before, system_before, user, system = map(float, output.split())
    usage = group.usage()
    assert usage.user_seconds is not None
    assert usage.system_seconds is not None
    assert user - user_before - 0.1 <= usage.user_seconds <= user + 0.1
    assert system - system_before - 0.1 <= usage.system_seconds <= system + 0.1


def test_memory_in_a_memfd_is_seen(hierarchies: Hierarchies, group: Group, join: Join, tmp_path: Path) -> None:
    """Zoo r01: 300 MB in nobody's RSS or PSS."""
    needs(hierarchies, "memory")
    join(*zoo("r01_memfd_hog"))
    wait_for(tmp_path / "ready")
    usage = group.usage()
    assert usage.memory_bytes is not None
    assert usage.peak_bytes is not None
    assert 300 << 20 <= usage.memory_bytes < 360 << 20
    assert usage.peak_bytes >= usage.memory_bytes * 0.98


def test_page_cache_is_no_memory_of_the_payload(hierarchies: Hierarchies, group: Group, join: Join, disk: str) -> None:
    """As the zoo's r12: who reads or writes files makes the kernel keep them, which is free memory all the same."""
    needs(hierarchies, "memory")
    with tempfile.NamedTemporaryFile(dir=disk) as file:
        script = f"f = open({file.name!r}, 'wb')\nfor _ in range(100): f.write(bytes(1_000_000))\nf.flush()\n{HOLD}"
        assert line(join(*python(script))) == "ready"
        usage = group.usage()
    assert usage.memory_bytes is not None
    assert 1 * MB < usage.memory_bytes < 40 * MB


def test_pages_that_children_share_count_once(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    """Zoo r03's way: ten children of a parent with 100 MB."""
    needs(hierarchies, "memory")
    script = (
        "import os, signal\nx = bytearray(100_000_000)\n"
        "for _ in range(10):\n    if not os.fork(): signal.pause()\n"
        "print('ready', flush=True); signal.pause()"
    )
    assert line(join(*python(script))) == "ready"
    usage = group.usage()
    assert usage.processes == 11
    assert usage.memory_bytes is not None
    assert 95 * MB < usage.memory_bytes < 160 * MB


def test_threads_count_as_tasks_not_as_processes(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    needs(hierarchies, "pids")
    script = (
        "import threading\nfor _ in range(7): threading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    assert line(join(*python(script + HOLD))) == "ready"
    usage = group.usage()
    assert (usage.processes, usage.tasks) == (1, 8)


def test_a_group_nobody_is_in_uses_nothing(group: Group) -> None:
    usage = group.usage()
    assert (usage.processes, usage.tasks or 0, usage.oom_kills, usage.refused_forks) == (0, 0, 0, 0)
    assert (usage.cpu_seconds or 0) == 0
    assert (usage.memory_bytes or 0) < MB


# -- limits ------------------------------------------------------------------------------------------------------


def test_a_memory_limit_kills_and_says_so(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    needs(hierarchies, "memory")
    assert group.limit_memory(60 * MB)
    process = join(*python(f"x = bytearray(200_000_000)\n{HOLD}"))
    assert process.communicate(timeout=30)[0] == ""
    assert process.returncode == -9
    assert group.usage().oom_kills >= 1
    assert group.out_of_memory() is OutOfMemory.OWN_LIMIT


def test_a_memfd_does_not_get_round_the_memory_limit(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    needs(hierarchies, "memory")
    assert group.limit_memory(60 * MB)
    process = join(*zoo("r01_memfd_hog"))
    process.communicate(timeout=30)
    assert process.returncode == -9
    assert group.out_of_memory() is OutOfMemory.OWN_LIMIT


def test_below_its_memory_limit_a_payload_lives_and_page_cache_does_not_count(
    hierarchies: Hierarchies, group: Group, join: Join, disk: str
) -> None:
    """54 of 60 MB held, and 100 MB of files written on the way."""
    needs(hierarchies, "memory")
    assert group.limit_memory(60 * MB)
    with tempfile.NamedTemporaryFile(dir=disk) as file:
        hold = "x = bytearray(44_000_000)"  # and some megabytes of interpreter
        write = f"f = open({file.name!r}, 'wb')\nfor _ in range(100): f.write(bytes(1_000_000))\nf.flush()"
        assert line(join(*python(f"{hold}\n{write}\n{HOLD}"))) == "ready"
        assert group.usage().oom_kills == 0
        assert group.out_of_memory() is None


def test_a_payload_killed_by_a_limit_of_its_own_is_not_told_it_met_ours(
    hierarchies: Hierarchies, group: Group, join: Join
) -> None:
    needs(hierarchies, "memory")
    if "memory.events.local" not in os.listdir(place(group, hierarchies.memory)):
        pytest.skip("v1 does not say whose limit it was")
    assert group.limit_memory(200 * MB)
    inner = place(group, hierarchies.memory)
    (inner / "cgroup.subtree_control").write_text("+memory")
    (inner / "mine").mkdir()
    (inner / "mine" / "memory.max").write_text("20000000")
    words = (str(os.open(inner / "mine" / "cgroup.procs", os.O_WRONLY)),)
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", JOIN, *words, *python("x = bytearray(100_000_000)")],
        pass_fds=(int(words[0]),),
    )
    os.close(int(words[0]))
    assert process.wait() == -9
    assert group.out_of_memory() is OutOfMemory.ELSEWHERE


def test_a_limit_of_tasks_stops_a_fork_bomb(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    """Without any limit of the user's: the bomb stands still, and what it holds is counted."""
    needs(hierarchies, "pids")
    assert group.limit_tasks(40)
    script = (
        "import os\n"
        "while True:\n"
        "    try: os.fork()\n"
        "    except BlockingIOError: pass"
    )  # fmt: skip
    join(*python(script))
    deadline = time.monotonic() + 20
    while (usage := group.usage()).refused_forks == 0:
        assert time.monotonic() < deadline
    assert usage.tasks is not None
    assert usage.tasks <= 40


def test_a_limit_the_kernel_refuses_is_not_held(hierarchies: Hierarchies, group: Group) -> None:
    assert not group.limit_tasks(-5)


def test_without_a_controller_a_limit_is_not_held(hierarchies: Hierarchies) -> None:
    bare = Group(Hierarchies(kill=hierarchies.directories[0]), "7")
    try:
        assert not bare.limit_memory(MB)
        assert not bare.limit_tasks(5)
        assert bare.usage().memory_bytes is None
        assert bare.out_of_memory() is None
    finally:
        assert bare.remove()


# -- ending ------------------------------------------------------------------------------------------------------


async def test_a_kill_reaches_whoever_is_in_it(group: Group, join: Join, tmp_path: Path) -> None:
    """Zoo t04: daemons with a scrubbed environment, in sessions of their own."""
    join(*zoo("t04_daemon_scrubbed"))
    await until((tmp_path / "ready").exists)
    with anyio.fail_after(10):
        assert await group.end(10)
    assert not await to_thread.run_sync(group.is_populated)
    assert (await to_thread.run_sync(group.usage)).processes == 0


async def test_a_leader_that_has_ended_does_not_hide_its_threads(group: Group, join: Join, tmp_path: Path) -> None:
    """Zoo t20: `cgroup.kill` alone passes it by."""
    join(*zoo("t20_zombie_leader"))
    await until((tmp_path / "ready").exists)
    assert await group.end(10)


async def test_a_fork_bomb_is_ended(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    if hierarchies.pids is None:
        pytest.skip("not without a limit of tasks on a machine of others")
    await to_thread.run_sync(group.limit_tasks, 300)
    script = "import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass"
    join(*python(script))
    with anyio.fail_after(20):
        while ((await to_thread.run_sync(group.usage)).tasks or 0) < 100:
            pass
    begun = time.monotonic()
    assert await group.end(20)
    assert time.monotonic() - begun < 20


async def test_stopped_processes_are_ended(group: Group, join: Join) -> None:
    process = join(*python("import os, signal; print('ready', flush=True); os.kill(os.getpid(), signal.SIGSTOP)"))
    assert line(process) == "ready"
    assert await group.end(10)


async def test_waiting_ends_when_the_last_one_has(group: Group, join: Join) -> None:
    process = join(*python("import os, time\nif os.fork(): os._exit(0)\nprint('ready', flush=True); time.sleep(0.3)"))
    assert line(process) == "ready"
    with anyio.fail_after(10):
        await group.wait_empty()
    assert not await to_thread.run_sync(group.is_populated)


async def test_waiting_takes_no_cpu(group: Group, join: Join) -> None:
    assert line(join(*python(HOLD))) == "ready"
    with anyio.move_on_after(0.1):
        await group.wait_empty()
    used = time.process_time()
    with anyio.move_on_after(0.5) as waiting:
        await group.wait_empty()
    assert waiting.cancelled_caught
    assert time.process_time() - used < 0.2


async def test_a_group_nobody_has_joined_is_empty(group: Group) -> None:
    with anyio.fail_after(5):
        await group.wait_empty()
        assert await group.end(5)


async def test_what_cannot_be_ended_in_time_is_told(group: Group, join: Join) -> None:
    assert line(join(*python(HOLD))) == "ready"
    assert not await group.end(0)


def test_groups_a_payload_made_in_its_own_are_removed(group: Group, join: Join, hierarchies: Hierarchies) -> None:
    """Deep, wide, with somebody in them, and closed to us as far as that goes."""
    for top in group.directories:
        script = (
            "import os, sys\n"
            f"os.chdir({str(top)!r})\n"
            "for n in range(30): os.mkdir(f'wide{n}')\n"
            "for n in range(60):\n    os.mkdir('d' * 100); os.chdir('d' * 100)\n"
            "open('cgroup.procs', 'w').write('0')\n"
            f"os.chmod({str(top)!r} + '/cgroup.procs', 0); os.chmod({str(top)!r} + '/wide1', 0); os.chmod('..', 0)\n"
        )
        assert line(join(*python(script + HOLD))) == "ready"
        assert group.is_populated()
    group.kill()
    # The fixture ends the rest, and removes it all.


def test_a_group_that_vanished_troubles_nobody(group: Group) -> None:
    for path in group.directories:
        path.rmdir()
    assert group.usage().processes == 0
    assert group.usage().cpu_seconds is None
    assert not group.is_populated()
    assert not group.limit_tasks(5)
    group.kill()


async def test_waiting_for_a_group_that_vanished_returns(group: Group) -> None:
    for path in group.directories:
        path.rmdir()
    with anyio.fail_after(5):
        await group.wait_empty()


def test_many_looks_from_threads_at_once(group: Group, join: Join) -> None:
    assert line(join(*python(HOLD))) == "ready"
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(group.usage().processes)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 8


def test_the_groups_of_an_agent_that_died_are_removed_by_the_next(hierarchies: Hierarchies) -> None:
    left, living = Group(hierarchies, "left"), Group(hierarchies, "living")
    (left.directories[0] / "made-by-the-payload").mkdir()
    left.close()
    find_hierarchies(hierarchies.directories)
    assert all(path.exists() for path in living.directories), "somebody needs them"
    assert not any(path.exists() for path in left.directories)
    assert living.remove()


def test_an_outliving_payload_keeps_its_groups(hierarchies: Hierarchies, group: Group, join: Join) -> None:
    """Its agent has died: nobody holds the lock, but somebody is in them."""
    assert line(join(*python(HOLD))) == "ready"
    group.close()
    find_hierarchies(hierarchies.directories)
    assert group.is_populated()
    assert all(path.exists() for path in group.directories)


# -- an ordinary user ----------------------------------------------------------------------------------------------


IMPORTS: Final = """
import json, os, subprocess, sys, time
from pathlib import Path
from loadmaster.payload.cgroup import Group
from loadmaster.payload.hierarchies import find_hierarchies
"""

DELEGATED: Final = """
there = Path(sys.argv[1])
found = find_hierarchies([there / "payloads"])
own = Path("/proc/self/cgroup").read_text()
group = Group(found, "42")
process = subprocess.Popen(
    ["/bin/sh", "-c", "echo 0; exec sleep 60"], stdout=group.descriptors[0], start_new_session=True)
while Path(f"/proc/{process.pid}/comm").read_text() != "sleep\\n": time.sleep(0.01)
inside = group.usage().processes
anyio.run(group.end, 10)
print(json.dumps({
    "items": sorted(item for item, _ in found.items()), "all_there": set(found.directories) == {there / "payloads"},
    "inside": inside, "ended": process.wait(), "cpu": group.usage().cpu_seconds is not None,
    "removed": group.remove(), "moved": Path("/proc/self/cgroup").read_text() != own}))
"""


def test_an_ordinary_user_has_what_was_delegated() -> None:
    """As a batch system or systemd delegates: a group of the user's, the agent in one group of it, payloads in another."""
    own = own_v2()
    if own is None or not os.access(own, os.W_OK) or os.geteuid() != 0:
        pytest.skip("only root can delegate a group of v2")
    there = GroupDirectory.make(own, "delegated")
    try:
        if available := (there.read("cgroup.controllers") or "").split():
            there.write("cgroup.subtree_control", " ".join(f"+{name}" for name in available if name != "hugetlb"))
        for name in ("agent", "payloads"):
            (there.path / name).mkdir()
        for folder in (there.path, there.path / "agent", there.path / "payloads"):
            os.chown(folder, NOBODY, NOBODY)
            for name in ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control"):
                os.chown(folder / name, NOBODY, NOBODY)
        enter = f"open({str(there.path / 'agent' / 'cgroup.procs')!r}, 'w').write('0')\n"
        words = [sys.executable, "-I", "-c", IMPORTS + enter + BECOME_ORDINARY + DELEGATED, str(there.path)]
        done = subprocess.run(words, cwd="/", capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert {"kill", "events", "cpu"} <= set(said.pop("items"))
        assert said == {"all_there": True, "inside": 1, "ended": -9, "cpu": True, "removed": True, "moved": False}
    finally:
        assert there.remove()


# -- files of other kernels ------------------------------------------------------------------------------------------


def test_memory_of_each_version_is_what_cannot_be_taken_back() -> None:
    v2 = "anon 1000\nfile 9000\nkernel 70\nshmem 200\nfile_mapped 8000\ninactive_anon 1200\nunevictable 0\n"
    v1 = "cache 900\nrss 5\nshmem 7\ntotal_cache 9000\ntotal_rss 1000\ntotal_shmem 200\ntotal_inactive_file 8000\n"
    old = "cache 900\nrss 5\ntotal_cache 9000\ntotal_rss 1000\ntotal_active_anon 900\ntotal_inactive_anon 200\n"
    assert memory_of(v2) == 1200
    assert memory_of(v1) == 1200
    assert memory_of(old + "total_unevictable 100\n") == 1200


def test_io_of_all_devices_is_added_up() -> None:
    text = "8:0 rbytes=4096 wbytes=512 rios=1 wios=1 dbytes=0 dios=0\n253:1 rbytes=1000 wbytes=0\n7:0 \n"
    assert io_of(text) == (5096, 512)
    assert io_of("") == (0, 0)


def test_a_limit_that_is_none_is_no_number() -> None:
    assert [number("12\n"), number("max\n"), number(""), number(None)] == [12, None, None, None]
