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

from loadmaster.payload.usage import open_group, read_session, read_stat

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
    assert own.cpu_ticks > 0
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
    assert 80_000_000 < found.memory_bytes < 200_000_000


def test_cpu_of_children_that_are_gone_is_counted(start: Start) -> None:
    burn = "while time.process_time() < 0.3: pass"
    outer = (
        f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time\\n{burn}']); "
        "print('ready', flush=True); input()"
    )
    process = start(sys.executable, "-c", outer)
    assert line(process) == "ready"
    assert read_session(process.pid).cpu_seconds >= 0.3
    assert read_session(process.pid).processes == 1


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
