"""Calling community code: whatever it raises becomes a value, and it is found by its name."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Callable, Coroutine, Generator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio

from conftest import BACKENDS
from loadmaster import (
    HoldJob,
    HookFailed,
    InvalidJob,
    JobError,
    JobExecutionCoordinator,
    RescheduleJob,
    RetryHook,
    RuntimeFault,
    SkipPayload,
)
from loadmaster.hooks import BLOCKED_SECONDS, RETRIES, call_hook, find_coordinator

SOON = timedelta(milliseconds=1)


def raising(error: BaseException) -> Callable[[], Coroutine[Any, Any, None]]:
    async def hook() -> None:
        raise error

    return hook


async def test_a_hook_is_called_with_its_arguments_and_its_value_returned() -> None:
    async def hook(a: int, b: str) -> tuple[int, str]:
        await anyio.sleep(0)
        return a, b

    assert await call_hook("hook", hook, 1, "two") == (1, "two")


@pytest.mark.parametrize(
    "verdict", [SkipPayload("x"), RescheduleJob("x"), HoldJob("x"), JobError("x"), RuntimeFault("x")], ids=repr
)
async def test_a_verdict_comes_out_as_it_was_raised(verdict: Exception) -> None:
    with pytest.raises(type(verdict)) as caught:
        await call_hook("hook", raising(verdict))
    assert caught.value is verdict


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (ValueError("no such run"), "ValueError: no such run"),
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit(3), "SystemExit: 3"),
        (TimeoutError(), "TimeoutError"),
        (ExceptionGroup("two", [ValueError("first"), OSError("second")]), "ValueError: first"),
    ],
    ids=repr,
)
async def test_any_other_error_is_a_failed_hook_that_names_its_cause(error: BaseException, named: str) -> None:
    with pytest.raises(HookFailed, match=r"^hook raised ") as caught:
        await call_hook("hook", raising(error))
    assert str(caught.value).startswith(f"hook raised {named}")
    assert caught.value.__cause__ is error


async def test_a_verdict_is_found_in_the_groups_of_the_hooks_own_task_groups() -> None:
    async def hook() -> None:
        async with anyio.create_task_group() as outer:
            outer.start_soon(anyio.sleep_forever)
            async with anyio.create_task_group() as inner:
                inner.start_soon(raising(RescheduleJob("no licence")))

    with pytest.raises(RescheduleJob, match="no licence"):
        await call_hook("hook", hook)


async def test_a_fault_of_the_runtime_beats_a_verdict_in_the_same_group() -> None:
    """A journal that fails inside of a hook's task group must not pass for a failure of the job."""
    group = ExceptionGroup("both", [RescheduleJob("x"), ExceptionGroup("inner", [RuntimeFault("disk on fire")])])
    with pytest.raises(RuntimeFault, match="disk on fire"):
        await call_hook("hook", raising(group))


async def test_a_keyboard_interrupt_is_not_a_hooks_to_swallow() -> None:
    async def hook() -> None:
        raise BaseExceptionGroup("group", [ValueError("x"), KeyboardInterrupt()])

    with pytest.raises(KeyboardInterrupt):
        await call_hook("hook", hook)


@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
async def test_a_cancellation_nobody_asked_for_is_a_failed_hook(anyio_backend: Any) -> None:
    """As from awaiting a task that was cancelled elsewhere: it must not look as if the job were."""

    async def hook() -> None:
        task = asyncio.create_task(asyncio.sleep(3600))
        task.cancel()
        await task

    with pytest.raises(HookFailed, match="hook let a cancellation escape that nobody had asked for"):
        await call_hook("hook", hook)


async def test_a_cancellation_somebody_asked_for_ends_the_hook() -> None:
    with anyio.CancelScope() as scope:

        async def hook() -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await call_hook("hook", hook)
    assert scope.cancelled_caught


@pytest.mark.parametrize("anyio_backend", BACKENDS[2:])
async def test_a_cancelled_hook_whose_cleanup_fails_in_a_nursery_is_cancelled(anyio_backend: Any) -> None:
    """A plain nursery raises both in one group, which used to leave `run_job` as an error when a job was killed."""

    async def untidy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("while cleaning up")

    async def hook() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(untidy)
            scope.cancel()
            await trio.sleep_forever()

    with anyio.CancelScope() as scope:
        await call_hook("hook", hook)
    assert scope.cancelled_caught


async def test_a_hook_that_asks_for_it_is_called_again_after_the_time_it_named() -> None:
    calls: list[float] = []

    async def hook() -> str:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise RetryHook(after=timedelta(seconds=0.05))
        return "content"

    assert await call_hook("hook", hook) == "content"
    assert len(calls) == 3
    assert calls[1] - calls[0] >= 0.05
    assert calls[2] - calls[1] >= 0.05


async def test_a_retry_asked_for_inside_a_task_group_counts_too() -> None:
    calls: list[int] = []

    async def once() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RetryHook(SOON)

    async def hook() -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(once)

    await call_hook("hook", hook)
    assert len(calls) == 2


async def test_a_hook_that_is_never_content_fails_in_the_end() -> None:
    calls: list[int] = []

    async def hook() -> None:
        calls.append(1)
        raise RetryHook(timedelta(0))

    with pytest.raises(HookFailed, match=f"hook asked to be called again more than {RETRIES} times"):
        await call_hook("hook", hook)
    assert len(calls) == RETRIES


async def test_a_synchronous_hook_is_told_how_to_become_one_of_ours() -> None:
    def hook() -> Any:
        return {"OK": True, "Value": None}

    with pytest.raises(HookFailed, match=r"it returned dict.*async def.*loadmaster\.dirac\.adapt"):
        await call_hook("hook", hook)


async def test_a_hook_that_blocks_the_loop_is_named_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def hook() -> str:
        await anyio.sleep(0)
        until = time.monotonic() + BLOCKED_SECONDS + 0.05
        while time.monotonic() < until:
            pass
        await anyio.sleep(0)
        return "at last"

    with caplog.at_level(logging.WARNING, logger="loadmaster.hooks"):
        assert await call_hook("Mine.preProcess", hook) == "at last"
    (record,) = caplog.records
    assert record.getMessage().startswith("Mine.preProcess held the event loop for 0.3 s in one step")


async def test_a_hook_that_only_waits_is_not_accused(caplog: pytest.LogCaptureFixture) -> None:
    async def hook() -> None:
        await anyio.sleep(BLOCKED_SECONDS + 0.05)

    await call_hook("hook", hook)
    assert caplog.records == []


async def test_what_a_hook_waits_for_is_sent_and_thrown_into_it() -> None:
    """The watch over its steps is not noticed: values arrive, errors can be handled, cleanup runs."""
    done: list[str] = []

    async def hook() -> str:
        try:
            with anyio.fail_after(0.01):
                await anyio.sleep_forever()
        except TimeoutError:
            done.append("timed out")
        finally:
            await anyio.sleep(0)
            done.append("cleaned up")
        return "fine"

    assert await call_hook("hook", hook) == "fine"
    assert done == ["timed out", "cleaned up"]


async def test_an_awaitable_of_somebodys_own_will_do() -> None:
    class Ready:
        def __await__(self) -> Generator[Any, Any, str]:
            yield from ()
            return "ready"

    assert await call_hook("hook", Ready) == "ready"


# -- finding a coordinator -----------------------------------------------------------------------------------------

FILE = """
from dataclasses import dataclass
from loadmaster import JobExecutionCoordinator

@dataclass
class Settings:
    retries: int = 3

class Mine(JobExecutionCoordinator):
    settings = Settings()

class Half:
    async def preProcess(self, command, exeEnv): ...

function = len
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def test_a_coordinator_is_found_in_a_module() -> None:
    assert find_coordinator("loadmaster.coordinator:JobExecutionCoordinator") is JobExecutionCoordinator


def test_a_coordinator_is_found_in_a_file(file: Path) -> None:
    found = find_coordinator(f"{file}:Mine")
    assert issubclass(found, JobExecutionCoordinator)
    assert found.__name__ == "Mine"


def test_a_coordinator_is_found_by_the_name_of_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = tmp_path / "community-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: community\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        "[loadmaster.coordinators]\n"
        "standard = loadmaster.coordinator:JobExecutionCoordinator\n"
        "broken = no.such.module:Thing\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert find_coordinator("standard") is JobExecutionCoordinator
    with pytest.raises(InvalidJob, match="coordinator broken: cannot import it: ModuleNotFoundError"):
        find_coordinator("broken")
    with pytest.raises(InvalidJob, match=r"installed: .*broken.*standard"):
        find_coordinator("absent")


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("{file}:Absent", "has no 'Absent'"),
        ("{file}:function", "is not a class but <built-in function"),
        ("{file}:Half", "has no postProcess"),
        ("{folder}/none.py:Mine", "no such file"),
        ("{folder}/broken.py:Mine", "cannot import it: ZeroDivisionError"),
        ("no.such.module:Mine", "cannot import it: ModuleNotFoundError"),
        ("Mine", "neither module:Class nor an entry point of loadmaster.coordinators"),
        (":Mine", "cannot import it: ValueError"),
        ("loadmaster:", "has no ''"),
    ],
)
def test_a_coordinator_that_cannot_be_found_is_said_to_be_so(file: Path, reference: str, said: str) -> None:
    (file.parent / "broken.py").write_text("1 / 0")
    with pytest.raises(InvalidJob, match=r"^coordinator ") as caught:
        find_coordinator(reference.format(file=file, folder=file.parent))
    assert said in str(caught.value)


async def test_a_failed_hook_says_where_its_author_will_look() -> None:
    async def hook() -> None:
        raise ValueError("no such run")

    with pytest.raises(HookFailed, match=r"hook raised ValueError: no such run \(test_hooks.py:\d+\)"):
        await call_hook("hook", hook)


# -- misspelled hooks --------------------------------------------------------------------------------------------

MISSPELLED = """
from loadmaster import JobExecutionCoordinator
class Mine(JobExecutionCoordinator):
    async def preprocess(self, command, exeEnv): ...
    async def post_process(self): ...
    async def stage_in_order(self): ...
    stagein = 5
class Half:
    def preProcess(self, job): ...
    def postProcess(self): ...
    def stageout(self): ...
class Careful(JobExecutionCoordinator):
    async def preProcess(self, command, exeEnv): return await self.pre_process(command, exeEnv)
    async def pre_process(self, command, exeEnv): ...
    def _postprocess(self): ...
class Careless(Careful):
    async def pre_process(self, command, exeEnv): ...
    async def StageOut(self): ...
class Nearly:
    def preProcess(self, job): ...
    def postprocess(self): ...
"""


def test_a_method_that_looks_like_a_hook_and_is_none_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`preprocess` ran silently: the job was Done, and nothing of what its author had written had happened."""
    (tmp_path / "misspelled.py").write_text(MISSPELLED)
    for name in ("Mine", "Half"):
        caplog.clear()
        find_coordinator(f"{tmp_path}/misspelled.py:{name}")
        told = [record.getMessage() for record in caplog.records if record.getMessage().startswith(name)]
        assert (
            told
            == {
                "Mine": [
                    "Mine.preprocess is never called: the hook is preProcess",
                    "Mine.post_process is never called: the hook is postProcess",
                ],
                "Half": ["Half.stageout is never called: the hook is stageOut"],
            }[name]
        )
        said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Care")]
        assert said == ["Careless.StageOut is never called: the hook is stageOut"]
    with pytest.raises(InvalidJob, match=r"has no postProcess, but postprocess$"):
        find_coordinator(f"{tmp_path}/misspelled.py:Nearly")
