"""Descriptions: both spellings, DIRAC's tolerances, and what is refused by the name the user gave it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from loadmaster import ComputingElement, InputFile, InvalidJob, JobDescription, OutputFile, PayloadSpec

# Every key a DIRAC job has a field for here, with the tolerances its tools rely on.
DIRAC_JOB: dict[str, Any] = {
    "JobID": 123456,
    "JobName": "sim",
    "JobType": "MCSimulation",
    "Owner": "alice",
    "OwnerGroup": "vo_user",
    "VirtualOrganization": "vo",
    "Executable": "run.sh",
    "Arguments": "-n 5 > log 2>&1",
    "ExecutionEnvironment": ["GREETING=hello%20world%3B", "EMPTY="],
    "InputSandbox": ["SB:STORE|/S/u/run.tar.bz2", "LFN:/vo/a.sh"],
    "InputData": "LFN:/vo/in1.root;lfn:/vo/in2.root",
    "OutputSandbox": "std.out; *.log",
    "OutputData": ["LFN:/vo/out/x.root", "hist*.root"],
    "OutputSE": "DISK",
    "OutputPath": "run7",
    "StdOutput": "stdout.txt",
    "StdError": "stderr.txt",
    "CPUTime": "36000",
    "NumberOfProcessors": "4",
    "MaxNumberOfProcessors": "8",
    "NumberOfGPUs": "1",
    "WholeNode": "Yes",
    "Memory": "2000",
    "Tags": "8Processors, MultiProcessor",
    "Priority": 3,
    "Site": ["LCG.A.org"],
}


def job(**words: Any) -> JobDescription:
    return JobDescription.load({"executable": "/bin/true", **words})


def refused(**words: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        JobDescription.load({"Executable": "/bin/true", **words})
    return str(caught.value)


# -- two spellings -----------------------------------------------------------------------------------------------


def test_diracs_dictionary_is_understood() -> None:
    found = JobDescription.load(DIRAC_JOB)
    assert (found.job_id, found.cpu_work, found.number_of_processors, found.memory_mb) == ("123456", 36000.0, 4, 2000)
    assert found.environment == {"GREETING": "hello world;", "EMPTY": ""}
    assert [file.source for file in found.input_data] == ["LFN:/vo/in1.root", "LFN:/vo/in2.root"]
    assert [file.name for file in found.input_sandbox] == ["run.tar.bz2", "a.sh"]
    assert found.output_sandbox == (OutputFile(pattern="std.out"), OutputFile(pattern="*.log"))
    assert found.output_data[0] == OutputFile(pattern="vo/out/x.root", target="LFN:/vo/out/x.root")
    assert found.output_se == ("DISK",)
    assert (found.max_number_of_processors, found.number_of_gpus, found.whole_node) == (8, 1, True)
    assert found.tags == ("8Processors", "MultiProcessor")
    assert (found.priority, found.extra) == (3, {"Site": ["LCG.A.org"]})


def test_it_is_given_back_in_diracs_keys_and_shapes() -> None:
    given = JobDescription.load(DIRAC_JOB).to_dirac()
    assert set(given) == set(DIRAC_JOB)
    assert given["JobID"] == 123456
    assert given["ExecutionEnvironment"] == ["GREETING=hello%20world%3B", "EMPTY="]
    assert given["InputData"] == ["LFN:/vo/in1.root", "LFN:/vo/in2.root"]
    assert given["OutputData"] == ["LFN:/vo/out/x.root", "hist*.root"]
    assert JobDescription.load(json.loads(json.dumps(given))) == JobDescription.load(DIRAC_JOB)


def test_snake_case_means_the_same() -> None:
    same = job(job_id="1", input_data=["LFN:/vo/a"], number_of_processors=2)
    dirac = {"Executable": "/bin/true", "JobID": 1, "InputData": "LFN:/vo/a", "NumberOfProcessors": "2"}
    assert same == JobDescription.load(dirac)


@pytest.mark.parametrize("job_id", ["007", "0", "12", "local-1"])
def test_a_job_id_survives_being_a_number_in_dirac(job_id: str) -> None:
    assert JobDescription.load(job(job_id=job_id).to_dirac()).job_id == job_id


def test_jobs_without_an_id_get_different_ones() -> None:
    assert job().job_id != job().job_id


def test_a_computing_element_is_understood_in_both_spellings() -> None:
    words = {"Site": "LCG.A.org", "GridCE": "ce", "CEQueue": "q", "MaxRAM": "2000", "CPUTimeLeft": 9, "Platform": "el9"}
    ce = ComputingElement.load(words)
    assert (ce.site, ce.name, ce.queue, ce.memory_mb, ce.cpu_work_left) == ("LCG.A.org", "ce", "q", 2000, 9.0)
    assert ce.to_dirac() == {**words, "MaxRAM": 2000}


# -- tolerances --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a; b ;", ["a", "b"], ("a", "", "b", " "), [{"source": "a"}, "b"]])
def test_a_list_comes_in_many_shapes(given: object) -> None:
    assert [file.name for file in job(input_data=given).input_data] == ["a", "b"]


@pytest.mark.parametrize("blank", ["", " ; ", [], [""]])
def test_a_blank_is_no_file_and_no_storage_element(blank: object) -> None:
    empty = JobDescription.load({"Executable": "x", "InputData": blank, "OutputData": blank, "OutputSE": blank})
    assert (empty.input_data, empty.output_data, empty.output_se) == ((), (), ())


def test_a_blank_owner_is_no_owner() -> None:
    assert JobDescription.load({"Executable": "x", "Owner": "", "VirtualOrganization": " "}).owner is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("A=1;B=2", {"A": "1", "B": "2"}),
        (["A=x%3By", "B=1=2"], {"A": "x;y", "B": "1"}),
        ({"A": 1, "B": "x=y%20"}, {"A": "1", "B": "x=y%20"}),
        ("", {}),
    ],
)
def test_an_environment_comes_urlencoded_or_as_a_mapping(given: object, expected: dict[str, str]) -> None:
    assert job(environment=given).environment == expected


@pytest.mark.parametrize("value", ["x=y", "a b;c", "%41", "é\n", "\udcff", ""])
def test_any_value_of_a_variable_survives_diracs_spelling(value: str) -> None:
    assert JobDescription.load(job(environment={"A": value}).to_dirac()).environment == {"A": value}


@pytest.mark.parametrize(("given", "expected"), [("a  $B", "a  $B"), (["a b", 3, "$B"], "'a b' 3 '$B'"), (5, "5")])
def test_arguments_are_shell_and_a_list_is_quoted(given: object, expected: str) -> None:
    assert job(arguments=given).arguments == expected


@pytest.mark.parametrize(
    ("text", "pattern", "target"),
    [
        ("d/", "d", None),
        ("./a", "a", None),
        ("lfn:/vo/a", "vo/a", "LFN:/vo/a"),
        ("/data/a", "a", "/data/a"),
        ("root://h//d/a", "a", "root://h//d/a"),
    ],
)
def test_an_output_may_be_one_string(text: str, pattern: str, target: str | None) -> None:
    assert job(output_data=text).output_data == (OutputFile(pattern=pattern, target=target),)


def test_an_output_path_may_end_with_a_slash_in_every_spelling() -> None:
    assert job(output_path="LFN:/vo/run7/").output_path == "LFN:/vo/run7"
    assert job(output_path="/run7/").output_path == "/run7/"


# -- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"exectuable": "x"}, "exectuable: there is no such field"),
        ({"executable": "x"}, "executable and Executable are the same field, given twice"),
        ({"extra": {"JobID": 5}}, "extra.JobID: has a field of its own, job_id"),
        ({"extra": "abc"}, "extra: is not a dictionary"),
        ({1: 2}, "1: there is no such field"),
        ({"NumberOfProcessors": "many"}, "NumberOfProcessors: "),
        ({"number_of_processors": 0}, "number_of_processors: "),
        ({"memory_mb": "x", "MaxRAM": 5}, "memory_mb: "),
        ({"Memory": 0}, "Memory: "),
        ({"CPUTime": "inf"}, "CPUTime: Input should be a finite number"),
        ({"CPUTime": -1}, "CPUTime: "),
        ({"limits": {"wall_seconds": float("nan")}}, "limits.wall_seconds: "),
        ({"limits": {"grace_seconds": float("inf")}}, "limits.grace_seconds: "),
        ({"limits": {"walls": 1}}, "limits.walls: there is no such field"),
        ({"JobID": ".."}, "JobID: "),
        ({"JobID": "12\n"}, "JobID: "),
        ({"Owner": "a/b"}, "Owner: 'a/b': may not have a '/' in it"),
        ({"Arguments": "a\0"}, "Arguments: may not have a NUL"),
        ({"Arguments": "\ud800"}, "Arguments: has '\\ud800' in it, half of a character"),
        ({"ExecutionEnvironment": "A=%00"}, "ExecutionEnvironment.A: may not have a NUL"),
        ({"ExecutionEnvironment": ["A"]}, "ExecutionEnvironment: 'A' is not NAME=value"),
        ({"environment": {"A=B": "1"}}, "environment.A=B: 'A=B' cannot be the name"),
        ({"environment": {"A": None}}, "environment.A: is not a string"),
        ({"environment": {"A": ["x"]}}, "environment.A: is not a string"),
        ({"InputData": ["LFN:/a", "LFN:b"]}, "InputData.1: 'LFN:b': an LFN must begin with '/'"),
        ({"InputData": [{"source": "", "name": "x"}]}, "InputData.0.source: is empty"),
        ({"InputSandbox": "SB:S|/../x"}, "InputSandbox.0.source: '../x'"),
        ({"InputData": [{"source": "/a", "adler32": "xyz"}]}, "InputData.0.adler32: "),
        ({"InputData": "a/x;b/x"}, "InputData: two files would be called 'x'"),
        ({"InputSandbox": "a/x", "InputData": "b/x"}, "InputData: two files would be called 'x'"),
        ({"InputData": "std.out"}, "StdOutput: two files would be called 'std.out'"),
        ({"StdOutput": "a", "StdError": "a/b"}, "StdError: 'a' would be a file and a directory"),
        ({"OutputData": [{"pattern": "x", "target": "d/x"}]}, "OutputData.0.target: "),
        ({"OutputPath": "../x"}, "OutputPath: "),
    ],
)
def test_what_cannot_be_is_refused_by_the_name_the_user_gave_it(words: dict[Any, Any], complaint: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        JobDescription.load({"Executable": "/bin/true", **words})
    assert f"job description: {complaint}" in str(caught.value)


@pytest.mark.parametrize("data", [[1], None, "executable", 5])
def test_what_is_no_dictionary_is_no_description(data: Any) -> None:
    with pytest.raises(
        InvalidJob,
        match=r"^job description: executable: is empty; argumnts: there is no such field; there is arguments$",
    ):
        JobDescription(executable="", argumnts="x")  # type: ignore[call-arg]
    with pytest.raises(InvalidJob, match=r"^computing element: memory_mb: "):
        ComputingElement(memory_mb=0)
    with pytest.raises(InvalidJob, match="job description: "):
        JobDescription.load(data)


def test_a_missing_executable_is_named_in_the_spelling_of_the_rest() -> None:
    with pytest.raises(InvalidJob, match="Executable: is missing"):
        JobDescription.load({"JobID": 7})
    with pytest.raises(InvalidJob, match="executable: is missing"):
        JobDescription.load({"job_id": "7"})


def test_every_field_at_fault_is_named_at_once() -> None:
    assert all(name in refused(Memory="x", CPUTime="y", StdOutput="..") for name in ("Memory", "CPUTime", "StdOutput"))


@pytest.mark.parametrize("field", ["MaxRAM", "CPUNormalizationFactor"])
def test_a_computing_element_is_refused_by_its_own_keys(field: str) -> None:
    with pytest.raises(InvalidJob, match=f"computing element: {field}: "):
        ComputingElement.load({field: "inf"})


def test_both_logs_may_be_one_file() -> None:
    assert job(std_output="log", std_error="log").std_error == "log"


# -- commands and results ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "  ", (), ("", "x"), "a\0b", ("a", "b\0"), ("a", "\ud800")])
def test_a_command_the_system_cannot_be_given_is_no_payload(command: Any) -> None:
    with pytest.raises(ValidationError, match="command"):
        PayloadSpec(command=command)


def test_a_description_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        job().executable = "x"  # type: ignore[misc]  # the type checker knows it too
    with pytest.raises(ValidationError, match="frozen"):
        InputFile(source="/a").name = "../x"  # type: ignore[misc]  # likewise


# -- what the slot must have -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "processors", "memory"),
    [
        ({"MinNumberOfProcessors": 4}, 4, None),
        ({"MinNumberOfProcessors": 4, "NumberOfProcessors": 2}, 2, None),
        ({"MinNumberOfProcessors": 0}, 1, None),
        ({"MinRAM": "1000"}, 1, 1000),
        ({"MinRAM": 1000, "MaxRAM": 3000}, 1, 3000),
        ({"MinRAM": 1000, "MaxRAM": 0}, 1, 1000),
        ({"MaxRAM": 3000, "Memory": 2000}, 1, 2000),
    ],
)
def test_diracs_other_keys_count_where_the_first_is_not_given(
    words: dict[str, Any], processors: int, memory: int | None
) -> None:
    found = job(**words)
    assert (found.number_of_processors, found.memory_mb) == (processors, memory)
    kept = {key: value for key, value in words.items() if key not in {"NumberOfProcessors", "Memory"}}
    assert {key: found.extra[key] for key in kept} == kept, "a coordinator finds them as they came"
    assert JobDescription.load(found.to_dirac()) == found


def test_no_maximum_is_written_as_zero_by_dirac() -> None:
    assert job(MaxNumberOfProcessors=0).max_number_of_processors is None


@pytest.mark.parametrize("tags", [["WholeNode", "GPU"], "WholeNode;GPU", "WholeNode, GPU", ["WholeNode", " ", "GPU"]])
def test_tags_are_a_list_however_they_are_written(tags: object) -> None:
    assert job(Tags=tags).tags == job(Tag=tags).tags == ("WholeNode", "GPU")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"MinNumberOfProcessors": "many"}, "MinNumberOfProcessors: "),
        ({"MaxRAM": -1}, "MaxRAM: "),
        ({"NumberOfProcessors": 4, "MaxNumberOfProcessors": 2}, "MaxNumberOfProcessors: 2 is less than the 4 it needs"),
        ({"NumberOfGPUs": -1}, "NumberOfGPUs: "),
        ({"WholeNode": "maybe"}, "WholeNode: "),
        ({"resources": {"licences": -1}}, "resources.licences: "),
        ({"resources": {"": 1}}, "resources"),
    ],
)
def test_a_slot_that_cannot_be_meant_is_refused_by_the_name_the_user_gave_it(
    words: dict[str, Any], complaint: str
) -> None:
    assert complaint in refused(**words)
