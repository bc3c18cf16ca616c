"""A starter: what it starts, what is left of it, and what becomes of starts when it is hindered or killed.

That its shims are shims like those that are executed is test_shim.py's and test_containment.py's to say.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import TEMPORARY, until
from loadmaster import JobDescription, Node, Site
from loadmaster.description import Containment
from loadmaster.payload import containment, shimtree
from loadmaster.payload.containment import start_contained
from loadmaster.payload.launch import Launch, Refused, shim_kind
from loadmaster.payload.process import ExitRecord
from loadmaster.payload.shimtree import ShimTree
from loadmaster.payload.starter import MESSAGE_BYTES, MOST_PIDS, Starter, open_starter
from loadmaster.payload.tree import Tree
from loadmaster.payload.usage import read_stat
from loadmaster.world import BEST_FIRST

pytestmark = pytest.mark.skipif(shim_kind() != "c", reason="without a compiled shim there is no starter")

SUBREAPER = [Containment.SUBREAPER]


@pytest.fixture
def printed(tmp_path: Path) -> Path:
    return tmp_path / "printed"


@pytest.fixture
def sh(tmp_path: Path, printed: Path) -> Iterator[Callable[..., Launch]]:
    """A launch of a piece of shell in `work`, whose output goes to `printed`."""
    (tmp_path / "work").mkdir()
    with printed.open("wb") as file:

        def sh(script: str, **words: Any) -> Launch:
            given = {"env": {"PATH": "/usr/bin:/bin"}, "grace_seconds": 10.0, **words}
            argv = ["/bin/sh", "-c", script]
            return Launch(argv, cwd=tmp_path / "work", stdout=file.fileno(), stderr=file.fileno(), **given)

        yield sh


@pytest.fixture
async def starter(anyio_backend: Any) -> AsyncIterator[Starter]:
    async with open_starter() as found:
        assert found is not None
        yield found


async def ended(tree: Tree) -> ExitRecord:
    with anyio.fail_after(20):
        await tree.wait()
        assert await tree.end(0)
    return tree.reap()


def was_ordered(tree: Tree) -> bool:
    assert isinstance(tree, ShimTree)
    return tree._popen is None


def is_there(pid: int) -> bool:
    found = read_stat(pid)
    return found is not None and found.state not in "ZX"


# -- what it starts ----------------------------------------------------------------------------------------------


async def test_a_shim_is_the_agents_child_and_its_payload_does_as_it_is_told(
    starter: Starter, sh: Callable[..., Launch], printed: Path, tmp_path: Path
) -> None:
    script = 'echo "$A" $(pwd) $(umask); echo wrong >&2; exit 7'
    launch = sh(script, env={"PATH": "/usr/bin:/bin", "A": "two words\nand a line"}, umask=0o027)
    tree = await start_contained(launch, SUBREAPER, starter)
    assert was_ordered(tree)
    stat = await to_thread.run_sync(Path(f"/proc/{tree.shim_pid}/stat").read_text)
    assert int(stat.rpartition(")")[2].split()[1]) == os.getpid()
    assert (await ended(tree)).exit_code == 7
    assert printed.read_text() == f"two words\nand a line {tmp_path / 'work'} 0027\nwrong\n"


async def test_a_hundred_starts_at_once_are_a_hundred_payloads(
    starter: Starter, sh: Callable[..., Launch], printed: Path
) -> None:
    codes: list[int | None] = []

    async def run(number: int) -> None:
        tree = await start_contained(sh(f"echo {number}; exit {number}"), SUBREAPER, starter)
        codes.append((await ended(tree)).exit_code)

    async with anyio.create_task_group() as tasks:
        for number in range(100):
            tasks.start_soon(run, number)
    assert sorted(code or 0 for code in codes) == list(range(100)) == sorted(map(int, printed.read_text().split()))


async def test_a_refused_containment_is_followed_by_the_next(
    starter: Starter, sh: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And by the same way: a node without namespaces has them refused with every start."""
    spawned: list[object] = []
    monkeypatch.setattr(containment, "spawn", lambda *words: spawned.append(words))
    begin = ShimTree.begin

    async def refuse(tree: ShimTree) -> None:
        await begin(tree)
        if tree.containment is Containment.PID_NAMESPACE:
            raise Refused("pid-namespace: not here")

    monkeypatch.setattr(ShimTree, "begin", refuse)
    tree = await start_contained(sh("exit 3"), [Containment.PID_NAMESPACE, *SUBREAPER], starter)
    assert (tree.containment, spawned) == (Containment.SUBREAPER, [])
    assert (await ended(tree)).exit_code == 3


async def test_a_directory_that_is_not_there_is_said_as_ever(starter: Starter, sh: Callable[..., Launch]) -> None:
    launch = replace(sh("exit 0"), cwd=Path("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError, match="/nowhere/at/all"):
        await start_contained(launch, SUBREAPER, starter)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param({"env": {"BIG": "x" * MESSAGE_BYTES}}, id="too large for a message"),
        pytest.param({"wrapped": True}, id="a wrapper"),
    ],
)
async def test_what_no_message_can_say_is_executed(
    starter: Starter, sh: Callable[..., Launch], words: dict[str, Any]
) -> None:
    tree = await start_contained(sh("exit 4", **words), SUBREAPER, starter)
    assert not was_ordered(tree)
    assert (await ended(tree)).exit_code == 4


async def test_a_word_with_a_nul_is_not_two_words(starter: Starter, sh: Callable[..., Launch]) -> None:
    launch = replace(sh("exit 0"), argv=["/bin/echo", "one\0two"])
    with pytest.raises(ValueError, match="null byte"):
        await start_contained(launch, SUBREAPER, starter)


async def test_a_shim_inherits_no_descriptor_but_its_own(starter: Starter, sh: Callable[..., Launch]) -> None:
    """Three, the report, and what it opens for itself: a signalfd. The starter: its socket, and a descriptor of ours."""
    with socket.socket() as inheritable:
        inheritable.set_inheritable(True)
        tree = await start_contained(sh("sleep 1000"), SUBREAPER, starter)

        def descriptors(pid: int) -> list[str]:
            return [os.readlink(f"/proc/{pid}/fd/{number}").partition(":")[0] for number in range(3, 20)
                    if os.path.lexists(f"/proc/{pid}/fd/{number}")]  # fmt: skip

        if os.geteuid() == 0:
            assert sorted(await to_thread.run_sync(descriptors, tree.shim_pid)) == ["anon_inode", "socket"]
            assert sorted(await to_thread.run_sync(descriptors, starter.pid)) == ["anon_inode", "socket"]
    tree.hurry()
    await ended(tree)


# -- when it is hindered -----------------------------------------------------------------------------------------


async def test_a_killed_starter_costs_its_payloads_nothing_and_another_one_starts_the_next(
    starter: Starter, sh: Callable[..., Launch]
) -> None:
    running = await start_contained(sh("read line; exit 5"), SUBREAPER, starter)
    sleeping = await start_contained(sh("sleep 0.2; exit 6"), SUBREAPER, starter)
    first = starter.pid
    os.kill(first, signal.SIGKILL)
    await until(lambda: not is_there(first))
    after = await start_contained(sh("exit 7"), SUBREAPER, starter)
    assert was_ordered(after)
    assert starter.pid not in {0, first}
    assert [(await ended(tree)).exit_code for tree in (running, sleeping, after)] == [5, 6, 7]


async def test_an_order_that_a_starter_dies_of_is_executed(
    starter: Starter, sh: Callable[..., Launch], printed: Path
) -> None:
    """Sent and never read: once, and once only."""
    await to_thread.run_sync(starter.prepare)
    os.kill(starter.pid, signal.SIGSTOP)
    await until(lambda: (found := read_stat(starter.pid)) is not None and found.state == "T")
    begun = containment.order(sh("echo once"), SUBREAPER, starter)
    assert begun is not None
    os.kill(starter.pid, signal.SIGKILL)
    tree = await containment.settled(sh("echo once"), *begun)
    assert not was_ordered(tree)
    assert (await ended(tree)).exit_code == 0
    assert printed.read_text() == "once\n"


async def test_a_stopped_starter_is_told_to_go_on(
    starter: Starter, sh: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload of the same user may stop it where Linux has no fence."""
    monkeypatch.setattr(shimtree, "UNHEARD_SECONDS", 0.05)
    await to_thread.run_sync(starter.prepare)
    os.kill(first := starter.pid, signal.SIGSTOP)
    with anyio.fail_after(20):
        tree = await start_contained(sh("exit 3"), SUBREAPER, starter)
    assert was_ordered(tree)
    assert starter.pid == first
    assert (await ended(tree)).exit_code == 3


async def test_a_starter_that_does_not_answer_is_done_without(
    starter: Starter, sh: Callable[..., Launch], monkeypatch: pytest.MonkeyPatch, printed: Path
) -> None:
    monkeypatch.setattr(shimtree, "UNHEARD_SECONDS", 0.05)
    monkeypatch.setattr("loadmaster.payload.starter.Order.insist", lambda order: None)
    await to_thread.run_sync(starter.prepare)
    os.kill(starter.pid, signal.SIGSTOP)
    with anyio.fail_after(20):
        tree = await start_contained(sh("echo once"), SUBREAPER, starter)
    assert not was_ordered(tree)
    assert (await ended(tree)).exit_code == 0
    assert printed.read_text() == "once\n"


async def test_who_gives_a_start_up_that_nobody_has_heard_of_leaves_nothing(
    starter: Starter, sh: Callable[..., Launch], tmp_path: Path
) -> None:
    await to_thread.run_sync(starter.prepare)
    os.kill(starter.pid, signal.SIGSTOP)
    with anyio.move_on_after(0.1):
        await start_contained(sh("touch started"), SUBREAPER, starter)
    assert not is_there(starter.pid)
    tree = await start_contained(sh("exit 0"), SUBREAPER, starter)
    assert (await ended(tree)).exit_code == 0
    assert not (tmp_path / "work" / "started").exists()


async def test_a_shim_that_ends_before_it_has_spoken_is_not_followed_by_a_second_start(
    starter: Starter, sh: Callable[..., Launch], tmp_path: Path
) -> None:
    """It may have started the payload. One that does not understand its words, as a negative grace, says nothing."""
    with pytest.raises(OSError, match="before it said what it had started"):
        await start_contained(sh("touch started", grace_seconds=-1.0), BEST_FIRST, starter)
    assert not (tmp_path / "work" / "started").exists()


async def test_a_node_without_a_process_left_says_so(as_ordinary_user: Callable[[str], str]) -> None:
    script = """
import os, resource, anyio
from pathlib import Path
from loadmaster.description import Containment
from loadmaster.payload.containment import start_contained
from loadmaster.payload.launch import Launch
from loadmaster.payload.starter import open_starter
async def main():
    async with open_starter() as starter:
        starter.prepare()
        resource.prlimit(starter.pid, resource.RLIMIT_NPROC, (0, 0))
        try:
            await start_contained(Launch(["/bin/true"], {}, Path.cwd(), 1, 2, 1.0), [Containment.SUBREAPER], starter)
        except OSError as exc:
            print(exc)
anyio.run(main)
"""
    said = await to_thread.run_sync(as_ordinary_user, script)
    assert "a limit of processes is reached" in said


async def test_rights_that_were_given_up_are_not_had_again(as_ordinary_user: Callable[[str], str]) -> None:
    """A starter has those of its own start: an agent that has changed its user since does without it."""
    if os.geteuid() != 0:
        pytest.skip("takes somebody who may give up his rights")

    def run() -> str:
        script = """
import os, anyio
from pathlib import Path
from loadmaster.description import Containment
from loadmaster.payload.containment import start_contained
from loadmaster.payload.launch import Launch
from loadmaster.payload.starter import open_starter
async def main():
    async with open_starter() as starter:
        starter.prepare()
        os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 0)
        tree = await start_contained(Launch(["/usr/bin/id", "-u"], {}, Path("/"), 1, 2, 1.0), [Containment.SESSION], starter)
        await tree.wait(); await tree.end(0); tree.reap()
        assert starter.order(Launch(["/usr/bin/id"], {}, Path("/"), 1, 2, 1.0), Containment.SUBREAPER, 1) is None
        os.setresuid(0, 0, 0)
anyio.run(main)
"""
        return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout

    assert await to_thread.run_sync(run) == "65534\n"


async def test_no_more_starts_than_there_are_places_are_ordered(starter: Starter, sh: Callable[..., Launch]) -> None:
    await to_thread.run_sync(starter.prepare)
    with socket.socket() as report:
        assert starter._running is not None
        taken = [starter._running.free.pop() for _ in range(MOST_PIDS)]
        assert starter.order(sh("exit 0"), Containment.SUBREAPER, report.fileno()) is None
        starter._running.free += taken


# -- its end -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopped", [False, True])
async def test_it_ends_with_whoever_opened_it(sh: Callable[..., Launch], stopped: bool) -> None:
    """Also on a cancellation; a payload is not ended with it."""
    pid, tree = 0, None
    with anyio.CancelScope() as scope:
        async with open_starter() as starter:
            assert starter is not None
            tree = await start_contained(sh("sleep 0.1; exit 9"), SUBREAPER, starter)
            pid = starter.pid
            if stopped:
                os.kill(pid, signal.SIGSTOP)
            scope.cancel()
            await anyio.lowlevel.checkpoint()
    assert tree is not None
    assert read_stat(pid) is None
    assert (await ended(tree)).exit_code == 9


AGENT = """
import os, sys, anyio
from pathlib import Path
from loadmaster.payload.starter import open_starter
async def main():
    async with open_starter() as starter:
        starter.prepare()
        if os.fork() == 0:  # somebody who has what the agent has, and outlives it
            sys.stdin.read()
            os._exit(0)
        print(starter.pid, flush=True)
        await anyio.sleep_forever()
anyio.run(main)
"""


async def test_a_killed_agent_leaves_none(tmp_path: Path) -> None:
    """Nor where a copy of it has the socket as well."""

    def run() -> int:
        words = [sys.executable, "-c", AGENT]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=TEMPORARY) as agent:
            assert agent.stdout is not None
            pid = int(agent.stdout.readline())
            assert is_there(pid)
            agent.kill()
            for _ in range(2000):
                if not is_there(pid):
                    break
                signal.sigtimedwait([], 0.01)
            assert not is_there(pid), "the starter has outlived its agent"
            return pid

    assert await to_thread.run_sync(run) > 1


async def test_a_node_starts_its_payloads_by_one(root: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*words: object) -> None:
        raise AssertionError("a shim was executed")

    monkeypatch.setattr(ShimTree, "executed", never)
    async with Node(site=Site(output_directory=str(out)), root=root) as node:
        handles = [node.submit(JobDescription(executable="/bin/true")) for _ in range(5)]
        assert [(await handle.wait()).status for handle in handles] == ["Done"] * 5
