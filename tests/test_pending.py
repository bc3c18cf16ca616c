"""`loadmaster pending`, run as an administrator runs it: beside an agent, or when there is none."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import sh
from loadmaster import JobDescription, Ledger, Node, Site, Status
from loadmaster.dirac import JobStatus, Major, Minor
from loadmaster.diracx.outbox import FileOutbox, ParameterReport, Report, StatusReport
from loadmaster.pending import Backoff

LOADMASTER = [sys.executable, "-W", "error", "-m", "loadmaster"]

SITE = """
catalog = "catalog.sqlite"
default_se = ["DISK"]
failover_se = ["BUFFER"]
vo = "vo"
retries = 0
[storage_elements]
DISK = "disk"
BUFFER = "buffer"
"""


class Admin:
    """A directory with a site and a journal, in which two jobs have left something to be done: `disk` was no directory."""

    def __init__(self, directory: Path, root: Path) -> None:
        self.directory, self.root = directory, root
        (directory / "site.toml").write_text(SITE)
        (directory / "disk").write_text("in the way")
        self.site = Site.load(directory / "site.toml")
        anyio.run(self.leave_something, backend="asyncio")

    def node(self, backoff: Backoff) -> Node:
        return Node(
            site=self.site, ledger=Ledger(1), root=self.root, journal=self.directory / "journal", backoff=backoff
        )

    async def leave_something(self) -> None:
        async with self.node(Backoff(3600, 3600)) as node:
            for number in ("7", "8"):
                words = {
                    **sh(f"echo {number} > o.txt"),
                    "output_data": ["o.txt"],
                    "owner": "ann",
                    "job_name": "si/m (1)",
                }
                result = await node.submit(JobDescription(job_id=number, **words)).wait()
                assert result.status is Status.COMPLETED

    def repair(self) -> None:
        (self.directory / "disk").unlink()

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        line = [*LOADMASTER, "pending", "journal", *words]
        done = subprocess.run(line, cwd=self.directory, capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr
        return done

    def left(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.run("--json").stdout)
        return found

    def delivered(self) -> list[str]:
        return sorted(path.read_text().strip() for path in (self.directory / "disk").rglob("o.txt"))


@pytest.fixture
def admin(tmp_path: Path, root: Path) -> Admin:
    return Admin(tmp_path, root)


def test_the_list_says_what_where_and_when(admin: Admin) -> None:
    first, second = admin.left()
    assert (first["job_id"], second["job_id"], first["kind"], first["tries"]) == ("7", "8", "move", 0)
    assert first["wanted"] == f"file://{admin.directory}/disk/vo/user/a/ann/0/7/o.txt"
    table = admin.run().stdout.splitlines()
    assert len(table) == 3
    assert f"{first['at']} to {first['wanted']}" in table[1]


def test_what_is_dropped_is_asked_about_and_gone(admin: Admin) -> None:
    first, second = (str(each["operation"]) for each in admin.left())
    assert "--yes" in admin.run("--drop", first).stderr
    unknown = admin.run("--drop", "2", "--yes").stderr  # the second line, somebody may think
    assert (
        f"nothing pending has the number 2: there are {first}, {second} (NUMBER is what stands in the first" in unknown
    )
    assert len(admin.left()) == 2
    assert answered(admin, "n", "--drop", first) == 1
    assert len(admin.left()) == 2
    assert answered(admin, "y", "--drop", first) == 0
    done = admin.run("--drop", second, "--yes")
    assert (done.returncode, "nobody moves it" in done.stdout) == (0, True)
    assert admin.left() == []
    assert len(list((admin.directory / "buffer").rglob("o.txt"))) == 2


def answered(admin: Admin, answer: str, *words: str) -> int:
    """The exit code, when a person at a terminal answers so."""
    person, terminal = pty.openpty()
    try:
        line = [*LOADMASTER, "pending", "journal", *words]
        with subprocess.Popen(line, cwd=admin.directory, stdin=terminal, stdout=subprocess.DEVNULL) as process:
            os.write(person, f"{answer}\n".encode())
            return process.wait(60)
    finally:
        os.close(person)
        with suppress(OSError):
            os.close(terminal)


def test_a_request_for_dirac_has_the_names_of_the_site(admin: Admin) -> None:
    assert "a directory" in admin.run("--export", "r.json").stderr
    assert admin.run("--export", "r.json", "--job", "7", "--config", "site.toml").returncode == 0
    request = json.loads((admin.directory / "r.json").read_text())
    replicate, remove = request["Operations"]
    assert (request["JobID"], request["Owner"], request["Status"]) == (7, "ann", "Waiting")
    assert (replicate["Type"], replicate["SourceSE"], replicate["TargetSE"]) == (
        "ReplicateAndRegister",
        "BUFFER",
        "DISK",
    )
    assert (remove["Type"], remove["TargetSE"]) == ("RemoveReplica", "BUFFER")
    assert replicate["Files"][0]["LFN"] == "/vo/user/a/ann/0/7/o.txt"
    assert len(admin.left()) == 2  # whoever takes the request says so: --drop
    (admin.directory / "requests").mkdir()
    assert admin.run("--export", "requests", "--config", "site.toml").returncode == 0
    assert len(list((admin.directory / "requests").iterdir())) == 2


def test_reports_that_no_server_took_are_among_them(admin: Admin) -> None:
    async def put() -> None:
        async with FileOutbox(admin.directory / "journal" / "outbox.sqlite") as outbox:
            said = JobStatus(Major.COMPLETING, Minor.APP_SUCCESS)
            reports: list[Report] = [
                StatusReport(7, datetime(2024, 1, 1, tzinfo=UTC), said),
                ParameterReport(7, {"CPU": 1}),
            ]
            await outbox.put(reports, {})

    anyio.run(put, backend="asyncio")
    assert [each["operation"] for each in admin.left()[2:]] == ["r1", "r2"]
    assert "tell that job 7 is Completing" in admin.run().stdout
    assert admin.run("--export", "r.json", "--job", "7", "--config", "site.toml").returncode == 0
    operations = json.loads((admin.directory / "r.json").read_text())["Operations"]
    assert [each["Type"] for each in operations] == ["ReplicateAndRegister", "RemoveReplica", "ForwardDISET"]
    assert admin.run("--drop", "r1", "r2", "--yes").returncode == 0
    assert len(admin.left()) == 2


def test_without_an_agent_the_command_tries_itself(admin: Admin) -> None:
    done = admin.run("--retry", "--config", "site.toml")
    assert (done.returncode, "stuck" in done.stdout) == (1, True)
    assert [each["stuck"] for each in admin.left()] == [True, True]
    assert "disk" in admin.left()[0]["error"]
    admin.repair()
    assert admin.run("--retry", "--config", "site.toml").returncode == 0
    assert (admin.left(), admin.delivered()) == ([], ["7", "8"])


async def test_beside_an_agent_everything_works_and_the_agent_does_it(admin: Admin) -> None:
    """Its waits are an hour: what makes it try is the administrator's word."""
    async with admin.node(Backoff(3600, 3600)) as node:
        stream = node.events()
        first, second = await anyio.to_thread.run_sync(admin.left)
        dropped = await anyio.to_thread.run_sync(lambda: admin.run("--drop", str(first["operation"]), "--yes"))
        assert dropped.returncode == 0
        await anyio.to_thread.run_sync(admin.repair)
        tried = await anyio.to_thread.run_sync(lambda: admin.run("--retry"))
        assert (tried.returncode, "agent" in tried.stdout) == (0, True)
        with anyio.fail_after(30):
            async for event in stream:
                assert event.job_id == second["job_id"]
                break
    assert admin.delivered() == ["8"]


def test_where_there_is_no_journal_that_is_said(tmp_path: Path) -> None:
    done = subprocess.run([*LOADMASTER, "pending", "nowhere"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "there is no journal" in done.stderr) == (1, True)
