"""Community packages found as DIRAC finds them: real ones, installed as far as importlib can tell."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from anyio import to_thread

from conftest import Fly
from loadmaster import InvalidJob, Status
from loadmaster.dirac.extensions import Extension, extensions, find_coordinator

COORDINATOR = """
from {base} import JobExecutionCoordinator as Base

class JobExecutionCoordinator(Base):
    def preProcess(self, command, exeEnv):
        return {{"OK": True, "Value": {{"command": command, "env": exeEnv | {{"BY": __name__}}}}}}
"""

BASE = """
class JobExecutionCoordinator:
    def __init__(self, jobArgs, ceArgs):
        self.jobArgs, self.ceArgs = jobArgs, ceArgs

    def preProcess(self, command, exeEnv):
        return {"OK": True, "Value": {"command": command, "env": exeEnv}}

    def postProcess(self):
        return {"OK": True, "Value": None}
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Put an extension where Python finds it: its metadata, its package, its coordinator if it has one."""
    site = tmp_path / "site-packages"
    site.mkdir()
    before = set(sys.modules)
    monkeypatch.syspath_prepend(site)

    def install(package: str, says: str, coordinator: str | None = None) -> None:
        metadata = site / f"{package}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[dirac]\nmetadata = {package}:extension_metadata\n")
        (site / package).mkdir()
        (site / package / "__init__.py").write_text(f"def extension_metadata():\n    return {says}\n")
        if coordinator is not None:
            folder = site / package / "WorkloadManagementSystem" / "JobWrapper"
            folder.mkdir(parents=True)
            for parent in (folder, folder.parent):
                (parent / "__init__.py").touch()
            (folder / "JobExecutionCoordinator.py").write_text(coordinator)

    yield install
    for name in set(sys.modules) - before:
        if name.startswith("Lm"):
            del sys.modules[name]


def says(priority: int) -> str:
    return f'{{"primary_extension": True, "priority": {priority}, "setups": {{}}}}'


@pytest.fixture
def dirac(install: Install) -> str:
    install("LmDIRAC", says(0), BASE)
    return "LmDIRAC.WorkloadManagementSystem.JobWrapper.JobExecutionCoordinator"


def ours() -> list[Extension]:
    return [extension for extension in extensions() if extension.package.startswith("Lm")]


def test_extensions_come_by_priority_and_then_by_name(install: Install, dirac: str) -> None:
    install("LmOther", says(100))
    install("LmCommunity", says(100))
    assert [extension.package for extension in ours()] == ["LmCommunity", "LmOther", "LmDIRAC"]
    assert ours()[0] == Extension("LmCommunity", 100, primary=True)


async def test_the_first_extension_that_has_a_coordinator_gives_it_and_it_runs(
    fly: Fly, out: Path, install: Install, dirac: str
) -> None:
    install("LmWithout", says(200))
    install("LmCommunity", says(100), COORDINATOR.format(base=dirac))
    words = {"executable": "/bin/sh", "arguments": ["-c", "echo $BY"], "output_sandbox": "std.out"}
    result = await fly({"coordinator": await to_thread.run_sync(find_coordinator)}, **words)
    assert (result.status, result.failure) == (Status.DONE, None)
    assert (out / "std.out").read_text().startswith("LmCommunity.WorkloadManagementSystem.JobWrapper.")


def test_an_extension_can_be_asked_for(install: Install, dirac: str) -> None:
    install("LmCommunity", says(100), COORDINATOR.format(base=dirac))
    assert find_coordinator("LmDIRAC").__qualname__ == "adapt(JobExecutionCoordinator)"
    with pytest.raises(InvalidJob, match=r"no coordinator in LmNowhere: none has a module WorkloadManagementSystem\."):
        find_coordinator("LmNowhere")


def test_a_missing_dependency_is_not_a_missing_coordinator(install: Install, dirac: str) -> None:
    install("LmBroken", says(300), "import LmGone.tools")
    with pytest.raises(InvalidJob, match="JobExecutionCoordinator: it needs LmGone, which is not installed"):
        find_coordinator()


@pytest.mark.parametrize(
    ("coordinator", "complaint"),
    [
        ("1 / 0", "cannot import it: ZeroDivisionError: division by zero"),
        ("raise SystemExit(1)", "cannot import it: SystemExit: 1"),
        ("JobExecutionCoordinator = 7", "has no class JobExecutionCoordinator with preProcess and postProcess"),
    ],
)
def test_a_coordinator_that_cannot_be_used_is_named(install: Install, coordinator: str, complaint: str) -> None:
    install("LmBroken", says(300), coordinator)
    with pytest.raises(InvalidJob, match=complaint):
        find_coordinator()


@pytest.mark.parametrize(
    ("said", "complaint"), [("1 / 0", "ZeroDivisionError"), ("{}", "has no priority"), ("7", "no pri")]
)
def test_an_extension_that_cannot_say_what_it_is_is_named(install: Install, said: str, complaint: str) -> None:
    install("LmMute", said)
    with pytest.raises(InvalidJob, match=f"extension LmMute: .*{complaint}"):
        extensions()
