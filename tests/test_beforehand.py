"""What can be known of a job on this machine before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from loadmaster import ComputingElement, JobDescription, JobExecutionCoordinator, Site
from loadmaster.commands.beforehand import Findings, look_ahead
from loadmaster.coordinator import Coordinator
from loadmaster.description import Containment, Isolation
from loadmaster.dirac import adapt
from loadmaster.world import World


async def ahead(
    site: Site | None = None,
    ce: ComputingElement | None = None,
    coordinator: type[Coordinator] | None = JobExecutionCoordinator,
    **words: Any,
) -> Findings:
    job = JobDescription(**{"executable": "/bin/true", **words})
    return await look_ahead(job, ce or ComputingElement(), site or Site(), coordinator)


async def test_of_a_good_job_there_is_nothing_to_say(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("cargo")
    site = Site(output_directory=str(tmp_path / "out"), cache=str(tmp_path / "cache"))
    limits = {"deadline": "2999-01-01T00:00:00Z"}
    words: dict[str, Any] = {
        "input_data": [str(tmp_path / "in")],
        "output_data": ["o"],
        "output_sandbox": ["std.out"],
        "limits": limits,
    }
    assert await ahead(site, **words) == Findings((), ())
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing is made"


@pytest.mark.parametrize(
    ("deadline", "told"),
    [
        (3600, "limits.deadline: 1970-01-01 01:00:00 UTC lies in the past; a number is taken for seconds since 1970"),
        ("2026-01-01T10:00:00+02:00", "limits.deadline: 2026-01-01 08:00:00 UTC lies in the past"),
    ],
)
async def test_a_deadline_in_the_past_is_told(deadline: Any, told: str) -> None:
    assert (await ahead(limits={"deadline": deadline})).problems == (told,)


async def test_an_executable_that_is_nowhere_is_a_problem_unless_a_hook_may_bring_it() -> None:
    class Brings(JobExecutionCoordinator):
        async def stageIn(self) -> None:
            await anyio.Path("brought").touch()

    class Looks(JobExecutionCoordinator):
        async def preProcess(self, command: str, exeEnv: dict[str, str]) -> Any: ...

    class Legacy:
        def preProcess(self, job: Any) -> None: ...
        def postProcess(self) -> None: ...

    for coordinator in (JobExecutionCoordinator, Looks, adapt(Legacy), None):
        found = await ahead(coordinator=coordinator, executable="no-such-tool")
        assert len(found.problems) == 1
        assert found.problems[0].startswith("executable 'no-such-tool': neither a file of the job nor in PATH")
    found = await ahead(coordinator=Brings, executable="no-such-tool")
    assert found.problems == ()
    assert found.notes[0].endswith("; unless the coordinator's stageIn brings it")


async def test_more_than_there_is_on_this_machine_is_told_but_no_fault() -> None:
    found = await ahead(
        ce=ComputingElement(number_of_processors=2, memory_mb=100), number_of_processors=99_999, memory_mb=101
    )
    assert found.problems == ()
    machine, cores, memory = found.notes
    assert machine.startswith("on this machine only `run` would take it: the job needs 99999 cores, the node has ")
    assert cores == "number_of_processors: 99999, and the computing element has 2"
    assert memory == "memory_mb: 101, and the computing element has 100"


async def test_a_node_without_what_isolates_payloads_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    world = World(isolation=Isolation.APPTAINER, image=str(tmp_path / "image.sif"))
    assert (await ahead(Site(payload=world))).problems == (
        "[payload] isolation = apptainer: there is neither apptainer nor singularity on the PATH; "
        "install the package apptainer",
        f"[payload] image = {tmp_path}/image.sif: No such file or directory",
    )
    (tmp_path / "apptainer").write_text("#!/bin/sh\n")
    (tmp_path / "apptainer").chmod(0o755)
    (tmp_path / "image.sif").touch()
    assert (await ahead(Site(payload=world))).problems == ()
    world = World(isolation=Isolation.NAMESPACES, containment=(Containment.SESSION,))
    assert (await ahead(Site(payload=world))).problems == (
        "[payload] isolation = namespaces: isolation namespaces takes containment pid-namespace, and not session",
    )


async def test_a_key_of_diracs_in_other_letters_is_told() -> None:
    """It is kept for the coordinator, as any that begins with a capital: no output was delivered, and nothing was said."""
    ce = ComputingElement.load({"MaxRam": 1000, "Mine": 1})
    found = await ahead(ce=ce, OutputSandBox=["std.out"], MINRAM=5, Mine=1, MinRAM=6)
    assert found.notes == (
        "OutputSandBox means nothing here: the key is OutputSandbox",
        "MINRAM means nothing here: the key is MinRAM",
        "MaxRam means nothing here: the key is MaxRAM",
    )


async def test_everything_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    site = Site(storage={"file": {"synk": 1}})
    found = await ahead(
        site,
        executable="/nowhere/x",
        limits={"deadline": 0},
        input_data=["gopher://h/a", "LFN:/vo/b", str(tmp_path / "gone"), "https://host.invalid/c"],
        output_data=["a", {"pattern": "o", "target": "gopher://h/o"}],
        output_sandbox=["std.out"],
    )
    assert [problem.partition(":")[0].split()[0] for problem in found.problems] == [
        "limits.deadline", "executable", "[storage.file]", *["input_data"] * 3, *["output_data"] * 2, "output_sandbox",
    ]  # fmt: skip
    assert found.notes == ("1 of the inputs are at servers, which were not asked: --online does",)
