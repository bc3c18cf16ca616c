"""Payloads that mean no good, from start to end by way of `run_job`: each comes to a clear end, and nothing is left."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import Fly, sh
from following import Signpost, history, killed_when, processes_of
from loadmaster import JobHandle, Limits, Status
from loadmaster.description import Containment
from loadmaster.events import OutputMissing
from loadmaster.result import EndedBy
from loadmaster.world import BEST_FIRST

LOGS = ["std.out", "std.err"]


@pytest.fixture(params=BEST_FIRST, ids=str)
def held(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Every containment there is."""
    return {"containment": [request.param]}


def python(script: str) -> dict[str, Any]:
    return {"executable": sys.executable, "arguments": ["-S", "-u", "-c", script]}


async def test_one_that_fills_the_disk_fails_and_it_is_said_why(
    fly: Fly, small_disk: Path, held: dict[str, Any]
) -> None:
    result = await fly({"root": small_disk}, world=held, **sh("cat /dev/zero > big"), output_sandbox=LOGS)
    assert result.status is Status.FAILED
    # cat's own words are lost: its standard error is on the same disk.
    assert result.failure.message == "the payload failed: exit code 1, the disk of its work directory is full"
    assert list(small_disk.iterdir()) == []


async def test_one_that_would_fill_the_disk_is_stopped_by_the_minimum_that_stays_free(
    fly: Fly, small_disk: Path, held: dict[str, Any]
) -> None:
    limits = Limits(free_disk_bytes=500_000)
    result = await fly(
        {"root": small_disk}, world=held, **sh("head -c 800000 /dev/zero > big; sleep 1000"), limits=limits
    )
    assert re.match(r"LimitExceeded: free disk of .* kB is under the minimum of 500 kB", str(result.failure))


async def test_one_that_closes_its_descriptors_ends_as_it_ends(fly: Fly, held: dict[str, Any]) -> None:
    result = await fly(world=held, **python("import os; os.closerange(0, 1000); os._exit(7)"))
    assert result.outcome.exit_code == 7


async def test_one_that_deletes_its_work_directory_is_done_without_outputs(
    fly: Fly, out: Path, held: dict[str, Any]
) -> None:
    handle = JobHandle()
    words = sh('echo said; rm -rf "$PWD"/* "$PWD"/.[a-z]*; rmdir "$PWD" || :')
    result = await fly({"handle": handle}, world=held, **words, output_sandbox=LOGS, output_data=["result"])
    assert result.status is Status.DONE
    assert {event.name for event in await history(handle) if isinstance(event, OutputMissing)} == {*LOGS, "result"}


async def test_one_that_renames_its_work_directory_keeps_nobody_from_removing_it(
    fly: Fly, root: Path, held: dict[str, Any]
) -> None:
    result = await fly(world=held, **sh('echo x > kept; mv "$PWD" "$PWD.moved"; mkdir "$PWD"; echo other > "$PWD/f"'))
    assert result.status in {Status.DONE, Status.FAILED}
    for left in root.iterdir():  # what it made beside its directory was never ours to remove
        assert left.name.endswith(".moved") or not left.name.endswith("part")
        for file in left.iterdir():
            file.unlink()
        left.rmdir()


@pytest.mark.parametrize("target", ["/etc/passwd", "/proc/self/environ", "../../outside"])
async def test_one_that_swaps_its_output_for_a_link_does_not_deliver_what_is_behind_it(
    fly: Fly, out: Path, target: str, held: dict[str, Any]
) -> None:
    result = await fly(
        world=held,
        **sh(f"rm std.out; ln -s {target} std.out; ln -s {target} data"),
        output_sandbox=["std.out"],
        output_data=["data"],
    )
    assert result.status is Status.FAILED
    assert result.failure.kind == "StagingFailed"
    assert "link" in result.failure.message
    assert not (out / "std.out").exists()
    assert not (out / "data").exists()


async def test_one_that_swaps_its_log_for_a_fifo_hangs_nobody(fly: Fly, held: dict[str, Any]) -> None:
    with anyio.fail_after(10):
        result = await fly(world=held, **sh("rm std.out; mkfifo std.out; exit 3"), output_sandbox=["std.out"])
    assert result.outcome.exit_code == 3
    assert result.status is Status.FAILED


async def test_one_that_is_over_before_anybody_looks_has_figures_all_the_same(fly: Fly, held: dict[str, Any]) -> None:
    result = await fly(world=held, **python("sum(range(1_000_000))"), limits={"memory_bytes": 10**9})
    assert result.status is Status.DONE
    assert 0 < result.outcome.cpu_seconds < 5
    assert result.outcome.verdict is None


async def test_one_that_forks_while_it_is_killed_is_gone_all_the_same(
    fly: Fly, tmp_path: Path, held: dict[str, Any]
) -> None:
    """A few that fork and end, a thousand times a second: whoever is seen is gone when the signal comes."""
    ready = Signpost(tmp_path / "ready")
    script = (
        "import os, signal\nfor n in (signal.SIGTERM, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)\n"
        "for _ in range(2):\n    if os.fork() == 0: break\n"
        f"else: open({str(ready)!r}, 'w').write('x')\n"
        "while True:\n    if os.fork(): os._exit(0)\n"
    )
    words = python(script) | {"limits": {"grace_seconds": 0.2}, "job_id": f"forks-{os.urandom(4).hex()}"}
    with anyio.fail_after(40):
        result, _ = await killed_when(ready.reached, lambda handle: fly({"handle": handle}, world=held, **words))
    assert result.status is Status.KILLED
    assert result.outcome is not None
    assert result.outcome.ended_by in {EndedBy.KILL, EndedBy.ITSELF}
    if held["containment"] != [Containment.SESSION]:
        assert processes_of(words["job_id"]) == []
