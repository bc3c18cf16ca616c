"""Hostile names: whatever is accepted stays where it belongs."""

from __future__ import annotations

import os.path
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st

from loadmaster import InvalidJob, JobDescription
from loadmaster.names import check_local_name, file_url, join_url, local_path, parse_lfn, user_lfn

OFTEN = settings(max_examples=500, deadline=None)
"""No deadline: the first example pays for imports and schemas, and the suite shares its machine."""

# Pieces of which attacks are made, so that a few draws reach what random text would not in a year.
PIECES = st.sampled_from(
    ["..", ".", "/", "//", " ", "\n", "\0", "\t", "%2e%2e", "%2f", "%00", "\\", "~", "a", "b.root", "*", "?", "[", ";", "|",
     "LFN:", "lfn:", "SB:", "SB:S|", "file://", "https://h/", "x" * 300, "é" * 128, "\udcff", "\ud800", "\u3000", "\u200f",
     "\x1c", "\x85", "#", ":", "=", "$HOME", "-"]
)  # fmt: skip
HOSTILE = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=30)
WORKDIR = "/scratch/root/job"


def inside(name: str, base: str = WORKDIR) -> bool:
    """By the operating system's own arithmetic, not by ours."""
    joined = os.path.join(base, name)
    return (
        os.path.normpath(joined) == joined
        and joined.startswith(base + "/")
        and not {"\0", "\n"} & set(name)
        and all(0 < len(os.fsencode(part)) <= 255 for part in name.split("/"))
    )


@OFTEN
@given(HOSTILE)
@example("a/../../b")
def test_a_checked_name_stays_inside(text: str) -> None:
    try:
        name = check_local_name(text)
    except ValueError:
        return
    assert name == text
    assert inside(name)


@OFTEN
@given(HOSTILE)
@example("/%2e%2e/%2e%2e/etc")
def test_no_lfn_leads_out_of_a_storage_element(text: str) -> None:
    try:
        lfn = parse_lfn(text)
    except ValueError:
        return
    assert inside(lfn[1:], base="/se")
    assert str(local_path(join_url("file:///se", lfn))) == f"/se{lfn}"
    assert parse_lfn(lfn) == parse_lfn(f"LFN:{lfn}") == lfn


@OFTEN
@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, st.none() | HOSTILE)
@example("x", "vo", "alice", "1", "../../root")
def test_no_output_gets_an_lfn_outside_of_its_owners_directory(
    name: str, vo: str, owner: str, job_id: str, output_path: str | None
) -> None:
    try:
        lfn = user_lfn(name, vo=vo, owner=owner, job_id=job_id, output_path=output_path)
    except ValueError:
        return
    assert parse_lfn(lfn) == lfn
    if output_path is None or output_path[:4].upper() != "LFN:":
        assert lfn.startswith(f"/{vo}/user/{owner[0]}/{owner}/")


@OFTEN
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30))
def test_any_path_survives_being_a_url(text: str) -> None:
    path = Path("/") / text
    assert local_path(file_url(path)) == path


FILE = HOSTILE | st.fixed_dictionaries({"source": HOSTILE}, optional={"name": HOSTILE})
OUTPUT = HOSTILE | st.fixed_dictionaries({"pattern": HOSTILE}, optional={"target": HOSTILE})
NAMING_FIELDS: dict[str, st.SearchStrategy[object]] = {
    "InputSandbox": HOSTILE | st.lists(FILE, max_size=2),
    "InputData": HOSTILE | st.lists(FILE, max_size=2),
    "OutputSandbox": HOSTILE | st.lists(OUTPUT, max_size=2),
    "OutputData": HOSTILE | st.lists(OUTPUT, max_size=2),
    "StdOutput": HOSTILE,
    "StdError": HOSTILE,
    "JobID": HOSTILE,
    "Owner": HOSTILE,
    "OutputPath": HOSTILE,
}


def one_field() -> st.SearchStrategy[dict[str, object]]:
    """One field at a time: two hostile ones would nearly always be refused together, and nothing be looked at."""
    return st.one_of([st.fixed_dictionaries({key: value}) for key, value in NAMING_FIELDS.items()])


@OFTEN
@given(one_field())
@example({"StdOutput": " .."})
@example({"StdError": " /etc/passwd"})
@example({"InputData": [{"source": "/a", "name": " ../../x"}]})
@example({"InputData": "https://h/%20.."})
@example({"OutputData": [{"pattern": "./ ../x"}]})
def test_no_description_names_a_file_outside_of_its_work_directory(words: dict[str, object]) -> None:
    """A name was checked before its blanks were taken off, so `" .."` and `" /etc/passwd"` passed."""
    try:
        job = JobDescription.load({"Executable": "/bin/true", **words})
    except InvalidJob as refusal:
        assert next(iter(words)) in str(refusal)
        return
    names = [job.job_id, job.std_output, job.std_error]
    names += [file.name for file in (*job.input_sandbox, *job.input_data)]
    names += [file.pattern for file in (*job.output_sandbox, *job.output_data)]
    assert [name for name in names if not inside(name)] == []


@OFTEN
@given(one_field())
def test_what_was_accepted_is_accepted_again_in_our_own_words(words: dict[str, object]) -> None:
    """A restart reads the description back from the journal."""
    try:
        job = JobDescription.load({"Executable": "/bin/true", **words})
    except InvalidJob:
        return
    assert JobDescription.load(job.model_dump(mode="json", exclude_defaults=True)) == job
