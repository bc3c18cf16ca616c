"""A state directory: what is in it, who has it, and what of it is believed."""

from __future__ import annotations

import os
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from loadmaster import PayloadSpec
from loadmaster.description import Containment
from loadmaster.errors import PayloadHeld, PayloadNotStarted
from loadmaster.payload import supervise
from loadmaster.payload.adopt import adopt
from loadmaster.payload.found import Lost, NotStarted
from loadmaster.payload.ready import start as start_payload
from loadmaster.payload.state import LaunchRecord, NotOurs, StateDirectory, boot_id, mark_executed, remove_state
from loadmaster.result import EndedBy
from loadmaster.workdir import Workdir
from loadmaster.world import World

LAUNCH = LaunchRecord(boot_id="b", shim="c", containment=(Containment.SUBREAPER,), groups={"cpu": "/a"})
BOOT = boot_id()
TRUE = PayloadSpec(command=("/bin/true",), env={})


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    made = StateDirectory.make(tmp_path / "state", LAUNCH)
    made.close()
    found = StateDirectory.open(tmp_path / "state")
    assert found.launch == LAUNCH
    assert (found.started, found.ended, found.has_shim()) == (None, None, False)
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    found.close()
    found.close()


def test_one_agent_at_a_time_has_it(tmp_path: Path) -> None:
    made = StateDirectory.make(tmp_path / "state", LAUNCH)
    with pytest.raises(PayloadHeld):
        StateDirectory.open(tmp_path / "state")
    made.close()
    StateDirectory.open(tmp_path / "state").close()


def test_one_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    with pytest.raises(PayloadHeld, match="is there already"):
        StateDirectory.make(tmp_path / "state", LAUNCH)


def test_a_lock_that_is_no_file_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "state" / "agent.lock").mkdir(parents=True, mode=0o700)
    (tmp_path / "state").chmod(0o700)
    with pytest.raises(NotOurs, match=r"agent\.lock"):
        StateDirectory.open(tmp_path / "state")


def test_it_is_void_once_nothing_can_have_been_executed(tmp_path: Path) -> None:
    made = StateDirectory.make(tmp_path / "state", LAUNCH)
    assert made.void()
    mark_executed(made.descriptor)
    assert not made.void()
    made.close()


def test_what_is_removed_is_not_what_a_link_leads_to(tmp_path: Path) -> None:
    StateDirectory.make(tmp_path / "state", LAUNCH).close()
    (tmp_path / "link").symlink_to("state")
    remove_state(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == ["state"]
    remove_state(tmp_path / "state")
    remove_state(tmp_path / "state")
    assert os.listdir(tmp_path) == []


def test_what_a_payload_has_put_there_is_removed_however_deep(tmp_path: Path) -> None:
    """A recursion went as deep as it."""
    made = StateDirectory.make(tmp_path / "state", LAUNCH)
    here = os.dup(made.descriptor)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    made.close()
    (tmp_path / "state").chmod(0)
    remove_state(tmp_path / "state")
    assert os.listdir(tmp_path) == []


def test_the_boot_has_a_name() -> None:
    assert len(boot_id()) == 36


# -- as `start` makes it -------------------------------------------------------------------------------------------------


async def start(workdir: Workdir, state: Path, spec: PayloadSpec = TRUE, **words: object) -> supervise.Payload:
    world = World.model_validate(words)
    return await start_payload(spec, workdir, stdout="std.out", stderr="std.err", world=world, state=state)


async def test_what_it_says_stays_until_somebody_removes_it(workdir: Workdir, tmp_path: Path) -> None:
    payload = await start(workdir, tmp_path / "state")
    await payload.tree.wait()
    await payload.end(EndedBy.ITSELF, grace_seconds=0)
    assert sorted(os.listdir(tmp_path / "state")) == ["agent.lock", "exit", "launch.json", "lock", "started"]
    again = await adopt(tmp_path / "state", workdir, stdout="std.out", stderr="std.err")
    assert isinstance(again, supervise.Payload)
    assert (await again.end(EndedBy.KILL, grace_seconds=0)).succeeded


@pytest.mark.parametrize("kind", [Containment.PID_NAMESPACE, Containment.SUBREAPER])
async def test_what_cannot_be_started_leaves_no_directory(workdir: Workdir, tmp_path: Path, kind: Containment) -> None:
    (workdir.path / "script").write_text("#!/nowhere/at/all\n")
    (workdir.path / "script").chmod(0o755)
    with pytest.raises(PayloadNotStarted):
        await start(workdir, tmp_path / "state", PayloadSpec(command=("./script",), env={}), containment=(kind,))
    assert not (tmp_path / "state").exists()


async def test_a_directory_that_is_there_is_not_taken_for_another_payload(workdir: Workdir, tmp_path: Path) -> None:
    (await to_thread.run_sync(StateDirectory.make, tmp_path / "state", LAUNCH)).close()
    with pytest.raises(PayloadHeld, match="is there already"):
        await start(workdir, tmp_path / "state")
    assert (tmp_path / "state").exists()


@pytest.mark.parametrize("place", ["root", "root/job", "root/job/state"])
async def test_it_is_apart_from_the_work_directory(workdir: Workdir, tmp_path: Path, place: str) -> None:
    with pytest.raises(ValueError, match="apart from the work directory"):
        await start(workdir, tmp_path / place)


async def test_a_session_that_comes_last_is_not_taken_for_never_started(
    workdir: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the shim was refused, a session was given; its directory said that nothing had been executed."""
    monkeypatch.setattr("loadmaster.payload.shimtree.shim_command", lambda: ["/etc/passwd"])
    spec = PayloadSpec(command=("/bin/sleep", "1000"), env={})
    words = (Containment.SUBREAPER, Containment.SESSION)
    payload = await start(workdir, tmp_path / "state", spec, containment=words)
    assert payload.tree.containment is Containment.SESSION
    payload._state.close()  # type: ignore[union-attr]
    found = await adopt(tmp_path / "state", workdir, stdout="std.out", stderr="std.err")
    assert isinstance(found, Lost)
    with anyio.fail_after(10):
        await payload.tree.wait()
    assert (await payload.end(EndedBy.ITSELF, grace_seconds=0)).signal == 9


async def test_where_nothing_was_started_there_is_nothing(workdir: Workdir, tmp_path: Path) -> None:
    found = await adopt(tmp_path / "state", workdir, stdout="std.out", stderr="std.err", boot=BOOT)
    assert isinstance(found, NotStarted)
    assert not (tmp_path / "state").exists()
