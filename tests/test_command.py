"""What a payload is told to run, and what it sees of the pilot."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from loadmaster import ComputingElement, JobDescription, Slot
from loadmaster.errors import PayloadNotStarted
from loadmaster.payload.command import (
    default_command,
    default_environment,
    executable_problem,
    program_of,
    slot_environment,
)
from loadmaster.workdir import Workdir
from loadmaster.world import World


def job(**words: Any) -> JobDescription:
    return JobDescription(**{"executable": "run.sh", "job_id": "7", **words})


def program(path: Path, mode: int = 0o755) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(mode)
    return path


@pytest.mark.parametrize(
    ("command", "program"),
    [
        ("/bin/x 'two\nlines'", "/bin/x"),
        ('/bin/x "two\nlines" > out', "/bin/x"),
        ("/bin/x one\n/bin/y two", None),
        ("/bin/x <<END\ntext\nEND", None),
        ("'/bin/x\ny' z", None),
        ("/bin/x $(one\ntwo)", None),
        ("/bin/x \\\n one", None),
        ("\n/bin/x", None),
    ],
)
def test_a_newline_in_an_argument_does_not_keep_the_shell(command: str, program: str | None) -> None:
    """It stood between the payload and whoever asked how it ended: a signal was an exit code."""
    assert program_of(command) == program


def test_the_pilots_secrets_and_python_paths_are_not_handed_on(
    workdir: Workdir, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("X509_USER_PROXY", "PYTHONPATH", "LD_LIBRARY_PATH", "PYTHONHOME", "SECRET"):
        monkeypatch.setenv(name, "the pilot's")
    monkeypatch.setenv("LANG", "C.UTF-8")
    env = default_environment(job(), ComputingElement(site="LCG.Here.org"), workdir, World())
    assert "the pilot's" not in env.values()
    assert env["LANG"] == "C.UTF-8"
    assert env["LOADMASTER_SITE"] == "LCG.Here.org"
    assert env["JOBID"] == "7"
    assert env["PWD"] == env["TMPDIR"] == str(workdir.path)


def test_there_is_a_path_when_the_pilot_has_none(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PATH")
    assert "/bin" in default_environment(job(), ComputingElement(), workdir, World())["PATH"].split(":")


def test_the_description_has_the_last_word_on_the_environment(workdir: Workdir) -> None:
    env = default_environment(
        job(environment={"PATH": "/mine", "TMPDIR": "/scratch"}), ComputingElement(), workdir, World()
    )
    assert (env["PATH"], env["TMPDIR"]) == ("/mine", "/scratch")


def test_a_payload_is_told_how_many_cores_it_has_and_so_are_libraries_that_start_threads() -> None:
    told = slot_environment(Slot(cores=8, memory_mb=None))
    assert set(told.values()) == {"8"}
    assert {"LOADMASTER_CORES", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"} <= told.keys()


@pytest.mark.parametrize(
    ("gpus", "variables", "told"),
    [
        (("0", "3"), ("CUDA_VISIBLE_DEVICES",), {"CUDA_VISIBLE_DEVICES": "0,3", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}),
        (("GPU-ab", "MIG-cd"), ("CUDA_VISIBLE_DEVICES",), {"CUDA_VISIBLE_DEVICES": "GPU-ab,MIG-cd"}),
        ((), ("CUDA_VISIBLE_DEVICES",), {"CUDA_VISIBLE_DEVICES": ""}),
        (("GPU-1f",), ("ROCR_VISIBLE_DEVICES",), {"ROCR_VISIBLE_DEVICES": "GPU-1f"}),
        ((), (), {}),
    ],
)
def test_a_payload_sees_its_gpus_and_no_others(
    gpus: tuple[str, ...], variables: tuple[str, ...], told: dict[str, str]
) -> None:
    slot = Slot(cores=1, memory_mb=None, gpus=gpus, gpu_variables=variables)
    env = slot_environment(slot)
    assert {name: value for name, value in env.items() if "DEVICE" in name} == told


def test_a_file_of_the_job_comes_before_one_in_the_path(workdir: Workdir, tmp_path: Path) -> None:
    program(tmp_path / "bin" / "run.sh")
    env = {"PATH": str(tmp_path / "bin")}
    assert default_command(job(), env, workdir) == str(tmp_path / "bin" / "run.sh")
    program(workdir.path / "run.sh")
    assert default_command(job(), env, workdir) == str(workdir.path / "run.sh")


def test_the_payloads_path_is_searched_not_the_pilots(
    workdir: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin" / "run.sh")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(PayloadNotStarted, match="neither a file of the job nor in PATH"):
        default_command(job(), {"PATH": "/nowhere"}, workdir)


def test_a_file_of_the_job_is_made_executable(workdir: Workdir) -> None:
    path = program(workdir.path / "run.sh", 0o600)
    default_command(job(), {}, workdir)
    assert path.stat().st_mode & 0o777 == 0o755


def test_a_file_that_is_not_the_jobs_is_not_made_executable(workdir: Workdir, tmp_path: Path) -> None:
    outside = program(tmp_path / "outside", 0o644)
    (workdir.path / "run.sh").symlink_to(outside)
    for executable in ("run.sh", str(outside)):
        with pytest.raises(PayloadNotStarted, match="may not be executed"):
            default_command(job(executable=executable), {}, workdir)
    assert outside.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("executable", "reason"), [("./nowhere", "no such file"), ("/nowhere", "no such file"), ("/", "is not a file")]
)
def test_what_is_no_program_is_refused_before_a_shell_sees_it(workdir: Workdir, executable: str, reason: str) -> None:
    with pytest.raises(PayloadNotStarted, match=reason):
        default_command(job(executable=executable), {}, workdir)


def test_a_fifo_is_no_program(workdir: Workdir) -> None:
    os.mkfifo(workdir.path / "run.sh")
    with pytest.raises(PayloadNotStarted, match="is not a file"):
        default_command(job(), {}, workdir)


def test_the_executable_is_quoted_and_the_arguments_are_shell(workdir: Workdir, tmp_path: Path) -> None:
    path = program(tmp_path / "it's mine; rm" / "run.sh")
    command = default_command(job(executable=str(path), arguments="$A > log; true"), {}, workdir)
    assert command == f"""'{tmp_path}/it'"'"'s mine; rm/run.sh' $A > log; true"""


def test_variables_in_the_executable_are_the_payloads(
    workdir: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNKNOWN", "/the/pilots")
    path = program(tmp_path / "v1" / "run.sh")
    env = {"BASE": str(tmp_path), "V": "v1"}
    assert default_command(job(executable="$BASE/${V}/run.sh"), env, workdir) == str(path)
    with pytest.raises(PayloadNotStarted, match=r"\$UNKNOWN"):
        default_command(job(executable="$UNKNOWN/run.sh"), env, workdir)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"executable": "sh"}, None),
        ({"executable": "/bin/sh"}, None),
        ({"executable": "{here}/plain"}, "executable '{here}/plain': may not be executed"),
        ({"executable": "{here}"}, "executable '{here}': is not a file"),
        ({"executable": "{here}/gone"}, "executable '{here}/gone': no such file"),
        ({"executable": "$TOOLS/plain", "environment": {"TOOLS": "{here}"}}, "executable '{here}/plain': may not be"),
        ({"executable": "$PWD/made"}, None),
        ({"executable": "no-such-tool"}, "executable 'no-such-tool': neither a file of the job nor in PATH ("),
        ({"executable": "tool", "environment": {"PATH": "{here}/bin"}}, None),
        ({"executable": "./run.sh", "input_sandbox": ["/x/run.sh"]}, None),
        ({"executable": "run.sh", "input_data": ["LFN:/vo/run.sh"]}, None),
        ({"executable": "bin/run.sh", "input_sandbox": ["/x/run.sh"]}, "executable 'bin/run.sh': is none of the job's"),
        ({"executable": "bin/run.sh", "input_sandbox": ["/x/all.tar.gz"]}, None),
        ({"executable": "run.sh", "input_sandbox": ["/x/all.tgz"]}, None),
    ],
)
def test_what_can_be_known_of_an_executable_before_there_is_a_work_directory(
    tmp_path: Path, words: dict[str, Any], told: str | None
) -> None:
    program(tmp_path / "plain", 0o644)
    program(tmp_path / "bin" / "tool")
    text = json.dumps(words).replace("{here}", str(tmp_path))
    problem = executable_problem(job(**json.loads(text)), World())
    assert (problem or "").startswith((told or "").format(here=tmp_path))
    assert (problem is None) is (told is None)
