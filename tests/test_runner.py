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
from loadmaster.storage.base import FileInfo, Replica, Transfer
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
        "JobAccepted", "StageInStarted", "FileStagedIn", "PayloadPrepared", "SlotGranted", "PayloadStarted",
        "PayloadExited", "ComputingEnded", "StageOutStarted", "FileStagedOut", "JobFinished",
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
        for _ in transfers:
            await self._together()
        await super().move(transfers, ended)

    async def _together(self) -> None:
        self.begun += 1
        if self.begun == self.at_once:
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
