"""Jobs in DIRAC's job description language."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster import InvalidJob, JobDescription, Limits
from loadmaster.dirac.jdl import DEEPEST, is_jdl, job_from_jdl, job_to_jdl, read_jdl

JDL = """
[
  Executable = "run.sh";  // what users write
  Arguments = "-c 'a; b' x[1]";
  InputData = { "LFN:/vo/a", "LFN:/vo/b, c" };
  ExecutionEnvironment = {"A=x%3Dy"};
  CPUTime = 86400;
  Priority=1; /* and
  more */ JobID = 17;
  Requirements = other.Site == "LCG.A.org" && other.CPU > 5;
  Nested = [ Deep = { [ X = 1 ], [ X = -2.5e1; ] }; ];
  WholeNode = false;
  StdOutput = "";
  JobName = "say \\"hi\\"";
]
"""


def test_a_jdl_text_is_read_also_where_diracs_parser_gives_up() -> None:
    assert read_jdl(JDL) == {
        "Executable": "run.sh",
        "Arguments": "-c 'a; b' x[1]",
        "InputData": ["LFN:/vo/a", "LFN:/vo/b, c"],
        "ExecutionEnvironment": ["A=x%3Dy"],
        "CPUTime": 86400,
        "Priority": 1,
        "JobID": 17,
        "Requirements": 'other.Site == "LCG.A.org" && other.CPU > 5',
        "Nested": {"Deep": [{"X": 1}, {"X": -25.0}]},
        "WholeNode": False,
        "StdOutput": "",
        "JobName": 'say "hi"',
    }


def test_a_job_is_made_of_it() -> None:
    job = job_from_jdl(
        'Executable = "run.sh"; JobID = 17; InputData = "LFN:/vo/a"; NumberOfProcessors = "4"; Site = "ANY"'
    )
    assert (job.job_id, job.number_of_processors, job.extra) == ("17", 4, {"Site": "ANY"})
    assert [file.source for file in job.input_data] == ["LFN:/vo/a"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[A = "open; B = 1;]', "line 1: a value is expected, or a quote is open"),
        ("[A = 1;\n B 2;]", "line 2: '=' is expected after B, at '2;]'"),
        ("[A = 1", r"line 1: '\]' is missing"),
        ("[A = ;]", "a value is expected"),
        ("[A = {1 2}; B = {1, [};]", "the name of an attribute is expected|',' or '}'"),
        ('[A = {"x" "y"}]', ""),
        ("[= 1]", "the name of an attribute is expected"),
        ("A = 1 ] ", "there is more after the end"),
        ("[A = [B = 1]", r"'\]' is missing"),
        ("[A = {]", "a value is expected"),
        ("[A = " + "{" * 500, "too many brackets in brackets"),
    ],
)
def test_what_cannot_be_read_is_said_with_its_line(text: str, complaint: str) -> None:
    if complaint:
        with pytest.raises(InvalidJob, match=complaint):
            read_jdl(text)
    else:
        assert read_jdl(text) == {"A": ['"x" "y"']}, "an expression, for all we know"


def test_large_texts_are_read_in_no_time() -> None:
    many = ", ".join(f'"LFN:/vo/{number}"' for number in range(20_000))
    assert len(read_jdl(f"[A = {{{many}}}; B = {'9' * 5000};]")["A"]) == 20_000
    with pytest.raises(InvalidJob):
        read_jdl('[A = "' + '\\"' * 100_000)
    with pytest.raises(InvalidJob):
        read_jdl("[A = 1; " + "/*" * 5_000)
    assert DEEPEST < 100


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"arguments": "a; b"}, "Arguments: DIRAC cannot read ';'"),
        ({"arguments": 'say "hi"'}, "Arguments: DIRAC cannot read"),
        ({"arguments": "x[1]"}, r"Arguments: DIRAC cannot read '\['"),
        ({"output_sandbox": ["a,b"]}, "OutputSandbox: DIRAC cannot read a comma"),
        ({"limits": Limits(wall_seconds=1)}, "Loadmaster: there are no words for it"),
    ],
)
def test_what_diracs_parser_would_not_survive_is_not_written(words: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidJob, match=complaint):
        job_to_jdl(JobDescription(executable="x", **words))


@pytest.mark.parametrize(
    ("text", "jdl"),
    [("[ A = 1 ]", True), ("A=1;", True), (' { "A": 1 }', False), ("[1, 2]", False), ("", False), ("# A = 1", False)],
)
def test_jdl_is_told_from_json(text: str, jdl: bool) -> None:
    assert is_jdl(text) is jdl


WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc"], exclude_characters=';"[]\\,'), min_size=1
).filter(lambda text: text == text.strip())
NAMES = st.from_regex(r"[a-zA-Z][a-zA-Z0-9_.]{0,8}", fullmatch=True)
JOBS = st.fixed_dictionaries(
    {"executable": WORDS, "job_id": st.integers(0, 10**9).map(str) | NAMES},
    optional={
        "arguments": WORDS,
        "job_name": WORDS,
        "environment": st.dictionaries(NAMES, st.text(st.characters(exclude_characters="\0", codec="utf-8"))),
        "input_data": st.lists(NAMES.map("LFN:/vo/{}".format), max_size=3, unique_by=str.lower),
        "output_sandbox": st.lists(NAMES, max_size=3),
        "cpu_work": st.integers(0, 10**9) | st.floats(0, 1e9),
        "whole_node": st.booleans(),
        "memory_mb": st.integers(1, 10**6),
        "extra": st.dictionaries(NAMES.map("X{}".format), st.integers() | st.booleans() | st.lists(NAMES), max_size=3),
    },
).map(lambda words: JobDescription(**words))


@settings(max_examples=200, deadline=None)
@given(JOBS)
def test_every_job_that_can_be_written_is_read_as_the_same(job: JobDescription) -> None:
    assert job_from_jdl(job_to_jdl(job)) == job


@settings(max_examples=100, deadline=None)
@given(JOBS)
def test_diracs_own_parser_reads_what_is_written(job: JobDescription) -> None:
    parser = pytest.importorskip("DIRACCommon.Core.Utilities.ClassAd.ClassAdLight")
    theirs = parser.ClassAd(job_to_jdl(job))
    ours = read_jdl(job_to_jdl(job))
    assert set(theirs.getAttributes()) == set(ours)
    for key, value in ours.items():
        if isinstance(value, str):
            assert theirs.getAttributeString(key).split() == value.split()
        elif isinstance(value, list):
            assert theirs.getListFromExpression(key) == [str(item) for item in value]


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from('[]{}=;,"\\ aA1/*\n')))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read_jdl(text)
    except InvalidJob as exc:
        assert str(exc).startswith("JDL, line ")
