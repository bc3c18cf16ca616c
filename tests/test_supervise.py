"""A payload is started, watched and ended: sure to be over, and told how."""

from __future__ import annotations

import os
import signal
import sys
import time
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import until
from loadmaster import Limits, PayloadOutcome, PayloadSpec, Verdict
from loadmaster.errors import PayloadNotStarted
from loadmaster.limits import Usage
from loadmaster.model import EndedBy
from loadmaster.payload import supervise
from loadmaster.payload.supervise import Payload, watch
from loadmaster.payload.usage import read_stat
from loadmaster.workdir import Workdir

PRINTED_BYTES = 200_000_000


async def start(command: str | tuple[str, ...], workdir: Workdir, **env: str) -> Payload:
    spec = PayloadSpec(command=command, env={"PATH": os.environ["PATH"], **env})
    return await supervise.start(spec, workdir, stdout="std.out", stderr="std.err")


async def run(
    command: str | tuple[str, ...],
    workdir: Workdir,
    *,
    heartbeat_seconds: float = 10,
    looks: list[Usage] | None = None,
    **limits: Any,
) -> PayloadOutcome:
    """From start to end, as the runner does it."""
    found = Limits(**limits)
    payload = await start(command, workdir)
    samples = [] if looks is None else looks
    verdict = await watch(payload, found, heartbeat_seconds=heartbeat_seconds, on_sample=samples.append)
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


async def test_a_child_left_in_the_background_is_gone_when_the_payload_is_over(workdir: Workdir) -> None:
    outcome = await run("trap '' TERM HUP; sleep 1000 & echo $!", workdir)
    assert outcome.succeeded
    assert gone(int((workdir.path / "std.out").read_text()))


async def test_a_payload_that_had_ended_before_the_order_ended_by_itself(workdir: Workdir) -> None:
    payload = await start("exit 0", workdir)
    await payload.process.wait()
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
    """Whoever is cancelled gets the payload, or the fixture that looks for processes complains."""
    started: list[Payload] = []

    async def begin() -> None:
        started.append(await start("exec sleep 1000", workdir))

    async with anyio.create_task_group() as group:
        group.start_soon(begin)
        await anyio.wait_all_tasks_blocked()  # in the thread
        group.cancel_scope.cancel()
    for payload in started:
        outcome = await payload.end(EndedBy.CANCELLATION, grace_seconds=10)
        assert (outcome.signal, outcome.ended_by) == (signal.SIGTERM, EndedBy.CANCELLATION)
    assert len(started) == 1


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
    payload = await start("(trap '' TERM; echo ready; sleep 1000; true) & wait", workdir)
    await says(workdir, "ready")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert outcome.signal == signal.SIGTERM
    assert all(gone(pid) for pid in group_of(payload.process.pid))


def group_of(leader: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
    return [pid for pid in pids if (found := read_stat(pid)) and found.group == leader]


@pytest.mark.parametrize(("script", "ends_by"), [("", signal.SIGTERM), ("trap '' TERM; ", signal.SIGKILL)])
async def test_a_payload_that_stopped_itself_is_ended(workdir: Workdir, script: str, ends_by: int) -> None:
    payload = await start(script + "while :; do kill -STOP $$; done", workdir)
    await until(lambda: getattr(read_stat(payload.process.pid), "state", "") == "T")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert outcome.signal == ends_by


async def test_the_whole_group_is_gone_after_the_end(workdir: Workdir) -> None:
    payload = await start("for i in 1 2 3 4 5; do sleep 1000 & done; echo ready; wait", workdir)
    await says(workdir, "ready")
    group = group_of(payload.process.pid)
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
    await watch(payload, Limits(), heartbeat_seconds=10, on_sample=lambda usage: None)
    noticed = time.time()
    await payload.end(EndedBy.LIMIT, grace_seconds=10)
    assert noticed - float((workdir.path / "std.out").read_text()) < 0.2


async def test_what_a_payload_prints_costs_us_nothing(workdir: Workdir) -> None:
    begun, looks = time.process_time(), list[list[str]]()
    payload = await start(f"yes 'a line of text' | head -c {PRINTED_BYTES}; exec sleep 0.2", workdir)
    async with anyio.create_task_group() as group:

        async def peek() -> None:
            while True:
                looks.append(await payload.peek(3))
                await anyio.sleep(0.05)

        group.start_soon(peek)
        await watch(payload, Limits(), heartbeat_seconds=10, on_sample=lambda usage: None)
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
