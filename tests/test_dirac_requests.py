"""What is left to be done, as DIRAC's request system takes it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from conftest import Fly
from following import history
from loadmaster import JobDescription, JobHandle, Site
from loadmaster.dirac.requests import (
    FILES_PER_OPERATION,
    Kind,
    Operation,
    RequestFile,
    digest,
    element_of,
    encode,
    failover_operations,
    forward_status,
    move,
    register,
    request_json,
    request_name,
)
from loadmaster.dirac.words import JobStatus
from loadmaster.result import StoredFile

NOW = datetime(2024, 1, 1, 12, tzinfo=UTC)
JOB = JobDescription(job_id="17", job_name='sim (1): "a.b" {c}', owner="alice", owner_group="vo_user", executable="x")
FILE = RequestFile("/vo/out", "root://se/vo/out", 7, "adler32:0a1b2c3d")


def test_a_request_has_the_jobs_name_without_what_dirac_takes_out_of_it() -> None:
    assert request_name(JOB) == "sim1abc_job_17"
    assert request_name(JobDescription(job_id="17", executable="x")) == "job_17"


def test_a_request_is_what_the_request_manager_takes() -> None:
    request = json.loads(json.dumps(request_json(move(FILE, source_se="FAILOVER", target_se="SE"), JOB, now=NOW)))
    operations = request.pop("Operations")
    assert request == {
        "RequestName": "sim1abc_job_17", "JobID": 17, "SourceComponent": "Job_17", "Owner": "alice",
        "OwnerGroup": "vo_user", "Status": "Waiting", "Error": None, "CreationTime": "2024-01-01 12:00:00",
        "SubmitTime": "2024-01-01 12:00:00", "LastUpdate": "2024-01-01 12:00:00", "NotBefore": "2024-01-01 12:45:00",
    }  # fmt: skip
    assert [(op["Type"], op["Order"], op["Status"], op["SourceSE"], op["TargetSE"]) for op in operations] == [
        ("ReplicateAndRegister", 0, "Waiting", "FAILOVER", "SE"),
        ("RemoveReplica", 1, "Queued", None, "FAILOVER"),
    ]
    [file] = operations[0]["Files"]
    guid = file.pop("GUID")
    assert len(guid) == 36
    assert file == {
        "LFN": "/vo/out", "PFN": "root://se/vo/out", "Size": 7, "Checksum": "0a1b2c3d", "ChecksumType": "ADLER32",
        "Status": "Waiting", "Attempt": 0, "Error": None,
    }  # fmt: skip
    assert operations[1]["Files"][0]["GUID"] == guid, "asked again it is the same"


def test_what_the_payload_has_left_comes_after_the_jobs_own() -> None:
    theirs = request_json([Operation(Kind.REMOVE_FILE, (RequestFile("/vo/old"),))], JOB, now=NOW)
    request = request_json([register(FILE, se="SE", catalog="FC")], JOB, now=NOW, stored=[theirs])
    assert [(op["Type"], op["Order"], op["Status"]) for op in request["Operations"]] == [
        ("RegisterFile", 0, "Waiting"), ("RemoveFile", 1, "Queued"),
    ]  # fmt: skip
    assert digest(request).splitlines() == [
        "Name:sim1abc_job_17",
        "RegisterFile:RegisterFile:Waiting:0:SE:FC:/vo/out",
        "RemoveFile:RemoveFile:Queued:1:/vo/old",
    ]
    with pytest.raises(ValueError, match="evil: has no list of operations"):
        request_json([], JOB, now=NOW, stored=[{"RequestName": "evil", "Operations": "x"}])


def test_more_files_than_an_operation_takes_make_several() -> None:
    files = tuple(RequestFile(f"/vo/{number}") for number in range(FILES_PER_OPERATION + 1))
    request = request_json([Operation(Kind.REMOVE_FILE, files)], JOB, now=NOW)
    assert [len(op["Files"]) for op in request["Operations"]] == [FILES_PER_OPERATION, 1]
    assert digest(request).splitlines()[1].endswith(f"/vo/0...+<{FILES_PER_OPERATION - 1} files>")


def test_a_file_without_a_logical_name_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="file:///x: has no logical name"):
        RequestFile.of(StoredFile("x", "file:///x", 1, "adler32:1"))


def test_a_url_is_at_the_element_whose_place_it_is_in() -> None:
    site = Site(storage_elements={"ALL": "root://se//data", "USER": "root://se//data/user", "U": "root://se//data/us"})
    assert element_of("root://se//data/user/a", site) == "USER"
    assert element_of("root://se//data/users/a", site) == "ALL"
    assert element_of("https://other/a", site) == "https://other/a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n"), (True, "b1"), (0, "i0e"), (-5, "i-5e"), (1.5, "f1.5e"), ("é", "s2:é"), ([1, "a"], "li1es1:ae"),
        ((1,), "ti1ee"), ({"a": []}, "ds1:alee"),
    ],
)  # fmt: skip
def test_calls_are_written_in_diracs_code(value: Any, text: str) -> None:
    assert encode(value) == text
    with pytest.raises(TypeError, match="set: DIRAC has no code for it"):
        encode({1})


def test_statuses_that_could_not_be_said_are_said_later_in_their_order() -> None:
    said = [
        (NOW, JobStatus("Failed", "a")),
        (NOW, JobStatus(minor="b")),
        (NOW + timedelta(seconds=1), JobStatus("Done")),
    ]
    operation = forward_status("17", said)
    assert operation.kind == "ForwardDISET"
    assert operation.arguments.startswith(
        "tts33:WorkloadManagement/JobStateUpdateds7:timeouti120eees16:setJobStatusBulkli17ed"
    )
    times = ["2024-01-01 12:00:00.000000", "2024-01-01 12:00:00.000001", "2024-01-01 12:00:01.000000"]
    assert [operation.arguments.index(time) for time in times] == sorted(map(operation.arguments.index, times))


async def test_a_file_that_is_elsewhere_than_asked_for_is_asked_to_be_moved(fly: Fly, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("no directory")
    elements = {"SE": str(tmp_path / "blocked"), "FAILOVER": str(tmp_path / "failover")}
    site = Site(storage_elements=elements, failover_se="FAILOVER", retries=0, vo="vo")
    handle = JobHandle()
    await fly({"site": site, "handle": handle}, output_data="LFN:/vo/std.out", output_se="SE")
    operations = failover_operations(await history(handle), site)
    assert [(op.kind, op.source_se, op.target_se) for op in operations] == [
        (Kind.REPLICATE_AND_REGISTER, "FAILOVER", "SE"), (Kind.REMOVE_REPLICA, "", "FAILOVER"),
    ]  # fmt: skip
    assert operations[0].files[0].lfn == "/vo/std.out"
