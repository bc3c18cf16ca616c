"""A payload outlives its agent, which is a real process that is killed, and is adopted by the next: this one."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import NOBODY, until
from loadmaster import Limits, PayloadOutcome
from loadmaster.description import Containment
from loadmaster.errors import PayloadHeld
from loadmaster.events import PayloadStarted
from loadmaster.payload import supervise
from loadmaster.payload.adopt import adopt, end_held, end_left
from loadmaster.payload.found import Lost, NotStarted
from loadmaster.payload.hierarchies import find_hierarchies
from loadmaster.payload.launch import shim_command
from loadmaster.payload.state import LaunchRecord, StateDirectory, boot_id, remove_state
from loadmaster.payload.supervise import Payload, watch
from loadmaster.payload.usage import read_stat
from loadmaster.result import EndedBy, Usage
from loadmaster.workdir import Workdir
from loadmaster.world import World

SHIMS = [Containment.PID_NAMESPACE, Containment.SUBREAPER]

AGENT = """
import json, os, sys
from pathlib import Path
import anyio
from loadmaster import Limits, PayloadSpec
from loadmaster.payload.ready import start as start_payload
from loadmaster.payload import launch, ready, shimtree
from loadmaster.payload.adopt import adopt
from loadmaster.workdir import Workdir
from loadmaster.world import World

root, words = Path(sys.argv[1]), json.loads(sys.argv[2])
if words["shim"] == "python":
    launch.shim_kind = shimtree.shim_kind = ready.shim_kind = lambda: "python"
world = World(**words["world"])

async def main():
    for name, script in words["scripts"].items():
        workdir = Workdir.make(root / "work", name)
        spec = PayloadSpec(command=("/bin/sh", "-c", script), env={"PATH": "/usr/bin:/bin"})
        payload = await start_payload(
            spec, workdir, stdout="std.out", stderr="std.err", world=world, limits=Limits(grace_seconds=words["grace"]),
            state=root / "state" / name, hidden=[Path(place) for place in words["hidden"]])
        tree = payload.tree
        print(json.dumps([name, tree.pid, tree.start_ticks, tree.containment, tree.shim, tree.shim_pid,
                          tree.shim_start_ticks]), flush=True)
    print("null", flush=True)
    await anyio.sleep(1000)

anyio.run(main)
"""


@dataclass
class Left:
    """What an agent that was killed has left: its payloads, by their names."""

    root: Path
    process: subprocess.Popen[str]
    known: dict[str, PayloadStarted]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def state(self, name: str) -> Path:
        return self.root / "state" / name

    def file(self, name: str, file: str = "std.out") -> Path:
        return self.root / "work" / name / file

    def workdir(self, name: str) -> Workdir:
        path = self.root / "work" / name
        return Workdir(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY))

    def everything_has_ended(self, name: str = "job") -> bool:
        return all(map(gone, (self.known[name].pid, self.known[name].shim_pid)))


Start = Callable[..., Awaitable[Left]]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[Start]:
    """Start an agent with payloads: `await agent("sleep 3", containment=...)`; it lives until `kill`."""
    started: list[Left] = []

    async def start(
        *script: str, containment: Containment = Containment.PID_NAMESPACE, shim: str = "c", grace: float = 10,
        orphan_seconds: float = 0, hidden: tuple[str, ...] = (), world: dict[str, Any] | None = None, **scripts: str,
    ) -> Left:  # fmt: skip
        own = {"containment": [containment], "orphan_seconds": orphan_seconds, **(world or {})}
        scripts |= {"job": script[0]} if script else {}
        words = {"shim": shim, "world": own, "grace": grace, "hidden": hidden, "scripts": scripts}
        argv = [sys.executable, "-c", AGENT, str(tmp_path), json.dumps(words)]

        def begin() -> Left:
            (tmp_path / "work").mkdir(exist_ok=True)
            left = Left(tmp_path, subprocess.Popen(argv, stdout=subprocess.PIPE, text=True), {})
            started.append(left)
            assert left.process.stdout is not None
            with left.process.stdout as told:
                for line in told:
                    if (facts := json.loads(line)) is None:
                        return left
                    name, pid, ticks, held_by, kind, shim_pid, shim_ticks = facts
                    left.known[name] = PayloadStarted(
                        name, 1, datetime.now(UTC), pid, ticks, held_by, kind, shim_pid, shim_ticks, boot_id()
                    )
            left.process.wait()
            raise AssertionError("the agent could not start them")

        return await to_thread.run_sync(begin)

    yield start
    for left in started:
        left.kill()
        for known in left.known.values():
            if (own := read_stat(known.shim_pid)) and own.start_ticks == known.shim_start_ticks:
                os.kill(known.shim_pid, signal.SIGUSR1)


def gone(pid: int) -> bool:
    found = read_stat(pid)
    return found is None or found.state in "ZX"


def session_is_over(known: PayloadStarted) -> bool:
    """Whether nobody of it runs; what waits to be reaped does not."""
    names = [name for name in os.listdir("/proc") if name.isdecimal()]
    found = [read_stat(int(name)) for name in names]
    return not any(one and one.session == known.pid and one.state not in "ZX" for one in found)


async def take_on(left: Left, name: str = "job", **words: Any) -> Payload | NotStarted | Lost:
    """Adopt what there is of one of them."""
    workdir = left.workdir(name)
    try:
        return await adopt(left.state(name), workdir, stdout="std.out", stderr="std.err", **words)
    finally:
        os.close(workdir._fd)


async def taken_on(left: Left, name: str = "job", **words: Any) -> Payload:
    payload = await take_on(left, name, **words)
    assert isinstance(payload, Payload), payload
    return payload


async def ended(payload: Payload, limits: Limits = supervise.NO_LIMITS) -> PayloadOutcome:
    """Watched to its end, as the runner does it."""

    async def take(_: Usage) -> None:
        return

    with anyio.fail_after(30):
        verdict = await watch(payload, limits, heartbeat_seconds=10, on_sample=take)
    return await payload.end(EndedBy.LIMIT, grace_seconds=limits.grace_seconds, verdict=verdict)


# -- as if it had never been left --------------------------------------------------------------------------------------

BURN = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"


@pytest.mark.parametrize("kind", SHIMS)
async def test_fifty_payloads_are_adopted_and_none_is_started_again(agent: Start, kind: Containment) -> None:
    """Some have ended while nobody was their agent, some end after they were adopted."""
    scripts = {f"job{i}": f"echo $$ >> ran; {BURN}; sleep {i % 10 * 0.4 + 0.2}; exit {i + 1}" for i in range(50)}
    left = await agent(containment=kind, **scripts)
    left.kill()
    await anyio.sleep(2)
    outcomes: dict[str, PayloadOutcome] = {}

    async def follow(name: str) -> None:
        outcomes[name] = await ended(await taken_on(left, name, known=left.known[name]))

    async with anyio.create_task_group() as tasks:
        for name in scripts:
            tasks.start_soon(follow, name)
    assert {name: outcomes[name].exit_code for name in scripts} == {f"job{i}": i + 1 for i in range(50)}
    for name, outcome in outcomes.items():
        assert outcome.ended_by is EndedBy.ITSELF
        assert outcome.cpu_seconds > 0
        assert (outcome.peak_memory_bytes or 0) > 100_000
        assert int(name[3:]) % 10 * 0.4 + 0.2 <= outcome.wall_seconds < 20
        assert len(left.file(name, "ran").read_text().splitlines()) == 1


@pytest.mark.parametrize("shim", ["c", "python"])
@pytest.mark.parametrize("kind", SHIMS)
async def test_who_ended_without_an_agent_is_told_as_completely_as_any(
    agent: Start, kind: Containment, shim: str
) -> None:
    left = await agent(f"(setsid sleep 0.2 &); {BURN}; sleep 0.5; kill -9 $$", containment=kind, shim=shim)
    left.kill()
    await until(lambda: left.everything_has_ended())
    payload = await taken_on(left)
    assert payload.tree.gone
    assert (payload.tree.pid, payload.tree.shim, payload.tree.containment) == (left.known["job"].pid, shim, kind)
    outcome = await ended(payload)
    assert (outcome.signal, outcome.exit_code, outcome.ended_by) == (9, None, EndedBy.ITSELF)
    assert outcome.orphans == 1
    assert 0.5 <= outcome.wall_seconds < 10
    assert outcome.cpu_seconds > 0
    assert not outcome.grace_expired


@pytest.mark.parametrize("shim", ["c", "python"])
@pytest.mark.parametrize("kind", SHIMS)
async def test_an_adopted_payload_is_killed_with_its_grace(agent: Start, kind: Containment, shim: str) -> None:
    left = await agent("trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done", containment=kind, shim=shim)
    left.kill()
    payload = await taken_on(left)
    await until(lambda: left.file("job").read_text() == "ready\n")
    usage = await payload.usage()
    assert usage.processes >= 1
    assert await payload.peek() == ["ready"]
    outcome = await payload.end(EndedBy.KILL, grace_seconds=10)
    assert (outcome.exit_code, outcome.ended_by, outcome.grace_expired) == (4, EndedBy.KILL, False)
    assert left.everything_has_ended()


@pytest.mark.parametrize("kind", SHIMS)
async def test_who_does_not_heed_his_second_agent_either_is_killed(agent: Start, kind: Containment) -> None:
    left = await agent("trap '' TERM; echo ready; while :; do sleep 0.05; done", containment=kind, grace=0.3)
    left.kill()
    payload = await taken_on(left)
    await until(lambda: left.file("job").read_text() == "ready\n")
    outcome = await payload.end(EndedBy.KILL, grace_seconds=0.3)
    assert (outcome.signal, outcome.grace_expired) == (9, True)


async def test_an_adopted_payload_hurries(agent: Start) -> None:
    left = await agent("trap '' TERM; echo ready; while :; do sleep 0.05; done")
    left.kill()
    payload = await taken_on(left)
    payload.hurry()
    with anyio.fail_after(10):
        outcome = await payload.end(EndedBy.KILL, grace_seconds=300)
    assert outcome.signal == 9


async def test_the_wall_clock_of_an_adopted_payload_began_at_its_start(agent: Start) -> None:
    left = await agent("exec sleep 1000")
    left.kill()
    await anyio.sleep(1)
    payload = await taken_on(left)
    limits = Limits(wall_seconds=1.0, grace_seconds=5)
    begun = time.monotonic()
    outcome = await ended(payload, limits)
    assert outcome.verdict is not None
    assert (outcome.verdict.limit, outcome.ended_by) == ("wall time", EndedBy.LIMIT)
    assert time.monotonic() - begun < outcome.wall_seconds


BRIEF = """
import os, signal, sys
from pathlib import Path
import anyio
from loadmaster.payload.adopt import adopt
from loadmaster.workdir import Workdir

async def main():
    path = Path(sys.argv[2])
    workdir = Workdir(path, os.open(path, os.O_RDONLY))
    print(await adopt(Path(sys.argv[1]), workdir, stdout="std.out", stderr="std.err"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

anyio.run(main)
"""


async def test_a_payload_is_adopted_again_and_again(agent: Start, tmp_path: Path) -> None:
    left = await agent("sleep 1; exit 3")
    left.kill()
    words = [sys.executable, "-c", BRIEF, str(left.state("job")), str(tmp_path / "work" / "job")]
    for _ in range(3):
        done = await to_thread.run_sync(partial(subprocess.run, words, capture_output=True, text=True))
        assert done.stdout.startswith("<Payload "), done.stderr
    assert (await ended(await taken_on(left))).exit_code == 3


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
@pytest.mark.parametrize("kind", SHIMS)
@pytest.mark.parametrize("rounds", [4, pytest.param(60, marks=pytest.mark.long)])
async def test_killed_at_any_instant_of_a_start_an_agent_leaves_what_can_be_told(
    tmp_path: Path, kind: Containment, rounds: int
) -> None:
    """Each payload has run once, to its own end, or never: nothing between."""
    names = [f"job{number}" for number in range(15)]
    for turn in range(rounds):
        root = tmp_path / str(turn)
        scripts = {name: f"echo $$ >> ran; sleep 0.3; exit {7 + len(name)}" for name in names}
        words = {"shim": "c", "world": {"containment": [kind]}, "grace": 1, "hidden": [], "scripts": scripts}

        def kill_one(root: Path = root, words: dict[str, Any] = words, turn: int = turn) -> None:
            (root / "work").mkdir(parents=True)
            argv = [sys.executable, "-c", AGENT, str(root), json.dumps(words)]
            with subprocess.Popen(argv, stdout=subprocess.PIPE) as agent:
                assert agent.stdout is not None
                agent.stdout.readline()
                time.sleep(turn * 0.0137 % 0.08)
                agent.kill()

        await to_thread.run_sync(kill_one)
        left = Left(root, None, {})  # type: ignore[arg-type]
        for name in filter(lambda name: left.file(name, "").exists(), names):
            found = await take_on(left, name)
            if isinstance(found, Payload):
                assert (await ended(found)).exit_code == 7 + len(name)
                assert len(left.file(name, "ran").read_text().split()) == 1
            else:
                assert isinstance(found, NotStarted), found
                assert not left.file(name, "ran").exists()


# -- one agent at a time -----------------------------------------------------------------------------------------------


async def test_a_payload_whose_agent_lives_is_not_adopted(agent: Start) -> None:
    left = await agent("sleep 1000")
    with pytest.raises(PayloadHeld, match="another agent has this payload"):
        await take_on(left)
    left.kill()
    payload = await taken_on(left)
    with pytest.raises(PayloadHeld):
        await take_on(left)
    assert (await payload.end(EndedBy.KILL, grace_seconds=5)).signal == signal.SIGTERM
    again = await taken_on(left)
    assert again.tree.gone
    await again.end(EndedBy.KILL, grace_seconds=0)


async def test_a_lock_that_a_killed_agent_leaves_to_a_child_for_a_moment_is_waited_for(agent: Start) -> None:
    """Killed while it starts another process, its locks are that one's too until it executes something."""
    left = await agent("sleep 1000")
    left.kill()
    lock = os.open(left.state("job") / "agent.lock", os.O_RDWR)
    fcntl.fcntl(lock, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    found: list[Payload] = []

    async def take() -> None:
        found.append(await taken_on(left))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await anyio.sleep(0.2)
        os.close(lock)
    assert (await found[0].end(EndedBy.KILL, grace_seconds=5)).signal == signal.SIGTERM


async def test_who_is_cancelled_while_it_adopts_leaves_the_payload_as_it_is(agent: Start) -> None:
    left = await agent("sleep 1000")
    left.kill()
    for _ in range(3):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await take_on(left)
        assert not left.everything_has_ended()
    assert (await (await taken_on(left)).end(EndedBy.KILL, grace_seconds=5)).signal == signal.SIGTERM


# -- without an agent ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHIMS)
async def test_a_payload_that_nobody_adopts_in_time_is_ended(agent: Start, kind: Containment) -> None:
    left = await agent("trap 'exit 0' TERM; while :; do sleep 0.05; done", containment=kind, orphan_seconds=0.3)
    left.kill()
    await until(lambda: left.everything_has_ended())
    outcome = await ended(await taken_on(left))
    assert (outcome.exit_code, outcome.ended_by, outcome.succeeded) == (0, EndedBy.ORPHANED, False)


async def test_a_payload_that_was_adopted_in_time_is_not_ended(agent: Start) -> None:
    left = await agent("sleep 3; exit 8", orphan_seconds=1.5)
    left.kill()
    outcome = await ended(await taken_on(left))
    assert (outcome.exit_code, outcome.ended_by) == (8, EndedBy.ITSELF)


# -- lost ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_event", [True, False])
@pytest.mark.parametrize("kind", SHIMS)
async def test_what_a_killed_shim_has_left_is_ended(agent: Start, kind: Containment, with_event: bool) -> None:
    left = await agent("echo $$; (trap '' TERM; sleep 1000) & sleep 1000", containment=kind)
    await until(lambda: left.file("job").read_text().endswith("\n"))
    left.kill()
    known = left.known["job"]
    os.kill(known.shim_pid, signal.SIGKILL)
    await until(lambda: gone(known.shim_pid))
    found = await take_on(left, known=known if with_event else None)
    assert found == Lost("its shim was killed", sure=kind is Containment.PID_NAMESPACE)
    assert left.everything_has_ended()
    assert session_is_over(known)


@pytest.mark.parametrize("kind", SHIMS)
async def test_a_payload_that_nobody_knows_of_any_more_is_ended(agent: Start, kind: Containment) -> None:
    """Its journal has lost it, and would have the job run again."""
    left = await agent("trap '' TERM; (setsid sleep 1000 &); echo ready; sleep 1000", containment=kind, grace=0.3)
    await until(lambda: left.file("job").read_text() == "ready\n")
    left.kill()
    assert await end_held(left.state("job")) == Lost("it ran, and was ended", sure=True)
    assert left.everything_has_ended()
    assert await end_held(left.state("job")) == Lost("it had ended", sure=True)


@pytest.mark.parametrize("with_event", [True, False])
async def test_what_is_left_of_a_session_is_ended(agent: Start, with_event: bool) -> None:
    left = await agent("sleep 1000 & sleep 1000", containment=Containment.SESSION)
    left.kill()
    known = left.known["job"]
    assert not gone(known.pid)
    found = await take_on(left, known=known if with_event else None)
    assert isinstance(found, Lost)
    assert not found.left_behind
    assert session_is_over(known)


async def test_a_session_is_ended_by_what_was_told_of_its_start(agent: Start) -> None:
    left = await agent("trap '' TERM; sleep 1000 & sleep 1000", containment=Containment.SESSION)
    left.kill()
    known = left.known["job"]
    assert await end_left(replace(known, start_ticks=known.start_ticks + 1))
    assert await end_left(replace(known, boot_id="another"))
    assert not gone(known.pid)
    assert await end_left(known)
    assert session_is_over(known)


async def test_after_a_reboot_nobody_is_signalled(agent: Start) -> None:
    left = await agent("sleep 1000")
    left.kill()
    launch = left.state("job") / "launch.json"
    launch.write_text(launch.read_text().replace(left.known["job"].boot_id, "another-boot"))
    assert await take_on(left) == Lost("the machine was started again", rebooted=True, sure=True)
    assert not left.everything_has_ended()
    assert await take_on(left, boot="yet-another") == Lost("the machine was started again", rebooted=True, sure=True)
    await to_thread.run_sync(remove_state, left.state("job"))
    found = await take_on(left, boot="another-boot")
    assert isinstance(found, Lost)
    assert found.rebooted


async def test_after_a_reboot_a_record_counts_that_was_synced(agent: Start) -> None:
    """The shim syncs it, and what the payload wrote before it, where no agent is there to do so."""
    left = await agent(early="exit 3", late="sleep 0.5; exit 4")
    await until(lambda: gone(left.known["early"].shim_pid))
    left.kill()
    await until(lambda: gone(left.known["late"].shim_pid))
    found = await take_on(left, "early", boot="another")
    assert isinstance(found, Lost)
    assert found.rebooted
    assert (await ended(await taken_on(left, "late", boot="another"))).exit_code == 4


# -- a directory that is not as it should be -------------------------------------------------------------------------------


def replaced(by: Callable[[Path], object]) -> Callable[[Path], object]:
    def replace(file: Path) -> None:
        file.unlink()
        by(file)

    return replace


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: os.truncate(file, 20),
    "noise": lambda file: file.write_bytes(bytes(range(256))),
    "huge": lambda file: file.write_bytes(b"shim_pid 1\n" * 1_000_000),
    "directory": replaced(Path.mkdir),
    "link": replaced(lambda file: file.symlink_to("/etc/passwd")),
    "FIFO": replaced(os.mkfifo),
}


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
@pytest.mark.parametrize("how", DAMAGES)
async def test_a_payload_whose_start_cannot_be_read_is_found_by_its_lock_and_ended(agent: Start, how: str) -> None:
    left = await agent("sleep 1000")
    left.kill()
    DAMAGES[how](left.state("job") / "started")
    found = await take_on(left)
    assert isinstance(found, Lost), found
    assert found.sure
    assert left.everything_has_ended()


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
@pytest.mark.parametrize("how", DAMAGES)
async def test_a_payload_whose_start_was_told_is_adopted_whatever_its_directory_says(agent: Start, how: str) -> None:
    left = await agent("sleep 0.3; exit 6")
    left.kill()
    DAMAGES[how](left.state("job") / "started")
    DAMAGES[how](left.state("job") / "launch.json")
    assert (await ended(await taken_on(left, known=left.known["job"]))).exit_code == 6


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
@pytest.mark.parametrize("how", DAMAGES)
async def test_a_record_that_cannot_be_read_is_none(agent: Start, how: str) -> None:
    left = await agent("exit 6")
    left.kill()
    await until(lambda: left.everything_has_ended())
    DAMAGES[how](left.state("job") / "exit")
    found = await take_on(left)
    assert isinstance(found, Lost)
    assert "exit" in found.reason


def moved(then: Callable[[Path], object]) -> Callable[[Path], object]:
    def move(state: Path) -> None:
        state.rename(state.with_name("elsewhere"))
        then(state)

    return move


TAKEN: dict[str, Callable[[Path], object]] = {
    "link": moved(lambda state: state.symlink_to("elsewhere")),
    "file": moved(Path.touch),
    "others'": lambda state: os.chown(state, NOBODY, NOBODY),
    "open to all": lambda state: state.chmod(0o777),
    "gone": lambda state: state.rename(state.with_name("elsewhere")),
}


@pytest.mark.parametrize("anyio_backend", [("asyncio", {})], ids=["asyncio"])
@pytest.mark.parametrize("how", TAKEN)
async def test_what_is_not_our_directory_is_not_believed_and_the_payload_ended(agent: Start, how: str) -> None:
    if how == "others'" and os.geteuid() != 0:
        pytest.skip("only root gives files away")
    left = await agent("sleep 1000")
    left.kill()
    TAKEN[how](left.state("job"))
    found = await take_on(left, known=left.known["job"])
    assert isinstance(found, Lost)
    assert left.everything_has_ended()


@pytest.mark.parametrize("kind", [Containment.SUBREAPER])
async def test_what_a_payload_says_of_its_own_end_is_not_believed(agent: Start, kind: Containment) -> None:
    forged = "status 0\\nwall_ms 1\\nasked -\\norphans 0\\ngrace_expired 0\\nsynced 1\\n"
    left = await agent(f"printf '{forged}' > ../../state/job/exit; echo ready; sleep 0.5; exit 9", containment=kind)
    left.kill()
    await until(lambda: left.file("job").read_text() == "ready\n")
    assert (await ended(await taken_on(left))).exit_code == 9


async def test_with_mounts_of_its_own_a_payload_is_adopted_too(agent: Start) -> None:
    left = await agent("ls -A ../../state/job; sleep 0.3; exit 3", world={"isolation": "namespaces"})
    left.kill()
    assert (await ended(await taken_on(left))).exit_code == 3
    assert left.file("job").read_text() == ""


async def test_a_state_directory_is_hidden_from_the_payload(agent: Start, tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "secret").touch()
    script = "echo forged > ../../state/job/exit; ls -A ../../state/job ../../journal; exit 3"
    left = await agent(script, hidden=(str(tmp_path / "journal"),))
    left.kill()
    assert (await ended(await taken_on(left))).exit_code == 3
    assert "secret" not in left.file("job").read_text()
    assert "exit" not in left.file("job").read_text()


# -- never started ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing(tmp_path: Path) -> Left:
    """An agent that died before it had started anything."""
    (tmp_path / "work" / "job").mkdir(parents=True)
    launch = LaunchRecord(boot_id=boot_id(), shim="c", containment=(Containment.SUBREAPER,))
    StateDirectory.make(tmp_path / "state" / "job", launch).close()
    return Left(tmp_path, None, {})  # type: ignore[arg-type]


def shim_with(state: Path, *program: str) -> subprocess.Popen[bytes]:
    descriptor = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    try:
        words = [*shim_command(), str(descriptor), "-1", "-1", "0", "subreaper", "n", *program]
        return subprocess.Popen(words, pass_fds=[descriptor])
    finally:
        os.close(descriptor)


async def test_what_was_never_started_never_will_be(nothing: Left, tmp_path: Path) -> None:
    """A shim that was on its way when its agent died comes too late."""
    assert isinstance(await take_on(nothing), NotStarted)
    late = await to_thread.run_sync(lambda: shim_with(nothing.state("job"), "/bin/touch", str(tmp_path / "ran")))
    assert await to_thread.run_sync(late.wait) == 125
    assert not (tmp_path / "ran").exists()
    assert isinstance(await take_on(nothing), NotStarted)


async def test_without_a_directory_nothing_was_started(nothing: Left) -> None:
    await to_thread.run_sync(remove_state, nothing.state("job"))
    assert isinstance(await take_on(nothing), NotStarted)


async def test_what_could_not_be_executed_was_not_started(nothing: Left) -> None:
    shim = await to_thread.run_sync(lambda: shim_with(nothing.state("job"), "/nowhere/at/all"))
    await until(lambda: (nothing.state("job") / "started").exists())
    found = await take_on(nothing)
    assert found == NotStarted("No such file or directory")
    assert await to_thread.run_sync(shim.wait) == 0
    assert await take_on(nothing) == found


async def test_a_shim_that_was_killed_before_it_said_anything_may_have_started_it(nothing: Left) -> None:
    (nothing.state("job") / "lock").touch(0o700)
    assert await take_on(nothing) == Lost("its shim was killed")


async def test_a_shim_that_is_just_starting_is_waited_for(nothing: Left) -> None:
    """It has its lock, and its program is on a file server that is slow to answer. The kernel tells when it goes on."""
    lock = os.open(nothing.state("job") / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    found: list[object] = []

    async def take() -> None:
        found.append(await take_on(nothing))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(take)
        await anyio.sleep(0.3)
        assert found == []
        os.close(lock)
    assert found == [NotStarted("its agent died before anything was executed")]


# -- what else it has --------------------------------------------------------------------------------------------------


async def test_a_payload_that_was_adopted_is_still_in_its_groups(agent: Start) -> None:
    if not await to_thread.run_sync(lambda: find_hierarchies().directories):
        pytest.skip("no control group can be made here")
    left = await agent("(setsid sleep 1000 &) ; echo ready; sleep 1000", containment=Containment.CGROUP,
                       world={"cgroup": "own"})  # fmt: skip
    left.kill()
    groups = json.loads((left.state("job") / "launch.json").read_text())["groups"]
    await until(lambda: left.file("job").read_text() == "ready\n")
    payload = await taken_on(left)
    assert payload.tree.containment is Containment.CGROUP
    assert (await payload.usage()).processes >= 2
    os.kill(left.known["job"].shim_pid, signal.SIGKILL)  # the group holds them all the same
    outcome = await payload.end(EndedBy.KILL, grace_seconds=1)
    assert not outcome.left_behind
    assert not any(map(os.path.exists, groups.values()))


async def test_what_had_left_everything_but_its_group_is_ended_too(agent: Start) -> None:
    if not await to_thread.run_sync(lambda: find_hierarchies().directories):
        pytest.skip("no control group can be made here")
    left = await agent("(setsid sh -c 'echo $$ > daemon; exec sleep 1000' &); sleep 1000",
                       containment=Containment.CGROUP, world={"cgroup": "own"})  # fmt: skip
    daemon = left.file("job", "daemon")
    await until(lambda: daemon.exists() and daemon.read_text().endswith("\n"))
    left.kill()
    os.kill(left.known["job"].shim_pid, signal.SIGKILL)
    await until(lambda: gone(left.known["job"].shim_pid))
    assert await take_on(left) == Lost("its shim was killed", sure=True)
    assert gone(int(daemon.read_text()))


async def test_what_is_printed_is_seen_after_the_adoption(agent: Start) -> None:
    left = await agent(
        "echo before; until [ -e go ]; do sleep 0.02; done; echo after; sleep 0.2; echo wrong >&2; exit 1"
    )
    left.kill()
    payload = await taken_on(left)
    told: list[str] = []
    async with anyio.create_task_group() as beside:
        beside.start_soon(payload.follow, lambda name, text, skipped: told.append(text))
        left.file("job", "go").touch()
        outcome = await ended(payload)
        beside.cancel_scope.cancel()
    assert outcome.exit_code == 1
    assert payload.last_lines == ("wrong",)
    assert "".join(told).startswith("before\nafter\n")


async def test_logs_that_are_no_files_any_more_do_not_hinder_the_adoption(agent: Start) -> None:
    left = await agent("rm std.out std.err; mkfifo std.out; ln -s /etc/passwd std.err; sleep 0.3; exit 2")
    left.kill()
    await until(lambda: left.file("job", "std.err").is_symlink())
    payload = await taken_on(left)
    assert await payload.peek() == []
    assert (await ended(payload)).exit_code == 2
    assert payload.last_lines == ()


KEPT = 1_000_000


async def test_the_middle_that_the_first_agent_gave_up_is_left_out_by_the_second(agent: Start) -> None:
    left = await agent("head -c 5000000 /dev/zero | tr '\\\\0' x; until [ -e go ]; do sleep 0.02; done; echo end",
                       world={"kept_output_bytes": KEPT})  # fmt: skip
    await until(lambda: left.file("job").stat().st_size == 5_000_000)
    left.kill()
    world = World(kept_output_bytes=KEPT)
    payload = await taken_on(left, world=world)
    await payload.usage(Limits(workdir_bytes=10**9))  # gives it back
    assert left.file("job").stat().st_blocks * 512 < 2 * KEPT
    payload._output.close()
    payload._state.close()  # type: ignore[union-attr]
    payload.tree.leave()  # type: ignore[attr-defined]
    second = await taken_on(left, world=world)
    left.file("job", "go").touch()
    await ended(second)
    text = left.file("job").read_text()
    assert "bytes left out" in text
    assert text.endswith("end\n")
    assert len(text) < 2 * KEPT


# -- as somebody else ----------------------------------------------------------------------------------------------------

ORDINARY = """
import os, signal, subprocess, sys, time
from pathlib import Path
from loadmaster import Limits, PayloadSpec
from loadmaster.payload import launch, ready, shimtree
from loadmaster.payload.adopt import adopt
from loadmaster.payload.ready import start as start_payload
from loadmaster.result import EndedBy
from loadmaster.workdir import Workdir
from loadmaster.world import World
import loadmaster.notices

async def start(root, words):
    workdir = Workdir.make(root, "job")
    spec = PayloadSpec(command=("/bin/sh", "-c", "sleep 0.5; exit 7"), env={"PATH": "/usr/bin:/bin"})
    payload = await start_payload(
        spec, workdir, stdout="std.out", stderr="std.err", world=World(containment=words), state=root / "state")
    os.write(told, b"!")
    await anyio.sleep(1000)

async def take(root):
    path = root / "job"
    found = await adopt(root / "state", Workdir(path, os.open(path, os.O_RDONLY)), stdout="std.out", stderr="std.err")
    await found.tree.wait()
    outcome = await found.end(EndedBy.KILL, grace_seconds=1)
    print(found.tree.containment, outcome.exit_code, outcome.ended_by, outcome.cpu_seconds > 0)

for number, words in enumerate(sys.argv[1:] or ["pid-namespace", "subreaper"]):
    root = Path.cwd() / str(number)
    root.mkdir()
    tell, told = os.pipe()
    agent = os.fork()
    if agent == 0:
        anyio.run(start, root, words)
    os.close(told)
    os.read(tell, 1)
    os.kill(agent, signal.SIGKILL)
    os.waitpid(agent, 0)
    anyio.run(take, root)
"""


def test_an_ordinary_user_adopts_payloads_too(as_ordinary_user: Callable[[str], str]) -> None:
    seen = as_ordinary_user(ORDINARY).splitlines()
    assert seen == [f"{kind} 7 itself True" for kind in SHIMS]
