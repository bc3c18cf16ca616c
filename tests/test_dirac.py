"""DIRAC's dictionaries, and its synchronous coordinators as they are found in the wild."""

from __future__ import annotations

import threading
import time
from typing import Any

import anyio
import pytest

from conftest import Fly, sh
from loadmaster import ComputingElement, InvalidJob, JobHandle, Status
from loadmaster.dirac import adapt, is_synchronous, split_wrapper_file


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

    class Blocking(Base):
        def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any:
            assert threading.get_ident() != loop_thread
            self.begun = time.monotonic()
            time.sleep(0.2)
            return super().preProcess(command, exeEnv)

        def postProcess(self) -> Any:
            assert time.monotonic() - self.begun >= 0.2
            return S_OK()

    gaps = []
    async with anyio.create_task_group() as tasks:

        async def tick() -> None:
            while True:
                before = time.monotonic()
                await anyio.sleep(0.005)
                gaps.append(time.monotonic() - before)

        tasks.start_soon(tick)
        result = await fly({"coordinator": adapt(Blocking)})
        tasks.cancel_scope.cancel()
    assert result.status is Status.DONE
    assert max(gaps) < 0.1


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


async def test_a_failed_payload_is_still_post_processed(fly: Fly) -> None:
    called = []

    class Looks(Base):
        def postProcess(self) -> Any:
            called.append(True)
            return S_OK()

    result = await fly({"coordinator": adapt(Looks)}, **sh("exit 3"))
    assert (called, result.failure.kind) == ([True], "PayloadFailed")


def test_a_wrapper_file_has_two_dictionaries_and_a_bare_description_one() -> None:
    assert split_wrapper_file({"Job": {"JobID": 1}, "CE": {"Site": "S"}}) == ({"JobID": 1}, {"Site": "S"})
    assert split_wrapper_file({"Executable": "x"}) == ({"Executable": "x"}, {})
    with pytest.raises(InvalidJob, match="Job: list where an object"):
        split_wrapper_file({"Job": []})


def test_synchronous_coordinators_are_told_from_asynchronous_ones() -> None:
    assert is_synchronous(Base)
    assert not is_synchronous(adapt(Base))
