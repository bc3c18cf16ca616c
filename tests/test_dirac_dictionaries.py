"""DIRAC's dictionaries to our words and back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Fly, sh
from loadmaster import ComputingElement, InputFile, InvalidJob, JobDescription, Limits, OutputFile, Status
from loadmaster.dirac import DiracCoordinator, environment, from_dirac, job_info, split_wrapper_file, to_dirac
from loadmaster.dirac.dictionaries import OWN_KEY, payload_command, payload_environment

WRAPPER_FILE: dict[str, Any] = {
    "Job": {
        "JobID": 17,
        "JobName": "sim (1)",
        "JobType": "User",
        "Owner": "alice",
        "OwnerGroup": "vo_user",
        "VirtualOrganization": "vo",
        "Executable": "run.sh",
        "Arguments": "a 'b c'",
        "ExecutionEnvironment": ["A=x%3Dy"],
        "InputSandbox": ["SB:SE|/sandbox.tar.bz2", "LFN:/vo/lib.tar"],
        "InputData": ["LFN:/vo/in"],
        "OutputSandbox": ["std.out", "*.log"],
        "OutputData": ["LFN:/vo/out", "hist.root"],
        "OutputSE": ["CERN-USER"],
        "StdOutput": "std.out",
        "CPUTime": 86400.0,
        "Priority": 1,
        "NumberOfProcessors": 2,
        "Site": "ANY",
        "LogLevel": "INFO",
    },
    "CE": {"Site": "LCG.CERN.cern", "GridCE": "ce1", "CPUNormalizationFactor": 10.0, "LocalSE": ["CERN-USER"]},
}


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data, allow_nan=False))


def test_a_wrapper_file_comes_back_as_it_was_also_with_what_would_be_so_anyway() -> None:
    job, ce = from_dirac(WRAPPER_FILE)
    assert (job.job_id, job.owner, ce.site) == ("17", "alice", "LCG.CERN.cern")
    assert through_json(to_dirac(job, ce)) == WRAPPER_FILE


def test_a_bare_job_has_an_empty_element() -> None:
    assert from_dirac({"Executable": "x", "JobID": 1})[1] == ComputingElement()
    assert split_wrapper_file({"Job": {"JobID": 1}, "CE": {"Site": "S"}}) == ({"JobID": 1}, {"Site": "S"})
    with pytest.raises(InvalidJob, match="Job: list where an object"):
        split_wrapper_file({"Job": []})


def test_what_dirac_has_no_words_for_goes_under_a_key_of_its_own() -> None:
    files = [InputFile(source="/data/a", name="b", arrives="during"), InputFile(source="/other/a")]
    outputs = [OutputFile(pattern="x", target="LFN:/vo/y", leaves="on_close")]
    job = JobDescription(
        job_id="7", executable="x", input_data=files, output_data=outputs, limits=Limits(wall_seconds=5)
    )
    words = through_json(to_dirac(job))
    assert set(words["Job"][OWN_KEY]) == {"input_data", "output_data", "limits"}
    assert words["Job"]["InputData"] == ["/data/a", "/other/a"], "DIRAC's own tools still read it"
    assert from_dirac(words)[0] == job


def test_a_tool_of_diracs_that_changes_the_files_is_believed() -> None:
    job = JobDescription(job_id="7", executable="x", input_data=[InputFile(source="/data/a", name="b")])
    words = to_dirac(job)
    words["Job"]["InputData"] = ["LFN:/vo/elsewhere"]
    assert [file.source for file in from_dirac(words)[0].input_data] == ["LFN:/vo/elsewhere"]


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ({"StopSigFinishSeconds": "600"}, 600),
        ({"StopSigFinishWork": "6000"}, 600),
        ({"StopSigFinishWork": 6000, "StopSigFinishSeconds": 60}, 60),
        ({"StopSigFinishWork": 0}, 1800),
        ({"StopSigStartWork": 100}, 1800),
    ],
)
def test_the_soft_stop_is_understood_in_seconds_and_in_work(words: dict[str, Any], seconds: float) -> None:
    data = {"Job": {"Executable": "x", "JobID": 1, **words}, "CE": {"CPUNormalizationFactor": 10}}
    job, ce = from_dirac(data)
    assert job.stop_seconds == seconds
    assert from_dirac(through_json(to_dirac(job, ce))) == (job, ce)


@pytest.mark.parametrize(
    ("job", "complaint"),
    [
        ({"StopSigFinishWork": "much"}, "StopSigFinishWork: could not convert"),
        ({OWN_KEY: [1]}, f"{OWN_KEY}: is not an"),
    ],
)
def test_what_cannot_be_understood_is_named(job: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidJob, match=complaint):
        from_dirac({"Executable": "x", **job})


# -- any job -----------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() and text == text.strip()
)
NAMES = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_.\-]{0,8}", fullmatch=True)
SOURCES = st.one_of(
    NAMES.map("LFN:/vo/{}".format), NAMES, NAMES.map("/data/{}".format), NAMES.map("SB:SE|/x/{}".format)
)
INPUTS = st.builds(InputFile, source=SOURCES, name=NAMES, arrives=st.sampled_from(["before", "during"]))
PLAIN_INPUTS = SOURCES.map(InputFile.model_validate)
TARGETS = st.none() | NAMES.map("LFN:/vo/{}".format) | NAMES.map("file:///out/{}".format)
OUTPUTS = st.builds(OutputFile, pattern=NAMES | NAMES.map("{}/*".format), target=TARGETS)
PLAIN_OUTPUTS = (NAMES | SOURCES.filter(lambda text: "|" not in text)).map(OutputFile.model_validate)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | WORDS, lambda inner: st.lists(inner, max_size=3)
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "job_name": WORDS,
    "job_type": WORDS,
    "owner": NAMES,
    "owner_group": NAMES,
    "vo": NAMES,
    "arguments": WORDS | st.lists(WORDS, max_size=3),
    "environment": st.dictionaries(NAMES, st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=9)),
    "input_sandbox": st.lists(INPUTS | PLAIN_INPUTS, max_size=2, unique_by=lambda file: file.name.lower()),
    "output_sandbox": st.lists(PLAIN_OUTPUTS | OUTPUTS, max_size=3),
    "output_data": st.lists(PLAIN_OUTPUTS | OUTPUTS, max_size=3),
    "output_se": st.lists(NAMES, max_size=2),
    "output_path": NAMES | NAMES.map("LFN:/vo/{}".format),
    "cpu_work": st.floats(0, 1e9),
    "priority": st.integers(-10, 10),
    "number_of_processors": st.integers(1, 64),
    "max_number_of_processors": st.integers(64, 128),
    "whole_node": st.booleans(),
    "number_of_gpus": st.integers(0, 8),
    "memory_mb": st.integers(1, 10**6),
    "disk_bytes": st.integers(0, 10**12),
    "resources": st.dictionaries(NAMES, st.integers(0, 5), max_size=2),
    "tags": st.lists(WORDS, max_size=2),
    "limits": st.builds(Limits, wall_seconds=st.none() | st.floats(1, 1e6), memory_bytes=st.none() | st.just(10**9)),
    "stop_pattern": st.just("gauss|root"),
    "stop_signal": st.integers(1, 64),
    "stop_seconds": st.floats(0, 1e5),
    "extra": st.dictionaries(NAMES.map("X{}".format), JSON, max_size=3),
}
JOBS = st.fixed_dictionaries(
    {"executable": WORDS, "job_id": st.integers(0, 10**9).map(str) | NAMES}, optional=FIELDS
).map(lambda words: JobDescription(**words))
ELEMENTS = st.fixed_dictionaries(
    {},
    optional={
        "site": WORDS, "name": WORDS, "queue": WORDS, "number_of_processors": st.integers(1, 99),
        "memory_mb": st.integers(1, 10**6), "cpu_normalization_factor": st.floats(0.1, 100), "extra": FIELDS["extra"],
    },
).map(lambda words: ComputingElement(**words))  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(JOBS, ELEMENTS)
def test_every_job_survives_diracs_dictionaries(job: JobDescription, ce: ComputingElement) -> None:
    words = through_json(to_dirac(job, ce))
    assert from_dirac(words) == (job, ce)
    assert through_json(to_dirac(*from_dirac(words))) == words


# -- what a payload finds ------------------------------------------------------------------------------------------


def test_the_environment_has_diracs_variables() -> None:
    job, ce = from_dirac(WRAPPER_FILE)
    assert environment(job, ce) == {
        "DIRACJOBID": "17",
        "DIRACSITE": "LCG.CERN.cern",
        "DIRAC_PROCESSORS": "2",
        "DIRAC_WHOLENODE": "False",
        "DIRAC_JOB_PROCESSORS": "2",
    }
    pilots = ComputingElement.load({"Processors": 8, "WholeNode": True})
    assert environment(job, pilots).items() >= {"DIRAC_PROCESSORS": "8", "DIRAC_WHOLENODE": "True"}.items()


def test_what_diracs_installation_has_put_aside_is_appended() -> None:
    job, ce = from_dirac(WRAPPER_FILE)
    saved = payload_environment(job, ce, {"LD_LIBRARY_PATH": "/a", "LD_LIBRARY_PATH_SAVE": "/b", "DIRACSITE": "mine"})
    assert (saved["LD_LIBRARY_PATH"], saved["DIRACSITE"]) == ("/a:/b", "mine")
    assert payload_environment(job, ce, {"LD_LIBRARY_PATH_SAVE": "/b"})["LD_LIBRARY_PATH"] == "/b"
    assert "LD_LIBRARY_PATH" not in payload_environment(job, ce, {})


def test_dirac_jobexec_is_told_where_it_is() -> None:
    ce = ComputingElement.load({"Site": "LCG.A.org", "GridCE": "ce", "Queue": "long; q", "CPUNormalizationFactor": 10})
    jobexec = JobDescription(executable="dirac-jobexec")
    assert payload_command(jobexec, ce, "/x/dirac-jobexec a.xml") == (
        "/x/dirac-jobexec a.xml -o /LocalSite/CPUNormalizationFactor=10.0 -o /LocalSite/Site=LCG.A.org "
        "-o /LocalSite/GridCE=ce -o '/LocalSite/CEQueue=long; q' "
    )
    remote = ce.model_copy(update={"extra": {"SubmissionPolicy": "Application"}})
    assert payload_command(jobexec, remote, "x").endswith(" -o /LocalSite/RemoteExecution=True ")
    assert payload_command(JobDescription(executable="x"), ce, "x") == "x"


def test_job_info_has_a_line_for_each_word() -> None:
    lines = job_info(
        from_dirac({"Executable": "x", "JobID": 1, "InputData": ["LFN:/a", "LFN:/b"], "Nest": {"A": 1}})[0]
    )
    assert set(lines.splitlines()) == {
        "/Job/JobID = 1", "/Job/Executable = x", "/Job/InputData = LFN:/a, LFN:/b", "/Job/Nest/A = 1",
    }  # fmt: skip


async def test_the_standard_dirac_coordinator_gives_both(fly: Fly, out: Any) -> None:
    words = sh("grep ^.Job.JobName job.info; echo $DIRACSITE $JOBID $DIRACJOBID $GREETING")
    options = {"coordinator": DiracCoordinator, "ce": ComputingElement(site="LCG.A.org")}
    environment = {"GREETING": "hello", "DIRACJOBID": "mine"}
    await fly(options, **words, job_id="7", JobName="n", environment=environment, output_sandbox="std.out")
    assert (out / "std.out").read_text() == "/Job/JobName = n\nLCG.A.org 7 mine hello\n"


async def test_an_input_called_job_info_is_not_overwritten_by_it_and_stays(fly: Fly, out: Any, tmp_path: Any) -> None:
    (tmp_path / "job.info").write_text("the user's own")
    options = {"coordinator": DiracCoordinator}
    words = {"input_sandbox": str(tmp_path / "job.info"), "output_sandbox": "std.out"}
    result = await fly(options, **sh("cat job.info"), **words)
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "the user's own"
