"""The example of examples/zmumu, as a user runs it, and what its coordinator refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import BACKENDS, Fly
from loadmaster import Coordinator, JobDescription, JobResult, Site, Status, run_job
from loadmaster.hooks import find_coordinator
from loadmaster.names import local_path

ZMUMU = Path(__file__).parents[1] / "examples" / "zmumu"
NEEDED = ("uproot", "matplotlib", "skhep_testdata")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

needs_data = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra `example`)")
once = pytest.mark.parametrize("anyio_backend", BACKENDS[:1], indirect=True)
"""The payload takes seconds and does not know which backend waits for it."""


@pytest.fixture
def example(tmp_path: Path) -> Path:
    """A copy, so that its grid is the test's own."""
    return shutil.copytree(ZMUMU, tmp_path / "zmumu", ignore=shutil.ignore_patterns("grid", "__pycache__"))


@pytest.fixture
def zmumu() -> type[Coordinator]:
    return find_coordinator(f"{ZMUMU}/coordinator.py:ZmumuCoordinator")


async def prepare(example: Path) -> str:
    done = await anyio.run_process([sys.executable, str(example / "prepare.py")])
    return done.stdout.decode()


async def run(example: Path, zmumu: type[Coordinator], root: Path) -> JobResult:
    words = json.loads((example / "job.json").read_text())
    job = JobDescription.load(words).relative_to(example, outputs=example)
    site = await to_thread.run_sync(Site.load, example / "site.toml")
    return await run_job(job, site=site, coordinator=zmumu, root=root)


def contents(directory: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


@needs_data
@once
async def test_the_z_boson_is_found_and_found_again(example: Path, zmumu: type[Coordinator], root: Path) -> None:
    await prepare(example)
    first = await run(example, zmumu, root)
    assert (first.status, first.failure) == (Status.DONE, None)
    assert sorted(file.name for file in first.inputs) == ["analysis.py", *(f"zmumu_{n}.root" for n in range(4))]
    assert first.parameters["PairsRead"] == "2304"

    outputs = {file.name: local_path(file.url) for file in first.outputs}
    figures = json.loads(outputs["zmumu.json"].read_text())
    assert figures["peak_gev"] == pytest.approx(91, abs=0.5)
    assert figures["pairs_read"] == sum(file["read"] for file in figures["files"].values()) == 2304
    assert figures["pairs_selected"] == sum(file["selected"] for file in figures["files"].values()) == 508
    picture = outputs["zmumu.png"].read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack(">II", picture[16:24]) == (1200, 840)
    assert len(picture) > 20_000, "an empty frame takes 15 kB"

    kept = contents(example / "grid" / "user-disk")
    second = await run(example, zmumu, root)
    assert (second.status, second.failure) == (Status.DONE, None)
    assert contents(example / "grid" / "user-disk") == kept, "outputs with logical names were written again"


@needs_data
@once
async def test_preparing_again_changes_nothing_and_says_so(example: Path) -> None:
    assert "nothing to do" not in await prepare(example)
    before = contents(example / "grid")
    assert "nothing to do" in await prepare(example)
    assert contents(example / "grid") == before


def figures(**other: Any) -> dict[str, Any]:
    good = {
        "pairs_read": 9,
        "pairs_selected": 8,
        "peak_gev": 90.7,
        "peak_error_gev": 0.1,
        "width_gev": 3.5,
        "files": {},
    }
    return {**good, **other}


LookAt = Callable[..., Awaitable[JobResult]]


@pytest.fixture
def look_at(fly: Fly, zmumu: type[Coordinator], tmp_path: Path) -> LookAt:
    """The coordinator's opinion of a payload that is not the analysis."""

    async def look_at(program: str, **words: Any) -> JobResult:
        (tmp_path / "analysis.py").write_text(program)
        sandbox = [str(tmp_path / "analysis.py")]
        result: JobResult = await fly({"coordinator": zmumu}, executable="analysis.py", input_sandbox=sandbox, **words)
        return result

    return look_at


def writes(text: str) -> str:
    return f"open('zmumu.json', 'w').write({text!r})"


async def test_good_figures_are_reported(look_at: LookAt) -> None:
    result = await look_at(writes(json.dumps(figures())))
    assert result.status is Status.DONE
    assert result.parameters["ZPeak"] == "90.70 +- 0.10 GeV"


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        (writes(json.dumps(figures(peak_gev=80.4))), "the peak is at 80.40 GeV: this is not the Z"),
        (writes(json.dumps(figures(pairs_selected=0))), "selected none of 9 muon pairs"),
        (writes("{}"), "zmumu.json does not have the figures"),
        ("", "wrote no zmumu.json"),
    ],
)
async def test_figures_that_cannot_be_right_fail_the_job(
    look_at: LookAt, out: Path, program: str, complaint: str
) -> None:
    result = await look_at(program, output_data=["zmumu.json"])
    assert result.status is Status.FAILED
    assert result.failure is not None
    assert complaint in result.failure.message
    assert not (out / "zmumu.json").exists()


async def test_an_input_that_was_left_out_fails_the_job(look_at: LookAt, tmp_path: Path) -> None:
    (tmp_path / "zmumu_7.root").touch()
    program = writes(json.dumps(figures()))
    result = await look_at(program, input_data=[str(tmp_path / "zmumu_7.root")])
    assert result.failure is not None
    assert result.failure.message == "the analysis left out zmumu_7.root"


async def test_a_failed_analysis_fails_for_its_own_reason(look_at: LookAt) -> None:
    result = await look_at("raise SystemExit(3)")
    assert result.failure is not None
    assert result.failure.kind == "PayloadFailed"
