"""A work directory is somebody's as long as a payload lives in it, whatever has become of its agent."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from anyio import to_thread

from conftest import until
from loadmaster import PayloadSpec
from loadmaster.description import Containment
from loadmaster.occupants import NOTE, hold, is_occupied, note_session, who
from loadmaster.payload import launch, ready, shimtree
from loadmaster.payload.ready import start as start_payload
from loadmaster.payload.supervise import Payload
from loadmaster.result import EndedBy
from loadmaster.workdir import Workdir
from loadmaster.world import World


@pytest.fixture
def seen(workdir: Workdir) -> Iterator[int]:
    """The work directory, as somebody else has it open."""
    descriptor = os.open(workdir.path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


async def start(script: str, workdir: Workdir, kind: Containment) -> Payload:
    spec = PayloadSpec(command=("/bin/sh", "-c", script), env={"PATH": "/usr/bin:/bin"})
    return await start_payload(
        spec, workdir, stdout="std.out", stderr="std.err", world=World(containment=(kind,), cgroup="none")
    )


@pytest.mark.parametrize("shim", ["c", "python"])
@pytest.mark.parametrize("kind", [Containment.PID_NAMESPACE, Containment.SUBREAPER, Containment.SESSION])
async def test_a_directory_is_occupied_while_a_payload_runs_and_the_payload_has_nothing_of_it(
    workdir: Workdir, seen: int, monkeypatch: pytest.MonkeyPatch, kind: Containment, shim: str
) -> None:
    for module in (launch, shimtree, ready):
        monkeypatch.setattr(module, "shim_kind", lambda: shim)
    assert not await to_thread.run_sync(is_occupied, seen)
    payload = await start("ls /proc/self/fd > open; echo $$ > ready; sleep 1000", workdir, kind)
    await until(lambda: (workdir.path / "ready").exists() and (workdir.path / "ready").read_text() != "")
    assert await to_thread.run_sync(is_occupied, seen)
    assert str(payload.tree.pid) in await to_thread.run_sync(who, seen)
    assert (workdir.path / "open").read_text().split() == ["0", "1", "2", "3"]  # the last is the listing's
    await payload.end(EndedBy.CANCELLATION, grace_seconds=5)
    assert not await to_thread.run_sync(is_occupied, seen)


@pytest.mark.parametrize("kind", [Containment.PID_NAMESPACE, Containment.SUBREAPER])
async def test_it_is_free_when_the_shim_has_been_killed_and_what_it_held_is_gone(
    workdir: Workdir, seen: int, kind: Containment
) -> None:
    payload = await start("sleep 1000", workdir, kind)
    os.kill(payload.tree.shim_pid, signal.SIGKILL)
    await payload.end(EndedBy.CANCELLATION, grace_seconds=5)
    assert not await to_thread.run_sync(is_occupied, seen)


def test_a_lock_is_held_by_whoever_has_inherited_it(workdir: Workdir, seen: int) -> None:
    lock = hold(seen)
    other = os.dup(lock)
    os.close(lock)
    assert is_occupied(seen)
    os.close(other)
    assert not is_occupied(seen)


NOTES = [b"", b"x", b"a b c", b"boot 1 1", b"\xff\xff \xff 1", b"boot -1 5", b"boot 99999999999999999999 1"]


@pytest.mark.parametrize("note", NOTES)
def test_a_note_that_the_payload_has_written_itself_is_no_harm(seen: int, note: bytes) -> None:
    try:
        os.setxattr(seen, NOTE, note)
    except OSError:
        pytest.skip("this disk has no attributes")
    assert not is_occupied(seen)


def test_a_session_whose_number_is_somebody_elses_does_not_count(seen: int) -> None:
    note_session(seen, os.getsid(0), 1)
    assert not is_occupied(seen)


ORDINARY = """
import subprocess
from pathlib import Path
from loadmaster.occupants import hold
from loadmaster.workdir import Workdir

first = Workdir.make(Path.cwd(), "7")
(Path.cwd() / "7" / "result").touch()
lock = first.hold()
with subprocess.Popen(["sleep", "1000"], pass_fds=[lock], cwd=first.path) as shim:
    os.close(lock)
    os.close(first._fd)  # its agent has died
    try:
        Workdir.make(Path.cwd(), "7")
    except Exception as exc:
        print(type(exc).__name__, exc.args[0].count(f"(process {shim.pid})"), (Path.cwd() / "7" / "result").exists())
    again = Workdir.make(Path.cwd(), "7", identity=first.identity)
    print(again.continued)
    again.close(keep=True)
    shim.kill()
Workdir.make(Path.cwd(), "7").close()
"""


def test_an_ordinary_user_is_refused_too(as_ordinary_user: Callable[[str], str]) -> None:
    assert as_ordinary_user(ORDINARY).splitlines() == ["WorkdirFault 1 True", "True"]
