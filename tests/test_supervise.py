"""A payload is started, watched and ended: sure to be over, and told how."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import lowlevel, to_thread

from conftest import until
from loadmaster import Limits, PayloadOutcome, PayloadSpec, Verdict
from loadmaster.description import Containment
from loadmaster.errors import PayloadNotStarted
from loadmaster.limits import UNCHECKED
from loadmaster.payload import supervise
from loadmaster.payload.hierarchies import find_hierarchies
from loadmaster.payload.ready import start as start_payload
from loadmaster.payload.supervise import Payload, watch
from loadmaster.payload.usage import read_stat
from loadmaster.result import EndedBy, Usage
from loadmaster.workdir import Workdir, open_workdir
from loadmaster.world import BEST_FIRST, World

PRINTED_BYTES = 200_000_000


async def start(
    command: str | tuple[str, ...],
    workdir: Workdir,
    *,
    containment: Sequence[Containment] = BEST_FIRST,
    cgroup: str = "own",
    limits: Limits = supervise.NO_LIMITS,
    **env: str,
) -> Payload:
    spec = PayloadSpec(command=command, env={"PATH": os.environ["PATH"], **env})
    world = World(containment=tuple(containment), cgroup=cgroup)
    return await start_payload(spec, workdir, stdout="std.out", stderr="std.err", limits=limits, world=world)


def keep(looks: list[Usage]) -> Callable[[Usage], Awaitable[None]]:
    """What takes samples in."""

    async def take(usage: Usage) -> None:
        looks.append(usage)

    return take


async def run(
    command: str | tuple[str, ...],
    workdir: Workdir,
    *,
    heartbeat_seconds: float = 10,
    looks: list[Usage] | None = None,
    containment: Sequence[Containment] = BEST_FIRST,
    **limits: Any,
) -> PayloadOutcome:
    """From start to end, as the runner does it."""
    found = Limits(**limits)
    payload = await start(command, workdir, containment=containment, limits=found)
    samples = [] if looks is None else looks
    verdict = await watch(payload, found, heartbeat_seconds=heartbeat_seconds, on_sample=keep(samples))
    return await payload.end(EndedBy.LIMIT, grace_seconds=found.grace_seconds, verdict=verdict)


def gone(pid: int) -> bool:
    found = read_stat(pid)
    return found is None or found.state in "ZX"


async def says(workdir: Workdir, text: str) -> None:
    await until(lambda: text in (workdir.path / "std.out").read_text())


# -- by itself ---------------------------------------------------------------------------------------------------


async def test_a_payload_runs_in_the_work_directory_and_its_output_is_in_two_files(workdir: Workdir) -> None:
    outcome = await run("pwd; echo no >&2; exit 4", workdir)
    assert (outcome.exit_code, outcome.signal, outcome.ended_by) == (4, None, EndedBy.ITSELF)
    assert (workdir.path / "std.out").read_text() == f"{workdir.path}\n"
    assert (workdir.path / "std.err").read_text() == "no\n"
    assert 0 < outcome.wall_seconds < 5
    assert not outcome.succeeded


async def test_exit_143_is_not_sigterm(workdir: Workdir) -> None:
    exited = await run("exit 143", workdir)
    killed = await run("kill -TERM $$", workdir)
    assert (exited.exit_code, exited.signal, str(exited)) == (143, None, "exit code 143")
    assert (killed.exit_code, killed.signal, str(killed)) == (None, 15, "ended by signal 15 (SIGTERM)")


@pytest.mark.parametrize("kind", [kind for kind in Containment if kind is not Containment.CGROUP])
async def test_a_child_left_in_the_background_is_gone_when_the_payload_is_over(
    workdir: Workdir, kind: Containment
) -> None:
    """The child is known by the end of a FIFO that it holds open: its number is its namespace's own."""
    os.mkfifo(workdir.path / "held")
    held = os.open(workdir.path / "held", os.O_RDONLY | os.O_NONBLOCK)
    outcome = await run("trap '' TERM HUP; exec 3> held; sleep 1000 &", workdir, containment=[kind])
    assert outcome.succeeded
    assert os.read(held, 1) == b""  # the end of the file: nobody has it open for writing
    os.close(held)


async def test_a_payload_that_had_ended_before_the_order_ended_by_itself(workdir: Workdir) -> None:
    payload = await start("exit 0", workdir)
    await payload.tree.wait()
    verdict = Verdict("wall time", 2, 1, "s")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=10, verdict=verdict)
    assert outcome.succeeded
    assert (outcome.ended_by, outcome.verdict) == (EndedBy.ITSELF, None)


async def test_words_are_executed_as_they_stand(workdir: Workdir) -> None:
    await run(("printf", "%s|", "$HOME", "a b"), workdir)
    assert (workdir.path / "std.out").read_text() == "$HOME|a b|"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("./nowhere",), "./nowhere': no such file"),
        (("no-such-program",), "no-such-program': no such file"),
        (("./plain",), "./plain': may not be executed"),
        ("x" * 3_000_000, "Argument list too long"),
    ],
)
async def test_what_cannot_be_started_says_why_and_leaves_nothing(
    workdir: Workdir, command: str | tuple[str, ...], reason: str
) -> None:
    (workdir.path / "plain").touch(mode=0o644)
    with pytest.raises(PayloadNotStarted, match=reason):
        await start(command, workdir)


async def test_a_cancelled_start_is_a_payload_to_end_or_none(workdir: Workdir) -> None:
    """Whoever is cancelled gets the payload, or the fixture that looks for processes and descriptors complains.

    Cancelled after each number of turns of the loop in its turn, until the start is quicker.
    """
    for turns in range(200):
        started: list[Payload] = []

        async def begin(started: list[Payload]) -> None:
            started.append(await start("exec sleep 1000", workdir))

        async with anyio.create_task_group() as group:
            group.start_soon(begin, started)
            for _ in range(turns):
                await lowlevel.checkpoint()
            quicker = bool(started)
            group.cancel_scope.cancel()
        for payload in started:
            outcome = await payload.end(EndedBy.CANCELLATION, grace_seconds=10)
            assert (outcome.signal, outcome.ended_by) == (signal.SIGTERM, EndedBy.CANCELLATION)
        if quicker:
            break


# -- by order ----------------------------------------------------------------------------------------------------


async def test_a_payload_may_use_its_grace(workdir: Workdir) -> None:
    payload = await start("trap 'echo saved > saved; exit 9' TERM; echo ready; while :; do sleep 0.01; done", workdir)
    await says(workdir, "ready")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=20)
    assert (outcome.exit_code, outcome.ended_by) == (9, EndedBy.KILL)
    assert (workdir.path / "saved").exists()
    assert outcome.wall_seconds < 10


async def test_what_a_shell_script_runs_may_use_the_grace_too(workdir: Workdir) -> None:
    """A script dies of TERM at once. The program it had started was killed with it, its checkpoint half written."""
    inner = "trap 'sleep 0.3; echo saved > saved; exit' TERM; echo ready; while :; do sleep 0.01; done"
    payload = await start(f'sh -c "{inner}"; true', workdir)
    await says(workdir, "ready")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=20)
    assert outcome.signal == signal.SIGTERM
    assert (workdir.path / "saved").exists()
    assert outcome.wall_seconds < 10


async def test_a_payload_that_ignores_the_request_is_killed_after_the_grace(workdir: Workdir) -> None:
    payload = await start("trap '' TERM; echo ready; sleep 1000; sleep 1000", workdir)
    await says(workdir, "ready")
    begun = time.perf_counter()
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert outcome.signal == signal.SIGKILL
    assert 0.3 <= time.perf_counter() - begun < 3


async def test_a_child_that_ignores_the_request_is_gone_after_the_grace(workdir: Workdir) -> None:
    payload = await start(
        "(trap '' TERM; echo ready; sleep 1000; true) & wait", workdir, containment=[Containment.SESSION]
    )
    await says(workdir, "ready")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert outcome.signal == signal.SIGTERM
    assert all(gone(pid) for pid in group_of(payload.tree.pid))


def group_of(leader: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if (found := read_stat(pid)) and found.group == leader]


@pytest.mark.parametrize(("script", "ends_by"), [("", signal.SIGTERM), ("trap '' TERM; ", signal.SIGKILL)])
async def test_a_payload_that_stopped_itself_is_ended(workdir: Workdir, script: str, ends_by: int) -> None:
    payload = await start(script + "while :; do kill -STOP $$; done", workdir)
    await until(lambda: getattr(read_stat(payload.tree.pid), "state", "") == "T")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert outcome.signal == ends_by


async def test_the_whole_group_is_gone_after_the_end(workdir: Workdir) -> None:
    script = "for i in 1 2 3 4 5; do sleep 1000 & done; echo ready; wait"
    payload = await start(script, workdir, containment=[Containment.SESSION])
    await says(workdir, "ready")
    group = group_of(payload.tree.pid)
    assert len(group) == 6
    await payload.end(EndedBy.KILL, grace_seconds=10)
    assert all(gone(pid) for pid in group)


async def test_an_end_under_a_cancelled_scope_is_an_end_when_shielded(workdir: Workdir) -> None:
    payload = await start("exec sleep 1000", workdir)
    with anyio.CancelScope() as scope:
        scope.cancel()
        with anyio.CancelScope(shield=True):
            outcome = await payload.end(EndedBy.CANCELLATION, grace_seconds=10)
    assert outcome.signal == signal.SIGTERM


# -- limits ------------------------------------------------------------------------------------------------------


async def test_the_wall_limit_ends_it_with_a_verdict(workdir: Workdir) -> None:
    outcome = await run("exec sleep 1000", workdir, wall_seconds=0.3)
    assert outcome.verdict is not None
    assert (outcome.verdict.limit, outcome.verdict.threshold) == ("wall time", 0.3)
    assert (outcome.signal, outcome.ended_by) == (signal.SIGTERM, EndedBy.LIMIT)
    assert 0.3 <= outcome.wall_seconds < 5


async def test_the_cpu_limit_counts_what_short_lived_children_burn(workdir: Workdir) -> None:
    burn = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
    outcome = await run(f"while :; do sh -c '{burn}'; done", workdir, cpu_seconds=0.4)
    assert outcome.verdict is not None
    assert outcome.verdict.limit == "CPU time"
    assert 0.4 <= outcome.cpu_seconds < 3


async def test_a_payload_that_sleeps_uses_no_cpu_limit(workdir: Workdir) -> None:
    outcome = await run("sleep 0.6", workdir, cpu_seconds=0.3)
    assert outcome.succeeded


async def test_memory_is_the_most_that_was_seen_of_all_processes_together(workdir: Workdir) -> None:
    hold = f"{sys.executable} -c 'import time; x = bytearray(60_000_000); time.sleep(0.9)'"
    outcome = await run(f"{hold} & {hold} & wait", workdir)
    assert outcome.peak_memory_bytes is not None
    assert 120_000_000 < outcome.peak_memory_bytes < 300_000_000


LIMITS: dict[str, Any] = {
    "memory": {"memory_bytes": 60_000_000},
    "processes": {"processes": 10},
    "work directory": {"workdir_bytes": 10_000_000},
    "output": {"output_bytes": 1_000_000},
}


def using(what: str, fraction: float) -> str:
    """A payload that uses this part of its limit, says so, and stays."""
    match what:
        case "memory":
            script = f"import signal; x = bytearray(int({60e6 * fraction} - 10e6)); print('there'); signal.pause()"
            return f"exec {sys.executable} -S -u -c {shlex.quote(script)}"
        case "processes":
            sleepers = round(10 * fraction) - 1
            return f"for i in $(seq {sleepers}); do sleep 1000 & done; echo there; exec sleep 1000"
        case "work directory":
            return f"mkdir d; head -c {int(1e7 * fraction)} /dev/urandom > d/f; sync d/f; echo there; exec sleep 1000"
        case _:
            return f"yes | head -c {int(1e6 * fraction)} >&2; echo there; exec sleep 1000"


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("memory", r"memory of [6-9]\d.* MB is over the limit of 60 MB( .ended by the kernel.)?"),
        ("processes", r"number of processes of 1\d is over the limit of 10"),
        ("work directory", r"work directory size of 1[0-3].* MB is over the limit of 10 MB"),
        ("output", r"output size of 1.2 MB is over the limit of 1 MB"),
    ],
)
async def test_a_payload_over_a_limit_is_ended_and_told_why(workdir: Workdir, what: str, text: str) -> None:
    with anyio.fail_after(20):
        outcome = await run(using(what, 1.2), workdir, **LIMITS[what])
    assert re.fullmatch(text, str(outcome.verdict))
    assert outcome.ended_by is EndedBy.LIMIT


@pytest.mark.parametrize("what", LIMITS)
async def test_a_payload_just_under_a_limit_is_left_alone(workdir: Workdir, what: str) -> None:
    """Until it has been looked at five times since it was there."""
    payload = await start(using(what, 0.9), workdir)
    looks: list[Usage] = []

    async with anyio.create_task_group() as group:

        async def watching() -> None:
            verdict = await watch(payload, Limits(**LIMITS[what]), heartbeat_seconds=10, on_sample=keep(looks))
            assert verdict is None

        group.start_soon(watching)
        await says(workdir, "there")
        before = len(looks)
        await until(lambda: len(looks) >= before + 5, seconds=20)
        group.cancel_scope.cancel()
    await payload.end(EndedBy.KILL, grace_seconds=10)


async def test_children_that_share_their_memory_are_not_stopped_for_its_sum(workdir: Workdir) -> None:
    """Ten children and their parent share 50 MB: 550 MB of resident size, under a limit of 200 MB."""
    script = (
        "import os, time\nx = b'x' * 50_000_000\n"
        "for _ in range(10):\n    if os.fork() == 0: time.sleep(0.8); os._exit(0)\n"
        "for _ in range(10): os.wait()"
    )
    command = f"exec {sys.executable} -S -c {shlex.quote(script)}"
    outcome = await run(command, workdir, memory_bytes=200_000_000)
    assert outcome.succeeded
    assert outcome.peak_memory_bytes is not None
    assert outcome.peak_memory_bytes > 500_000_000
    assert outcome.peak_pss_bytes is not None
    assert 50_000_000 < outcome.peak_pss_bytes < 200_000_000


async def test_children_that_share_too_much_are_stopped_for_what_they_share(workdir: Workdir) -> None:
    script = (
        "import os, signal\nx = b'x' * 50_000_000\n"
        "for _ in range(3):\n    if os.fork() == 0: signal.pause()\nsignal.pause()"
    )
    command = f"exec {sys.executable} -S -c {shlex.quote(script)}"
    outcome = await run(command, workdir, memory_bytes=40_000_000)
    assert re.fullmatch(
        r"memory of [4-9]\d.* MB is over the limit of 40 MB( .ended by the kernel.)?", str(outcome.verdict)
    )


async def test_a_disk_that_fills_up_ends_the_payload_whatever_its_files_are_called(small_disk: Path) -> None:
    """Even an open file without a name, which no walk over the work directory sees."""
    script = "exec 3> f; rm f; head -c 700000 /dev/zero >&3; exec sleep 1000"
    async with open_workdir(small_disk, "job") as workdir:
        outcome = await run(script, workdir, free_disk_bytes=500_000, workdir_bytes=500_000)
    assert re.fullmatch(r"free disk of 3\d\d.* kB is under the minimum of 500 kB", str(outcome.verdict))


async def test_a_payload_that_idles_is_ended(workdir: Workdir) -> None:
    outcome = await run("exec sleep 1000", workdir, cpu_ratio=0.05, cpu_ratio_window_seconds=0.6)
    assert re.fullmatch(r"CPU ratio of [0-4].* % is under the minimum of 5 %", str(outcome.verdict))
    assert 0.6 <= outcome.wall_seconds < 5


async def test_a_payload_that_computes_is_not_idle(workdir: Workdir) -> None:
    burn = "import time\nwhile time.process_time() < 1: pass"
    command = f"exec {sys.executable} -S -c {shlex.quote(burn)}"
    outcome = await run(command, workdir, cpu_ratio=0.05, cpu_ratio_window_seconds=0.5)
    assert outcome.succeeded


async def test_a_payload_may_idle_when_it_says_so_in_a_file(workdir: Workdir) -> None:
    """DIRAC's switch: a file in the work directory, made at any time."""
    command = f"touch {UNCHECKED}; exec sleep 1"
    outcome = await run(command, workdir, cpu_ratio=0.05, cpu_ratio_window_seconds=0.3)
    assert outcome.succeeded


async def test_a_deadline_ends_it_when_it_comes(workdir: Workdir) -> None:
    deadline = datetime.now(UTC) + timedelta(seconds=0.5)
    outcome = await run("exec sleep 1000", workdir, deadline=deadline, grace_seconds=0)
    assert str(outcome.verdict).startswith(f"deadline of {deadline:%Y-%m-%d %H:%M:%S} UTC was over at ")
    assert datetime.now(UTC) - deadline < timedelta(seconds=5)


async def test_just_under_a_time_a_payload_is_left_alone(workdir: Workdir) -> None:
    burn = "import time\nwhile time.process_time() < 0.6: pass"
    command = f"exec {sys.executable} -S -c {shlex.quote(burn)}"
    outcome = await run(command, workdir, cpu_seconds=1, wall_seconds=20)
    assert outcome.succeeded
    assert 0.6 <= outcome.cpu_seconds < 1


@pytest.mark.parametrize("kind", [kind for kind in Containment if kind is not Containment.CGROUP])
async def test_what_a_payload_used_is_known_even_when_nobody_looked(workdir: Workdir, kind: Containment) -> None:
    """The kernel keeps the sums until the last process is reaped."""
    script = (
        "import os, time\nopen('f', 'wb').write(bytes(3_000_000))\n"
        "while time.process_time() < 0.2: os.urandom(1 << 20)\n"
        "print(open('/proc/self/io').read().split()[11])"
    )
    payload = await start(f"{sys.executable} -S -c {shlex.quote(script)}; true", workdir, containment=[kind])
    await payload.tree.wait()
    outcome = await payload.end(EndedBy.ITSELF, grace_seconds=0)
    said = int((workdir.path / "std.out").read_text())
    assert outcome.succeeded
    assert outcome.peak_processes is None
    if os.geteuid() == 0:  # nobody else is told by a process that has ended
        assert said <= outcome.written_bytes < said + 1_000_000
    assert outcome.system_seconds > 0.1
    assert outcome.user_seconds == pytest.approx(outcome.cpu_seconds - outcome.system_seconds)


def names_of(payload: Payload) -> list[str]:
    return [Path(f"/proc/{pid}/comm").read_text().strip() for pid in payload.tree.usage().pids]


async def test_a_look_tells_all_there_is_to_know(workdir: Workdir) -> None:
    payload = await start("echo 12345; echo 789 >&2; sleep 1000 & exec sleep 1000", workdir, cgroup="none")
    await until(lambda: (workdir.path / "std.err").stat().st_size > 0)
    with anyio.fail_after(10):
        while await to_thread.run_sync(names_of, payload) != ["sleep", "sleep"]:
            pass
    plain = await payload.usage()
    assert (plain.processes, plain.threads, plain.output_bytes) == (2, 2, 10)
    assert (plain.pss_bytes, plain.workdir_bytes, plain.workdir_files) == (None, None, None)
    assert plain.rss_bytes > 0
    assert plain.free_disk_bytes
    full = await payload.usage(Limits(memory_bytes=1, workdir_bytes=1))
    assert full.pss_bytes
    assert full.pss_bytes <= full.rss_bytes
    assert full.workdir_files == 2
    await payload.end(EndedBy.KILL, grace_seconds=10)


# -- what is said of an end --------------------------------------------------------------------------------------

SHIMS = (Containment.PID_NAMESPACE, Containment.SUBREAPER)


@pytest.mark.parametrize("kind", SHIMS)
async def test_an_end_says_who_ordered_it_how_long_it_took_and_who_was_left(
    workdir: Workdir, kind: Containment
) -> None:
    script = "(sleep 1000 &); (trap '' TERM; echo ready; sleep 1000; true) & exec sleep 1000"
    payload = await start(script, workdir, containment=[kind], limits=Limits(grace_seconds=0.3))
    await says(workdir, "ready")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert (outcome.ended_by, outcome.signal, outcome.grace_expired) == (EndedBy.KILL, signal.SIGTERM, True)
    assert 0.3 <= outcome.ending_seconds < 3
    assert outcome.orphans >= 2  # the sleeper whose parent had gone, and he who does not listen
    assert not outcome.left_behind


@pytest.mark.parametrize("kind", SHIMS)
async def test_an_end_that_was_polite_says_so(workdir: Workdir, kind: Containment) -> None:
    payload = await start("echo ready; exec sleep 1000", workdir, containment=[kind])
    await says(workdir, "ready")
    outcome = await payload.end(EndedBy.CANCELLATION, grace_seconds=10)
    assert (outcome.ended_by, outcome.grace_expired, outcome.orphans) == (EndedBy.CANCELLATION, False, 0)
    assert outcome.ending_seconds < 3


@pytest.mark.parametrize("kind", SHIMS)
async def test_what_it_read_and_wrote_is_the_kernels_account_to_the_end(workdir: Workdir, kind: Containment) -> None:
    """No sample of a tenth of a second, and no root, is needed for it."""
    outcome = await run("(head -c 3000000 /dev/zero > file; sync file)", workdir, containment=[kind])
    assert 3_000_000 <= outcome.written_bytes < 6_000_000


# -- without its shim --------------------------------------------------------------------------------------------


async def shim_killed(payload: Payload) -> PayloadOutcome:
    """How a payload ends whose shim the node has killed, for want of memory say."""
    os.kill(payload.tree.shim_pid, signal.SIGKILL)
    assert await watch(payload, Limits(), heartbeat_seconds=10, on_sample=keep([])) is None
    with anyio.fail_after(30):
        return await payload.end(EndedBy.CANCELLATION, grace_seconds=10)


DAEMON = (
    "(setsid sh -c 'echo $$ > daemon; exec sleep 1000' &); until [ -s daemon ]; do sleep 0.02; done\n"
    "echo ready; sleep 1000"
)


async def test_a_payload_that_has_lost_its_shim_is_lost_where_nothing_of_it_can_be_left(workdir: Workdir) -> None:
    """It had failed, but not of its own: the job was not run again, as it is when the agent dies with the shim."""
    payload = await start(DAEMON, workdir, containment=[Containment.PID_NAMESPACE])
    await says(workdir, "ready")
    init = payload.tree.init_pid  # type: ignore[attr-defined]
    assert not gone(init)
    outcome = await shim_killed(payload)
    assert gone(init)
    assert (outcome.ended_by, outcome.has_no_status, outcome.left_behind) == (EndedBy.LOST, True, False)


async def test_a_payload_over_a_limit_that_loses_its_shim_before_it_is_asked_is_not_run_again(workdir: Workdir) -> None:
    payload = await start("sleep 1000", workdir, containment=[Containment.PID_NAMESPACE])
    os.kill(payload.tree.shim_pid, signal.SIGKILL)
    await payload.tree.wait()
    verdict = Verdict("memory", 3e9, 2e9, "bytes")
    outcome = await payload.end(EndedBy.LIMIT, grace_seconds=10, verdict=verdict)
    assert (outcome.ended_by, outcome.verdict, outcome.left_behind) == (EndedBy.LIMIT, verdict, False)


@pytest.mark.usefixtures("groups")
async def test_a_payload_that_has_lost_its_shim_is_lost_where_its_group_is_empty(workdir: Workdir) -> None:
    payload = await start(DAEMON, workdir, containment=[Containment.CGROUP])
    await says(workdir, "ready")
    daemon = await anyio.Path(workdir.path / "daemon").read_text()
    outcome = await shim_killed(payload)
    assert gone(int(daemon))
    assert (outcome.ended_by, outcome.left_behind) == (EndedBy.LOST, False)


@pytest.mark.parametrize("fenced", [True, False])
async def test_a_payload_that_has_lost_its_shim_may_have_left_something(workdir: Workdir, fenced: bool) -> None:
    """One that could have killed it itself has failed: it would again."""
    payload = await start(DAEMON, workdir, containment=[Containment.SUBREAPER], cgroup="none")
    if fenced and not payload.tree.fenced:
        await payload.end(EndedBy.CANCELLATION, grace_seconds=0)
        pytest.skip("Linux has no Landlock scopes here")
    payload.tree.fenced = fenced
    await says(workdir, "ready")
    daemon = int(await anyio.Path(workdir.path / "daemon").read_text())
    outcome = await shim_killed(payload)
    os.kill(daemon, signal.SIGKILL)
    said = (EndedBy.LOST, True) if fenced else (EndedBy.ITSELF, False)
    assert (outcome.ended_by, outcome.left_behind, outcome.succeeded) == (*said, False)


# -- the kernel's own word ---------------------------------------------------------------------------------------


@pytest.fixture
def groups() -> None:
    """Control groups that count memory and processes, or the test is skipped."""
    found = find_hierarchies()
    if found.memory is None or found.pids is None or found.cpu is None:
        pytest.skip(f"control groups here: {found}")


@pytest.mark.usefixtures("groups")
async def test_memory_that_grows_faster_than_anybody_looks_is_the_kernels_to_stop(workdir: Workdir) -> None:
    """Also when the kernel has killed only one of its processes, and the rest would go on."""
    script = f"{sys.executable} -S -c 'x = bytearray(300_000_000)'; sleep 1000"
    with anyio.fail_after(20):
        outcome = await run(script, workdir, memory_bytes=60_000_000)
    assert outcome.ended_by is EndedBy.LIMIT
    assert re.match(r"memory of .* MB is over the limit of 60 MB", str(outcome.verdict))


@pytest.mark.usefixtures("groups")
async def test_memory_that_is_in_nobodys_resident_size_is_seen(workdir: Workdir) -> None:
    """A memfd that nobody has mapped: 200 MB that no look at /proc finds."""
    script = (
        "import os, time\nf = os.memfd_create('hidden')\n"
        "for _ in range(200): os.write(f, bytes(1_000_000))\ntime.sleep(1000)"
    )
    with anyio.fail_after(20):
        outcome = await run(f"exec {sys.executable} -S -c {shlex.quote(script)}", workdir, memory_bytes=150_000_000)
    assert outcome.verdict is not None
    assert outcome.verdict.limit == "memory"


@pytest.mark.usefixtures("groups")
async def test_cpu_of_children_nobody_waits_for_is_counted(workdir: Workdir) -> None:
    script = (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "for _ in range(5):\n    if os.fork() == 0:\n        while time.process_time() < 0.1: pass\n        os._exit(0)\n"
        "    time.sleep(0.4)"
    )
    outcome = await run(f"exec {sys.executable} -S -c {shlex.quote(script)}", workdir)
    assert outcome.succeeded
    assert 0.45 < outcome.cpu_seconds < 1.5


async def test_nothing_of_ours_is_left_among_the_control_groups(root: Path) -> None:
    async with open_workdir(root, "leaves-nothing") as workdir:
        await run("sleep 0.2 & exec sleep 0.1", workdir, memory_bytes=10**9)
    assert await to_thread.run_sync(groups_of, "leaves-nothing") == []


def groups_of(job_id: str) -> list[Path]:
    return [group for top in find_hierarchies().directories for group in top.glob(f"loadmaster-{job_id}*")]


# -- what it costs -----------------------------------------------------------------------------------------------


async def test_a_payload_with_far_limits_is_looked_at_for_heartbeats_only(workdir: Workdir) -> None:
    """After 0.1 s, then after as long again as it has been running: five looks in two seconds, whatever the interval."""
    looks: list[Usage] = []
    begun = time.process_time()
    await run("sleep 1.5", workdir, looks=looks, wall_seconds=10**6, cpu_seconds=10**6)
    assert 1 <= len(looks) <= 4
    assert time.process_time() - begun < 0.3


async def test_heartbeats_come_at_their_interval(workdir: Workdir) -> None:
    looks: list[Usage] = []
    await run("sleep 1", workdir, looks=looks, heartbeat_seconds=0.2)
    assert 3 <= len(looks) <= 6
    assert all(after.wall_seconds - before.wall_seconds >= 0.1 for before, after in pairwise(looks))


async def test_a_payload_shorter_than_the_first_look_is_not_looked_at(workdir: Workdir) -> None:
    looks: list[Usage] = []
    outcome = await run("exit 0", workdir, looks=looks)
    assert outcome.wall_seconds >= 0.1 or looks == []


async def test_an_exit_is_noticed_at_once(workdir: Workdir) -> None:
    """Python's own clock, as the payload's last word: DIRAC's wrapper takes up to ten seconds."""
    last = f"exec {sys.executable} -S -c 'import time, os; time.sleep(0.3); os.write(1, str(time.time()).encode())'"
    payload = await start(last, workdir)
    await watch(payload, Limits(), heartbeat_seconds=10, on_sample=keep([]))
    noticed = time.time()
    await payload.end(EndedBy.LIMIT, grace_seconds=10)
    assert noticed - float((workdir.path / "std.out").read_text()) < 0.2


async def test_what_a_payload_prints_costs_us_nothing(workdir: Workdir) -> None:
    begun, looks = time.process_time(), list[list[str]]()
    script = f"yes 'a line of text' | head -c {PRINTED_BYTES}; : > printed; until [ -e seen ]; do sleep 0.1; done"
    payload = await start(script, workdir)
    async with anyio.create_task_group() as group:

        async def peek() -> None:
            while not await anyio.Path(workdir.path / "printed").exists():
                looks.append(await payload.peek(3))
                await anyio.sleep(0.05)
            looks.append(await payload.peek(3))
            await anyio.Path(workdir.path / "seen").touch()

        group.start_soon(peek)
        await watch(payload, Limits(), heartbeat_seconds=10, on_sample=keep([]))
        group.cancel_scope.cancel()
    outcome = await payload.end(EndedBy.LIMIT, grace_seconds=10)
    cost = time.process_time() - begun
    print(f"measured: {cost:.3f} s of CPU for {PRINTED_BYTES} bytes")
    assert outcome.succeeded
    assert (workdir.path / "std.out").stat().st_size == PRINTED_BYTES
    assert looks[-1][-2] == "a line of text"
    assert cost < 0.25


async def test_a_payload_is_looked_at_while_it_prints(workdir: Workdir) -> None:
    payload = await start("i=0; while :; do i=$((i+1)); echo line $i; sleep 0.01; done", workdir)
    await says(workdir, "line 3")
    assert (await payload.peek())[:3] == ["line 1", "line 2", "line 3"]
    assert len(await payload.peek(2)) == 2
    usage = await payload.usage()
    assert usage.processes >= 1
    assert usage.memory_bytes > 0
    await payload.end(EndedBy.KILL, grace_seconds=10)


def test_nothing_of_this_needs_the_main_thread(workdir: Workdir) -> None:
    """A pilot may run its event loop where no signal can be handled."""

    async def fly() -> None:
        async def elsewhere() -> None:
            outcome = await run("exit 5", workdir)
            assert outcome.exit_code == 5

        await to_thread.run_sync(lambda: anyio.run(elsewhere))

    anyio.run(fly)


# -- what a review found ------------------------------------------------------------------------------------------


async def test_who_hurries_a_payload_that_was_reaped_hurries_nobody(workdir: Workdir) -> None:
    """Its descriptor's number was the next payload's by then, and that one was killed."""
    first = await start("exit 0", workdir)
    await first.tree.wait()
    await first.end(EndedBy.ITSELF, grace_seconds=0)
    second = await start("echo ready; exec sleep 1000", workdir)
    await says(workdir, "ready")
    first.hurry()
    await anyio.sleep(0.1)
    assert not second.tree.gone
    await second.end(EndedBy.KILL, grace_seconds=5)


async def test_haste_for_a_payload_that_has_ended_by_itself_changes_nothing(workdir: Workdir) -> None:
    payload = await start("exit 0", workdir)
    await payload.tree.wait()
    payload.hurry()
    outcome = await payload.end(EndedBy.CANCELLATION, grace_seconds=0)
    assert outcome.succeeded


async def test_a_look_that_fails_is_no_verdict(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor was free for a moment, and the payload was ended, its job crashed."""

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(supervise, "read_free_disk", fail)
    payload = await start("sleep 0.5", workdir)
    assert await watch(payload, Limits(), heartbeat_seconds=0.1, on_sample=keep([])) is None
    monkeypatch.undo()
    assert (await payload.end(EndedBy.ITSELF, grace_seconds=0)).succeeded


async def test_limits_of_time_hold_while_a_look_hangs(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file server that is gone: the wall limit of 0.5 s was kept when the server came back."""
    answered = threading.Event()
    monkeypatch.setattr(supervise, "read_free_disk", lambda _: answered.wait(10) and 0)
    monkeypatch.setattr(supervise, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(supervise, "LAST_WORDS_SECONDS", 0.3)
    with anyio.fail_after(5):
        outcome = await run("exec sleep 1000", workdir, wall_seconds=0.5)
    answered.set()
    assert outcome.verdict is not None
    assert outcome.verdict.limit == "wall time"
