"""What a job's next agent makes of a payload that an earlier one had, and had begun to end: real agents, killed."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import sh, until
from following import happens, kinds
from loadmaster import (
    JobDescription,
    JobExecutionCoordinator,
    JobHandle,
    JobResult,
    Ledger,
    Node,
    Site,
    Status,
    run_job,
)
from loadmaster.description import Containment
from loadmaster.errors import WorkdirFault
from loadmaster.events import Event, LimitReached, PayloadStarted
from loadmaster.journal import open_journal
from loadmaster.lifecycle import Lifecycle
from loadmaster.logbook import Logbook
from loadmaster.payload.usage import read_stat
from loadmaster.recovery import Succession
from loadmaster.result import EndedBy, Verdict
from loadmaster.world import World

AGENT = """
import json, sys
from pathlib import Path
import anyio
from loadmaster import JobDescription, JobExecutionCoordinator, Site, run_job
from loadmaster.errors import HoldJob
from loadmaster.journal import open_journal
from loadmaster.world import World

place, words, world = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])

class Worried(JobExecutionCoordinator):
    async def preProcess(self, command, exeEnv):
        self.job.start_soon(self.worry)
        return await super().preProcess(command, exeEnv)

    async def worry(self):
        while not (self.job.workdir / "ready").exists():
            await anyio.sleep(0.02)
        raise HoldJob("the calibration is of another year")

async def main():
    site = Site(output_directory=str(place / "out"), payload=World(**world))
    async with open_journal(place / "journal") as journal:
        coordinator = Worried if words.get("job_name") == "worried" else JobExecutionCoordinator
        await run_job(JobDescription(**words), journal=journal, root=place / "root", site=site, coordinator=coordinator)

anyio.run(main)
"""


class Place:
    """A directory in which one agent is killed, and the next one comes: this process."""

    def __init__(self, place: Path, root: Path) -> None:
        self.place, self.root = place, root
        self.world: dict[str, Any] = {"containment": [Containment.SUBREAPER]}
        self.agent: subprocess.Popen[str] | None = None

    def file(self, name: str) -> Path:
        return self.root / "7" / name

    async def killed(self, words: dict[str, Any], when: Callable[[], bool]) -> None:
        """Run the job below an agent until then, and kill that."""
        argv = [
            sys.executable,
            "-c",
            AGENT,
            str(self.place),
            json.dumps({"job_id": "7", **words}),
            json.dumps(self.world),
        ]
        self.agent = await to_thread.run_sync(lambda: subprocess.Popen(argv, text=True))
        await until(when, 30)
        while not any(isinstance(event, PayloadStarted) for event in await self.events()):
            await anyio.sleep(0.01)
        self.kill()

    def kill(self) -> None:
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait()

    async def goes_on(self, words: dict[str, Any], *, journal: str = "journal", **options: Any) -> JobResult:
        """The job's end, with the next agent."""
        options = {"root": self.root, "site": self.site, **options}
        async with open_journal(self.place / journal) as opened:
            return await run_job(JobDescription(**{"job_id": "7", **words}), journal=opened, **options)

    @property
    def site(self) -> Site:
        return Site(output_directory=str(self.place / "out"), payload=World(**self.world))

    async def events(self) -> Sequence[Event]:
        def read() -> Sequence[Event]:
            with Logbook.look(self.place / "journal") as book:
                history = book.history("7", 1)
            return () if history is None else history.events

        return await to_thread.run_sync(read)

    async def started(self) -> PayloadStarted:
        (started,) = (event for event in await self.events() if isinstance(event, PayloadStarted))
        return started


@pytest.fixture
def place(tmp_path: Path, root: Path) -> Iterator[Place]:
    place = Place(tmp_path, root)
    yield place
    place.kill()


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    found = read_stat(pid)
    return found is None or found.state in "ZX"


STUBBORN = "trap 'touch heard' TERM; echo x >> ran; cp ran {place}/ran; touch ready; while :; do sleep 0.05; done"


def stubborn(place: Place, **words: Any) -> dict[str, Any]:
    """A job whose payload hears that it should end, and does not."""
    return {**sh(STUBBORN.format(place=place.place)), **words}


async def end(place: Place, how: str) -> None:
    """What becomes of the payload while nobody is its agent."""
    shim = (await place.started()).shim_pid
    if how == "gone":  # the shim keeps the grace
        await until(lambda: gone(shim), 30)
    elif how == "shim killed":
        os.kill(shim, signal.SIGKILL)


# -- what an agent had ordered -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["runs", "gone", "shim killed"])
async def test_a_payload_that_a_limit_was_stopping_is_not_run_again(place: Place, how: str) -> None:
    """The agent is killed in the grace. Its successor said PayloadLost, or let it go on."""
    words = stubborn(place, limits={"wall_seconds": 0.5, "grace_seconds": 30 if how == "runs" else 1})
    await place.killed(words, lambda: place.file("heard").exists())
    await end(place, how)
    result = await place.goes_on({**words, "limits": {"grace_seconds": 0.2}})  # nothing is over a limit any more
    assert (result.status, result.failure and result.failure.kind) == (Status.FAILED, "LimitExceeded"), result.failure
    assert str(result.failure).startswith("LimitExceeded: wall time")
    assert result.outcome is not None
    assert result.outcome.ended_by is EndedBy.LIMIT
    assert kinds(await place.events()).count("LimitReached") == 1
    assert (place.place / "ran").read_text() == "x\n"


async def test_a_limit_that_an_agent_had_found_reached_and_not_acted_on_is_acted_on_by_the_next(place: Place) -> None:
    words = sh("touch ready; trap 'exit 7' TERM; while :; do sleep 0.05; done")
    await place.killed(words, lambda: place.file("ready").exists())
    async with open_journal(place.place / "journal") as journal:
        await journal.append(LimitReached("7", 1, datetime.now(UTC), Verdict("memory", 3e9, 2e9, "bytes")))
    result = await place.goes_on(words)
    assert str(result.failure) == "LimitExceeded: memory of 3 GB is over the limit of 2 GB"
    assert result.outcome is not None
    assert (result.outcome.exit_code, result.outcome.ended_by) == (7, EndedBy.LIMIT)


@pytest.mark.parametrize("how", ["runs", "gone", "shim killed"])
async def test_a_payload_that_a_companion_had_ended_ends_the_job_for_its_reason(place: Place, how: str) -> None:
    words = stubborn(place, job_name="worried", limits={"grace_seconds": 30 if how == "runs" else 1})
    await place.killed(words, lambda: place.file("heard").exists())
    await end(place, how)
    result = await place.goes_on({**words, "limits": {"grace_seconds": 0.2}})
    assert str(result.failure) == "HoldJob: the calibration is of another year"
    assert result.outcome is not None
    assert result.outcome.ended_by is EndedBy.COORDINATOR
    assert kinds(await place.events()).count("CompanionFailed") == 1
    assert (place.place / "ran").read_text() == "x\n"


async def test_a_payload_that_was_asked_to_wind_down_is_not_asked_twice_and_may_do_so(place: Place) -> None:
    script = "trap 'echo x >> heard; sleep 1; cp heard {}/heard; exit 138' USR1; while :; do sleep 0.05; done"
    words = {**sh(script.format(place.place)), "limits": {"wall_seconds": 3}}
    words |= {"stop_pattern": "heard", "stop_signal": int(signal.SIGUSR1), "stop_seconds": 10}
    await place.killed(words, lambda: place.file("heard").exists())
    result = await place.goes_on({**words, "limits": {"wall_seconds": 60}})
    assert result.status is Status.DONE, result.failure
    assert result.outcome is not None
    assert result.outcome.stopped_softly
    assert (place.place / "heard").read_text() == "x\n"
    assert kinds(await place.events())[5:8] == ["PayloadStarted", "SoftStopOrdered", "PayloadAdopted"]


# -- a shim that was killed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_by", "status"), [(Containment.PID_NAMESPACE, Status.RESCHEDULED), (Containment.SESSION, Status.FAILED)]
)
async def test_a_shim_that_is_killed_loses_the_payload_also_while_the_agent_lives(
    place: Place, held_by: Containment, status: Status
) -> None:
    """Without a shim it is the payload that is killed, and that is its own end."""
    place.world["containment"] = [held_by]
    handle, results = JobHandle(), list[JobResult]()

    async def run() -> None:
        described = JobDescription(job_id="7", **sh("sleep 1000"))
        results.append(await run_job(described, handle=handle, root=place.root, site=place.site))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await happens(PayloadStarted)(handle)
        started = handle.life.started
        assert started is not None
        os.kill(started.shim_pid or started.pid, signal.SIGKILL)
    (result,) = results
    assert result.status is status, result.failure
    if status is Status.RESCHEDULED:
        assert str(result.failure) == "PayloadLost: what held the payload is gone, and how it ended is not known"


# -- a journal that has lost its end -------------------------------------------------------------------------------


def cut(journal: Path, events: int) -> None:
    """Lose all but so many events of the one job."""
    (path,) = journal.glob("journal.*.db")
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("DELETE FROM events WHERE number > ?", (events,))
    if events == 0:
        database.execute("DELETE FROM jobs")
    database.close()


@pytest.mark.parametrize(
    ("events", "how"), [(0, "runs"), (1, "runs"), (4, "runs"), (4, "gone"), (5, "runs"), (5, "gone")]
)
async def test_a_payload_that_the_journal_has_lost_is_ended_or_adopted_and_its_job_never_failed(
    place: Place, events: int, how: str
) -> None:
    """`PayloadNotStarted: File exists`, said a journal that ended with PayloadPrepared, and its payload ran on."""
    place.world["containment"] = [Containment.PID_NAMESPACE]
    script = f"echo x >> {place.place}/ran; touch ready; until [ -e go ]; do sleep 0.05; done"
    await place.killed(sh(script), lambda: place.file("ready").exists())
    started = await place.started()
    if how == "gone":
        place.file("go").touch()
        await until(lambda: gone(started.shim_pid))
    await to_thread.run_sync(cut, place.place / "journal", events)
    if events == 5 and how == "runs":  # it has a slot
        with anyio.CancelScope() as leaving:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(place.goes_on, sh(script))
                while "PayloadAdopted" not in kinds(await place.events()):
                    await anyio.sleep(0.05)
                leaving.cancel()
        assert (await place.started()).shim_pid == started.shim_pid
    result = await place.goes_on(sh(script))
    assert gone(started.shim_pid)
    assert (place.place / "ran").read_text() == "x\n"
    if events == 5 and how == "gone":
        assert (result.status, result.attempt) == (Status.DONE, 1)
        return
    assert (result.status, result.failure and result.failure.kind) == (Status.RESCHEDULED, "PayloadLost"), result
    again = await place.goes_on(sh("true"), attempt=2)
    assert again.status is Status.DONE, again.failure
    assert list((place.place / "journal" / "payloads").iterdir()) == []


async def test_a_node_ends_a_payload_it_has_forgotten_before_anything_waits(place: Place) -> None:
    """A job that only waits may be given back, to be run elsewhere; its payload ran on here."""
    script = f"echo x >> {place.place}/ran; touch ready; [ -e {place.place}/again ] || sleep 1000"
    await place.killed(sh(script), lambda: place.file("ready").exists())
    started = await place.started()
    await to_thread.run_sync(cut, place.place / "journal", 1)
    async with Node(ledger=Ledger(1), root=place.root, site=place.site, journal=place.place / "journal") as node:
        assert gone(started.shim_pid)
        (place.place / "again").touch()
        (handle,) = node.resumed
        lost = await handle.wait()
        assert (lost.status, lost.failure and lost.failure.kind) == (Status.RESCHEDULED, "PayloadLost")
        following = node.handle("7")
        assert following is not None
        result = await following.wait()
        assert (result.status, result.attempt) == (Status.DONE, 2), result.failure
    assert (place.place / "ran").read_text() == "x\nx\n"


@pytest.mark.parametrize("when", ["while it is delivered", "while its end is written", "and the agent dies"])
async def test_a_job_whose_lost_attempt_is_killed_does_not_run_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """It was too late to end that attempt, and the next one ran to its end. The order is for the job."""
    place.world["containment"] = [Containment.PID_NAMESPACE]
    script = f"echo x >> {place.place}/ran; touch ready; [ -e {place.place}/again ] || sleep 1000"
    await place.killed(sh(script), lambda: place.file("ready").exists())
    await to_thread.run_sync(cut, place.place / "journal", 4)
    (place.place / "again").touch()
    taken: list[bool] = []
    words: dict[str, Any] = {"ledger": Ledger(1), "root": place.root, "site": place.site}

    def kill() -> None:
        taken.extend([handle.kill("stale", attempt=7), handle.kill("unwanted", attempt=1)])

    async def deliver(_: JobExecutionCoordinator) -> None:
        if when != "while its end is written":
            kill()
        if when == "and the agent dies":
            await handle.keep_order()
            leaving.cancel()
            await anyio.sleep_forever()

    usual = Succession.write_soon

    def write_soon(self: Succession, events: Sequence[Event], told: Any) -> Any:
        write = usual(self, events, told)
        if self.has_next and not taken:
            kill()
        return write

    monkeypatch.setattr(JobExecutionCoordinator, "stageOut", deliver)
    monkeypatch.setattr(Succession, "write_soon", write_soon)
    with anyio.CancelScope() as leaving:
        async with Node(journal=place.place / "journal", **words) as node:
            (handle,) = node.resumed
            await handle.wait()
            await node.wait_idle()
    if when == "and the agent dies":
        monkeypatch.undo()
        async with Node(journal=place.place / "journal", **words) as node:
            await node.wait_idle()
    assert taken == [False, True]
    async with open_journal(place.place / "journal") as journal:
        history = await journal.history("7")
    assert history is not None
    assert history.attempt == (2 if when == "while its end is written" else 1)
    assert history.status == Status.KILLED
    assert str(Lifecycle.of(history.events).result().failure) == "JobWasKilled: unwanted"
    assert kinds(history.events).count("KillOrdered") == 1
    assert (place.place / "ran").read_text() == "x\n"


# -- one work directory, two journals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held_by", "journal"),
    [
        (Containment.PID_NAMESPACE, "another"),
        (Containment.SUBREAPER, "another"),
        (Containment.SUBREAPER, None),
        (Containment.SESSION, None),
    ],
)
async def test_a_work_directory_in_which_a_payload_runs_is_nobody_elses(
    place: Place, held_by: Containment, journal: str | None
) -> None:
    """Its agent was killed, and with it went the lock: somebody else emptied the directory under the payload."""
    place.world["containment"] = [held_by]
    words = sh("touch kept ready; until [ -e go ]; do sleep 0.05; done; [ -e kept ] && exit 3")
    await place.killed(words, lambda: place.file("ready").exists())
    started = await place.started()
    with pytest.raises(
        WorkdirFault, match=r"the payload of a job 7 still runs .*\(process [0-9, ]+\).* journal of that"
    ):
        if journal is None:
            await run_job(JobDescription(job_id="7", **words), root=place.root, site=place.site)
        else:
            await place.goes_on(words, journal=journal)
    assert place.file("kept").exists()
    place.file("go").touch()
    if held_by is Containment.SESSION:  # which nobody can adopt
        await until(lambda: gone(started.pid))
    result = await place.goes_on(words)
    assert result.status is (Status.RESCHEDULED if held_by is Containment.SESSION else Status.FAILED)
    if result.status is Status.FAILED:
        assert result.outcome is not None
        assert result.outcome.exit_code == 3
    assert not place.file("").exists()
