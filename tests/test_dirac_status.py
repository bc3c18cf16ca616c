"""A job's events in DIRAC's words: of real jobs, and of any history whatever."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Fly, sh
from following import happens, history, killed_when
from loadmaster import JobDescription, JobExecutionCoordinator, JobHandle, Limits, PayloadSpec, RescheduleJob, Site
from loadmaster.dirac import MAY_FOLLOW, JobStatus, Major, Minor, Statuses, statuses
from loadmaster.dirac.words import limit_word
from loadmaster.errors import IllegalEvent
from loadmaster.events import (
    KINDS,
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedOut,
    JobAccepted,
    JobFinished,
    OutputMissing,
    PayloadExited,
    PayloadStarted,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.lifecycle import Lifecycle
from loadmaster.result import EndedBy, Failure, PayloadOutcome, Phase, Status, StoredFile, Verdict

INITIALIZED = "Running: Job Initialization"
APPLICATION = ": Application"
SUCCESS = "Completing: Application Finished Successfully"
ERRORS = "Completing: Application Finished With Errors"
UPLOADING = "Completing: Uploading Output Sandbox"
UPLOADED = "Completing: Output Sandbox Uploaded"
DATA = ": Uploading Output Data"
DATA_UPLOADED = "Completing: Output Data Uploaded"
DONE = "Done: Execution Complete"


def written(said: Iterable[JobStatus]) -> list[str]:
    return [f"{each.status}: {each.minor}{each.application and f'({each.application})'}" for each in said]


def rescheduled(cause: str) -> list[str]:
    return [f": (Failed {cause} )", f"Rescheduled: {cause}"]


@pytest.fixture
def said(fly: Fly) -> Any:
    """Run a job; what DIRAC would have been told, without the time."""

    async def said(options: dict[str, Any] | None = None, **words: Any) -> list[str]:
        handle = JobHandle()
        await fly({**(options or {}), "handle": handle}, **words)
        return written(status for _, status in statuses(await history(handle)))

    return said


# -- real jobs ---------------------------------------------------------------------------------------------------


async def test_a_job_that_only_runs(said: Any) -> None:
    assert await said() == [INITIALIZED, APPLICATION, SUCCESS, DONE]


async def test_a_job_with_files_of_every_kind_says_each_step_in_diracs_order(said: Any, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("in")
    (tmp_path / "data").write_text("data")
    words = sh("cp in log; cp data result")
    words |= {"input_sandbox": str(tmp_path / "in"), "input_data": str(tmp_path / "data")}
    assert await said(**words, output_sandbox=["log", "std.out"], output_data="result") == [
        INITIALIZED, ": Downloading InputSandbox", ": Input Data Resolution", APPLICATION, SUCCESS,
        UPLOADING, UPLOADED, DATA, DATA_UPLOADED, DONE,
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["exit 3", "kill -9 $$"])
async def test_of_a_failed_job_nothing_is_said_but_that_also_while_its_sandbox_goes_out(said: Any, script: str) -> None:
    words = {"output_sandbox": "std.out", "output_data": "std.err"}
    assert await said(**sh(script), **words) == [INITIALIZED, APPLICATION, ERRORS, "Failed: "]


async def test_a_payload_that_asks_for_it_is_rescheduled(said: Any) -> None:
    going = ": Going to reschedule job"
    expected = [INITIALIZED, APPLICATION, ERRORS, going, *rescheduled("JobWrapper execution")]
    assert await said(**sh("exit 222")) == expected


async def test_a_hook_that_asks_for_it_is_too(said: Any) -> None:
    class Later(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
            raise RescheduleJob("not here")

    assert await said({"coordinator": Later}) == [INITIALIZED, *rescheduled("JobWrapper execution")]


@pytest.mark.parametrize("hook", ["preProcess", "postProcess"])
async def test_an_error_of_a_hook_is_an_exception_during_execution(said: Any, hook: str) -> None:
    async def fails(*_: object) -> None:
        raise KeyError("conditions")

    ran = [APPLICATION, SUCCESS] if hook == "postProcess" else []
    failing = type("Failing", (JobExecutionCoordinator,), {hook: fails})
    assert await said({"coordinator": failing}) == [INITIALIZED, *ran, "Failed: Exception During Execution"]


async def test_a_coordinator_that_cannot_be_made_has_the_job_rescheduled(said: Any) -> None:
    class Broken(JobExecutionCoordinator):
        def __init__(self, **_: object) -> None:
            raise KeyError("VOSpecific")

    assert await said({"coordinator": Broken}) == [INITIALIZED, *rescheduled("Job Wrapper Initialization")]


async def test_an_executable_that_is_not_there(said: Any) -> None:
    assert await said(executable="/nowhere") == [INITIALIZED, "Failed: Application not found"]


async def test_a_missing_input_has_the_job_rescheduled_for_what_is_missing(said: Any, tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    there, gone = str(tmp_path / "there"), str(tmp_path / "gone")
    sandbox, data = ": Downloading InputSandbox", ": Input Data Resolution"
    assert await said(input_sandbox=gone, input_data=there) == [
        INITIALIZED, sandbox, data, ": Failed Downloading InputSandbox", *rescheduled("Downloading InputSandbox"),
    ]  # fmt: skip
    assert await said(input_sandbox=there, input_data=gone) == [
        INITIALIZED, sandbox, data, *rescheduled("Input Data Resolution"),
    ]  # fmt: skip


async def test_a_sandbox_with_logical_names_says_so(said: Any) -> None:
    lfn = ": Downloading InputSandbox LFN(s)"
    failed = ": Failed Downloading InputSandbox LFN(s)"
    assert await said(input_sandbox="LFN:/vo/x") == [
        INITIALIZED, ": Downloading InputSandbox", lfn, failed, *rescheduled("Downloading InputSandbox"),
    ]  # fmt: skip


async def test_a_limit_is_said_at_once_and_is_the_last_word(said: Any) -> None:
    words = sh("sleep 60") | {"limits": Limits(wall_seconds=0.3, grace_seconds=0), "output_sandbox": "std.out"}
    assert await said(**words) == [INITIALIZED, APPLICATION, "Failed: Job has exceeded maximum wall clock time"]


async def test_a_killed_job_has_received_a_kill_signal(fly: Fly) -> None:
    async def run(handle: JobHandle) -> Any:
        return await fly({"handle": handle}, **sh("sleep 60"), limits=Limits(grace_seconds=0))

    _, events = await killed_when(happens(PayloadStarted), run)
    kill = "Failed: Received Kill signal"
    assert written(status for _, status in statuses(events)) == [INITIALIZED, APPLICATION, kill]


async def test_an_output_that_cannot_go_has_the_job_rescheduled(said: Any, out: Path) -> None:
    out.write_text("a file where a directory is meant")
    site = Site(output_directory=str(out), retries=0)
    went = [INITIALIZED, APPLICATION, SUCCESS, UPLOADING]
    assert await said({"site": site}, output_data="std.out") == [
        *went, DATA, "Failed: Uploading Output Data", *rescheduled("Uploading Outputs"),
    ]  # fmt: skip
    assert await said({"site": site}, output_sandbox="std.out") == [*went, *rescheduled("Uploading Outputs")]


async def test_an_output_elsewhere_than_asked_for_leaves_requests_pending(said: Any, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("no directory")
    elements = {"SE": str(tmp_path / "blocked"), "FAILOVER": str(tmp_path / "failover")}
    site = Site(storage_elements=elements, failover_se="FAILOVER", retries=0, vo="vo")
    words = {"output_data": "LFN:/vo/std.out", "output_se": "SE"}
    expected = [INITIALIZED, APPLICATION, SUCCESS, UPLOADING, DATA, DATA_UPLOADED, "Completed: Pending Requests"]
    assert await said({"site": site}, **words) == expected


@pytest.mark.parametrize(("script", "failed"), [("echo much", False), ("echo much; exit 1", True)])
async def test_a_sandbox_that_goes_to_grid_storage_is_said_to_be_data_also_of_a_failed_job(
    said: Any, tmp_path: Path, script: str, failed: bool
) -> None:
    site = Site(
        storage_elements={"SE": str(tmp_path / "se")}, default_se="SE", vo="vo",
        sandbox_store=str(tmp_path / "sb"), sandbox_format="tar.bz2", sandbox_limit_bytes=1,
    )  # fmt: skip
    before = [INITIALIZED, APPLICATION, ERRORS] if failed else [INITIALIZED, APPLICATION, SUCCESS, UPLOADING]
    assert await said({"site": site}, **sh(script), owner="alice", output_sandbox="std.out") == [
        *before, DATA, DATA_UPLOADED, "Failed: " if failed else DONE,
    ]  # fmt: skip


# -- single events -----------------------------------------------------------------------------------------------

WHO = ("7", 1, datetime(2024, 1, 1, tzinfo=UTC))
BOTH = JobDescription(executable="x", output_sandbox=["log", "*.txt"], output_data="d").model_dump(
    exclude_defaults=True
)
OUT = PayloadOutcome(0, None, 1.0, 1.0, None)


def stored(name: str, lfn: str | None = None) -> StoredFile:
    return StoredFile(name, f"file:///{name}", 1, "adler32:1", lfn)


def said_of(*events: Event) -> list[str]:
    return written(status for _, status in statuses(events))


def test_the_data_are_said_to_go_when_the_sandbox_is_out_and_not_before() -> None:
    delivering = [JobAccepted(*WHO, BOTH), ComputingEnded(*WHO, None), StageOutStarted(*WHO)]
    fold = Statuses()
    for event in delivering:
        fold.advance(event)
    assert fold.advance(FileStagedOut(*WHO, stored("d", "/vo/d"))) == ()
    assert fold.advance(FileStagedOut(*WHO, stored("log"))) == ()
    assert fold.advance(OutputMissing(*WHO, "*.txt", "not made")) == ()
    assert written(fold.advance(FileStagedOut(*WHO, stored("more", "/vo/more")))) == [UPLOADED, DATA]
    assert written(fold.advance(JobFinished(*WHO, Status.DONE, None))) == [DATA_UPLOADED, DONE]


def test_an_archive_is_the_whole_sandbox() -> None:
    accepted, archive = JobAccepted(*WHO, BOTH), stored("0123.tar.bz2")
    events = [accepted, ComputingEnded(*WHO, None), StageOutStarted(*WHO), FileStagedOut(*WHO, archive)]
    assert said_of(*events)[1:] == [UPLOADING, UPLOADED, DATA]


def test_a_failed_job_with_requests_says_that_they_are_pending() -> None:
    failure = Failure("PayloadFailed", "because", Phase.PAYLOAD)
    failover = FailoverRequested(*WHO, stored("log"), "SE")
    events = [JobAccepted(*WHO, BOTH), ComputingEnded(*WHO, failure), StageOutStarted(*WHO), failover]
    assert said_of(*events, JobFinished(*WHO, Status.FAILED, None))[1:] == ["Failed: Pending Requests"]


@pytest.mark.parametrize(
    ("failure", "minor"),
    [
        (Failure("JobWasKilled", "enough", Phase.STAGE_IN), Minor.RECEIVED_KILL_SIGNAL),
        (Failure("LimitExceeded", "late", Phase.STAGE_IN), Minor.JOB_EXCEEDED_CPU),
        (Failure("InvalidJob", "no SE", Phase.STAGE_IN), Minor.ILLEGAL_JOB_JDL),
        (Failure("PayloadNotStarted", "no slot", Phase.PAYLOAD), Minor.APP_THREAD_FAILED),
        (Failure("StagingFailed", "late input", Phase.PAYLOAD), Minor.INPUT_NOT_AVAILABLE),
        (Failure("OfACommunity", "because", Phase.PRE_PROCESS), Minor.EXCEPTION_DURING_EXEC),
    ],
)
def test_each_failure_has_its_word(failure: Failure, minor: str) -> None:
    events = [JobAccepted(*WHO, {}), StageInStarted(*WHO), ComputingEnded(*WHO, failure)]
    assert said_of(*events, JobFinished(*WHO, Status.FAILED, None)) == [INITIALIZED, f"Failed: {minor}"]


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        (PayloadOutcome(None, None, 1, 1, None), ["Failed: Application thread did not complete"]),
        (PayloadOutcome(130, None, 1, 1, None, stop_signal=2), [SUCCESS]),
        (PayloadOutcome(None, 2, 1, 1, None, stop_signal=2), [SUCCESS]),
        (PayloadOutcome(130, None, 1, 1, None), [ERRORS]),
        (PayloadOutcome(None, 15, 1, 1, None, EndedBy.CANCELLATION), []),
        (PayloadOutcome(None, 15, 1, 1, None, EndedBy.COORDINATOR), []),
        (PayloadOutcome(0, None, 1, 1, None, EndedBy.KILL), ["Failed: Received Kill signal"]),
    ],
)
def test_each_end_of_a_payload_has_its_word(outcome: PayloadOutcome, expected: list[str]) -> None:
    assert said_of(PayloadExited(*WHO, outcome)) == expected


def test_a_limit_dirac_does_not_have_is_named() -> None:
    assert limit_word(Verdict("memory", 2, 1, "bytes")) == "Job has exceeded maximum memory"
    assert limit_word(Verdict("CPU ratio", 1, 5, "%")) == "Watchdog identified this job as stalled"


def test_what_is_sent_has_nothing_empty_no_quotes_and_fits_its_columns() -> None:
    status = JobStatus(minor="it's " * 100, application="a" * 300)
    sent = status.to_dirac("JobWrapper@LCG.CERN.cern")
    assert set(sent) == {"Source", "MinorStatus", "ApplicationStatus"}
    assert sent["MinorStatus"].startswith("its its ")
    assert (len(sent["MinorStatus"]) <= 128, len(sent["ApplicationStatus"])) == (True, 255)
    assert JobStatus("Failed").over(JobStatus("Running", "Application", "a")) == JobStatus("Failed", "Application", "a")


def test_dirac_cwls_words_are_known() -> None:
    assert Minor("Executing Payload") is Minor.APPLICATION
    with pytest.raises(ValueError, match="Executing Nothing"):
        Minor("Executing Nothing")


# -- any history -------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
FILES = st.builds(stored, NAMES | st.just("x.tar.bz2"), st.none() | st.just("/vo/a"))
FAILURE_KINDS = (
    "InvalidJob", "StagingFailed", "HookFailed", "PayloadNotStarted", "PayloadFailed", "LimitExceeded", "JobWasKilled",
    "RescheduleJob", "HoldJob", "OfACommunity",
)  # fmt: skip
FAILURES = st.none() | st.builds(Failure, st.sampled_from(FAILURE_KINDS), st.just("because"), st.sampled_from(Phase))
OUTCOMES = st.builds(
    PayloadOutcome,
    st.none() | st.sampled_from([0, 1, 130, 222]),
    st.none() | st.just(9),
    st.just(1.0),
    st.just(1.0),
    st.none(),
    st.sampled_from(EndedBy),
    st.none() | st.builds(Verdict, st.sampled_from(["deadline", "memory"]), st.just(2.0), st.just(1.0), st.just("s")),
    stop_signal=st.none() | st.just(2),
)
PATTERNS = st.lists(st.sampled_from(["a", "b", "c*"]), max_size=3, unique=True)
SOURCES = st.lists(st.sampled_from(["/a", "LFN:/vo/b", "SB:SE|/c"]), max_size=3, unique=True)
DESCRIPTIONS = st.builds(
    lambda sandbox, data, outputs, output_data: JobDescription(
        executable="x", input_sandbox=sandbox, input_data=data, output_sandbox=outputs, output_data=output_data
    ).model_dump(mode="json", exclude_defaults=True),
    SOURCES,
    st.lists(st.just("LFN:/vo/d"), max_size=1),
    PATTERNS,
    PATTERNS,
)
FIELDS: dict[str, tuple[st.SearchStrategy[Any], ...]] = {
    "JobAccepted": (DESCRIPTIONS,),
    "FileStagedIn": (FILES,),
    "PayloadPrepared": (st.just("true"), st.just({})),
    "SlotGranted": (st.just(1), st.none()),
    "PayloadStarted": (st.just(1), st.just(1), st.just("session")),
    "PayloadExited": (OUTCOMES,),
    "ParameterReported": (NAMES | st.just("OutputSandboxLFN"), NAMES),
    "ComputingEnded": (FAILURES,),
    "FileStagedOut": (FILES,),
    "OutputMissing": (NAMES, NAMES),
    "FailoverRequested": (FILES, NAMES),
    "JobFinished": (st.sampled_from(Status), FAILURES),
}
WITHOUT_FIELDS = {"StageInStarted", "StageOutStarted"}


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    """Any history a runtime could have made, to its end or not, with any content."""
    life, events = Lifecycle(), []
    for _ in range(draw(st.integers(0, 20))):
        names = [name for name in sorted({*FIELDS, *WITHOUT_FIELDS}) if takes(life, name)]
        if not names:
            break
        name = draw(st.sampled_from(names))
        events.append(KINDS[name](*WHO, *map(draw, FIELDS.get(name, ()))))
        life.advance(events[-1])
    return events


def takes(life: Lifecycle, name: str) -> bool:
    try:
        life.check(KINDS[name](*WHO, *[None for _ in FIELDS.get(name, ())]))
    except IllegalEvent:
        return False
    return True


@settings(max_examples=300, deadline=None)
@given(histories())
def test_no_history_asks_for_what_the_server_refuses(events: list[Event]) -> None:
    """Save for Rescheduled after Completing, which DIRAC's own wrapper asks for."""
    status = Major.MATCHED
    for _, said in statuses(events):
        if said.status and said.status != status:
            asked = Major(said.status)
            if (status, asked) != (Major.COMPLETING, Major.RESCHEDULED):
                assert asked in MAY_FOLLOW[status], f"{asked} after {status}"
            status = asked


@settings(max_examples=300, deadline=None)
@given(histories())
def test_a_history_that_ends_ends_in_a_final_status_and_what_is_said_of_it_can_be_said_again(
    events: list[Event],
) -> None:
    fold = Statuses()
    one_by_one = [said for event in events for said in fold.advance(event)]
    assert one_by_one == [said for _, said in statuses(events)]
    assert all(said != JobStatus() for said in one_by_one)
    if events and isinstance(events[-1], JobFinished):
        assert fold.current.status in {Major.DONE, Major.COMPLETED, Major.FAILED, Major.RESCHEDULED}
        assert (fold.current.status == Major.RESCHEDULED) == bool(fold.cause)
        assert fold.current.minor
    elif events:
        assert fold.current.status in {Major.RUNNING, Major.COMPLETING, Major.FAILED}


def test_the_servers_rules_are_diracs_own() -> None:
    machine = pytest.importorskip("DIRACCommon.WorkloadManagementSystem.Client.JobStatus").JobsStateMachine
    for before in Major:
        after = {status for status in Major if status != before}
        assert machine(None).getLevelOfState(before.value) >= 0
        allowed = {status for status in after if machine(before.value).getNextState(status.value)["Value"] == status}
        assert allowed == (
            MAY_FOLLOW[before] if MAY_FOLLOW[before] else after - after if before != "Deleted" else after
        )
