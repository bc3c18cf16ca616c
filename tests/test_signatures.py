"""What a coordinator's hooks are called, and called with."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from loadmaster import JobDescription, JobExecutionCoordinator, PayloadSpec, Status, run_job
from loadmaster.errors import HookFailed
from loadmaster.hooks import call_hook
from loadmaster.signatures import HOOKS, meant_by, miscalled, misspellings


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("preproces", "preProcess"),
        ("post_proces", "postProcess"),
        ("stagein", "stageIn"),
        ("pre_process", "preProcess"),
        ("prepocess", "preProcess"),
        ("PostProcesss", "postProcess"),
        ("stage_Outt", "stageOut"),
        ("stagout", "stageOut"),
    ],
)
def test_a_slip_of_the_finger_is_taken_for_the_hook_it_was_meant_to_be(name: str, hook: str) -> None:
    assert meant_by(name) == hook


@pytest.mark.parametrize(
    "name",
    [
        *HOOKS,
        "reprocess",
        "preprocessor",
        "process",
        "stage",
        "staging",
        "stage_inputs",
        "stage_in_order",
        "post",
        "p",
        "",
    ],
)
def test_a_word_of_its_own_is_nobodys_slip(name: str) -> None:
    assert meant_by(name) is None


def test_only_public_methods_are_asked_about_and_each_once() -> None:
    class Base:
        def preproces(self) -> None: ...

    class Mine(Base):
        stagein = 5

        async def preproces(self) -> None: ...  # type: ignore[override]
        async def _postproces(self) -> None: ...
        async def stageOut(self) -> None: ...
        async def stage_out(self) -> None: ...

    assert [line.rpartition(".")[2] for line in misspellings(Mine)] == [
        "preproces is never called: the hook is preProcess"
    ]


class Short(JobExecutionCoordinator):
    async def preProcess(self, command: str) -> PayloadSpec:  # type: ignore[override]
        return PayloadSpec(command=command)


async def test_a_hook_with_other_arguments_is_named_with_its_place_and_how_it_is_written(tmp_path: Path) -> None:
    """`TypeError: takes 2 positional arguments but 3 were given (hooks.py:57)` sent its author to our file."""
    line = Short.preProcess.__code__.co_firstlineno
    job = JobDescription(executable="/bin/true")
    result = await run_job(job, coordinator=Short, root=tmp_path)  # type: ignore[arg-type]
    assert result.status is Status.FAILED
    assert result.failure is not None
    assert result.failure.message == (
        f"Short.preProcess cannot be called: too many positional arguments (test_signatures.py:{line}); it is written "
        "`async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec`"
    )
    assert list(miscalled(Short)) == [result.failure.message]
    assert list(miscalled(JobExecutionCoordinator)) == []


async def test_a_type_error_of_a_hooks_own_is_told_as_it_is() -> None:
    async def preProcess(command: str) -> None:
        len(5)  # type: ignore[arg-type]

    with pytest.raises(HookFailed, match=r"^hook raised TypeError: object of type 'int' .*\(test_signatures.py:\d+\)$"):
        await call_hook("hook", preProcess, "command")


async def test_an_error_of_ours_is_placed_where_the_hook_called_us(tmp_path: Path) -> None:
    class Mine(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            await self.job.remember("", {1, 2})  # no JSON

    result = await run_job(JobDescription(executable="/bin/true"), coordinator=Mine, root=tmp_path)
    assert result.failure is not None
    line = Mine.stageIn.__code__.co_firstlineno + 1
    assert result.failure.message.endswith(f" is not JSON serializable (test_signatures.py:{line})")


async def test_a_class_that_is_no_subclass_is_told_of_at_its_first_use(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Duck:
        def __init__(self, jobArgs: Any, ceArgs: Any) -> None: ...
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            return PayloadSpec(command=command, env=exeEnv)

        async def postProcess(self) -> None: ...
        async def stagein(self) -> None: ...

    with caplog.at_level(logging.WARNING, logger="loadmaster.signatures"):
        for number in range(2):
            job = JobDescription(job_id=str(number), executable="/bin/true")
            assert (await run_job(job, coordinator=Duck, root=tmp_path)).status is Status.DONE
    (record,) = caplog.records
    assert record.getMessage().endswith("Duck.stagein is never called: the hook is stageIn")
