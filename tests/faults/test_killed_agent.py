"""An agent is killed at any instant, and its successors bring every job to one end."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import Request, urlopen

import pytest

from loadmaster.errors import JournalFault
from loadmaster.events import KINDS as KINDS_OF_EVENTS
from loadmaster.events import PayloadStarted
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.logbook import Logbook
from loadmaster.recovery import MOST_RERUNS
from servers import Server, moto, nginx

AGENT = Path(__file__).with_name("agent.py")

RUN = """
exec 9>> $CAMPAIGN/alive.$NAME
flock -n 9 || echo $NAME >> $CAMPAIGN/clashes
echo $NAME >> $CAMPAIGN/starts
sleep $LONG
cat input.$NAME > result.$NAME
echo done
exit $CODE
"""


def words(number: int, kind: str) -> dict[str, Any]:
    """A job of the campaign: what it is for is in its name."""
    name = f"{kind}{number}"
    job: dict[str, Any] = {
        "job_id": name,
        "executable": "/bin/sh",
        "arguments": ["-c", RUN],
        "environment": {"NAME": name, "LONG": "0.15", "CODE": "3" if kind == "fail" else "0"},
        "input_data": [f"input.{name}"],
        "output_sandbox": ["std.out", "never.made"],
        "output_data": [{"pattern": f"result.{name}", "target": f"LFN:/vo/{name}"}],
    }
    if kind in {"early", "web", "objects"}:
        job["output_data"][0]["leaves"] = "on_close"
    if kind in {"web", "objects"}:
        job["output_se"] = [kind.upper()]
        job["output_data"].append({"pattern": "more.*", "target": "LFN:/vo/*", "leaves": "on_close"})
        job["arguments"] = ["-c", f"echo more > more.$NAME; {RUN}"]
        job["environment"]["LONG"] = "0.4"
    if kind == "failover":
        job["output_se"] = ["GONE"]
    if kind == "kill":
        job["environment"]["LONG"] = "3"
    return job


WHEN: Final = ("after", "before")

KINDS = ("plain", "early", "failover", "fail", "plain", "kill")

UNLOOKED_AT: Final = (
    "AWS4-HMAC-SHA256 Credential=AK/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
)
"""moto wants to see a signature, and does not look at it."""


@dataclass(frozen=True)
class Servers:
    """Storages that know of an upload before it is whole."""

    web: Server
    objects: str

    def elements(self, place: str) -> dict[str, str]:
        return {"WEB": f"{self.web.url.replace('http', 'dav')}/{place}", "OBJECTS": f"s3://bucket/{place}"}

    @property
    def words(self) -> dict[str, Any]:
        return {"s3": {"endpoint": self.objects, "access_key": "AK", "secret_key": "SK"}}

    def content(self, kind: str, path: str) -> str:
        base = self.web.url if kind == "web" else f"{self.objects}/bucket"
        with urlopen(Request(f"{base}/{path}", headers={"Authorization": UNLOOKED_AT}), timeout=30) as answer:
            return str(answer.read().decode())

    def uploads(self, place: str) -> list[str]:
        """What is there and has no name, or not its own."""
        with urlopen(f"{self.objects}/bucket?uploads", timeout=30) as answer:
            listing = answer.read().decode()
        found = [key for key in re.findall("<Upload>.*?<Key>([^<]*)</Key>", listing, re.DOTALL) if place in key]
        return found + [str(path) for path in (self.web.root / place).rglob(".*")]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with nginx(tmp_path_factory.mktemp("nginx") / "home") as web, moto(tmp_path_factory.mktemp("moto")) as objects:
        yield Servers(web, objects)


class Campaign:
    """A directory in which agents live and die."""

    def __init__(
        self, directory: Path, jobs: int, servers: Servers | None = None, kinds: Sequence[str] = KINDS
    ) -> None:
        self.directory = directory
        self.servers, self.place = servers, os.urandom(8).hex()
        kinds = kinds if servers is None else (*kinds, "web", "objects")
        self.jobs = [words(number, kinds[number % len(kinds)]) for number in range(jobs)]
        if servers is not None:
            there = {"elements": servers.elements(self.place), "words": servers.words}
            (directory / "servers.json").write_text(json.dumps(there))
        for name in ("root", "disk", "buffer", "sandboxes", "out"):
            (directory / name).mkdir()
        for job in self.jobs:
            (directory / f"input.{job['job_id']}").write_text(f"cargo of {job['job_id']}\n")
        (directory / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in self.jobs))
        self.lives = 0

    def agent(self, *options: str) -> subprocess.Popen[bytes]:
        self.lives += 1
        backend = ("asyncio", "uvloop", "trio")[self.lives % 3]
        log = (self.directory / "log").open("ab")
        with log:
            log.write(f"--- {self.lives} {backend} {' '.join(options)}\n".encode())
            log.flush()
            return subprocess.Popen(
                [sys.executable, str(AGENT), str(self.directory), backend, *options],
                stdout=log, stderr=log, cwd=self.directory, start_new_session=True,
            )  # fmt: skip

    def lives_on(self) -> None:
        """Until all jobs have ended."""
        for _ in range(5):
            with self.agent() as agent:
                if agent.wait(60) == 0:
                    return
        raise AssertionError(self.log())

    def log(self) -> str:
        return (self.directory / "log").read_text()[-6000:]

    # -- what must hold ----------------------------------------------------------------------------------------------

    def check(self, *, reboots: bool = False) -> None:
        lines = self.told("ended")
        with Logbook.look(self.directory / "journal") as book:
            assert book.open_jobs() == [], self.log()
            for job in self.jobs:
                self.check_job(job, book, 1000 if reboots else MOST_RERUNS + 1)
        assert not (self.directory / "clashes").exists(), (self.directory / "clashes").read_text()
        assert {json.loads(line)[0] for line in lines} == {job["job_id"] for job in self.jobs}
        self.check_remains()

    def check_job(self, job: dict[str, Any], book: Logbook, most: int) -> None:
        name, attempt = job["job_id"], 0
        while (history := book.history(name, attempt + 1)) is not None:
            attempt += 1
            life = Lifecycle.of(history.events)
            assert life.stage is Stage.FINISHED
            last = life.result()
        assert attempt >= 1
        assert attempt <= most
        kind = name.rstrip("0123456789")
        content = f"cargo of {name}\n"
        here, there = self.directory / "disk" / "vo" / name, self.directory / "buffer" / "vo" / name
        if last.status == "Rescheduled":  # it was lost more often than a node tries
            assert last.failure is not None
            assert last.failure.kind in {"PayloadLost", "RescheduleJob"}
        elif kind in {"plain", "early"}:
            assert (str(last.status), str(last.failure)) == ("Done", "None"), self.log()
            assert here.read_text() == content
        elif kind in {"web", "objects"}:
            assert self.servers is not None
            assert (str(last.status), str(last.failure)) == ("Done", "None"), self.log()
            assert self.servers.content(kind, f"{self.place}/vo/{name}") == content
            assert self.servers.content(kind, f"{self.place}/vo/more.{name}") == "more\n"
        elif kind == "failover":
            assert last.status == "Completed"
            assert there.read_text() == content
        elif kind == "fail":
            assert last.status == "Failed"
            assert not here.exists()
        else:
            assert last.status in {"Killed", "Done"}
        assert self.told("starts").count(name) <= attempt, "one attempt is one start, at most"
        self.check_hooks(name, attempt)

    def check_hooks(self, name: str, attempts: int) -> None:
        """One that had returned is not called again, so of none there is a call after the next one's first."""
        order = ["stageIn", "preProcess", "postProcess"]
        calls = [line.split() for line in self.told("hooks")]
        for attempt in range(1, attempts + 1):
            own = [order.index(hook) for job_id, number, hook in calls if (job_id, int(number)) == (name, attempt)]
            assert own == sorted(own), (name, attempt, own)

    def check_remains(self) -> None:
        assert list((self.directory / "root").iterdir()) == []
        assert list((self.directory / "journal" / "payloads").iterdir()) == []
        for name in ("disk", "buffer", "sandboxes", "out"):
            assert list((self.directory / name).rglob(".*")) == [], self.log()
        assert self.servers is None or self.servers.uploads(self.place) == [], self.log()
        for _ in range(100):
            if not (left := processes_in(self.directory)):
                break
            time.sleep(0.05)
        assert left == []

    def told(self, name: str) -> list[str]:
        path = self.directory / name
        return path.read_text().splitlines() if path.exists() else []


def processes_in(directory: Path) -> list[int]:
    found = list[int]()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if f"CAMPAIGN={directory}\0".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_an_agent_that_is_left_alone_brings_all_to_their_ends(tmp_path: Path, servers: Servers) -> None:
    campaign = Campaign(tmp_path, 8, servers)
    campaign.lives_on()
    assert campaign.lives == 1
    # nothing is lost, and nothing is told twice
    assert len(campaign.told("ended")) == len(campaign.jobs)
    campaign.check()


def dead_at_records(campaign: Campaign, generator: random.Random, kills: int, when: Sequence[str] = WHEN) -> int:
    """So many times, each a few records on; how often it was."""
    for number in range(kills):
        with campaign.agent(f"--die-{generator.choice(when)}", str(generator.randint(1, 14))) as agent:
            code = agent.wait(60)
        if code == 0:
            return number
        assert code == -9, campaign.log()
    return kills


@pytest.mark.parametrize("when", WHEN)
def test_an_agent_dies_at_each_record(tmp_path: Path, when: str, servers: Servers) -> None:
    """Every few records in the short form; the jobs go on where they stood, so all boundaries of a life are met."""
    campaign = Campaign(tmp_path, 8, servers)
    dead_at_records(campaign, random.Random(when), 8, [when])
    campaign.lives_on()
    campaign.check()


NOT_MET: Final = {
    "RegistrationRequested": "the catalog is never down",
    "RemovalRequested": "nothing resists: see test_killed_uploads.py",
    "OperationDone": "where the failover is wanted there never is anything: see test_killed_operations.py",
    "OperationDropped": "nobody drops any",
    "LimitReached": "no payload is out of bounds: see test_takeover.py",
    "SoftStopOrdered": "none is asked to stop: see test_takeover.py",
    "CompanionFailed": "nothing runs beside: see test_takeover.py",
}
"""What events a campaign's jobs do not have, and why."""

BOUNDARIES: Final = [kind for kind, event in KINDS_OF_EVENTS.items() if event.kept and kind not in NOT_MET]


OF_SUCCESSORS: Final = {"KillOrdered", "PayloadAdopted"}
"""What is only done for what an earlier agent has begun; the job that is killed runs for long enough to be adopted."""


def dead_at_both_sides_of(kind: str, campaign: Campaign) -> None:
    """Of the commit of the first event of a kind; the second death is that of a successor."""
    if kind in OF_SUCCESSORS:
        with campaign.agent("--die-after-kind", "PayloadStarted") as agent:
            assert agent.wait(60) == -9, campaign.log()
    for when in reversed(WHEN):
        with campaign.agent(f"--die-{when}-kind", kind) as agent:
            assert agent.wait(60) == -9, f"{when} {kind}: {campaign.log()}"


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in {"FileStagedOut", "PayloadStarted"} else pytest.mark.long)
        for kind in BOUNDARIES
    ],
)
def test_an_agent_dies_at_both_sides_of_each_kind_of_record(tmp_path: Path, kind: str, servers: Servers) -> None:
    campaign = Campaign(tmp_path, 8, servers, sorted(KINDS, key="kill".__ne__) if kind in OF_SUCCESSORS else KINDS)
    dead_at_both_sides_of(kind, campaign)
    campaign.lives_on()
    campaign.check()


def killed_at_random(campaign: Campaign, generator: random.Random, kills: int) -> int:
    """So many times, or until there is nothing left to do; how often it was."""
    for number in range(kills):
        with campaign.agent() as agent:
            try:
                code = agent.wait(generator.uniform(0.3, 1.2))
            except subprocess.TimeoutExpired:
                agent.kill()
                continue
        assert code == 0, campaign.log()
        return number
    return kills


def test_an_agent_dies_at_any_instant(tmp_path: Path, servers: Servers) -> None:
    campaign = Campaign(tmp_path, 16, servers)
    killed_at_random(campaign, random.Random(int(os.environ.get("SEED", "1"))), 6)
    campaign.lives_on()
    campaign.check()


def test_payloads_that_run_when_their_agent_is_killed_are_adopted(tmp_path: Path) -> None:
    """Some end while no agent is alive, some after: each with its own exit code and usage, and none is started again."""
    campaign = Campaign(tmp_path, 0)
    jobs = int(os.environ.get("ADOPTED", "12"))
    campaign.jobs = [
        {
            "job_id": f"plain{number}",
            "executable": "/bin/sh",
            "arguments": ["-c", RUN],
            "environment": {"NAME": f"plain{number}", "LONG": str(0.5 + number % 4), "CODE": str(number % 7)},
            "output_sandbox": ["std.out"],
        }
        for number in range(jobs)
    ]
    for number in range(jobs):
        (tmp_path / f"input.plain{number}").touch()
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in campaign.jobs))
    with campaign.agent("--cores", str(jobs)) as agent:
        deadline = time.monotonic() + 30
        while running(tmp_path) < jobs and time.monotonic() < deadline:
            time.sleep(0.02)
        agent.kill()
    assert running(tmp_path) == jobs, campaign.log()
    time.sleep(2)  # the time for which there is no agent
    with campaign.agent("--cores", str(jobs)) as agent:
        assert agent.wait(60) == 0, campaign.log()
    with Logbook.look(tmp_path / "journal") as book:
        for number in range(jobs):
            history = book.history(f"plain{number}")
            assert history is not None
            result = Lifecycle.of(history.events).result()
            assert result.attempt == 1, result
            assert result.outcome is not None
            assert result.outcome.exit_code == number % 7, result
            assert result.outcome.wall_seconds >= 0.5 + number % 4 - 0.1
            assert result.outcome.cpu_seconds > 0
    assert sorted(campaign.told("starts")) == sorted(job["job_id"] for job in campaign.jobs)
    campaign.check_remains()


def running(directory: Path) -> int:
    """How many payloads are known to have been started."""
    try:
        with Logbook.look(directory / "journal") as book:
            return sum(any(isinstance(event, PayloadStarted) for event in job.events) for job in book.open_jobs())
    except JournalFault:
        return 0


@pytest.mark.parametrize("when", ["power", "full"])
def test_power_fails_or_the_disk_is_full_for_a_moment(tmp_path: Path, when: str) -> None:
    """After a power failure there is only what was synced, no process, and another boot. A full disk ends an agent, in
    order; the next one has the room."""
    campaign, generator = Campaign(tmp_path, 6), random.Random(when)
    for _ in range(4):
        boot = str(generator.random()) if when == "power" else ""
        with campaign.agent("--boot", boot, f"--{when}-at", str(generator.randint(2, 25))) as agent:
            code = agent.wait(60)
        if code == 0:
            break
        assert code == (-9 if when == "power" else 1), campaign.log()
        if when == "power":
            machine_stops(campaign)
    campaign.lives_on()
    campaign.check(reboots=when == "power")


def machine_stops(campaign: Campaign) -> None:
    """No process is left, and of the journal only what a sync had brought to the disk: the agent copied it then."""
    deadline = time.monotonic() + 30
    while left := processes_in(campaign.directory):
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline
    synced, journal = campaign.directory / "synced", campaign.directory / "journal"
    if synced.is_dir():
        for path in journal.glob("journal.*"):
            path.unlink()
        for path in synced.iterdir():
            shutil.copy(path, journal)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_500_kills(tmp_path: Path, servers: Servers) -> None:
    seed = random.randrange(2**32)
    generator, kills, rounds = random.Random(seed), 0, 0
    while kills < 500:
        rounds += 1
        campaign = Campaign(made(tmp_path / str(rounds)), 24, servers)
        try:
            if rounds % 2:
                kills += killed_at_random(campaign, generator, 25)
            else:
                kills += dead_at_records(campaign, generator, 25)
            campaign.lives_on()
            campaign.check()
        except AssertionError as exc:
            raise AssertionError(f"round {rounds} of seed {seed}, after {kills} kills") from exc
        shutil.rmtree(campaign.directory)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory
