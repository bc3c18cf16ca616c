"""One job's life, by what a user sees of it."""

from __future__ import annotations

import os
import tarfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import lowlevel, to_thread

from conftest import Fly, sh
from following import Signpost, happens, history, killed_when, kinds, processes_of
from loadmaster import (
    ComputingElement,
    JobDescription,
    JobError,
    JobExecutionCoordinator,
    JobHandle,
    JobResult,
    JobWasKilled,
    Ledger,
    LimitExceeded,
    PayloadFailed,
    PayloadSpec,
    RuntimeFault,
    Site,
    Slot,
    Status,
    Transfers,
    WorkdirFault,
    open_transfers,
    run_job,
)
from loadmaster.events import (
    ComputingEnded,
    Event,
    JobFinished,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    SlotGranted,
    StageOutStarted,
)
from loadmaster.lifecycle import Lifecycle
from loadmaster.names import file_url
from loadmaster.result import EndedBy, Failure, Phase
from loadmaster.storage.base import Replica, Transfer
from loadmaster.storage.catalog import SqliteCatalog
from loadmaster.testing import Faults, MemoryJournal, MemoryStorage

LOGS = ["std.out", "std.err"]


def phase(result: JobResult) -> Phase | None:
    return result.failure.phase if result.failure else None


def kind(result: JobResult) -> str | None:
    return result.failure.kind if result.failure else None


class Asked(JobExecutionCoordinator):
    """Reports what of it was called."""

    async def postProcess(self) -> None:
        await self.job.report("postProcess", "called")


# -- the ends a job may come to ----------------------------------------------------------------------------------


async def test_a_job_that_prints_delivers_what_it_printed(fly: Fly, out: Path) -> None:
    result = await fly(**sh("echo hello"), output_sandbox=["std.out", "std.err"])
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "hello\n"
    assert result.outcome.exit_code == 0


async def test_a_job_that_succeeds_tells_its_life_in_this_order(fly: Fly, out: Path, tmp_path: Path) -> None:
    (tmp_path / "input").write_text("cargo")
    handle = JobHandle()
    result = await fly(
        {"handle": handle},
        **sh("cat input > copy"),
        input_data=[str(tmp_path / "input")],
        output_data=["copy"],
    )
    assert result.status is Status.DONE
    assert kinds(await history(handle)) == [
        "JobAccepted", "StageInStarted", "FileStagedIn", "StageInEnded", "PayloadPrepared", "SlotGranted",
        "PayloadStarted", "PayloadExited", "ComputingEnded", "StageOutStarted", "FileStagedOut", "JobFinished",
    ]  # fmt: skip
    assert (out / "copy").read_text() == "cargo"


@pytest.mark.parametrize(
    ("script", "said"),
    [("exit 3", "exit code 3"), ("kill -9 $$", "ended by signal 9 (SIGKILL)")],
    ids=["exit code", "signal"],
)
async def test_a_failing_payload_delivers_its_logs_and_not_its_data(
    fly: Fly, out: Path, script: str, said: str
) -> None:
    result = await fly(
        {"coordinator": Asked},
        **sh(f"echo half > data; echo why >&2; {script}"), output_sandbox=LOGS, output_data=["data"],
    )  # fmt: skip
    assert result.status is Status.FAILED
    assert result.failure == Failure("PayloadFailed", f"the payload failed: {said}", Phase.PAYLOAD)
    assert (out / "std.err").read_text() == "why\n"
    assert not (out / "data").exists()
    assert result.missing_outputs == ()
    assert result.parameters == {"postProcess": "called"}


async def test_a_payload_that_exits_with_222_is_rescheduled_without_postprocess(fly: Fly, out: Path) -> None:
    result = await fly({"coordinator": Asked}, **sh("touch data; exit 222"), output_sandbox=LOGS, output_data=["data"])
    assert result.status is Status.RESCHEDULED
    assert kind(result) == "RescheduleJob"
    assert result.outcome.exit_code == 222
    assert result.parameters == {}
    assert sorted(path.name for path in out.iterdir()) == LOGS[::-1]


@pytest.mark.parametrize("obedience", ["", "trap 'exit 0' TERM; "], ids=["dies of it", "exits with 0"])
async def test_a_payload_over_its_limit_is_stopped_and_the_verdict_kept(fly: Fly, out: Path, obedience: str) -> None:
    """Also when it winds down politely and ends with status 0: the limit was exceeded all the same."""
    result = await fly(
        {"coordinator": Asked},
        **sh(f"{obedience}echo begun; touch data; while :; do sleep 0.05; done"),
        limits={"wall_seconds": 0.3}, output_sandbox=LOGS, output_data=["data"],
    )  # fmt: skip
    assert result.status is Status.FAILED
    assert (kind(result), phase(result)) == ("LimitExceeded", Phase.PAYLOAD)
    assert result.outcome.ended_by is EndedBy.LIMIT
    assert result.outcome.verdict.limit == "wall time"
    assert result.failure.message == str(result.outcome.verdict)
    assert result.parameters == {"postProcess": "called"}
    assert (out / "std.out").read_text() == "begun\n"
    assert not (out / "data").exists()


async def test_raise_for_status_raises_the_error_the_failure_stands_for(fly: Fly) -> None:
    (await fly()).raise_for_status()
    with pytest.raises(PayloadFailed, match="exit code 1"):
        (await fly(executable="/bin/false")).raise_for_status()
    with pytest.raises(LimitExceeded, match="wall time"):
        (await fly(executable="sleep", arguments="60", limits={"wall_seconds": 0.1})).raise_for_status()
    with pytest.raises(JobError, match="cannot bring in: gone"):
        (await fly(input_data=["/nowhere/gone"])).raise_for_status()


# -- a kill, in every phase --------------------------------------------------------------------------------------


class Reached:
    """What a coordinator of a test says when it has come so far."""

    def __init__(self) -> None:
        self.event = anyio.Event()

    async def __call__(self, _: object = None) -> None:
        await self.event.wait()


def waiting_in(hook: str, reached: Reached) -> type[JobExecutionCoordinator]:
    """A coordinator that waits for ever in one hook, having left a log."""

    async def wait(self: JobExecutionCoordinator, *_: Any) -> None:
        await to_thread.run_sync((self.job.workdir / "my.log").write_text, "waiting\n")
        await to_thread.run_sync((self.job.workdir / "data").touch)
        reached.event.set()
        await anyio.sleep_forever()

    return type("Waiting", (JobExecutionCoordinator,), {hook: wait})


@pytest.mark.parametrize(
    ("hook", "where"),
    [("stageIn", Phase.STAGE_IN), ("preProcess", Phase.PRE_PROCESS), ("postProcess", Phase.POST_PROCESS)],
)
async def test_a_job_killed_in_a_hook_still_delivers_its_logs(fly: Fly, out: Path, hook: str, where: Phase) -> None:
    reached = Reached()
    options = {"coordinator": waiting_in(hook, reached)}
    result, _ = await killed_when(
        reached,
        lambda handle: fly({**options, "handle": handle}, output_sandbox=["my.log"], output_data=["data"]),
    )
    assert result.status is Status.KILLED
    assert result.failure == Failure("JobWasKilled", "the user is tired of waiting", where)
    assert (out / "my.log").read_text() == "waiting\n"
    assert not (out / "data").exists()


async def test_a_job_killed_while_an_input_hangs_ends_and_leaves_no_part_of_it(fly: Fly) -> None:
    storage = Faults(MemoryStorage({"memory://se/a": b"a", "memory://se/b": b"b"}))
    hangs = storage.hang("download", at=2)
    async with open_transfers(Site(), storages={"memory": storage}) as transfers:
        result, events = await killed_when(
            lambda _: hangs.wait(),
            lambda handle: fly(
                {"handle": handle, "transfers": transfers, "site": None},
                input_data=["memory://se/a", "memory://se/b"],
            ),
        )
    assert (result.status, phase(result)) == (Status.KILLED, Phase.STAGE_IN)
    assert kinds(events)[-3:] == ["ComputingEnded", "StageOutStarted", "JobFinished"]
    assert result.outcome is None


async def test_a_job_killed_while_it_waits_for_a_slot_gives_its_place_back(fly: Fly) -> None:
    ledger = Ledger(cores=1)
    async with ledger.lease(JobDescription(executable="true")):
        result, events = await killed_when(
            happens(PayloadPrepared), lambda handle: fly({"handle": handle, "slots": ledger})
        )
        assert repr(ledger) == "<Ledger [0 of 1 cores free, 0 waiting]>"
    assert (result.status, phase(result)) == (Status.KILLED, Phase.PAYLOAD)
    assert "SlotGranted" not in kinds(events)
    assert repr(ledger) == "<Ledger [1 of 1 cores free, 0 waiting]>"


async def test_a_job_killed_while_its_payload_runs_delivers_what_it_printed(
    fly: Fly, out: Path, tmp_path: Path
) -> None:
    post = Signpost(tmp_path / "post")
    result, events = await killed_when(
        post.reached,
        lambda handle: fly(
            {"handle": handle, "coordinator": Asked},
            **sh(f"echo begun; touch data; echo > {post}; sleep 60"),
            output_sandbox=LOGS, output_data=["data"],
        ),
    )  # fmt: skip
    assert result.status is Status.KILLED
    assert result.failure == Failure("JobWasKilled", "the user is tired of waiting", Phase.PAYLOAD)
    assert result.outcome is not None
    assert (result.outcome.signal, result.outcome.ended_by) == (15, EndedBy.KILL)
    assert (out / "std.out").read_text() == "begun\n"
    assert not (out / "data").exists()
    assert result.parameters == {}, "postProcess is not for killed jobs"
    assert "PayloadExited" in kinds(events)


async def test_a_payload_that_ignores_term_is_killed_after_its_grace(fly: Fly, tmp_path: Path) -> None:
    post = Signpost(tmp_path / "post")
    with anyio.fail_after(20):
        result, _ = await killed_when(
            post.reached,
            lambda handle: fly(
                {"handle": handle},
                **sh(f"trap '' TERM; echo > {post}; while :; do sleep 60; done"),
                limits={"grace_seconds": 0.2},
            ),
        )
    assert result.outcome is not None
    assert (result.outcome.signal, result.outcome.ended_by) == (9, EndedBy.KILL)
    assert result.outcome.wall_seconds >= 0.2


async def test_an_order_that_came_before_the_job_kills_it_before_it_does_anything(fly: Fly) -> None:
    handle = JobHandle()
    assert handle.kill("never mind")
    result = await fly({"handle": handle})
    assert (result.status, result.failure.message) == (Status.KILLED, "never mind")
    assert "PayloadPrepared" not in kinds(await history(handle))


async def test_the_first_reason_to_kill_is_the_one_that_is_kept(fly: Fly) -> None:
    handle = JobHandle()
    assert handle.kill("first")
    assert handle.kill("second")
    assert (await fly({"handle": handle})).failure.message == "first"


async def test_a_job_that_has_computed_cannot_be_killed(fly: Fly, out: Path) -> None:
    class Slow(JobExecutionCoordinator):
        async def stageOut(self) -> None:
            answers.append(handle.kill("too late"))
            await super().stageOut()

    answers: list[bool] = []
    handle = JobHandle()
    result = await fly({"handle": handle, "coordinator": Slow}, **sh("touch data"), output_data=["data"])
    assert result.status is Status.DONE
    assert (out / "data").exists()
    answers.append(handle.kill("far too late"))
    assert answers == [False, False]


# -- what is executed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("executable", "why"),
    [
        ("/nowhere/program", "no such file"),
        ("bin/program", "no such file"),
        ("no-such-program-anywhere", "neither a file of the job nor in PATH"),
        ("/etc", "is not a file"),
        ("/etc/passwd", "may not be executed"),
    ],
)
@pytest.mark.skipif(os.getuid() == 0 and os.access("/etc/passwd", os.X_OK), reason="everything may be executed")
async def test_an_executable_that_cannot_be_is_said_before_anything_starts(fly: Fly, executable: str, why: str) -> None:
    ledger, handle = Ledger(cores=1), JobHandle()
    result = await fly({"slots": ledger, "handle": handle}, executable=executable)
    assert (result.status, kind(result)) == (Status.FAILED, "PayloadNotStarted")
    assert repr(executable) in result.failure.message
    assert why in result.failure.message
    assert "SlotGranted" not in kinds(await history(handle))
    assert repr(ledger) == "<Ledger [1 of 1 cores free, 0 waiting]>"


async def test_an_executable_that_came_as_an_input_is_made_executable(fly: Fly, out: Path, tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho ran with $1\n")
    result = await fly(
        executable="run.sh", arguments="care", input_sandbox=[str(tmp_path / "run.sh")], output_sandbox=LOGS
    )
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "ran with care\n"


def saying(command: str | tuple[str, ...], **env: str) -> type[JobExecutionCoordinator]:
    """A coordinator that wants this executed."""

    class Saying(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            return PayloadSpec(command=words, env={**exeEnv, **env})

    words = command
    return Saying


@pytest.mark.parametrize(
    ("command", "printed"),
    [("echo $GREETING; echo two", "hello\ntwo\n"), (("echo", "$GREETING; echo two"), "$GREETING; echo two\n")],
    ids=["str", "sequence"],
)
async def test_a_str_is_a_piece_of_shell_and_a_sequence_is_executed_as_it_stands(
    fly: Fly, out: Path, command: str | tuple[str, ...], printed: str
) -> None:
    result = await fly({"coordinator": saying(command, GREETING="hello")}, output_sandbox=LOGS)
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == printed


@pytest.mark.parametrize("command", [("/nowhere/program",), ("nothing-of-that-name",), ("./absent", "x")])
async def test_a_sequence_whose_executable_is_missing_starts_nothing_and_frees_its_slot(
    fly: Fly, command: tuple[str, ...]
) -> None:
    ledger, handle = Ledger(cores=2), JobHandle()
    result = await fly({"coordinator": saying(command), "slots": ledger, "handle": handle})
    assert (kind(result), phase(result)) == ("PayloadNotStarted", Phase.PAYLOAD)
    assert command[0] in result.failure.message
    assert "PayloadStarted" not in kinds(await history(handle))
    assert repr(ledger) == "<Ledger [2 of 2 cores free, 0 waiting]>"


async def test_the_payload_has_its_own_environment_and_nothing_of_the_pilots(
    fly: Fly, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PILOT_SECRET", "hunter2")
    result = await fly(
        {"ce": ComputingElement(site="LCG.Example.org")},
        job_id="4711",
        **sh("env; id=$JOBID"),
        environment={"MINE": "a b"},
        number_of_processors=3,
        output_sandbox=LOGS,
    )
    assert result.status is Status.DONE
    seen = dict(line.split("=", 1) for line in (out / "std.out").read_text().splitlines())
    assert "PILOT_SECRET" not in seen
    assert (seen["JOBID"], seen["MINE"], seen["LOADMASTER_SITE"]) == ("4711", "a b", "LCG.Example.org")
    assert seen["LOADMASTER_CORES"] == "3"
    assert seen["PWD"] == seen["TMPDIR"]


async def test_the_payload_is_told_the_cores_of_the_slot_and_not_those_it_asked_for(fly: Fly, out: Path) -> None:
    class Generous:
        @asynccontextmanager
        async def lease(self, job: JobDescription) -> AsyncIterator[Slot]:
            yield Slot(cores=7, memory_mb=4000)

    handle = JobHandle()
    result = await fly({"slots": Generous(), "handle": handle}, **sh("echo $LOADMASTER_CORES"), output_sandbox=LOGS)
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "7\n"
    granted = [event for event in await history(handle) if isinstance(event, SlotGranted)]
    assert [(event.cores, event.memory_mb) for event in granted] == [(7, 4000)]


# -- files -------------------------------------------------------------------------------------------------------


class AllAtOnce(MemoryStorage):
    """A storage whose transfers only finish when so many have been begun."""

    def __init__(self, at_once: int, files: dict[str, bytes]) -> None:
        super().__init__(files)
        self.at_once = at_once
        self.begun = 0
        self.all_begun = anyio.Event()

    async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
        await self._together(len(transfers))
        await super().move(transfers, ended)

    async def _together(self, count: int) -> None:
        self.begun += count
        if self.begun >= self.at_once:
            self.all_begun.set()
        with anyio.fail_after(20):
            await self.all_begun.wait()


async def test_inputs_come_in_side_by_side_data_and_sandbox_together(fly: Fly) -> None:
    files = {f"memory://se/{name}": name.encode() for name in "abcd"}
    async with open_transfers(Site(), storages={"memory": AllAtOnce(4, files)}) as transfers:
        result = await fly(
            {"transfers": transfers, "site": None},
            input_data=["memory://se/a", "memory://se/b"],
            input_sandbox=["memory://se/c", "memory://se/d"],
        )
    assert result.status is Status.DONE
    assert sorted(file.name for file in result.inputs) == list("abcd")


async def test_outputs_go_out_side_by_side_data_and_sandbox_together(fly: Fly) -> None:
    storage = AllAtOnce(4, {})
    site = Site(output_directory="memory://se/out")
    async with open_transfers(site, storages={"memory": storage}) as transfers:
        result = await fly(
            {"transfers": transfers, "site": None},
            **sh("touch a b"), output_data=["a", "b"], output_sandbox=LOGS,
        )  # fmt: skip
    assert result.status is Status.DONE
    assert sorted(storage.files) == [f"memory://se/out/{name}" for name in ("a", "b", "std.err", "std.out")]


async def test_no_more_files_are_under_way_at_once_than_the_site_has_streams(fly: Fly) -> None:
    class Counting(AllAtOnce):
        now = most = 0

        async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
            self.now += 1
            self.most = max(self.most, self.now)
            try:
                await super().move(transfers, ended)
            finally:
                self.now -= 1

    storage = Counting(3, {f"memory://se/{n}": b"x" for n in range(9)})
    async with open_transfers(Site(streams=3), storages={"memory": storage}) as transfers:
        result = await fly({"transfers": transfers, "site": None}, input_data=sorted(storage.files))
    assert result.status is Status.DONE
    assert storage.most == 3


async def test_an_output_that_was_not_made_is_listed_and_the_job_is_done(fly: Fly, out: Path) -> None:
    result = await fly(**sh("echo x > made"), output_data=["made", "forgotten", "*.root"])
    assert result.status is Status.DONE
    assert result.missing_outputs == ("forgotten", "*.root")
    assert [file.name for file in result.outputs] == ["made"]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("ln -s /etc/passwd data", "is a symbolic link out of the work directory"),
        ("mkfifo data", "is a FIFO, not a file"),
    ],
    ids=["symlink", "fifo"],
)
async def test_an_output_that_may_not_leave_fails_the_job_with_its_reason(
    fly: Fly, out: Path, script: str, reason: str
) -> None:
    result = await fly(**sh(f"{script}; touch other"), output_data=["data", "other"], output_sandbox=LOGS)
    assert (result.status, kind(result), phase(result)) == (Status.FAILED, "StagingFailed", Phase.STAGE_OUT)
    assert f"data: {reason}" in result.failure.message
    assert not (out / "data").exists()
    assert (out / "other").exists(), "the others are tried all the same"


async def test_an_input_that_is_missing_fails_the_job_before_a_payload(fly: Fly, out: Path) -> None:
    handle = JobHandle()
    result = await fly({"handle": handle}, input_data=["/nowhere/a", "/nowhere/b"], output_sandbox=LOGS)
    assert (result.status, kind(result), phase(result)) == (Status.FAILED, "StagingFailed", Phase.STAGE_IN)
    assert "a: file:///nowhere/a" in result.failure.message
    assert "b: file:///nowhere/b" in result.failure.message
    assert "PayloadPrepared" not in kinds(await history(handle))
    assert result.missing_outputs == ("std.out", "std.err")


async def test_wrong_bytes_are_not_given_to_the_payload(fly: Fly) -> None:
    storage = Faults(MemoryStorage({"memory://se/a": b"right"}))
    storage.corrupt("download")
    async with open_transfers(Site(retry_seconds=0.001), storages={"memory": storage}) as transfers:
        result = await fly(
            {"transfers": transfers, "site": None}, input_data=[{"source": "memory://se/a", "adler32": "06960211"}]
        )
    assert (kind(result), phase(result)) == ("StagingFailed", Phase.STAGE_IN)
    assert "adler32" in result.failure.message


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Two storage elements, one to fall back on, and a catalog."""
    return Site(
        vo="example",
        catalog=str(tmp_path / "catalog.sqlite"),
        storage_elements={name: str(tmp_path / "se" / name) for name in ("DISK", "TAPE", "BUFFER")},
        default_se=["DISK"],
        failover_se=["BUFFER"],
        sandbox_store=str(tmp_path / "sandboxes"),
    )


DATA = {"owner": "jane", "job_id": "4711", "output_data": ["data"]}
LFN = "/example/user/j/jane/4/4711/data"


async def test_output_data_goes_to_the_storage_element_and_into_the_catalog(
    fly: Fly, site: Site, tmp_path: Path
) -> None:
    result = await fly({"site": site}, **sh("echo x > data"), **DATA)
    assert result.status is Status.DONE
    assert [(file.lfn, file.storage_element) for file in result.outputs] == [(LFN, "DISK")]
    place = tmp_path / "se" / "DISK" / LFN[1:]
    assert place.read_text() == "x\n"
    entry = (await SqliteCatalog(tmp_path / "catalog.sqlite").lookup([LFN]))[LFN]
    assert entry.replicas == (Replica(file_url(place), "DISK"),)


async def test_output_data_whose_element_is_broken_is_safe_elsewhere_and_the_job_completed(
    fly: Fly, site: Site, tmp_path: Path
) -> None:
    (tmp_path / "se").mkdir()
    (tmp_path / "se" / "DISK").write_text("a file where the storage element should be")
    result = await fly({"site": site}, **sh("echo x > data"), **DATA)
    assert (result.status, result.failure) == (Status.COMPLETED, None)
    assert [(file.lfn, file.storage_element) for file in result.outputs] == [(LFN, "BUFFER")]
    wanted = file_url(tmp_path / "se" / "DISK" / LFN[1:])
    assert result.pending == (f"move {result.outputs[0].url} to {wanted}",)
    assert (tmp_path / "se" / "BUFFER" / LFN[1:]).read_text() == "x\n"


async def test_output_data_no_element_takes_fails_the_job_and_says_why(fly: Fly, site: Site, tmp_path: Path) -> None:
    (tmp_path / "se").write_text("no storage at all")
    result = await fly({"site": site}, **sh("echo x > data; echo log"), **DATA, output_sandbox=["std.out"])
    assert (result.status, kind(result), phase(result)) == (Status.FAILED, "StagingFailed", Phase.STAGE_OUT)
    assert "DISK" in result.failure.message, "where it was wanted, not where it was tried last"
    assert result.outcome.exit_code == 0
    assert (tmp_path / "sandboxes" / "4711" / "std.out").read_text() == "log\n"


@pytest.mark.parametrize("words", [{"output_data": ["data"]}, {"output_sandbox": ["std.out"]}])
async def test_an_output_with_nowhere_to_go_is_refused_before_anything_is_computed(
    fly: Fly, words: dict[str, Any]
) -> None:
    handle = JobHandle()
    result = await fly({"site": Site(), "handle": handle}, **words)
    assert (result.status, kind(result), phase(result)) == (Status.FAILED, "InvalidJob", Phase.STAGE_IN)
    assert next(iter(words)) in result.failure.message
    assert "StageInStarted" not in kinds(await history(handle))


# -- slots -------------------------------------------------------------------------------------------------------


async def test_jobs_that_share_a_core_overlap_their_staging_but_not_their_payloads(fly: Fly, tmp_path: Path) -> None:
    """Both bring their inputs in before either payload runs; then one payload runs after the other."""
    order: list[tuple[str, str]] = []

    async def follow(handle: JobHandle) -> None:
        async for event in handle.events():
            if isinstance(event, (PayloadStarted, PayloadExited)):
                order.append((event.job_id, event.kind))

    class Together(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            staged.append(self.jobArgs.job_id)
            if len(staged) == 2:
                both_staged.set()
            with anyio.fail_after(20):
                await both_staged.wait()
            return PayloadSpec(command=command, env=exeEnv)

    staged: list[str] = []
    both_staged = anyio.Event()
    ledger = Ledger(cores=1)
    (tmp_path / "input").touch()
    results: list[JobResult] = []

    async def run(job_id: str, handle: JobHandle) -> None:
        results.append(
            await fly(
                {"slots": ledger, "handle": handle, "coordinator": Together},
                job_id=job_id, **sh(f"mkdir {tmp_path}/core && rmdir {tmp_path}/core"),
                input_data=[str(tmp_path / "input")],
            )
        )  # fmt: skip

    async with anyio.create_task_group() as tg:
        for job_id in ("one", "two"):
            handle = JobHandle()
            tg.start_soon(follow, handle)
            tg.start_soon(run, job_id, handle)
    assert [result.status for result in results] == [Status.DONE, Status.DONE]
    first = order[0][0]
    second = {"one": "two", "two": "one"}[first]
    assert order == [
        (first, "PayloadStarted"), (first, "PayloadExited"), (second, "PayloadStarted"), (second, "PayloadExited"),
    ]  # fmt: skip
    assert repr(ledger) == "<Ledger [1 of 1 cores free, 0 waiting]>"


@pytest.mark.parametrize(
    "words",
    [
        {"executable": "/bin/false"},
        {"executable": "/nowhere"},
        {"executable": "sleep", "arguments": "60", "limits": {"wall_seconds": 0.1}},
        {"number_of_processors": 3},
        {"memory_mb": 5000},
        {"input_data": ["/nowhere"]},
    ],
    ids=lambda words: ",".join(words),
)
async def test_a_failed_job_leaves_the_ledger_as_it_was(fly: Fly, words: dict[str, Any]) -> None:
    ledger = Ledger(cores=2, memory_mb=4000)
    assert (await fly({"slots": ledger}, **words)).status is Status.FAILED
    assert repr(ledger) == "<Ledger [2 of 2 cores free, 0 waiting]>"


async def test_a_job_that_fits_no_slot_is_told_so(fly: Fly) -> None:
    result = await fly({"slots": Ledger(cores=2)}, number_of_processors=3)
    assert result.failure == Failure("PayloadNotStarted", "the job needs 3 cores, the node has 2", Phase.PAYLOAD)


# -- the work directory ------------------------------------------------------------------------------------------


async def test_a_work_directory_that_is_to_be_kept_is_kept_whole(out: Path, tmp_path: Path) -> None:
    job = JobDescription(**sh("echo x > data"), job_id="kept")
    result = await run_job(job, root=tmp_path / "elsewhere", keep_workdir=True)
    assert result.status is Status.DONE
    assert sorted(path.name for path in (tmp_path / "elsewhere" / "kept").iterdir()) == ["data", "std.err", "std.out"]


async def test_a_job_cannot_have_the_work_directory_of_one_that_runs(fly: Fly) -> None:
    class Twice(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            with pytest.raises(WorkdirFault, match="another running job has this work directory"):
                await fly(job_id=self.jobArgs.job_id)

    assert (await fly({"coordinator": Twice})).status is Status.DONE


async def test_a_handle_is_for_one_job_only(fly: Fly) -> None:
    handle = JobHandle()
    await fly({"handle": handle}, job_id="one")
    with pytest.raises(RuntimeFault, match="already used for job one"):
        await fly({"handle": handle}, job_id="two")


# -- events, the journal -----------------------------------------------------------------------------------------


async def test_the_result_is_the_fold_of_the_recorded_events(fly: Fly, tmp_path: Path) -> None:
    journal = MemoryJournal()
    handle = JobHandle(journal)
    (tmp_path / "input").touch()
    result = await fly(
        {"handle": handle, "coordinator": Asked, "attempt": 2},
        **sh("echo x > data"), input_data=[str(tmp_path / "input")], output_data=["data", "absent"],
    )  # fmt: skip
    assert result.status is Status.DONE
    assert (result.attempt, result.parameters) == (2, {"postProcess": "called"})
    assert await history(handle) == journal.events
    assert Lifecycle.of(journal.events).result() == handle.result == result


async def test_nobody_hears_of_an_event_before_the_journal_has_it(fly: Fly) -> None:
    journal = MemoryJournal()
    handle = JobHandle(journal)

    async def follow() -> None:
        async for event in handle.events():
            assert event in journal.events

    async with anyio.create_task_group() as tg:
        tg.start_soon(follow)
        await fly({"handle": handle}, **sh("touch data"), output_data=["data"])


async def test_a_journal_that_fails_at_any_event_ends_the_job_and_its_payload(fly: Fly, tmp_path: Path) -> None:
    """The job stops where the journal stopped; the fault names the event, and no process is left."""
    (tmp_path / "input").touch()

    async def run(job_id: str, journal: MemoryJournal) -> None:
        await fly(
            {"handle": JobHandle(journal), "coordinator": Asked},
            job_id=job_id, **sh("touch data; [ $JOBID = whole ] || sleep 60"),
            input_data=[str(tmp_path / "input")], output_data=["data"],
        )  # fmt: skip

    await run("whole", whole := MemoryJournal())
    told = kinds(whole.events)
    for number, event in enumerate(told[: told.index("PayloadExited")], start=1):
        journal = MemoryJournal()
        journal.fail_at(number)
        with pytest.raises(RuntimeFault, match=rf"did not take {event}: \[Errno 28\]") as caught:
            await run(f"broken-{number}", journal)
        assert isinstance(caught.value.__cause__, OSError)
        assert kinds(journal.events) == told[: number - 1]
        assert processes_of(f"broken-{number}") == []


@pytest.mark.parametrize("event", [PayloadExited, ComputingEnded, StageOutStarted, JobFinished])
async def test_a_journal_that_fails_after_the_payload_claims_no_end(fly: Fly, event: type[Event]) -> None:
    class Full(MemoryJournal):
        async def append(self, event: Event) -> None:
            if isinstance(event, refused):
                raise OSError("disk on fire")
            await super().append(event)

    refused = event
    handle = JobHandle(Full())
    with pytest.raises(RuntimeFault, match=f"did not take {event.__name__}: disk on fire"):
        await fly({"handle": handle})
    assert handle.result is None
    assert event.__name__ not in kinds(await history(handle))


async def test_a_journals_own_runtime_fault_comes_out_as_it_is(fly: Fly) -> None:
    class Torn(RuntimeFault):
        pass

    journal = MemoryJournal()
    journal.fail_at(5, Torn("page 7"))
    with pytest.raises(Torn, match="page 7"):
        await fly({"handle": JobHandle(journal)})


async def test_a_journal_that_fails_inside_a_hook_is_not_the_hooks_failure(fly: Fly) -> None:
    """What a coordinator reports goes through the journal; its fault must not become a value of the job."""

    class Reports(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            async with anyio.create_task_group() as tg:
                tg.start_soon(self.job.report, "a", 1)

    journal = MemoryJournal()
    journal.fail_at(3)
    with pytest.raises(RuntimeFault, match="did not take ParameterReported"):
        await fly({"handle": JobHandle(journal), "coordinator": Reports})


async def test_a_journal_fault_is_not_hidden_by_an_input_that_fails_at_the_same_time(fly: Fly) -> None:
    """Both standard steps of stageIn fail at once: the job's own trouble is the lesser one."""

    class Late(MemoryJournal):
        async def append(self, event: Event) -> None:
            if event.kind == "FileStagedIn":
                arrived.set()
                await failed.wait()
                await lowlevel.checkpoint()
                raise OSError("disk on fire")
            await super().append(event)

    class Missing(MemoryStorage):
        async def move(self, transfers: Sequence[Transfer], ended: Callable[[Sequence[Transfer]], None]) -> None:
            if any(transfer.url.endswith("missing") for transfer in transfers):
                await arrived.wait()
                failed.set()
            await super().move(transfers, ended)

    arrived, failed = anyio.Event(), anyio.Event()
    async with open_transfers(Site(), storages={"memory": Missing({"memory://se/a": b""})}) as transfers:
        with pytest.raises(RuntimeFault, match="disk on fire"):
            await fly(
                {"transfers": transfers, "site": None, "handle": JobHandle(Late())},
                input_data=["memory://se/a"], input_sandbox=["memory://se/missing"],
            )  # fmt: skip


async def test_a_follower_who_comes_late_sees_everything(fly: Fly) -> None:
    handle = JobHandle()
    early: list[Event] = []

    async def follow() -> None:
        early.extend(await history(handle))

    async with anyio.create_task_group() as tg:
        tg.start_soon(follow)
        await fly({"handle": handle})
    assert await history(handle) == early
    assert early[-1].kind == "JobFinished"


async def test_transfers_shared_by_many_jobs_serve_them_all(fly: Fly) -> None:
    storage = MemoryStorage({"memory://se/a": b"cargo"})
    statuses: list[Status] = []

    async def run(transfers: Transfers) -> None:
        result = await fly({"transfers": transfers, "site": None}, input_data=["memory://se/a"])
        statuses.append(result.status)

    async with open_transfers(Site(), storages={"memory": storage}) as transfers, anyio.create_task_group() as tg:
        for _ in range(5):
            tg.start_soon(run, transfers)
    assert statuses == [Status.DONE] * 5


def test_a_killed_job_raises_its_reason() -> None:
    result = JobResult("1", 1, Status.KILLED, Failure("JobWasKilled", "why not", Phase.PAYLOAD), None)
    with pytest.raises(JobWasKilled, match="why not"):
        result.raise_for_status()


# -- one bad output keeps no other from being delivered ------------------------------------------------------------


async def test_a_sandbox_that_cannot_leave_does_not_keep_the_data_back(fly: Fly, out: Path) -> None:
    result = await fly(**sh("ln -s /etc/passwd l; echo x > o"), output_sandbox=["l", "std.out"], output_data=["o"])
    assert (result.status, phase(result)) == (Status.FAILED, Phase.STAGE_OUT)
    assert sorted(path.name for path in out.iterdir()) == ["o", "std.out"]


async def test_a_name_the_payload_chose_with_malice_does_not_keep_the_others_back(fly: Fly, out: Path) -> None:
    script = """touch "$(printf 'a\\nb.root')" "$(printf 'a\\377.root')" c.root"""
    result = await fly(**sh(script), output_data=["*.root"])
    assert (result.status, result.failure.kind) == (Status.FAILED, "StagingFailed")
    assert "a\\nb.root" in result.failure.message
    assert [path.name for path in out.iterdir()] == ["c.root"]


async def test_of_two_outputs_for_one_place_the_first_and_all_others_are_delivered(fly: Fly, out: Path) -> None:
    result = await fly(**sh("mkdir a b; echo 1 > a/x; echo 2 > b/x; echo 3 > good"), output_data=["a/x", "b/x", "good"])
    assert "b/x: would take the place of a/x" in result.failure.message
    assert sorted(path.name for path in out.iterdir()) == ["good", "x"]


async def test_an_archive_of_ours_never_replaces_a_file_of_the_payloads(fly: Fly, out: Path) -> None:
    """The payload's own `logs.tar` was delivered with our archive's content, and the job said Done."""
    script = "mkdir logs; echo a > logs/a; echo mine > logs.tar"
    result = await fly(**sh(script), output_sandbox=["logs"], output_data=["logs.tar"])
    assert (out / "logs.tar").read_text() == "mine\n"
    assert result.status is Status.FAILED


async def test_patterns_do_not_follow_links_out_of_the_work_directory(fly: Fly, out: Path) -> None:
    result = await fly(**sh("ln -s /etc link; echo x > o"), output_data=["link/*", "o"])
    assert result.missing_outputs == ("link/*",)
    assert [path.name for path in out.iterdir()] == ["o"]


async def test_an_lfn_of_an_output_is_found_by_its_path_or_by_its_last_part(fly: Fly, tmp_path: Path) -> None:
    site = Site(storage_elements={"D": str(tmp_path / "se")}, default_se="D")
    words = {"output_data": ["LFN:/vo/user/a/x.dat", "LFN:/vo/user/b/y.dat"]}
    result = await fly({"site": site}, **sh("mkdir -p vo/user/a; echo 1 > vo/user/a/x.dat; echo 2 > y.dat"), **words)
    assert result.status is Status.DONE
    assert sorted(file.lfn for file in result.outputs) == ["/vo/user/a/x.dat", "/vo/user/b/y.dat"]


async def test_an_archive_may_not_replace_another_input(fly: Fly, tmp_path: Path) -> None:
    (tmp_path / "ev.dat").write_text("verified")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ev.dat").write_text("other")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "in" / "ev.dat", "ev.dat")
    result = await fly(input_sandbox=[str(tmp_path / "s.tar")], input_data=[str(tmp_path / "ev.dat")])
    assert "'ev.dat' is the name of another input" in result.failure.message


async def test_a_script_among_the_inputs_stays_executable(fly: Fly, tmp_path: Path) -> None:
    (tmp_path / "h.sh").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "h.sh").chmod(0o755)
    assert (await fly(**sh("./h.sh"), input_sandbox=[str(tmp_path / "h.sh")])).status is Status.DONE


@pytest.mark.parametrize("executable", ["a" * 300, "/root/" + "b" * 300, "x\ny"])
async def test_an_executable_that_cannot_even_be_looked_for_fails_the_job(fly: Fly, executable: str) -> None:
    assert (await fly(executable=executable)).failure.kind == "PayloadNotStarted"
