"""What processes use, as the kernel tells it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loadmaster.payload.usage import (
    descendants,
    open_group,
    read_directory,
    read_free_disk,
    read_pss,
    read_session,
    read_sizes,
    read_stat,
    read_tree,
)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start processes in sessions of their own that print a line when they are ready."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            words, start_new_session=True, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        return process

    yield start
    for process in started:
        os.killpg(process.pid, 9)
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_process_reads_itself() -> None:
    own = read_stat(os.getpid())
    assert own is not None
    assert (own.session, own.group, own.state) == (os.getsid(0), os.getpgid(0), "R")
    assert own.resident_pages > 100
    assert own.user_ticks > 0
    assert own.threads == len(os.listdir("/proc/self/task"))
    assert own.start_ticks > 0


def test_a_process_that_is_gone_is_none() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert read_stat(process.pid) is None


def test_a_process_cannot_lie_by_its_name(start: Start, tmp_path: Path) -> None:
    liar = tmp_path / "x) R 1 1 1 ("
    shutil.copy(shutil.which("cat") or "cat", liar)
    process = start(str(liar))
    found = read_stat(process.pid)
    assert found is not None
    assert (found.session, found.group) == (process.pid, process.pid)


def test_memory_and_number_are_of_all_processes_of_the_session(start: Start) -> None:
    hold = "x = bytearray(50_000_000); print('ready', flush=True); input()"
    outer = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold!r}]); "
        f"x = bytearray(30_000_000); p.wait()"
    )
    process = start(sys.executable, "-c", outer)
    assert line(process) == "ready"
    found = read_session(process.pid)
    assert found.processes == 2
    assert 80_000_000 < found.rss_bytes < 200_000_000


def test_cpu_of_children_that_are_gone_is_counted(start: Start) -> None:
    burn = "while time.process_time() < 0.3: pass"
    outer = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time\\n{burn}']); "
        "print('ready', flush=True); input()"
    )
    process = start(sys.executable, "-c", outer)
    assert line(process) == "ready"
    found = read_session(process.pid)
    assert 0.25 <= found.cpu_seconds < 3  # in ticks, each process's rounded down
    assert found.cpu_seconds == found.user_seconds + found.system_seconds
    assert found.processes == 1


def test_system_time_is_told_from_user_time(start: Start) -> None:
    burn = "import os, time\nwhile time.process_time() < 0.3: os.urandom(1 << 20)"
    process = start(sys.executable, "-c", f"{burn}\nprint('ready', flush=True); input()")
    assert line(process) == "ready"
    found = read_session(process.pid)
    assert found.system_seconds > 0.2


def test_threads_are_counted(start: Start) -> None:
    script = (
        "import threading; [threading.Thread(target=threading.Event().wait, daemon=True).start() for _ in range(7)]; "
        "print('ready', flush=True); input()"
    )
    process = start(sys.executable, "-c", script)
    assert line(process) == "ready"
    found = read_session(process.pid)
    assert (found.processes, found.threads) == (1, 8)


def test_bytes_written_are_counted_once_also_by_children_that_are_gone(start: Start, tmp_path: Path) -> None:
    """As the kernel counts them: on some file systems (tmpfs) none are."""
    write = f"open({str(tmp_path)!r} + '/f', 'wb').write(bytes(3_000_000)); print(open('/proc/self/io').read())"
    outer = (
        f"import subprocess, sys; text = subprocess.run([sys.executable, '-c', {write!r}], capture_output=True, "
        "text=True).stdout; print(text.split()[11], flush=True); input()"
    )
    process = start(sys.executable, "-c", outer)
    written = int(line(process))
    found = read_session(process.pid)
    assert written <= found.written_bytes < 2 * max(written, 500_000)


def test_shared_memory_counts_once_in_pss(start: Start) -> None:
    """Ten children that share 50 MB: 550 MB of resident size, 50 MB of memory."""
    script = (
        "import os, signal\n"
        "shared = b'x' * 50_000_000\n"
        "for _ in range(10):\n"
        "    if os.fork() == 0: signal.pause()\n"
        "print('ready', flush=True); input()"
    )
    process = start(sys.executable, "-c", script)
    assert line(process) == "ready"
    found = read_session(process.pid)
    assert found.processes == 11
    assert found.rss_bytes > 550_000_000
    assert 50_000_000 < read_pss(found.pids) < 150_000_000


def test_memory_that_nobody_has_mapped_is_in_no_processs_figures(start: Start) -> None:
    """What we do not see without a memory cgroup: a memfd, and files of tmpfs."""
    script = (
        "import os\nfd = os.memfd_create('x')\nfor _ in range(60): os.write(fd, bytes(1 << 20))\n"
        "print('ready', flush=True); input()"
    )
    process = start(sys.executable, "-c", script)
    assert line(process) == "ready"
    found = read_session(process.pid)
    assert found.rss_bytes < 60 << 20
    assert read_pss(found.pids) < 60 << 20


def test_pss_of_processes_that_are_gone_is_none_at_all() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    assert read_pss([process.pid]) == 0
    assert read_pss([]) == 0


def test_a_process_cannot_hide_its_memory(as_ordinary_user: Callable[[str], str]) -> None:
    """One that is not dumpable shows nobody its pages: its resident size is taken."""
    script = """
import ctypes, signal
from loadmaster.payload.usage import read_pss, read_session
ready, hidden = os.pipe()
child = os.fork()
if child == 0:
    os.setsid()
    memory = bytearray(40_000_000)
    ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)
    os.write(hidden, b"!")
    signal.pause()
os.read(ready, 1)
try:
    open(f"/proc/{child}/smaps_rollup").read()
except PermissionError:
    print("hidden")
print(read_pss(read_session(child).pids))
os.kill(child, 9)
os.waitpid(child, 0)
"""
    hidden, size = as_ordinary_user(script).split()
    assert hidden == "hidden"
    assert int(size) > 40_000_000


def test_a_tree_is_read_below_its_shim_and_without_it(start: Start) -> None:
    """The shell stands in for the shim: its children count, what it has waited for too, itself does not."""
    burn = f"{sys.executable} -c 'import time\nwhile time.process_time() < 0.2: pass'"
    process = start("sh", "-c", f"{burn}; sleep 100 & sh -c 'sleep 100 & echo ready; wait' & read line")
    assert line(process) == "ready"
    found = read_tree(process.pid, helpers=0)
    assert found.processes == 3
    assert process.pid not in found.pids
    assert 0.15 <= found.cpu_seconds < 2
    assert read_tree(process.pid, helpers=1).processes == 2


def test_a_tree_that_has_ended_tells_its_cpu_until_it_is_reaped(as_ordinary_user: Callable[[str], str]) -> None:
    """The exact end: whatever went by between two samples is in what the first process has waited for."""
    script = """
import time
from loadmaster.payload.usage import read_tree

def burn():
    while time.process_time() < 0.3: pass

def run(work):
    if pid := os.fork():
        return pid
    work()
    os._exit(0)

first = run(lambda: os.waitpid(run(burn), 0))
os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
print(read_tree(first, helpers=0).cpu_seconds)
os.waitpid(first, 0)
"""
    assert 0.25 <= float(as_ordinary_user(script)) < 3  # in ticks, each process's rounded down


def test_a_chain_is_followed_to_its_end(start: Start) -> None:
    script = (
        "import os, signal\n"
        "for _ in range(60):\n"
        "    if os.fork(): signal.pause()\n"
        "print('ready', flush=True); signal.pause()"
    )
    process = start(sys.executable, "-c", script)
    assert line(process) == "ready"
    found = list(descendants(process.pid))
    assert len(found) == len(set(found)) == 60


def test_nobody_elses_session_is_counted(start: Start) -> None:
    first, second = start("cat"), start("cat")
    assert read_session(first.pid).processes == read_session(second.pid).processes == 1


def test_a_group_is_who_lives_in_it(start: Start) -> None:
    """A zombie is nobody: waiting for one that nobody reaps would never end."""
    script = (
        "import os\n"
        "if os.fork() == 0: os._exit(0)\n"  # a zombie: never waited for
        "r, w = os.pipe()\n"
        "if os.fork() == 0: os.close(w); os.read(r, 1); os._exit(0)\n"  # lives as long as its parent
        "os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT); print('ready', flush=True); os.close(r); input()"
    )
    process = start(sys.executable, "-c", script)
    assert line(process) == "ready"
    group = open_group(process.pid)
    assert len(group) == 2
    for pidfd in group:
        os.close(pidfd)


def test_a_look_at_the_whole_machine_takes_milliseconds() -> None:
    begun = time.perf_counter()
    read_session(os.getsid(0))
    each = (time.perf_counter() - begun) / sum(name.isdecimal() for name in os.listdir("/proc"))
    assert each < 0.001


def test_processes_of_others_are_read_or_passed_over_by_an_ordinary_user(
    as_ordinary_user: Callable[[str], str],
) -> None:
    script = "from loadmaster.payload.usage import read_session; print(read_session(os.getsid(0)).processes)"
    assert int(as_ordinary_user(script)) >= 1


# -- files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """An empty directory, and a descriptor of it."""
    path = tmp_path / "folder"
    path.mkdir()
    descriptor = os.open(path, os.O_RDONLY)
    yield path, descriptor
    os.close(descriptor)


def written(path: Path, size: int) -> Path:
    """A file whose blocks are on the disk: some file systems give them out only then."""
    with open(path, "wb") as file:
        file.write(os.urandom(size))
        file.flush()
        os.fsync(file.fileno())
    return path


def test_a_directory_takes_the_blocks_of_all_its_files(folder: tuple[Path, int]) -> None:
    path, descriptor = folder
    (path / "below" / "deeper").mkdir(parents=True)
    written(path / "a", 1_000_000)
    written(path / "below" / "deeper" / "b", 2_000_000)
    found = read_directory(descriptor)
    assert 3_000_000 <= found.size_bytes < 3_200_000
    assert (found.files, found.whole) == (2, True)


def test_holes_do_not_count(folder: tuple[Path, int]) -> None:
    path, descriptor = folder
    with open(path / "sparse", "wb") as file:
        file.truncate(10**12)
    assert read_directory(descriptor).size_bytes < 1_000_000


def test_a_file_with_several_names_counts_once(folder: tuple[Path, int]) -> None:
    path, descriptor = folder
    written(path / "a", 1_000_000)
    for name in "bcd":
        os.link(path / "a", path / name)
    found = read_directory(descriptor)
    assert 1_000_000 <= found.size_bytes < 1_200_000
    assert found.files == 4


def test_links_are_not_followed(folder: tuple[Path, int], tmp_path: Path) -> None:
    path, descriptor = folder
    (tmp_path / "outside").mkdir()
    written(tmp_path / "outside" / "big", 1_000_000)
    (path / "directory").symlink_to(tmp_path / "outside")
    (path / "file").symlink_to(tmp_path / "outside" / "big")
    (path / "loop").symlink_to(".")
    found = read_directory(descriptor)
    assert found.size_bytes < 100_000
    assert (found.files, found.whole) == (3, True)


def test_a_walk_is_bounded_and_says_so(folder: tuple[Path, int]) -> None:
    path, descriptor = folder
    for number in range(50):
        (path / str(number)).touch()
    assert read_directory(descriptor, at_most_files=50).whole
    found = read_directory(descriptor, at_most_files=20)
    assert (found.files, found.whole) == (20, False)
    assert not read_directory(descriptor, at_most_seconds=-1).whole


def test_a_tree_too_deep_for_the_system_is_not_whole(folder: tuple[Path, int]) -> None:
    _, descriptor = folder
    at, opened = os.dup(descriptor), []
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=at)
        opened.append(at)
        at = os.open("d" * 200, os.O_RDONLY, dir_fd=at)
    os.close(at)
    found = read_directory(descriptor)
    assert not found.whole
    for above in reversed(opened):
        os.rmdir("d" * 200, dir_fd=above)
        os.close(above)


def test_a_directory_that_nobody_may_enter_is_not_whole(as_ordinary_user: Callable[[str], str]) -> None:
    script = """
import os
from loadmaster.payload.usage import read_directory
os.mkdir("closed", 0o000); open("file", "w").close()
print(read_directory(os.open(".", os.O_RDONLY)))
os.rmdir("closed"); os.unlink("file")
"""
    assert "files=1, whole=False" in as_ordinary_user(script)


def test_a_file_without_a_name_is_seen_by_the_free_disk_only(small_disk: Path) -> None:
    descriptor = os.open(small_disk, os.O_RDONLY)
    free = read_free_disk(descriptor)
    with open(small_disk / "f", "wb") as file:
        os.unlink(small_disk / "f")
        file.write(bytes(500_000))
        file.flush()
        assert read_directory(descriptor).size_bytes < 100_000
        assert 500_000 <= free - read_free_disk(descriptor) < 600_000
    os.close(descriptor)


def test_one_log_for_both_streams_counts_once(tmp_path: Path) -> None:
    with open(tmp_path / "a", "wb") as first, open(tmp_path / "b", "wb") as second:
        first.write(bytes(100))
        second.write(bytes(10))
        first.flush()
        second.flush()
        again = os.dup(first.fileno())
        assert read_sizes([first.fileno(), again]) == 100
        assert read_sizes([first.fileno(), second.fileno()]) == 110
        os.close(again)
