"""One process in a session of its own, started, waited for and reaped without anybody's child watcher."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from conftest import until
from loadmaster.description import PayloadSpec
from loadmaster.payload.command import argv_of
from loadmaster.payload.process import ExitRecord, Process
from loadmaster.payload.usage import read_stat

ENV = {"PATH": os.environ["PATH"]}

DEADLY = [
    number
    for number in range(1, signal.SIGRTMAX + 1)
    if number not in (signal.SIGCHLD, signal.SIGCONT, signal.SIGURG, signal.SIGWINCH)  # ignored by default
    and number not in (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)  # stop by default
    and not 31 < number < signal.SIGRTMIN  # the C library's own
    # A test run in the background has some ignored, and its payloads with it; these two are reset.
    and (number in (signal.SIGPIPE, signal.SIGXFSZ) or signal.getsignal(number) is not signal.SIG_IGN)
]

Run = Callable[[str], Process]


@pytest.fixture
def printed(tmp_path: Path) -> Path:
    return tmp_path / "printed"


@pytest.fixture
def run(tmp_path: Path, printed: Path) -> Iterator[Run]:
    """Start a piece of shell whose output goes to `printed`."""
    with printed.open("wb") as file:
        yield lambda script: Process(
            argv_of(PayloadSpec(command=script, env=ENV), tmp_path, near=True),
            env=ENV,
            cwd=tmp_path,
            stdout=file.fileno(),
            stderr=file.fileno(),
        )


async def ended(process: Process) -> ExitRecord:
    await process.wait()
    return process.reap()


def gone(pid: int) -> bool:
    found = read_stat(pid)
    return found is None or found.state in "ZX"  # a zombie is for whoever its new parent is


# -- how it ends -------------------------------------------------------------------------------------------------


async def test_every_exit_code_is_told(run: Run) -> None:
    for code in range(256):
        record = await ended(await to_thread.run_sync(run, f"exit {code}"))
        assert (record.exit_code, record.signal) == (code, None)


async def test_every_signal_is_told_from_the_exit_code_that_looks_like_it(run: Run) -> None:
    assert len(DEADLY) > 50
    for number in DEADLY:
        record = await ended(await to_thread.run_sync(run, f"ulimit -c 0; kill -{number} $$"))
        assert (record.exit_code, record.signal) == (None, number)
        record = await ended(await to_thread.run_sync(run, f"exit {128 + number}"))
        assert (record.exit_code, record.signal) == (128 + number, None)


async def test_an_exit_is_noticed_at_once(run: Run) -> None:
    process = await to_thread.run_sync(run, "exec sleep 1000")
    ends: list[float] = []

    async def wait() -> None:
        await process.wait()
        ends.append(time.perf_counter())

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        begun = time.perf_counter()
        os.kill(process.pid, signal.SIGKILL)
    process.reap()
    assert ends[0] - begun < 0.1


async def test_a_process_that_has_ended_is_gone_and_still_has_its_status(run: Run) -> None:
    process = await to_thread.run_sync(run, "exit 3")
    await process.wait()
    assert process.gone
    assert process.gone  # a look does not reap it
    assert process.reap().exit_code == 3
    assert repr(process) == f"<Process {process.pid} gone>"


async def test_waiting_does_not_end_it(run: Run) -> None:
    process = await to_thread.run_sync(run, "exec sleep 1000")
    with anyio.move_on_after(0.05) as scope:
        await process.wait()
    assert scope.cancelled_caught
    assert not process.gone
    process.kill()
    assert (await ended(process)).signal == signal.SIGKILL


async def test_many_can_wait_for_one(run: Run) -> None:
    first, second = [await to_thread.run_sync(run, "exec sleep 1000") for _ in range(2)]
    async with anyio.create_task_group() as group:
        group.start_soon(first.wait)
        group.start_soon(second.wait)
        await anyio.wait_all_tasks_blocked()
        first.kill()
        second.kill()
    assert first.reap().signal == second.reap().signal == signal.SIGKILL


async def test_cpu_and_memory_are_of_the_process_and_the_children_it_waited_for(run: Run, tmp_path: Path) -> None:
    script = tmp_path / "burn.py"
    script.write_text("import time; x = b'x' * 700_000_000\nwhile time.process_time() < 0.3: pass")
    record = await ended(await to_thread.run_sync(run, f"{sys.executable} {script}; true"))
    assert 0.3 <= record.cpu_seconds < 5
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 700_000_000:
        assert record.peak_bytes is not None
        assert 700_000_000 < record.peak_bytes < 1_000_000_000
    else:  # tests before this one have made us larger than that, and a child's peak begins with ours
        assert record.peak_bytes is None


async def test_a_short_process_is_not_charged_with_our_own_memory(run: Run) -> None:
    """A child starts with its parent's peak: /bin/true was said to have used what the pilot did."""
    ballast = b"x" * 50_000_000
    record = await ended(await to_thread.run_sync(run, "exec true"))
    assert len(ballast) == 50_000_000
    assert record.peak_bytes is None


async def test_when_the_embedding_program_ignores_its_children_only_the_status_is_lost(
    run: Run, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = await to_thread.run_sync(run, "read line < go; exit 3")
        await to_thread.run_sync((tmp_path / "go").write_text, "\n")
        await process.wait()
        await until(lambda: process.gone)
        assert process.reap() == ExitRecord()
    finally:
        signal.signal(signal.SIGCHLD, before)


async def test_a_process_that_is_gone_before_we_look_has_ended_like_any_other(run: Run) -> None:
    """With children ignored the kernel reaps at once: a payload of milliseconds was said never to have started."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    busy = True

    def hold_the_interpreter() -> None:
        while busy:
            sum(range(1000))

    others = [threading.Thread(target=hold_the_interpreter) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(10):
            process = await to_thread.run_sync(run, "exit 3")
            await process.wait()
            await until(lambda process=process: process.gone)  # type: ignore[misc]
            assert process.reap() == ExitRecord()
    finally:
        busy = False
        for other in others:
            other.join()
        signal.signal(signal.SIGCHLD, before)


# -- its group ---------------------------------------------------------------------------------------------------


async def test_the_leader_ends_first_and_its_children_end_with_the_reaping(run: Run, printed: Path) -> None:
    process = await to_thread.run_sync(run, "trap '' TERM HUP; sleep 1000 & echo $!; exit 5")
    await process.wait()
    child = int(printed.read_text())
    assert not gone(child)
    record = process.reap()
    assert record.exit_code == 5
    await process.wait_rest()
    assert gone(child)


async def test_a_stopped_process_ends_on_request(run: Run) -> None:
    process = await to_thread.run_sync(run, "kill -STOP $$; exit 7")
    await until(lambda: getattr(read_stat(process.pid), "state", "") == "T")
    process.terminate()
    assert (await ended(process)).signal == signal.SIGTERM


async def test_waiting_for_the_rest_leaves_no_descriptor_when_cancelled(run: Run, printed: Path) -> None:
    process = await to_thread.run_sync(run, "sleep 1000 & sleep 1000 & echo ready; wait")
    await until(lambda: printed.read_text() == "ready\n")
    descriptors = len(os.listdir("/proc/self/fd"))
    with anyio.move_on_after(0.1) as scope:
        await process.wait_rest()
    assert scope.cancelled_caught
    assert len(os.listdir("/proc/self/fd")) == descriptors
    process.kill()
    await ended(process)
    await process.wait_rest()


def test_signals_to_a_group_that_is_no_more_are_no_fault(run: Run) -> None:
    process = run("exit 0")
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    process.reap()
    process.terminate()
    process.kill()


# -- what it inherits --------------------------------------------------------------------------------------------


async def test_it_leads_a_session_of_its_own(run: Run) -> None:
    process = await to_thread.run_sync(run, "exec sleep 1000")
    found = read_stat(process.pid)
    assert found is not None
    assert found.session == found.group == process.pid
    assert found.start_ticks == process.start_ticks
    process.kill()
    await ended(process)


async def test_it_has_three_descriptors_and_no_more(run: Run, printed: Path) -> None:
    ours = os.open(printed.parent, os.O_RDONLY)
    os.set_inheritable(ours, True)
    try:
        # What the shell opens to list the directory is closed again when it looks at what it found.
        await ended(await to_thread.run_sync(run, 'for f in /proc/$$/fd/*; do [ -e "$f" ] && readlink "$f"; done'))
    finally:
        os.close(ours)
    assert printed.read_text().splitlines() == ["/dev/null", str(printed), str(printed)]


async def test_its_environment_is_what_it_was_given(run: Run, printed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "the pilot's")
    await ended(await to_thread.run_sync(run, "exec env"))
    seen = dict(line.split("=", 1) for line in printed.read_text().splitlines())
    added_by_shells = {"PWD", "OLDPWD", "SHLVL", "_"}
    assert {name: value for name, value in seen.items() if name not in added_by_shells} == ENV


async def test_the_signals_python_ignores_are_as_usual_again(run: Run, printed: Path) -> None:
    """With SIGPIPE ignored, `yes | head -1` never ends in some programs, and ends with an error in others."""
    await ended(await to_thread.run_sync(run, "exec cat /proc/self/status"))
    fields = dict(line.split(":\t", 1) for line in printed.read_text().splitlines())
    masks = {name: int(fields[name], 16) for name in ("SigIgn", "SigCgt", "SigBlk")}
    assert masks["SigIgn"] & (1 << signal.SIGPIPE - 1 | 1 << signal.SIGXFSZ - 1) == 0
    assert masks["SigCgt"] == 0
    assert masks["SigBlk"] == 0


async def test_others_of_the_site_may_read_what_it_makes_whatever_our_umask(run: Run, tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        await ended(await to_thread.run_sync(run, "echo x > made"))
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o644


async def test_words_are_not_looked_at_by_the_shell(run: Run, tmp_path: Path, printed: Path) -> None:
    words = ("printf", "[%s]", "$HOME", "a b", "*", "'", "-x", "", "\\n", "ü")
    with printed.open("wb") as file:
        process = await to_thread.run_sync(
            lambda: Process(
                argv_of(PayloadSpec(command=words, env=ENV), tmp_path, near=True),
                env=ENV,
                cwd=tmp_path,
                stdout=file.fileno(),
                stderr=file.fileno(),
            )
        )
        assert (await ended(process)).exit_code == 0
    assert printed.read_text() == "[$HOME][a b][*]['][-x][][\\n][ü]"


def test_what_cannot_be_started_raises_and_leaves_nothing(tmp_path: Path) -> None:
    with open(os.devnull, "wb") as null, pytest.raises(OSError, match="No such file"):
        Process(["true"], env=ENV, cwd=tmp_path / "nowhere", stdout=null.fileno(), stderr=null.fileno())
