"""What DIRAC is told besides statuses: parameters, exit codes, heartbeats, the accounting record."""

from __future__ import annotations

from datetime import UTC, datetime
from math import nan
from pathlib import Path
from typing import Any

import pytest

from conftest import Fly, sh
from following import history
from loadmaster import ComputingElement, JobDescription, JobExecutionCoordinator, JobHandle, Limits, Site
from loadmaster.dirac import ExitCode, Parameters, Statuses, accounting, exit_code, heartbeat, node_parameters
from loadmaster.dirac.report import final_output, hms, kill_order
from loadmaster.events import (
    ComputingEnded,
    Heartbeat,
    JobAccepted,
    JobFinished,
    OutputMissing,
    ParameterReported,
    PayloadExited,
    SlotGranted,
)
from loadmaster.result import EndedBy, Failure, JobResult, PayloadOutcome, Phase, Status, StoredFile, Usage, Verdict

WHO = ("7", 1, datetime(2024, 1, 2, 3, 4, 5, 678, tzinfo=UTC))
CE = ComputingElement.load(
    {"Site": "LCG.A.org", "CPUNormalizationFactor": 10, "LocalSE": ["A", "B"], "PilotReference": "https://ce/1"}
)


@pytest.fixture
def told(fly: Fly) -> Any:
    """Run a job; its result, and the parameters DIRAC would have in the end."""

    async def told(options: dict[str, Any] | None = None, **words: Any) -> tuple[JobResult, dict[str, Any]]:
        handle = JobHandle()
        result = await fly({"ce": CE, **(options or {}), "handle": handle}, **words)
        fold = Parameters(CE, agent="loadmaster 0.1", pid=99)
        parameters: dict[str, Any] = {}
        for event in await history(handle):
            parameters |= fold.advance(event)
        return result, parameters

    return told


# -- parameters ----------------------------------------------------------------------------------------------------


async def test_a_job_has_diracs_parameters_in_their_units(told: Any) -> None:
    result, parameters = await told(
        **sh("i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; sleep 0.1"), number_of_processors=2
    )
    assert (parameters["Pilot_Reference"], parameters["AgentLocalSE"]) == ("https://ce/1", "A,B")
    assert (parameters["PilotAgent"], parameters["JobWrapperPID"]) == ("loadmaster 0.1", 99)
    outcome = result.outcome
    assert parameters["TotalCPUTime(s)"] == parameters["LastUpdateCPU(s)"] == outcome.cpu_seconds > 0
    assert parameters["NormCPUTime(s)"] == pytest.approx(10 * outcome.cpu_seconds)
    assert parameters["WallClockTime(s)"] == pytest.approx(2 * outcome.wall_seconds)
    assert parameters["ScaledCPUTime(s)"] == pytest.approx(20 * outcome.wall_seconds)
    assert parameters["PayloadPID"] > 1
    assert not {"ApplicationError", "Error Message", "OutputData"} & parameters.keys()


async def test_outputs_are_told_by_their_logical_names_and_what_is_missing_by_name(told: Any, tmp_path: Path) -> None:
    site = Site(storage_elements={"SE": str(tmp_path / "se")}, sandbox_store=str(tmp_path / "sb"), vo="vo")
    words = {"output_data": ["LFN:/vo/a", "LFN:/vo/b"], "output_se": "SE"}
    words["output_sandbox"] = ["std.out", "sub/not-made.log", "no*.txt"]
    _, parameters = await told({"site": site}, **sh("touch a b"), **words)
    assert set(parameters["UploadedOutputData"].split(", ")) == {"/vo/a", "/vo/b"}
    assert parameters["OutputSandboxMissingFiles"] == "not-made.log", "patterns are never reported missing"


async def test_outputs_that_could_not_go_are_told(told: Any, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("no directory")
    site = Site(storage_elements={"SE": str(tmp_path / "blocked")}, retries=0, vo="vo")
    result, parameters = await told({"site": site}, **sh("touch a"), output_data="LFN:/vo/a", output_se="SE")
    assert result.status is Status.FAILED
    assert parameters["OutputData"] == "MissingFiles: vo/a"
    assert parameters["Error Message"] == result.failure.message
    assert exit_code(result) is ExitCode.OUTPUTS_FAILED


async def test_missing_inputs_are_told_by_their_logical_names(told: Any) -> None:
    result, parameters = await told(input_data=["LFN:/vo/gone", "/nowhere"])
    assert parameters["MissingLFNs"] == "LFN:/vo/gone Problem: it was not brought in"
    assert exit_code(result) == ExitCode.FAILED


async def test_the_reason_of_a_limit_and_of_a_hook_are_kept(told: Any) -> None:
    _, parameters = await told(**sh("sleep 60"), limits=Limits(wall_seconds=0.2, grace_seconds=0))
    assert parameters["ApplicationError"] == "Job has exceeded maximum wall clock time"

    class Fails(JobExecutionCoordinator):
        async def postProcess(self) -> None:
            await self.job.report("Histograms", 7)
            raise ValueError("no histograms")

    _, parameters = await told({"coordinator": Fails})
    assert (parameters["Histograms"], "no histograms" in parameters["Error Message"]) == ("7", True)


def test_what_has_no_json_is_not_told() -> None:
    fold = Parameters(ComputingElement())
    assert fold.advance(ParameterReported(*WHO, "a", "nan")) == {"a": "nan"}
    told = fold.advance(PayloadExited(*WHO, PayloadOutcome(0, None, 1.0, nan, None)))
    assert told == {"WallClockTime(s)": 1.0, "ScaledCPUTime(s)": 1.0}
    lost = fold.advance(PayloadExited(*WHO, PayloadOutcome(None, None, 1.0, 1.0, 3 * 2**20)))
    assert (lost["ApplicationError"], lost["MemoryUsed(MB)"]) == ("Application thread did not complete", 3.0)


def test_nothing_is_said_of_a_failure_the_payload_explains() -> None:
    fold = Parameters()
    assert fold.advance(JobAccepted(*WHO, {})) == {"PilotAgent": "loadmaster"}
    assert fold.advance(SlotGranted(*WHO, 4, None)) == {}
    assert fold.advance(ComputingEnded(*WHO, Failure("PayloadFailed", "exit code 1", Phase.PAYLOAD))) == {}
    assert fold.advance(OutputMissing(*WHO, "undeclared", "not made")) == {}
    assert fold.advance(JobFinished(*WHO, Status.FAILED, None)) == {}


def test_the_node_is_told_as_the_watchdog_does() -> None:
    told = node_parameters({"PBS_JOBID": "12.server", "LSB_JOBID": "11"})
    assert (told["LocalJobID"], told["HostName"]) == (
        "12.server",
        Path("/proc/sys/kernel/hostname").read_text().strip(),
    )
    assert isinstance(told["Memory(MB)"], int)
    assert told["LocalAccount"]
    assert "LocalJobID" not in node_parameters({})


# -- exit codes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "failure", "code"),
    [
        (Status.DONE, None, 0),
        (Status.COMPLETED, None, 0),
        (Status.FAILED, Failure("PayloadFailed", "", Phase.PAYLOAD), 1),
        (Status.KILLED, Failure("JobWasKilled", "", Phase.PAYLOAD), 1),
        (Status.RESCHEDULED, Failure("RescheduleJob", "", Phase.PAYLOAD), 1),
        (Status.FAILED, Failure("StagingFailed", "", Phase.STAGE_OUT), 2),
    ],
)
def test_each_end_has_its_exit_code(status: Status, failure: Failure | None, code: int) -> None:
    assert exit_code(JobResult("7", 1, status, failure, None)) == code


def test_an_exit_code_is_seen_through_eight_bits() -> None:
    seen = [code % 256 for code in (ExitCode.EXCEPTION, ExitCode.REPORT_FAILED, ExitCode.NOT_BEGUN)]
    assert seen == [255, 254, 253]


# -- heartbeats ----------------------------------------------------------------------------------------------------


def test_a_heartbeat_is_in_diracs_units() -> None:
    usage = Usage(wall_seconds=10, cpu_seconds=3725.9, rss_bytes=3 * 2**20, free_disk_bytes=2**30)
    dynamic, static = heartbeat(
        Heartbeat(*WHO, Phase.PAYLOAD, 10, usage, ("one", "two")), cores=4, load_average=1.5, wall_seconds_left=60
    )
    assert dynamic == {
        "LoadAverage": 1.5, "MemoryUsed": 3.0, "CPUConsumed": 3725.9, "WallClockTime": 40.0, "AvailableDiskSpace": 1024.0,
    }  # fmt: skip
    title = "Last 2 lines of application output from Watchdog on 2024-01-02 03:04:05.000678 [UTC]:"
    cpu = "Last reported CPU consumed for job is 01:02:05 (h:m:s), Wall-clock time left 60s"
    assert static["StandardOutput"].split("\n") == [
        "", "=" * len(title), title, cpu, "=" * len(title), "one", "two", "",
    ]  # fmt: skip


def test_before_there_is_a_payload_a_heartbeat_has_next_to_nothing() -> None:
    dynamic, static = heartbeat(Heartbeat(*WHO, Phase.STAGE_IN, 10))
    assert dynamic == {}
    assert "Last 0 lines" in static["StandardOutput"]


def test_only_the_last_lines_are_sent() -> None:
    lines = tuple(map(str, range(100)))
    _, static = heartbeat(Heartbeat(*WHO, Phase.PAYLOAD, 1, None, lines))
    assert static["StandardOutput"].endswith("\n80\n" + "".join(f"{line}\n" for line in lines[81:]))


def test_the_last_heartbeat_is_the_wrappers() -> None:
    exited = PayloadExited(*WHO, PayloadOutcome(1, None, 1, 360000.0, None), ("the end",))
    said = final_output(exited, factor=10)["StandardOutput"].splitlines()
    assert said[2] == "Last 1 lines of application output from JobWrapper on 2024-01-02 03:04:05.000678 :"
    assert said[3] == "CPU Total: 100:00:00 (h:m:s) Normalized CPU Total 3600000.0 s @ HEP'06"
    assert said[5] == "the end"
    assert hms(59.9) == "00:00:59"


@pytest.mark.parametrize(
    ("answer", "kill"), [({"Kill": ""}, True), ({"Pause": 1}, False), ({}, False), ("Kill", False)]
)
def test_a_kill_is_the_only_order_there_is(answer: object, kill: bool) -> None:
    assert kill_order(answer) is kill


# -- accounting ----------------------------------------------------------------------------------------------------

FIELDS = {
    "User", "UserGroup", "JobGroup", "JobType", "JobClass", "ProcessingType", "Site", "FinalMajorStatus",
    "FinalMinorStatus", "CPUTime", "NormCPUTime", "ExecTime", "InputDataSize", "InputDataFiles", "OutputDataSize",
    "OutputDataFiles", "DiskSpace", "InputSandBoxSize", "OutputSandBoxSize", "ProcessedEvents",
}  # fmt: skip


async def test_the_accounting_record_has_all_fields_and_says_what_the_statuses_say(fly: Fly, tmp_path: Path) -> None:
    for name, size in (("sandbox", 10), ("data", 100)):
        (tmp_path / name).write_bytes(b"x" * size)
    words = {"owner": "alice", "owner_group": "vo_user", "JobGroup": "0001", "output_sandbox": "std.out"}
    words |= {"input_sandbox": str(tmp_path / "sandbox"), "input_data": str(tmp_path / "data")}
    handle, fold = JobHandle(), Statuses()
    result = await fly({"handle": handle, "ce": CE}, **sh("echo four"), **words)
    for event in await history(handle):
        fold.advance(event)
    job = JobDescription(executable="x", **words)
    record = accounting(job, CE, result, fold.current, cores=2, disk_bytes=77)
    assert set(record) == FIELDS
    assert (record["FinalMajorStatus"], record["FinalMinorStatus"]) == ("Done", "Execution Complete")
    assert (record["User"], record["UserGroup"], record["JobGroup"], record["Site"]) == (
        "alice", "vo_user", "0001", "LCG.A.org",
    )  # fmt: skip
    assert (record["InputSandBoxSize"], record["InputDataSize"], record["OutputSandBoxSize"]) == (10, 100, 5)
    assert record["DiskSpace"] == 77


def test_the_accounting_record_counts_cpu_by_the_cores_factor_and_wall_time_by_the_cores() -> None:
    outcome = PayloadOutcome(None, 9, 100.9, 50.9, None, EndedBy.LIMIT, Verdict("memory", 2, 1, "bytes"))
    data = StoredFile("a", "file:///a", 7, "adler32:1", "/vo/a")
    result = JobResult("7", 1, Status.FAILED, None, outcome, outputs=(data,))
    record = accounting(JobDescription(executable="x"), CE, result, Statuses().current, cores=4)
    assert (record["CPUTime"], record["NormCPUTime"], record["ExecTime"]) == (50, 500.0, 400)
    assert (record["OutputDataFiles"], record["OutputDataSize"], record["User"]) == (1, 7, "unknown")
