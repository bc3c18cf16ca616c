"""DIRAC's files and coordinators on the command line, run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

JDL = '[ JobID = 7; Executable = "/bin/sh"; Arguments = "-c \'echo $BY; exit 3\'"; OutputSandbox = {"std.out"}; ]'

COORDINATOR = """
class JobExecutionCoordinator:
    def __init__(self, jobArgs, ceArgs):
        self.jobArgs = jobArgs

    def preProcess(self, command, exeEnv):
        return {"OK": True, "Value": {"command": command, "env": {**exeEnv, "BY": f"LmCommunity {self.jobArgs['JobID']}"}}}

    def postProcess(self):
        return {"OK": True, "Value": None}
"""


def loadmaster(directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loadmaster", *words], cwd=directory, capture_output=True, text=True, timeout=50,
        env={**os.environ, "PYTHONPATH": str(directory / "site")},
    )  # fmt: skip


@pytest.fixture
def extension(tmp_path: Path) -> Path:
    """A directory with a job, and an extension of DIRAC's that is installed for the commands run in it."""
    (tmp_path / "job.jdl").write_text(JDL)
    metadata = tmp_path / "site" / "LmCommunity-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: LmCommunity\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[dirac]\nmetadata = LmCommunity:extension_metadata\n")
    package = tmp_path / "site" / "LmCommunity" / "WorkloadManagementSystem" / "JobWrapper"
    package.mkdir(parents=True)
    (package.parent.parent / "__init__.py").write_text('def extension_metadata():\n    return {"priority": 900}\n')
    (package / "JobExecutionCoordinator.py").write_text(COORDINATOR)
    return tmp_path


@pytest.mark.parametrize("coordinator", ["dirac", "dirac:LmCommunity"])
def test_a_jdl_file_runs_with_the_coordinator_of_the_installed_extension(extension: Path, coordinator: str) -> None:
    done = loadmaster(extension, "run", "job.jdl", "--coordinator", coordinator, "--scratch", "scratch")
    assert "exit code 3" in done.stderr
    assert (extension / "outputs" / "7" / "std.out").read_text() == "LmCommunity 7\n"


def test_a_jdl_file_that_cannot_be_read_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "job.jdl").write_text('[ Executable = "x";\n JobID = 7')
    done = loadmaster(tmp_path, "check", "job.jdl")
    assert done.returncode == 1
    assert "job.jdl: JDL, line 2: ']' is missing" in done.stderr


def test_an_extension_that_is_not_there_is_named(extension: Path) -> None:
    done = loadmaster(extension, "check", "job.jdl", "--coordinator", "dirac:LmNowhere")
    assert done.returncode == 1
    assert "no coordinator in LmNowhere" in done.stderr
