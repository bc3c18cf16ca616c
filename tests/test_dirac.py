"""DIRAC's dictionaries, and its synchronous coordinators as they are found in the wild."""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import Fly, sh, until
from following import happens, killed_when
from loadmaster import ComputingElement, JobHandle, Status
from loadmaster.dirac import adapt, is_synchronous
from loadmaster.dirac import thread as hook_thread
from loadmaster.dirac.thread import HookThread
from loadmaster.events import PayloadStarted


def S_OK(value: object = None) -> dict[str, Any]:
    return {"OK": True, "Value": value}


def S_ERROR(message: str, errno: int = 0) -> dict[str, Any]:
    return {"OK": False, "Errno": errno, "Message": message, "CallStack": []}


class Base:
    """What DIRAC's own class is like."""

    def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
        self.jobArgs = jobArgs
        self.ceArgs = ceArgs

    def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
        return S_OK({"command": command, "env": exeEnv})

    def postProcess(self) -> Any:
        return S_OK()


class OfJob(Base):
    def preProcess(self, job: dict[str, Any]) -> Any:  # type: ignore[override]
        self.seen = job["JobName"]
        return S_OK()

    def postProcess(self, job: dict[str, Any]) -> Any:  # type: ignore[override]
        assert self.seen == job["JobName"] == "n"
        return S_OK()


class OfNothing(Base):
    def preProcess(self) -> None:  # type: ignore[override]
        self.seen = True

    def postProcess(self) -> None:
        assert self.seen


@pytest.mark.parametrize("legacy", [Base, OfJob, OfNothing])
async def test_each_spelling_of_the_hooks_runs_unchanged(fly: Fly, legacy: type[Base]) -> None:
    result = await fly({"coordinator": adapt(legacy)}, job_name="n")
    assert (result.status, result.failure) == (Status.DONE, None)


async def test_it_is_given_diracs_dictionaries_and_may_change_command_and_environment(fly: Fly, out: Any) -> None:
    class Community(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            assert self.jobArgs["JobID"] == 17
            assert self.jobArgs["LHCbKey"] == "kept"
            assert self.ceArgs["Site"] == "LCG.CERN.cern"
            exeEnv["GREETING"] = f"hello from {exeEnv['DIRACSITE']}"
            return S_OK({"command": f"{command}; echo $GREETING", "env": exeEnv})

    options = {"coordinator": adapt(Community), "ce": ComputingElement(site="LCG.CERN.cern")}
    await fly(options, job_id=17, LHCbKey="kept", output_sandbox="std.out")
    assert (out / "std.out").read_text() == "hello from LCG.CERN.cern\n"


async def test_state_is_kept_between_the_hooks_and_the_loop_is_free_meanwhile(fly: Fly) -> None:
    loop_thread = threading.get_ident()
    blocks, loop_goes_on = threading.Event(), threading.Event()

    class Blocking(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            assert threading.get_ident() != loop_thread
            blocks.set()
            self.free = loop_goes_on.wait(20)
            return super().preProcess(command, exeEnv)

        def postProcess(self) -> Any:
            assert self.free
            return S_OK()

    async with anyio.create_task_group() as tasks:

        async def tick() -> None:
            ticks = 0
            while ticks < 10:
                await anyio.sleep(0.005)
                ticks += blocks.is_set()
            loop_goes_on.set()

        tasks.start_soon(tick)
        result = await fly({"coordinator": adapt(Blocking)})
        tasks.cancel_scope.cancel()
    assert result.status is Status.DONE


@pytest.mark.parametrize("hook", ["preProcess", "postProcess"])
async def test_s_error_fails_the_job_with_its_message(fly: Fly, hook: str) -> None:
    failing = type("Failing", (Base,), {hook: lambda self, *_: S_ERROR("no conditions for this run")})
    result = await fly({"coordinator": adapt(failing)})
    assert result.status is Status.FAILED
    assert str(result.failure) == f"HookFailed: Failing.{hook}: no conditions for this run"


async def test_s_error_with_diracs_number_for_it_reschedules(fly: Fly) -> None:
    class Later(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            return S_ERROR("software not here yet", errno=1502)

    result = await fly({"coordinator": adapt(Later)})
    assert (result.status, result.failure.message) == (Status.RESCHEDULED, "software not here yet")


@pytest.mark.parametrize("nonsense", [7, "command", {"cmd": "x"}, S_OK("a string")])
async def test_nonsense_from_a_hook_is_named(fly: Fly, nonsense: object) -> None:
    silly = type("Silly", (Base,), {"preProcess": lambda self, command, exeEnv: nonsense})
    result = await fly({"coordinator": adapt(silly)})
    assert result.failure.kind == "HookFailed"
    assert "Silly.preProcess returned" in result.failure.message


async def test_a_constructor_that_raises_fails_the_job(fly: Fly) -> None:
    class Broken(Base):
        def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
            raise KeyError("VOSpecific")

    result = await fly({"coordinator": adapt(Broken)})
    assert "KeyError: 'VOSpecific'" in result.failure.message


async def test_a_killed_job_does_not_wait_for_a_hook_that_blocks(fly: Fly) -> None:
    release = threading.Event()
    entered = threading.Event()

    class Stuck(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            entered.set()
            release.wait(30)

    handle = JobHandle()
    async with anyio.create_task_group() as tasks:

        async def kill() -> None:
            await anyio.to_thread.run_sync(entered.wait)
            handle.kill("enough")

        tasks.start_soon(kill)
        try:
            result = await fly({"coordinator": adapt(Stuck), "handle": handle})
        finally:
            release.set()
    assert (result.status, result.failure.message) == (Status.KILLED, "enough")
    await until(lambda: not any("Stuck" in thread.name for thread in threading.enumerate()))


async def test_a_failed_payload_is_still_post_processed(fly: Fly) -> None:
    called = []

    class Looks(Base):
        def postProcess(self) -> Any:
            called.append(True)
            return S_OK()

    result = await fly({"coordinator": adapt(Looks)}, **sh("exit 3"))
    assert (called, result.failure.kind) == ([True], "PayloadFailed")


def test_synchronous_coordinators_are_told_from_asynchronous_ones() -> None:
    assert is_synchronous(Base)
    assert not is_synchronous(adapt(Base))


# -- hooks of the kind there are ---------------------------------------------------------------------------------


async def test_all_of_a_coordinator_is_called_in_one_thread(fly: Fly) -> None:
    """Connections of sqlite3, and whatever else is a thread's own, may be kept on self."""

    class Connected(Base):
        def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
            super().__init__(jobArgs, ceArgs)
            self.connection = sqlite3.connect(":memory:")

        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            self.connection.execute("CREATE TABLE seen (job)")
            return super().preProcess(command, exeEnv)

        def postProcess(self) -> Any:
            self.connection.execute("INSERT INTO seen VALUES (1)")
            self.connection.close()
            return S_OK()

    result = await fly({"coordinator": adapt(Connected)})
    assert result.failure is None
    assert not any("Connected" in thread.name for thread in threading.enumerate())


async def test_a_hook_is_where_diracs_are_and_may_go_elsewhere(fly: Fly, root: Path, tmp_path: Path) -> None:
    """The directory above the job's; what it changes about that is nobody else's business."""
    seen = []

    class Wanders(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            seen.append(os.getcwd())
            os.chdir(str(self.jobArgs["JobID"]))
            Path("made by the hook").touch()
            os.umask(0o077)
            return super().preProcess(f"{command}; ls", exeEnv)

        def postProcess(self) -> Any:
            seen.append(os.getcwd())
            seen.append(subprocess.run(["pwd"], capture_output=True, text=True).stdout.strip())
            return S_OK()

    before, umask = os.getcwd(), os.umask(0o022)
    try:
        result = await fly({"coordinator": adapt(Wanders)}, job_id=7)
        assert (result.failure, os.getcwd(), os.umask(0o022)) == (None, before, 0o022)
    finally:
        os.umask(umask)
    assert seen == [str(root), str(root / "7"), str(root / "7")]


async def test_jobs_that_wander_at_the_same_time_do_not_meet(fly: Fly, root: Path) -> None:
    both = threading.Barrier(2)
    seen = {}

    class Wanders(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            os.chdir(str(self.jobArgs["JobID"]))
            both.wait(20)
            seen[self.jobArgs["JobID"]] = os.getcwd()
            return S_OK()

    async with anyio.create_task_group() as tasks:
        for job_id in (1, 2):
            tasks.start_soon(lambda job_id: fly({"coordinator": adapt(Wanders)}, job_id=job_id), job_id)
    assert seen == {1: str(root / "1"), 2: str(root / "2")}


async def test_where_a_directory_of_its_own_is_forbidden_a_hook_that_changes_it_is_named(
    fly: Fly, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in containers that forbid unshare."""

    class Wanders(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            os.chdir(tmp_path)
            return S_ERROR("lost")

    monkeypatch.setattr(hook_thread, "_own_directory", lambda directory: False)
    before = os.getcwd()
    result = await fly({"coordinator": adapt(Wanders)})
    assert (result.failure.message, os.getcwd()) == ("Wanders.preProcess: lost", before)
    assert (
        f"Wanders.preProcess changed the directory of the whole process, from {before} to {tmp_path}: " in caplog.text
    )


@pytest.mark.parametrize("hook", ["__init__", "preProcess", "postProcess"])
async def test_a_hook_that_changes_the_environment_of_the_process_is_named_and_nothing_stays(
    fly: Fly, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    monkeypatch.setenv("LOADMASTER_TEST_THERE", "there")
    monkeypatch.setenv("LOADMASTER_TEST_GONE", "there")

    def pollutes(self: Any, *_: Any, **__: Any) -> Any:
        self.jobArgs = {}
        os.environ["LOADMASTER_TEST_NEW"] = "secret"
        os.environ["LOADMASTER_TEST_THERE"] = "changed"
        del os.environ["LOADMASTER_TEST_GONE"]
        return None if hook == "__init__" else S_OK()

    result = await fly({"coordinator": adapt(type("Pollutes", (Base,), {hook: pollutes}))})
    assert result.failure is None
    assert "LOADMASTER_TEST_NEW" not in os.environ
    assert (os.environ["LOADMASTER_TEST_THERE"], os.environ["LOADMASTER_TEST_GONE"]) == ("there", "there")
    [said] = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert said.getMessage().startswith("Pollutes.preProcess" if hook == "preProcess" else "Pollutes")
    assert "(LOADMASTER_TEST_GONE, LOADMASTER_TEST_NEW, LOADMASTER_TEST_THERE)" in said.getMessage()
    assert "secret" not in caplog.text


async def test_a_hook_keeps_what_it_changed_while_it_runs_also_when_another_one_returns(
    fly: Fly, caplog: pytest.LogCaptureFixture
) -> None:
    """Two jobs of one pilot: one sets a variable for a program it starts, the other has nothing to do with it."""
    set_, returned, seen = threading.Event(), threading.Event(), []

    class Sets(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            os.environ["LOADMASTER_TEST_MINE"] = "mine"
            set_.set()
            returned.wait(20)
            seen.append(os.environ.get("LOADMASTER_TEST_MINE"))
            return S_OK()

    class Innocent(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            set_.wait(20)
            return S_OK()

    async def innocent() -> None:
        try:
            await fly({"coordinator": adapt(Innocent)}, job_id="2")
        finally:
            returned.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(innocent)
        await fly({"coordinator": adapt(Sets)}, job_id="1")
    assert (seen, "LOADMASTER_TEST_MINE" in os.environ) == (["mine"], False)
    [said] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("Innocent")
    assert "(or Sets.preProcess, beside it) changed environment variables" in said


async def test_a_hook_may_print_and_a_quiet_one_is_not_complained_of(
    fly: Fly, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    class Prints(Base):
        def postProcess(self) -> Any:
            print("the merged histograms look fine")
            return S_OK()

    await fly({"coordinator": adapt(Prints)})
    assert capsys.readouterr().out == "the merged histograms look fine\n"
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_a_hook_that_exits_fails_the_job_and_not_the_pilot(fly: Fly) -> None:
    class Exits(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            raise SystemExit(3)

    result = await fly({"coordinator": adapt(Exits)})
    assert result.failure.message.startswith("Exits.preProcess raised SystemExit: 3")


async def test_a_constructor_may_block_too_and_its_error_comes_before_anything_is_fetched(fly: Fly) -> None:
    class Broken(Base):
        def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
            time.sleep(0.2)
            raise ValueError(jobArgs["JobID"])

    result = await fly({"coordinator": adapt(Broken)}, job_id="7", input_data="/nowhere")
    assert result.failure.message.startswith("Broken.stageIn raised ValueError: 7")


async def test_the_thread_of_a_job_that_was_killed_ends(fly: Fly) -> None:
    async def run(handle: JobHandle) -> Any:
        return await fly({"coordinator": adapt(Base), "handle": handle}, **sh("sleep 60"), limits={"grace_seconds": 0})

    result, _ = await killed_when(happens(PayloadStarted), run)
    assert result.status is Status.KILLED
    assert not any("Base of job" in thread.name for thread in threading.enumerate())


async def test_a_thread_that_is_closed_starts_anew_when_it_is_needed() -> None:
    thread = HookThread("of a test")
    assert repr(thread) == "<HookThread [of a test, idle]>"
    first = await thread.call("hook", threading.get_ident)
    assert await thread.call("hook", threading.get_ident) == first != threading.get_ident()
    await thread.aclose()
    await thread.aclose()
    assert await thread.call("hook", lambda: 7) == 7
    with pytest.raises(ValueError, match=r"domain|nonnegative"):
        await thread.call("hook", math.sqrt, -1)
    await thread.aclose()
    assert not any("of a test" in each.name for each in threading.enumerate())


async def test_a_job_that_goes_on_with_a_later_hook_has_a_coordinator_all_the_same(fly: Fly) -> None:
    """As after a restart of the agent: what had returned before is not called again."""
    made = []

    class Counted(Base):
        def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
            super().__init__(jobArgs, ceArgs)
            made.append(os.getcwd())

    class Resumed(adapt(Counted)):  # type: ignore[misc]
        async def stageIn(self) -> None:
            pass

    result = await fly({"coordinator": Resumed})
    assert (result.failure, len(made)) == (None, 1)


async def test_what_a_hook_returns_besides_command_and_env_is_told_to_be_read_by_nobody(
    fly: Fly, caplog: pytest.LogCaptureFixture
) -> None:
    class Misspells:
        def __init__(self, jobArgs: dict[str, Any], ceArgs: dict[str, Any]) -> None:
            self.id = jobArgs["JobID"]

        def preProcess(self, command: str, exeEnv: dict[str, str]) -> dict[str, Any]:
            return S_OK({"command": command, "enviroment": {**exeEnv, "A": "1"}})

        def postProcess(self) -> dict[str, Any]:
            return S_OK()

    result = await fly({"coordinator": adapt(Misspells)}, job_id="7")
    assert result.status is Status.DONE
    (told,) = [record.getMessage() for record in caplog.records if "nobody reads" in record.getMessage()]
    assert told == "job 7: Misspells.preProcess returned enviroment, which nobody reads: only command and env are"
