"""One job's life, by what a user sees of it."""

from __future__ import annotations

from pathlib import Path

from conftest import Fly, sh
from loadmaster import Status


async def test_a_job_that_prints_delivers_what_it_printed(fly: Fly, out: Path) -> None:
    result = await fly(**sh("echo hello"), output_sandbox=["std.out", "std.err"])
    assert result.status is Status.DONE
    assert (out / "std.out").read_text() == "hello\n"
    assert result.outcome.exit_code == 0
