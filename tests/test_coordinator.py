"""What a community may change about a job, and what comes of it."""

from __future__ import annotations

import asyncio
import bz2
import hashlib
import io
import os
import tarfile
import time
import zipfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import BACKENDS, Fly, sh
from following import Signpost, history, kinds
from loadmaster import (
    ComputingElement,
    HoldJob,
    InvalidSite,
    JobDescription,
    JobError,
    JobExecutionCoordinator,
    JobHandle,
    JobInFlight,
    JobResult,
    PayloadSpec,
    RescheduleJob,
    RetryHook,
    Site,
    SkipPayload,
    Status,
)
from loadmaster.events import OutputMissing
from loadmaster.hooks import BLOCKED_SECONDS
from loadmaster.result import Failure, Phase
from loadmaster.staging import archives

PHASES = {
    "stageIn": Phase.STAGE_IN,
    "preProcess": Phase.PRE_PROCESS,
    "postProcess": Phase.POST_PROCESS,
    "stageOut": Phase.STAGE_OUT,
}
HOOKS = list(PHASES)

WORDS: dict[str, Any] = {
    **sh("echo printed; echo x > data"), "output_sandbox": ["std.out"], "output_data": ["data"]
}  # fmt: skip


def with_hook(name: str, hook: Callable[..., Any]) -> type[JobExecutionCoordinator]:
    return type("Mine", (JobExecutionCoordinator,), {name: hook})


def raising(name: str, make: Callable[[], BaseException]) -> type[JobExecutionCoordinator]:
    """A coordinator that raises in one hook."""

    async def hook(self: JobExecutionCoordinator, *_: Any) -> None:
        raise make()

    return with_hook(name, hook)


def outputs(result: JobResult) -> set[str]:
    return {file.name for file in result.outputs}


# -- when a hook is called -----------------------------------------------------------------------------------------


async def test_the_hooks_are_called_once_each_in_their_order_around_the_payload(fly: Fly) -> None:
    class Told(JobExecutionCoordinator):
        def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
            super().__init__(jobArgs, ceArgs)
            calls.append("__init__")

        async def stageIn(self) -> None:
            calls.append("stageIn")
            await super().stageIn()

        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            calls.append("preProcess")
            assert self.job.outcome is None
            return PayloadSpec(command=command, env=exeEnv)

        async def postProcess(self) -> None:
            calls.append("postProcess")
            assert self.job.outcome is not None
            assert self.job.outcome.exit_code == 0

        async def stageOut(self) -> None:
            calls.append("stageOut")
            await super().stageOut()

    calls: list[str] = []
    result = await fly({"coordinator": Told}, **WORDS)
    assert result.status is Status.DONE
    assert calls == ["__init__", *HOOKS]


async def test_a_coordinator_gets_the_job_and_the_computing_element_it_is_for(fly: Fly) -> None:
    class Curious(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            seen.append((self.jobArgs.job_id, self.ceArgs.site, command, exeEnv["MINE"]))
            return PayloadSpec(command=f"{command} --site {self.ceArgs.site}", env=exeEnv)

    seen: list[tuple[str, str, str, str]] = []
    result = await fly(
        {"coordinator": Curious, "ce": ComputingElement(site="LCG.Example.org")},
        job_id="7", executable="echo", arguments="hello  world", environment={"MINE": "1"},
    )  # fmt: skip
    assert result.status is Status.DONE
    ((job_id, site, command, mine),) = seen
    assert (job_id, site, mine) == ("7", "LCG.Example.org", "1")
    assert command.endswith("/echo hello  world")


async def test_what_preprocess_does_to_the_environment_it_was_given_counts_only_when_returned(
    fly: Fly, out: Path
) -> None:
    class Spoils(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            kept = dict(exeEnv)
            exeEnv.clear()
            return PayloadSpec(command="echo $JOBID", env=kept)

    result = await fly({"coordinator": Spoils}, job_id="7", executable="true", output_sandbox=["std.out"])
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "7\n"


class Least:
    """No more than the protocol asks for, and no place for a job."""

    __slots__ = ("args",)

    def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
        self.args = jobArgs

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> dict[str, Any]:
        return {"command": command, "env": exeEnv}

    async def postProcess(self) -> None:
        pass


async def test_a_coordinator_with_two_hooks_and_no_place_for_a_job_will_do(fly: Fly, out: Path, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("cargo")
    result = await fly(
        {"coordinator": Least}, **sh("cat input > data"), input_data=[str(tmp_path / "input")], output_data=["data"]
    )
    assert result.status is Status.DONE
    assert (out / "data").read_text() == "cargo"


async def test_a_constructor_that_raises_fails_the_job_with_its_cause(fly: Fly) -> None:
    class Picky(JobExecutionCoordinator):
        def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
            raise ValueError("I do not like this site")

    handle = JobHandle()
    result = await fly({"coordinator": Picky, "handle": handle}, **WORDS)
    assert result.status is Status.FAILED
    assert (result.failure.kind, result.failure.phase) == ("HookFailed", Phase.STAGE_IN)
    assert "Picky(jobArgs=..., ceArgs=...) raised ValueError: I do not like this site (test_" in result.failure.message
    assert kinds(await history(handle))[:2] == ["JobAccepted", "ComputingEnded"]
    assert result.missing_outputs == ("std.out",), "what is there of the sandbox is delivered by the standard steps"


async def test_a_constructor_may_reschedule_the_job(fly: Fly) -> None:
    class Picky(JobExecutionCoordinator):
        def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
            raise RescheduleJob("not on a Friday")

    result = await fly({"coordinator": Picky})
    assert (result.status, result.failure.message) == (Status.RESCHEDULED, "not on a Friday")


# -- what a hook may say -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["stageIn", "preProcess"])
async def test_a_hook_may_say_that_nothing_needs_to_be_computed(fly: Fly, hook: str) -> None:
    async def skip(self: JobExecutionCoordinator, *_: Any) -> None:
        await to_thread.run_sync((self.job.workdir / "data").write_text, "from a cache")
        raise SkipPayload("the result is known")

    handle = JobHandle()
    result = await fly({"coordinator": with_hook(hook, skip), "handle": handle}, **WORDS)
    assert (result.status, result.failure, result.outcome) == (Status.DONE, None, None)
    assert outputs(result) == {"data"}
    assert "SlotGranted" not in kinds(await history(handle))


@pytest.mark.parametrize("hook", ["postProcess", "stageOut"])
async def test_to_skip_a_payload_that_has_run_changes_nothing(fly: Fly, hook: str) -> None:
    result = await fly({"coordinator": raising(hook, lambda: SkipPayload("done"))}, **WORDS)
    assert (result.status, result.failure) == (Status.DONE, None)
    assert result.outcome.exit_code == 0
    assert outputs(result) == ({"std.out", "data"} if hook == "postProcess" else set())


class Unreachable(RescheduleJob):
    """A community's own word for it."""


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    ("make", "kind", "status"),
    [
        (lambda: RescheduleJob("why"), "RescheduleJob", Status.RESCHEDULED),
        (lambda: Unreachable("why"), "RescheduleJob", Status.RESCHEDULED),
        (lambda: HoldJob("why"), "HoldJob", Status.RESCHEDULED),
        (lambda: JobError("why"), "JobError", Status.FAILED),
        (lambda: ValueError("why"), "HookFailed", Status.FAILED),
        (lambda: SystemExit("why"), "HookFailed", Status.FAILED),
        (lambda: ExceptionGroup("g", [ExceptionGroup("h", [HoldJob("why")])]), "HoldJob", Status.RESCHEDULED),
    ],
    ids=["reschedule", "own reschedule", "hold", "job error", "value error", "system exit", "in groups"],
)
async def test_what_a_hook_raises_decides_the_job(
    fly: Fly, hook: str, make: Callable[[], BaseException], kind: str, status: Status
) -> None:
    handle = JobHandle()
    result = await fly({"coordinator": raising(hook, make), "handle": handle}, **WORDS)
    assert result.status is status
    cause = type(make()).__name__
    message = f"Mine.{hook} raised {cause}: why" if kind == "HookFailed" else "why"
    assert (result.failure.kind, result.failure.phase) == (kind, PHASES[hook])
    assert result.failure.message.startswith(message)
    delivered = {"stageIn": set(), "preProcess": set(), "postProcess": {"std.out"}, "stageOut": set()}
    assert outputs(result) == delivered[hook], "the sandbox, as far as it is there, and never the data"
    assert kinds(await history(handle))[-1] == "JobFinished"


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_hook_that_asks_to_be_called_again_is_and_the_job_succeeds(fly: Fly, hook: str) -> None:
    async def twice(self: JobExecutionCoordinator, *args: Any) -> Any:
        calls.append(hook)
        if len(calls) == 1:
            raise RetryHook(after=timedelta(milliseconds=1), reason="the conditions database is restarting")
        return await getattr(JobExecutionCoordinator, hook)(self, *args)

    calls: list[str] = []
    result = await fly({"coordinator": with_hook(hook, twice)}, **WORDS)
    assert result.status is Status.DONE
    assert calls == [hook, hook]
    assert outputs(result) == {"std.out", "data"}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("anyio_backend", BACKENDS[:2])
async def test_a_stray_cancellation_in_a_hook_fails_the_job_and_does_not_interrupt_it(
    fly: Fly, hook: str, anyio_backend: Any
) -> None:
    result = await fly({"coordinator": raising(hook, asyncio.CancelledError)}, **WORDS)
    assert (result.status, result.failure.kind) == (Status.FAILED, "HookFailed")
    assert f"Mine.{hook} let a cancellation escape" in result.failure.message


@pytest.mark.parametrize("hook", HOOKS)
async def test_a_synchronous_hook_fails_the_job_and_is_told_of_the_adapter(fly: Fly, hook: str) -> None:
    def synchronous(self: JobExecutionCoordinator, *_: Any) -> Any:
        return {"OK": True, "Value": {}}

    result = await fly({"coordinator": with_hook(hook, synchronous)}, **WORDS)
    assert result.status is Status.FAILED
    assert result.failure.kind == "HookFailed"
    assert f"Mine.{hook} is not awaitable (it returned dict)" in result.failure.message
    assert "loadmaster.dirac.adapt" in result.failure.message


async def test_a_hook_that_blocks_the_loop_is_named_in_the_log_and_the_job_goes_on(
    fly: Fly, caplog: pytest.LogCaptureFixture
) -> None:
    async def busy(_: JobExecutionCoordinator) -> None:
        until = time.monotonic() + BLOCKED_SECONDS + 0.02
        while time.monotonic() < until:
            pass

    result = await fly({"coordinator": with_hook("postProcess", busy)})
    assert result.status is Status.DONE
    assert [r.getMessage().split(" for ")[0] for r in caplog.records] == ["Mine.postProcess held the event loop"]


async def test_a_crash_in_postprocess_does_not_hide_why_the_payload_failed(
    fly: Fly, caplog: pytest.LogCaptureFixture
) -> None:
    """postProcess looks for a histogram the failed payload never made: that is not the story to tell."""
    coordinator = raising("postProcess", lambda: FileNotFoundError("histograms.root"))
    result = await fly({"coordinator": coordinator}, executable="/bin/false")
    assert result.failure == Failure("PayloadFailed", "the payload failed: exit code 1", Phase.PAYLOAD)
    assert "histograms.root" in caplog.text


async def test_postprocess_may_reschedule_a_job_whose_payload_failed(fly: Fly) -> None:
    class Judges(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            assert self.job.outcome is not None
            if self.job.outcome.exit_code == 42:
                raise RescheduleJob("no conditions database from here")

    result = await fly({"coordinator": Judges}, **sh("exit 42"))
    assert (result.status, result.failure.message) == (Status.RESCHEDULED, "no conditions database from here")


# -- what preProcess may return ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returned",
    [
        {"command": "echo $GREETING", "env": {"GREETING": "hello", "PATH": "/usr/bin:/bin"}},
        {"command": ["sh", "-c", "echo $GREETING"], "env": {"GREETING": "hello", "PATH": "/usr/bin:/bin"}},
        PayloadSpec(command="echo $GREETING", env={"GREETING": "hello"}),
    ],
    ids=["mapping", "mapping with a list", "spec"],
)
async def test_preprocess_may_return_a_spec_or_a_mapping_in_diracs_shape(fly: Fly, out: Path, returned: object) -> None:
    async def decide(*_: Any) -> object:
        return returned

    result = await fly({"coordinator": with_hook("preProcess", decide)}, output_sandbox=["std.out"])
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "hello\n"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "preProcess returned None: return PayloadSpec(command=..., env=...)"),
        ("echo", "preProcess returned 'echo': return PayloadSpec"),
        (7, "preProcess returned 7: return PayloadSpec"),
        ({}, "preProcess returned a payload that cannot be: command: is missing"),
        ({"command": " "}, "command: the command is empty"),
        ({"command": []}, "command: the command is empty"),
        ({"command": 7}, "cannot be: command"),
        ({"command": "a\0b"}, "NUL"),
        ({"command": "true", "env": {"A=B": "c"}}, "'A=B' cannot be the name of an environment variable"),
        ({"command": "true", "environment": {}}, "environment: there is no such field"),
        ({"OK": True, "Value": {"command": "true", "env": {}}}, "command: is missing"),
    ],
    ids=repr,
)
async def test_nonsense_from_preprocess_fails_the_job_with_a_clear_message(
    fly: Fly, returned: object, said: str
) -> None:
    async def decide(*_: Any) -> object:
        return returned

    handle = JobHandle()
    result = await fly({"coordinator": with_hook("preProcess", decide), "handle": handle})
    assert (result.status, result.failure.kind, result.failure.phase) == (
        Status.FAILED, "HookFailed", Phase.PRE_PROCESS,
    )  # fmt: skip
    assert said in result.failure.message
    assert "SlotGranted" not in kinds(await history(handle))


# -- what a hook is offered ----------------------------------------------------------------------------------------


async def test_a_coordinator_may_own_the_upload_and_reuse_the_standard_steps(fly: Fly, out: Path) -> None:
    """The example of DIRAC issue 8307."""

    class Merging(JobExecutionCoordinator):
        async def stageOut(self) -> None:
            await self.job.upload_output_sandbox()
            assert await to_thread.run_sync(os.listdir, out) == ["std.out"]
            await to_thread.run_sync(self.merge)
            await self.job.upload_output_data()

        def merge(self) -> None:
            parts = sorted(self.job.workdir.glob("part-*"))
            (self.job.workdir / "data").write_text("".join(part.read_text() for part in parts))

    result = await fly(
        {"coordinator": Merging}, **sh("echo 1 > part-1; echo 2 > part-2"),
        output_sandbox=["std.out"], output_data=["data"],
    )  # fmt: skip
    assert result.status is Status.DONE
    assert (out / "data").read_text() == "1\n2\n"


async def test_a_coordinator_may_own_the_stage_in_and_reuse_the_standard_steps(
    fly: Fly, out: Path, tmp_path: Path
) -> None:
    class Ordered(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            await self.job.download_input_sandbox()
            assert await to_thread.run_sync((self.job.workdir / "options").exists)
            assert not await to_thread.run_sync((self.job.workdir / "events").exists)
            await self.job.resolve_input_data()

    for name in ("options", "events"):
        (tmp_path / name).write_text(name)
    handle = JobHandle()
    result = await fly(
        {"coordinator": Ordered, "handle": handle}, **sh("cat options events"),
        input_sandbox=[str(tmp_path / "options")], input_data=[str(tmp_path / "events")], output_sandbox=["std.out"],
    )  # fmt: skip
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "optionsevents"
    assert [file.name for file in result.inputs] == ["options", "events"]


async def test_the_data_of_a_failed_job_stays_although_the_coordinator_asks(fly: Fly, out: Path) -> None:
    class Eager(JobExecutionCoordinator):
        async def stageOut(self) -> None:
            assert self.job.failure is not None
            await self.job.upload_output_data()

    result = await fly({"coordinator": Eager}, **sh("touch data; exit 1"), output_data=["data"])
    assert (result.status, outputs(result)) == (Status.FAILED, set())


async def test_a_coordinator_that_hides_a_staging_failure_has_decided_so(fly: Fly) -> None:
    class Lenient(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            try:
                await super().stageIn()
            except JobError as error:
                await self.job.report("InputProblem", error)

    result = await fly({"coordinator": Lenient}, input_data=["/nowhere/a"])
    assert result.status is Status.DONE
    assert "/nowhere/a" in result.parameters["InputProblem"]


async def test_what_a_coordinator_reports_is_in_the_result_the_latest_value_of_each_name(fly: Fly) -> None:
    class Reports(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            await self.job.report("Events", 0)

        async def postProcess(self) -> None:
            await self.job.report("Events", 17)

        async def stageOut(self) -> None:
            await self.job.report("Note", None)

    result = await fly({"coordinator": Reports})
    assert result.parameters == {"Events": "17", "Note": "None"}


async def test_a_coordinator_may_look_at_the_last_lines_of_its_running_payload(fly: Fly, tmp_path: Path) -> None:
    class Peeks(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            assert await self.job.peek() == []
            self.job.start_soon(self.look)
            return PayloadSpec(command=command, env=exeEnv)

        async def look(self) -> None:
            await post.reached()
            seen.append(await self.job.peek(2))
            await to_thread.run_sync((tmp_path / "seen").touch)

        async def postProcess(self) -> None:
            seen.append(await self.job.peek())

    seen: list[list[str]] = []
    post = Signpost(tmp_path / "post")
    result = await fly(
        {"coordinator": Peeks},
        **sh(f"seq 100; echo > {post}; while [ ! -e {tmp_path}/seen ]; do sleep 0.01; done"),
    )
    assert result.status is Status.DONE
    assert seen == [["99", "100"], []]


async def test_a_job_in_flight_is_known_by_its_id(fly: Fly) -> None:
    class Shown(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            assert isinstance(self.job, JobInFlight)
            await self.job.report("repr", repr(self.job))

    result = await fly({"coordinator": Shown}, job_id="4711")
    assert result.parameters["repr"] == "<JobInFlight 4711>"


async def test_hooks_of_different_jobs_run_side_by_side(fly: Fly) -> None:
    """Neither job gets further until both are in their hook."""

    class Meets(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            met.append(self.jobArgs.job_id)
            if len(met) == 2:
                both.set()
            with anyio.fail_after(20):
                await both.wait()

    met: list[str] = []
    both = anyio.Event()
    async with anyio.create_task_group() as tg:
        for _ in range(2):
            tg.start_soon(fly, {"coordinator": Meets})
    assert len(set(met)) == 2


# -- the output sandbox in one archive -------------------------------------------------------------------------------


def packing(tmp_path: Path, **words: Any) -> Site:
    """A site with a place for archives, and a storage element."""
    return Site(
        **{
            "sandbox_format": "tar.bz2",
            "sandbox_store": str(tmp_path / "sandboxes"),
            "storage_elements": {"DISK": str(tmp_path / "disk")},
            "default_se": ["DISK"],
            "vo": "vo",
            **words,
        }
    )


def unpacked(path: Path) -> dict[str, bytes]:
    """What is in an archive, whose name is the checksum of it."""
    data = path.read_bytes()
    assert path.name == f"{hashlib.md5(data).hexdigest()}.tar.bz2"
    with tarfile.open(fileobj=io.BytesIO(bz2.decompress(data))) as tar:
        return {info.name: getattr(tar.extractfile(info), "read", bytes)() for info in tar}


LOGS = {"job_id": "7", "owner": "ada", "output_sandbox": ["std.out", "d", "l/*.log", "none"]}


class SandboxFirst(JobExecutionCoordinator):
    async def stageOut(self) -> None:
        await self.job.upload_output_sandbox()
        await self.job.upload_output_data()


async def test_a_sandbox_goes_out_as_one_archive_where_the_site_says_so(fly: Fly, tmp_path: Path) -> None:
    handle = JobHandle()
    result = await fly(
        {"site": packing(tmp_path), "handle": handle, "coordinator": SandboxFirst},
        **sh("echo hi; mkdir d l; echo 1 > d/x; echo 2 > l/a.log; echo 3 > l/b.log; echo 4 > data"),
        **LOGS, output_data=["*[a2]"],
    )  # fmt: skip
    assert (result.status, result.failure) == (Status.DONE, None)
    (archive,) = (tmp_path / "sandboxes" / "7").iterdir()
    content = unpacked(archive)
    assert [*content] == ["d.tar", "a.log", "b.log", "std.out"]
    assert (content["std.out"], content["a.log"]) == (b"hi\n", b"2\n")
    with tarfile.open(fileobj=io.BytesIO(content["d.tar"])) as tar:
        assert tar.getnames() == ["d/x"]
    assert outputs(result) == {archive.name, "data"}, "no pattern of the data finds the archive"
    missing = [(event.name, event.reason) for event in await history(handle) if isinstance(event, OutputMissing)]
    assert missing == [("none", "the payload did not make it")]


class TriesAgain(JobExecutionCoordinator):
    """Its first stage-out breaks off after the sandbox."""

    tried = False

    async def stageOut(self) -> None:
        await self.job.upload_output_sandbox()
        if not self.tried:
            self.tried = True
            raise RetryHook(after=timedelta(milliseconds=1), reason="a catalog is restarting")
        await self.job.upload_output_data()


@pytest.mark.parametrize("packs", [False, True])
async def test_a_stage_out_that_is_tried_again_packs_its_directories_again(
    fly: Fly, tmp_path: Path, out: Path, packs: bool
) -> None:
    """It refused the archive that it had made itself as one of the payload's; and patterns of the data delivered it."""
    result = await fly(
        {"coordinator": TriesAgain} | ({"site": packing(tmp_path)} if packs else {}),
        **sh("mkdir -p a/d; echo 1 > a/d/x; echo data > a/data"), job_id="7", owner="ada",
        output_sandbox=["a/d"], output_data=["a/*a*"],
    )  # fmt: skip
    assert (result.status, result.failure) == (Status.DONE, None)
    names = {name for name in outputs(result) if not name.endswith((".tar.bz2", ".tar.zst"))}
    assert names == ({"a/data"} if packs else {"a/data", "a/d.tar"})
    if packs:
        (archive,) = (tmp_path / "sandboxes" / "7").iterdir()
        assert [*unpacked(archive)] == ["d.tar"]


async def test_a_failed_jobs_sandbox_is_an_archive_too_and_an_empty_one_is_none(fly: Fly, tmp_path: Path) -> None:
    result = await fly({"site": packing(tmp_path)}, **sh("echo hi; exit 1"), **LOGS)
    assert result.status is Status.FAILED
    (archive,) = (tmp_path / "sandboxes" / "7").iterdir()
    assert unpacked(archive) == {"std.out": b"hi\n"}
    result = await fly({"site": packing(tmp_path)}, **{**LOGS, "job_id": "8", "output_sandbox": ["none"]})
    assert (result.status, result.outputs) == (Status.DONE, ())


async def test_what_may_not_be_in_the_archive_fails_the_job_and_the_rest_is_delivered(fly: Fly, tmp_path: Path) -> None:
    handle = JobHandle()
    result = await fly(
        {"site": packing(tmp_path), "handle": handle},
        **sh("ln -s /etc/passwd link; mkdir d; echo 1 > a; echo 2 > d/a; ln -s gone dangling; mkfifo fifo"),
        job_id="7", output_sandbox=["a", "d/*", "link", "fifo", "dangling"],
    )  # fmt: skip
    assert (result.status, result.failure.kind) == (Status.FAILED, "StagingFailed")
    (archive,) = (tmp_path / "sandboxes" / "7").iterdir()
    assert unpacked(archive) == {"a": b"1\n"}
    missing = {event.name: event.reason for event in await history(handle) if isinstance(event, OutputMissing)}
    assert missing == {
        "d/a": "has the same last part as a",
        "link": "is a symbolic link out of the work directory",
        "fifo": "is a FIFO, not a file",
        "dangling": "the payload did not make it",
    }
    assert "link: is a symbolic link out of the work directory" in result.failure.message
    assert "dangling" not in result.failure.message, "as when it is taken out by itself"


@pytest.mark.parametrize("code", [0, 1])
async def test_a_sandbox_too_large_for_its_store_goes_to_grid_storage(fly: Fly, tmp_path: Path, code: int) -> None:
    """Also when the job has failed, as in DIRAC: it is the user's only look at why."""
    site = packing(tmp_path, sandbox_limit_bytes=5_000, sandbox_store="https://nobody.invalid/")
    result = await fly({"site": site}, **sh(f"head -c 9000 /dev/urandom; exit {code}"), **LOGS)
    assert (result.status, result.outcome.exit_code) == (Status.FAILED if code else Status.DONE, code)
    (archive,) = (tmp_path / "disk/vo/user/a/ada/0/7").iterdir()
    assert len(unpacked(archive)["std.out"]) == 9000
    assert (result.outputs[0].storage_element, result.outputs[0].lfn) == ("DISK", f"/vo/user/a/ada/0/7/{archive.name}")
    assert result.parameters["OutputSandbox"] == "Sandbox uploaded to grid storage"
    assert result.parameters["OutputSandboxLFN"] == result.outputs[0].lfn


async def test_a_sandbox_its_store_cannot_take_goes_to_grid_storage(fly: Fly, tmp_path: Path) -> None:
    (tmp_path / "sandboxes").write_text("in the way")
    result = await fly({"site": packing(tmp_path)}, **sh("echo hi"), **LOGS)
    assert result.status is Status.DONE
    (archive,) = (tmp_path / "disk/vo/user/a/ada/0/7").iterdir()
    assert unpacked(archive) == {"std.out": b"hi\n"}
    assert result.parameters["OutputSandboxLFN"] == f"/vo/user/a/ada/0/7/{archive.name}"


async def test_a_sandbox_that_nobody_takes_fails_the_job_and_says_why(fly: Fly, tmp_path: Path) -> None:
    site = packing(tmp_path, sandbox_limit_bytes=5_000, default_se=[])
    result = await fly({"site": site}, **sh("head -c 9000 /dev/urandom"), **LOGS)
    assert (result.status, result.failure.phase) == (Status.FAILED, Phase.STAGE_OUT)
    assert "bytes, and the sandbox store takes 5,000; as output data: " in result.failure.message
    assert "nowhere to put it" in result.failure.message
    (tmp_path / "sandboxes").write_text("in the way")
    (tmp_path / "disk").write_text("in the way")
    result = await fly({"site": packing(tmp_path)}, **sh("echo hi"), **LOGS)
    assert result.status is Status.FAILED
    assert {f"{tmp_path}/{place}" in result.failure.message for place in ("sandboxes", "disk")} == {True}
    assert "OutputSandbox" not in result.parameters


async def test_a_directory_for_outputs_takes_archives_of_any_size(fly: Fly, tmp_path: Path, out: Path) -> None:
    site = Site(sandbox_format="tar.bz2", sandbox_limit_bytes=1, output_directory=str(out))
    result = await fly({"site": site}, **sh("echo hi"), **LOGS)
    assert result.status is Status.DONE
    assert unpacked(*out.iterdir()) == {"std.out": b"hi\n"}


async def test_an_archive_may_be_of_zstd_and_its_library_is_missed_before_there_are_outputs(
    fly: Fly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setattr(archives, "_zstd", lambda: None)
        with pytest.raises(InvalidSite, match=r"^sandbox_format: zstd takes .* pip install loadmaster\[zstd\]$"):
            await fly({"site": packing(tmp_path, sandbox_format="tar.zst")}, **sh("echo hi"), **LOGS)
    if archives._zstd() is None:
        pytest.skip("zstd is not installed")
    result = await fly({"site": packing(tmp_path, sandbox_format="tar.zst")}, **sh("echo hi"), **LOGS)
    assert result.status is Status.DONE
    (archive,) = (tmp_path / "sandboxes" / "7").iterdir()
    with tarfile.open(fileobj=io.BytesIO(archives.zstd_library().decompress(archive.read_bytes()))) as tar:
        assert tar.getnames() == ["std.out"]


async def test_a_killed_jobs_sandbox_is_an_archive_too(fly: Fly, tmp_path: Path) -> None:
    class Killed(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            self.job.start_soon(self.kill)
            return PayloadSpec(command=command, env=exeEnv)

        async def kill(self) -> None:
            while await self.job.peek() != ["hi"]:
                await anyio.sleep(0.002)
            handle.kill("enough")

    handle = JobHandle()
    options = {"site": packing(tmp_path), "handle": handle, "coordinator": Killed}
    result = await fly(options, **sh("echo hi; sleep 60"), **{**LOGS, "output_sandbox": ["std.out"]})
    assert result.status is Status.KILLED
    (archive,) = (tmp_path / "sandboxes" / "7").iterdir()
    assert unpacked(archive) == {"std.out": b"hi\n"}


async def test_a_zip_archive_among_the_inputs_stays_packed(fly: Fly, tmp_path: Path, out: Path) -> None:
    """DIRAC does not unpack it, and payloads call `unzip`, which asks whether to overwrite and waits."""
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        archive.writestr("inside", "x")
    result = await fly(**sh("ls; test -f in.zip"), input_sandbox=[str(tmp_path / "in.zip")], output_sandbox=["std.out"])
    assert result.status is Status.DONE
    assert "inside" not in (out / "std.out").read_text().split()
