"""Tasks beside the payload: started with it, gone after it, and what they raise decides the job."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import Fly, sh
from following import Signpost, history, killed_when, kinds
from loadmaster import (
    HookFailed,
    JobError,
    JobExecutionCoordinator,
    JobHandle,
    PayloadSpec,
    RescheduleJob,
    RetryHook,
    RuntimeFault,
    Status,
)
from loadmaster.companions import Companions
from loadmaster.result import EndedBy, Failure, Phase
from loadmaster.tasks import single_error
from loadmaster.testing import MemoryJournal

LONG = sh("sleep 600")


def beside(*tasks: Callable[[JobExecutionCoordinator], Awaitable[None]]) -> type[JobExecutionCoordinator]:
    """A coordinator with tasks beside the payload."""

    class Accompanied(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            for task in tasks:
                self.job.start_soon(task, self)
            return PayloadSpec(command=command, env=exeEnv)

    return Accompanied


# -- in a job ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def alongside(companions: Companions) -> AsyncIterator[None]:
    """As a job runs them, among its own tasks."""
    with single_error():
        async with anyio.create_task_group() as tasks, companions.alongside(tasks):
            yield


async def test_a_companion_is_started_with_the_payload_and_gone_after_it(fly: Fly, tmp_path: Path) -> None:
    """The payload only ends because the companion runs; the companion only because the payload has ended."""

    async def companion(coordinator: JobExecutionCoordinator) -> None:
        told.append(f"payload {'runs' if coordinator.job.payload else 'does not run'}")
        try:
            assert await post.reached() == "hello\n"
            await anyio.sleep_forever()
        finally:
            told.append("gone")

    class Watching(beside(companion)):  # type: ignore[misc]
        async def postProcess(self) -> None:
            told.append("postProcess")

    told: list[str] = []
    post = Signpost(tmp_path / "post")
    result = await fly({"coordinator": Watching}, **sh(f"echo hello > {post}"))
    assert result.status is Status.DONE
    assert told == ["payload runs", "gone", "postProcess"]


async def test_a_companion_that_is_done_leaves_the_payload_alone(fly: Fly) -> None:
    async def companion(coordinator: JobExecutionCoordinator) -> None:
        await coordinator.job.report("companion", "was here")

    result = await fly({"coordinator": beside(companion)}, **sh("sleep 0.05; exit 0"))
    assert result.status is Status.DONE
    assert result.outcome.ended_by is EndedBy.ITSELF
    assert result.parameters == {"companion": "was here"}


@pytest.mark.parametrize(
    ("error", "failure", "status"),
    [
        (RescheduleJob("why"), ("RescheduleJob", "why"), Status.RESCHEDULED),
        (JobError("why"), ("JobError", "why"), Status.FAILED),
        (ExceptionGroup("g", [JobError("why")]), ("JobError", "why"), Status.FAILED),
        (ValueError("why"), ("HookFailed", "{name} raised ValueError: why"), Status.FAILED),
        (SystemExit("why"), ("HookFailed", "{name} raised SystemExit: why"), Status.FAILED),
    ],
    ids=repr,
)
async def test_what_a_companion_raises_ends_the_payload_and_decides_the_job(
    fly: Fly, out: Path, error: BaseException, failure: tuple[str, str], status: Status
) -> None:
    async def companion(_: JobExecutionCoordinator) -> None:
        await post.reached()
        raise error

    async def bystander(_: JobExecutionCoordinator) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            told.append("bystander gone")

    told: list[str] = []
    post = Signpost(out.parent / "post")
    result = await fly(
        {"coordinator": beside(bystander, companion)},
        **sh(f"echo begun; touch data; echo > {post}; sleep 600"), output_sandbox=["std.out"], output_data=["data"],
    )  # fmt: skip
    kind, message = failure
    assert result.status is status
    assert (result.failure.kind, result.failure.phase) == (kind, Phase.PAYLOAD)
    assert result.failure.message.startswith(message.format(name=companion.__qualname__))
    assert result.outcome.ended_by is EndedBy.COORDINATOR
    assert result.outcome.signal == 15
    assert told == ["bystander gone"]
    assert [file.name for file in result.outputs] == ["std.out"]
    assert (out / "std.out").read_text() == "begun\n"


async def test_of_several_companions_that_fail_the_first_one_is_heard(fly: Fly) -> None:
    async def first(_: JobExecutionCoordinator) -> None:
        raise RescheduleJob("first")

    async def second(_: JobExecutionCoordinator) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise JobError("second")

    result = await fly({"coordinator": beside(second, first)}, **LONG)
    assert (result.status, result.failure.message) == (Status.RESCHEDULED, "first")


async def test_a_companion_that_asks_for_it_is_called_again(fly: Fly, tmp_path: Path) -> None:
    async def companion(_: JobExecutionCoordinator) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RetryHook(timedelta(milliseconds=1))
        await post.reached()

    calls: list[int] = []
    post = Signpost(tmp_path / "post")
    result = await fly({"coordinator": beside(companion)}, **sh(f"echo > {post}"))
    assert (result.status, len(calls)) == (Status.DONE, 2)


async def test_a_companion_is_ended_by_a_kill_and_does_not_change_its_reason(fly: Fly, tmp_path: Path) -> None:
    async def companion(_: JobExecutionCoordinator) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise JobError("and another thing")

    post = Signpost(tmp_path / "post")
    result, _ = await killed_when(
        post.reached,
        lambda handle: fly(
            {"handle": handle, "coordinator": beside(companion)}, **sh(f"echo > {post}; sleep 600")
        ),
    )  # fmt: skip
    assert result.failure == Failure("JobWasKilled", "the user is tired of waiting", Phase.PAYLOAD)
    assert result.outcome is not None
    assert result.outcome.ended_by is EndedBy.KILL


async def test_a_journal_that_fails_under_a_companion_is_a_fault_of_the_runtime(fly: Fly) -> None:
    async def companion(coordinator: JobExecutionCoordinator) -> None:
        await coordinator.job.report("never", "kept")

    journal = MemoryJournal()
    journal.fail_at(7)
    handle = JobHandle(journal)
    with pytest.raises(RuntimeFault, match="did not take ParameterReported"):
        await fly({"coordinator": beside(companion), "handle": handle}, **LONG)
    assert kinds(await history(handle))[-1] == "PayloadExited"


async def test_companions_do_not_start_when_no_payload_does(fly: Fly) -> None:
    async def companion(_: JobExecutionCoordinator) -> None:
        raise AssertionError("nobody to accompany")

    class Nothing(beside(companion)):  # type: ignore[misc]
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            await super().preProcess(command, exeEnv)
            return PayloadSpec(command=("/nowhere/program",))

    result = await fly({"coordinator": Nothing})
    assert result.failure.kind == "PayloadNotStarted"


@pytest.mark.parametrize("hook", ["postProcess", "stageOut"])
async def test_nothing_can_be_started_beside_a_payload_that_has_ended(fly: Fly, hook: str) -> None:
    async def late(self: JobExecutionCoordinator) -> None:
        self.job.start_soon(anyio.sleep_forever)

    result = await fly({"coordinator": type("Late", (JobExecutionCoordinator,), {hook: late})})
    assert result.status is Status.FAILED
    assert "RuntimeError: the payload has ended" in result.failure.message


async def test_a_synchronous_companion_is_told_how_to_become_one_of_ours(fly: Fly) -> None:
    def synchronous(_: Any) -> Any:
        return 7

    result = await fly({"coordinator": beside(synchronous)}, **LONG)
    assert result.failure.kind == "HookFailed"
    assert "synchronous is not awaitable (it returned int)" in result.failure.message


# -- by itself -----------------------------------------------------------------------------------------------------


async def test_tasks_wait_in_the_queue_until_there_is_something_to_accompany() -> None:
    async def task(name: str) -> None:
        told.append(name)
        if len(told) == 3:
            all_told.set()

    told: list[str] = []
    all_told = anyio.Event()
    companions = Companions()
    companions.start_soon(task, "queued")
    companions.start_soon(task, "queued too")
    assert repr(companions) == "<Companions 2 queued>"
    await anyio.sleep(0)
    assert told == []
    async with alongside(companions):
        assert repr(companions) == "<Companions running>"
        companions.start_soon(task, "at once")
        await all_told.wait()
    assert sorted(told) == ["at once", "queued", "queued too"]
    assert repr(companions) == "<Companions over>"
    with pytest.raises(RuntimeError, match="the payload has ended"):
        companions.start_soon(task, "late")


async def test_a_companion_may_start_another() -> None:
    async def parent() -> None:
        companions.start_soon(child)

    async def child() -> None:
        raise JobError("from the child")

    companions = Companions()
    companions.start_soon(parent)
    with pytest.raises(JobError, match="from the child"):
        async with alongside(companions):
            await anyio.sleep_forever()


async def test_what_the_block_raises_comes_out_bare() -> None:
    companions = Companions()
    companions.start_soon(anyio.sleep_forever)
    with pytest.raises(KeyError):
        async with alongside(companions):
            raise KeyError("block")


async def test_a_companions_name_is_in_the_message_also_when_it_has_none() -> None:
    class Nameless:
        async def __call__(self) -> None:
            raise OSError("x")

        def __repr__(self) -> str:
            return "<my task>"

    companions = Companions()
    companions.start_soon(Nameless())
    with pytest.raises(HookFailed, match="<my task> raised OSError: x"):
        async with alongside(companions):
            await anyio.sleep_forever()
