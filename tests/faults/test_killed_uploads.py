"""An agent is killed while storages hold what is not whole, or not published: the next one leaves nothing of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from agent import site
from test_killed_agent import Campaign, Servers, machine_stops
from test_killed_agent import servers as servers

from loadmaster import pending
from loadmaster.events import RemovalRequested
from loadmaster.journal import open_journal
from loadmaster.logbook import Logbook
from loadmaster.operations import Operations
from loadmaster.pending import Operation
from loadmaster.staging.engine import open_transfers

WAITS = """
echo $NAME >> $CAMPAIGN/starts
echo more > more.$NAME
echo cargo of $NAME > result.$NAME
until [ -e $CAMPAIGN/go ]; do sleep 0.05; done
[ -e $CAMPAIGN/rename ] && mv more.$NAME hidden
exit $(cat $CAMPAIGN/go)
"""

KINDS = ("early", "web", "objects")


class Held(Campaign):
    """Three jobs that have sent all of their outputs, and wait."""

    def __init__(self, directory: Path, servers: Servers) -> None:
        super().__init__(directory, 8, servers)
        self.jobs = [job for job in self.jobs if job["job_id"].rstrip("0123456789") in KINDS]
        for job in self.jobs:
            job["arguments"] = ["-c", WAITS]
            job["output_data"][1:] = [{"pattern": "more.*", "target": "LFN:/vo/*", "leaves": "on_close"}]
        (directory / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in self.jobs))

    def held(self) -> list[str]:
        assert self.servers is not None
        return self.servers.uploads(self.place) + [str(path) for path in (self.directory / "disk").rglob(".*")]

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not true():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)

    def is_killed_with_all_held(self) -> None:
        with self.agent() as agent:
            self.until(lambda: len(self.held()) == 6)
            agent.kill()
        assert len(self.held()) == 6

    def ends(self) -> dict[str, str]:
        """How the jobs have ended; the status of the last attempt."""
        self.lives_on()
        return {job_id: status for job_id, _, status in map(json.loads, self.told("ended"))}


@pytest.fixture
def campaign(tmp_path: Path, servers: Servers) -> Held:
    return Held(tmp_path, servers)


def test_a_payload_that_ends_well_under_the_next_agent_has_its_outputs_there_once(campaign: Held) -> None:
    campaign.is_killed_with_all_held()
    (campaign.directory / "go").write_text("0")
    assert set(campaign.ends().values()) == {"Done"}
    campaign.check_remains()
    assert campaign.servers is not None
    for kind in ("web", "objects"):
        name = next(job["job_id"] for job in campaign.jobs if job["job_id"].startswith(kind))
        assert campaign.servers.content(kind, f"{campaign.place}/vo/{name}") == f"cargo of {name}\n"
        assert campaign.servers.content(kind, f"{campaign.place}/vo/more.{name}") == "more\n"


def test_nothing_is_left_of_payloads_that_fail_under_the_next_agent(campaign: Held) -> None:
    campaign.is_killed_with_all_held()
    (campaign.directory / "rename").touch()  # what was sent has another name now: only the journal knows of it
    (campaign.directory / "go").write_text("1")
    assert set(campaign.ends().values()) == {"Failed"}
    campaign.check_remains()
    assert list((campaign.directory / "disk").rglob("more.*")) == []


def test_nothing_is_left_of_an_attempt_that_is_lost_with_its_machine(campaign: Held) -> None:
    campaign.is_killed_with_all_held()
    machine_stops(campaign)
    (campaign.directory / "go").write_text("0")
    with campaign.agent("--boot", "another") as agent:
        assert agent.wait(60) == 0, campaign.log()
    assert sorted(campaign.told("starts")) == sorted(2 * [job["job_id"] for job in campaign.jobs])
    assert {json.loads(line)[2] for line in campaign.told("ended")} == {"Done"}
    campaign.check_remains()


def test_what_cannot_be_removed_is_a_pending_operation(campaign: Held) -> None:
    """In effect the directory is read-only: each part has become something that no unlink removes."""
    campaign.is_killed_with_all_held()
    parts = list((campaign.directory / "disk").rglob(".*"))
    assert len(parts) == 2
    for path in parts:
        path.unlink()
        path.mkdir()
    (campaign.directory / "go").write_text("1")
    early = next(job["job_id"] for job in campaign.jobs if job["job_id"].startswith("early"))
    assert campaign.ends()[early] == "Failed"
    with Logbook.look(campaign.directory / "journal") as book:
        left = book.ask(pending.every)
    asked = [each.request for each in left if isinstance(each.request, RemovalRequested)]
    assert len(asked) == len(left) == 2
    assert {path.name for path in parts} <= {part for each in asked for part in each.parts}
    told = subprocess.run(
        [sys.executable, "-m", "loadmaster", "pending", "--json", str(campaign.directory / "journal")],
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    listed = {(each["kind"], each["at"], each["file"]) for each in json.loads(told.stdout)}
    assert listed == {("remove", each.url, None) for each in asked}
    for path in parts:
        path.rmdir()
        path.touch()
    anyio.run(try_all, campaign.directory, left)
    assert campaign.held() == []


async def try_all(directory: Path, operations: list[Operation]) -> None:
    async with open_transfers(site(directory)) as transfers, open_journal(directory / "journal") as journal:
        assert await Operations(journal, transfers, lambda event: None).try_all(operations) == []
