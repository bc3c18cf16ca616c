"""Jobs as a real DiracX server sees them: its own history of each, what it orders, its sandboxes, its absences."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import to_thread

from conftest import sh, until
from following import Signpost, happens
from loadmaster import (
    ComputingElement,
    JobDescription,
    JobExecutionCoordinator,
    JobHandle,
    Ledger,
    Node,
    RescheduleJob,
    Site,
    Status,
    run_job,
)
from loadmaster.dirac import MAY_FOLLOW, JobStatus, Major
from loadmaster.diracx.client import DiracX, open_diracx
from loadmaster.diracx.errors import CredentialsRefused, DiracxRefused
from loadmaster.diracx.outbox import FileOutbox, StatusReport
from loadmaster.diracx.preferences import Preferences
from loadmaster.diracx.reporter import Reporter, open_reporter
from loadmaster.diracx.sandboxes import sandboxes
from loadmaster.events import PayloadStarted
from loadmaster.logbook import Logbook
from loadmaster.staging.engine import open_transfers
from servers_diracx import DiracxServer, Proxy, Said, diracx_server

pytestmark = [pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiracxServer]:
    cache = request.config.cache
    assert cache is not None
    with diracx_server(tmp_path_factory.mktemp("diracx"), cache.mkdir("diracx")) as server:
        yield server


@pytest.fixture
def proxy(server: DiracxServer) -> Iterator[Proxy]:
    with Proxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def preferences(server: DiracxServer, tmp_path: Path) -> Preferences:
    return Preferences(
        url=server.url,
        credentials_path=server.credentials(tmp_path / "pilot.json"),
        owner_credentials_path=server.credentials(tmp_path / "owner.json", "alice", "user"),
    )


Pilot = tuple[Node, Reporter, DiracX]


@pytest.fixture
def pilot(root: Path, out: Path) -> Callable[..., Any]:
    """A node whose jobs are reported."""

    @asynccontextmanager
    async def pilot(preferences: Preferences, cores: int = 4, **words: Any) -> AsyncIterator[Pilot]:
        async with (
            open_diracx(preferences) as diracx,
            open_reporter(diracx, **{"beat_seconds": 2.0, **words}) as reporter,
            anyio.create_task_group() as group,
        ):
            site = Site(output_directory=str(out / "{job_id}"))
            async with Node(site=site, ledger=Ledger(cores), root=root, heartbeat_seconds=0.5) as node:
                group.start_soon(reporter.listen, node)
                yield node, reporter, diracx
                await node.wait_idle()
                node.close_events()

    return pilot


def described(number: int, **words: Any) -> JobDescription:
    return JobDescription(job_id=str(number), **{"executable": "/bin/true", **words})


asked: Callable[..., Awaitable[Any]] = to_thread.run_sync
"""The server is asked in a thread: the loop goes on."""


def is_legal(history: Sequence[Said]) -> bool:
    """Whether each status may follow the one before it, from Matched on, and times grow."""
    status = Major.MATCHED
    for said in history:
        new = Major(said.status)
        if new != status and new not in MAY_FOLLOW[status]:
            return False
        status = new
    times = [said.time for said in history]
    return times == sorted(times)


def told(history: Sequence[Said]) -> list[str]:
    """A history as one reads it, without what is said twice."""
    lines = [f"{said.status}: {said.minor}" for said in history]
    return [line for at, line in enumerate(lines) if at == 0 or line != lines[at - 1]]


DONE = [
    "Running: Job Initialization",
    "Running: Application",
    "Completing: Application Finished Successfully",
    "Done: Execution Complete",
]


# -- what becomes of jobs ------------------------------------------------------------------------------------------------


async def test_fifty_jobs_through_a_node_have_their_history_at_the_server(
    server: DiracxServer, preferences: Preferences, pilot: Any
) -> None:
    jobs = await asked(server.submit, 50)
    async with pilot(preferences) as (node, reporter, _):
        for number in jobs:
            node.submit(described(number))
    assert reporter.undelivered == ()
    assert reporter.refused == ()
    histories = await asked(server.histories, jobs)
    assert all(is_legal(history) for history in histories.values())
    assert {number: told(history) for number, history in histories.items()} == dict.fromkeys(jobs, DONE)
    assert await asked(server.statuses, jobs) == dict.fromkeys(jobs, ("Done", "Execution Complete"))


class Reports(JobExecutionCoordinator):
    async def postProcess(self) -> None:
        await self.job.report("ProcessedEvents", 42)
        await self.job.report("Strange name \udc80", "with 'quotes' and \udc80 and \0")


class Again(JobExecutionCoordinator):
    async def stageIn(self) -> None:
        raise RescheduleJob("no conditions database on this node")


async def test_each_kind_of_end_is_told_in_dirac_s_words(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy
) -> None:
    done, failed, missing, again = await asked(server.submit, 4)
    async with pilot(preferences.model_copy(update={"url": proxy.url})) as (node, reporter, _):
        node.submit(described(done, **sh("echo hello"), output_sandbox=["std.out"]), coordinator=Reports)
        node.submit(described(failed, **sh("exit 3")))
        node.submit(described(missing, input_data=["/nowhere/at/all"]))
        node.submit(described(again), coordinator=Again)
    statuses = await asked(server.statuses, [done, failed, missing, again])
    assert statuses[done] == ("Done", "Execution Complete")
    assert statuses[failed][0] == "Failed"
    assert statuses[again] == ("Received", "Job Rescheduled")
    histories = await asked(server.histories, [done, failed, missing])
    assert told(histories[done]) == [
        *DONE[:3], "Completing: Uploading Output Sandbox", "Completing: Output Sandbox Uploaded", DONE[3],
    ]  # fmt: skip
    assert "Completing: Application Finished With Errors" in told(histories[failed])
    assert "Running: Input Data Resolution" in told(histories[missing])
    assert {said.source for said in histories[done]} == {"JobWrapper"}
    assert reporter.undelivered == ()
    parameters: dict[str, str] = {}
    for method, path, body in proxy.asked:
        if (method, path) == ("PATCH", "/api/jobs/metadata"):
            parameters |= json.loads(body).get(str(done), {})
    assert parameters["ProcessedEvents"] == "42"
    assert parameters["Strange name ?"] == "with 'quotes' and ? and \ufffd"
    assert parameters.keys() >= {"HostName", "JobWrapperPID", "PayloadPID", "TotalCPUTime(s)", "WallClockTime(s)"}


async def test_a_job_that_runs_beats_with_its_last_lines(
    server: DiracxServer, preferences: Preferences, pilot: Any, tmp_path: Path
) -> None:
    (number,) = await asked(server.submit)
    post = Signpost(tmp_path / "post")
    async with pilot(preferences) as (node, _, _):
        handle = node.submit(described(number, **sh(f"echo the last line; echo go > {post}")))
        await happens(PayloadStarted)(handle)
        printed = ""
        with anyio.fail_after(60):
            while "the last line" not in printed:
                printed = await asked(server.printed, number)
        await post.reached()
    assert "Last 1 lines of application output from Watchdog on " in printed
    beats = await asked(server.beats, number)
    assert beats.keys() == {"LoadAverage", "MemoryUsed", "CPUConsumed", "WallClockTime", "AvailableDiskSpace"}
    assert 0 < float(beats["MemoryUsed"]) < 1000


# -- kills ---------------------------------------------------------------------------------------------------------------


async def test_a_job_that_is_killed_through_the_server_dies_with_the_reason(
    server: DiracxServer, preferences: Preferences, pilot: Any
) -> None:
    killed, other = await asked(server.submit, 2)
    async with pilot(preferences) as (node, reporter, _):
        handle = node.submit(described(killed, **sh("sleep 600")))
        spared = node.submit(described(other, **sh("sleep 3")))
        await happens(PayloadStarted)(handle)
        await until(lambda: not reporter.waiting, 30)  # of two updates at once, the server keeps either
        await asked(server.kill, killed)
        with anyio.fail_after(30):
            result = await handle.wait()
        assert (await spared.wait()).status is Status.DONE
    assert result.status is Status.KILLED
    assert str(result.failure).startswith("JobWasKilled: killed: DiracX ")
    assert await asked(server.statuses, [killed, other]) == {
        killed: ("Killed", "Received Kill signal"),
        other: ("Done", "Execution Complete"),
    }


async def test_a_kill_whose_answer_was_lost_is_still_heard(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy
) -> None:
    """A command comes once: the server thinks that it was delivered, and only holds the job as Killed."""
    (number,) = await asked(server.submit)
    proxy.fate = lambda *asked: "lost" if asked[1] == "/api/jobs/heartbeat" else ""
    async with pilot(preferences.model_copy(update={"url": proxy.url})) as (node, _, _):
        handle = node.submit(described(number, **sh("sleep 600")))
        await happens(PayloadStarted)(handle)
        await until(lambda: proxy.count("PATCH", "/api/jobs/heartbeat") > 0, 30)
        await asked(server.kill, number)
        with anyio.fail_after(60):
            result = await handle.wait()
    assert str(result.failure) == "JobWasKilled: killed: DiracX holds it as Killed"


async def test_a_job_that_was_killed_before_it_began_does_not_run(
    server: DiracxServer, preferences: Preferences, pilot: Any
) -> None:
    (number,) = await asked(server.submit)
    await asked(server.kill, number)
    async with pilot(preferences) as (node, _, _):
        handle = node.submit(described(number, **sh("sleep 600")))
        with anyio.fail_after(60):
            assert (await handle.wait()).status is Status.KILLED


# -- absences ------------------------------------------------------------------------------------------------------------


async def test_the_server_may_be_restarted_in_the_middle(
    server: DiracxServer, preferences: Preferences, pilot: Any
) -> None:
    jobs = await asked(server.submit, 20)
    async with pilot(preferences) as (node, reporter, _):
        handles = [node.submit(described(number, **sh("sleep 0.2"))) for number in jobs]
        await handles[3].wait()
        await asked(server.order, "stop")
        await handles[15].wait()
        assert reporter.waiting > 0
        await asked(server.order, "start")
    assert reporter.undelivered == ()
    histories = await asked(server.histories, jobs)
    for history in histories.values():
        once = list(dict.fromkeys(history))
        assert is_legal(once)
        assert told(once) == DONE


async def test_nothing_is_lost_when_a_tenth_of_the_answers_is(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy
) -> None:
    chance = random.Random(7)
    fates = ["lost", "500", "500 after", "reset", "later"]
    proxy.fate = lambda *asked: chance.choice(fates) if chance.random() < 0.1 else ""
    jobs = await asked(server.submit, 30)
    async with pilot(preferences.model_copy(update={"url": proxy.url})) as (node, reporter, _):
        for number in jobs:
            node.submit(described(number, **sh("sleep 0.5")))
    assert reporter.undelivered == ()
    assert reporter.refused == ()
    assert await asked(server.statuses, jobs) == dict.fromkeys(jobs, ("Done", "Execution Complete"))
    histories = await asked(server.histories, jobs)
    for history in histories.values():
        once = list(dict.fromkeys(history))  # what was sent twice has the same time, and says the same
        assert is_legal(once)
        assert told(once) == DONE


async def test_a_report_that_was_not_delivered_is_delivered_by_the_next_process(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (number,) = await asked(server.submit)
    proxy.fate = lambda *asked: "reset"
    through = preferences.model_copy(update={"url": proxy.url})
    async with FileOutbox(tmp_path / "outbox.sqlite") as outbox:
        async with pilot(through, outbox=outbox, flush_seconds=0.5) as (node, reporter, _):
            node.submit(described(number))
        assert [each.said.minor for each in reporter.undelivered if isinstance(each, StatusReport)] == [
            line.partition(": ")[2] for line in DONE
        ]
    assert f"reports of jobs {number} were not delivered: they are kept for the next time" in caplog.text
    async with (
        FileOutbox(tmp_path / "outbox.sqlite") as outbox,
        open_diracx(preferences) as diracx,
        open_reporter(diracx, outbox=outbox) as reporter,
    ):
        assert reporter.waiting > 0
    assert reporter.waiting == 0
    assert told((await asked(server.histories, [number]))[number]) == DONE


async def test_what_the_server_took_for_old_is_said_again(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy
) -> None:
    """During an outage the job ends, and the server declares it stalled; the end is older than that."""
    (number,) = await asked(server.submit)
    async with pilot(preferences.model_copy(update={"url": proxy.url})) as (node, reporter, _):
        handle = node.submit(described(number, **sh("sleep 1")))
        await happens(PayloadStarted)(handle)
        await until(lambda: not reporter.waiting, 30)
        proxy.fate = lambda *asked: "reset"
        await handle.wait()
        await asked(server.set_status, [number], "Stalled", "Job stalled: pilot not running")
        proxy.fate = lambda *asked: ""
    assert await asked(server.statuses, [number]) == {number: ("Done", "Execution Complete")}


async def test_an_hour_old_report_of_a_job_that_was_matched_since_is_said_as_of_now(
    server: DiracxServer, preferences: Preferences, tmp_path: Path
) -> None:
    """So it is with a clock that is behind: what is older than the server's last line of the job is ignored there."""
    (number,) = await asked(server.submit)
    path, before = tmp_path / "outbox.sqlite", datetime.now(UTC) - timedelta(hours=1)
    said = [JobStatus("Running", "Job Initialization"), JobStatus("Completing", "Uploading"), JobStatus("Done", "End")]
    async with FileOutbox(path) as outbox:
        await outbox.put([StatusReport(number, before, each) for each in said], {})
        async with open_diracx(preferences) as diracx, open_reporter(diracx, outbox=outbox) as reporter:
            pass
        assert reporter.undelivered == ()
        assert (await outbox.load()).filed == []
    assert await asked(server.statuses, [number]) == {number: ("Done", "End")}


async def test_a_job_that_troubles_the_server_holds_up_no_other(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy
) -> None:
    *jobs, poison = await asked(server.submit, 12)
    proxy.fate = lambda method, path, body: "500" if f'"{poison}":'.encode() in body else ""
    words = preferences.model_copy(update={"url": proxy.url})
    async with pilot(words, flush_seconds=1.0) as (node, reporter, _):
        for number in (poison, *jobs):
            node.submit(described(number))
        await node.wait_idle()
        await until(lambda: {report.job for report in reporter.undelivered} == {poison}, 60)
    assert await asked(server.statuses, jobs) == dict.fromkeys(jobs, ("Done", "Execution Complete"))


async def test_a_job_the_server_does_not_have_holds_up_no_other(
    server: DiracxServer, preferences: Preferences, pilot: Any, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = await asked(server.submit, 3)
    strange = [10**9, 10**9 + 1]
    async with pilot(preferences) as (node, reporter, _):
        for number in (*strange, *jobs):
            node.submit(described(number, **sh("sleep 2.5")))
        node.submit(JobDescription(job_id="no-number", executable="/bin/true"))
    assert {report.job for report in reporter.refused} == set(strange)
    assert "DiracX has no such job" in caplog.text
    assert "job no-number: is not reported: DiracX knows jobs by numbers" in caplog.text
    assert await asked(server.statuses, jobs) == dict.fromkeys(jobs, ("Done", "Execution Complete"))


async def test_a_second_job_of_the_same_number_is_not_told_of(
    server: DiracxServer, preferences: Preferences, pilot: Any
) -> None:
    """The node refuses it. At the server, its failure would be that of the first, which goes on."""
    (number,) = await asked(server.submit)
    async with pilot(preferences) as (node, _, _):
        first = node.submit(described(number, **sh("sleep 1")))
        await happens(PayloadStarted)(first)
        second = await node.submit(described(number)).wait()
        assert second.status is Status.FAILED
        assert (await first.wait()).status is Status.DONE
    assert told((await asked(server.histories, [number]))[number]) == DONE


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_two_hundred_jobs_while_everything_fails_now_and_then(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy, tmp_path: Path
) -> None:
    """A fifth of the answers, the server three times, and once the token."""
    chance = random.Random(11)
    fates = ["lost", "500", "500 after", "reset", "later"]
    proxy.fate = lambda *asked: chance.choice(fates) if chance.random() < 0.2 else ""
    jobs = await asked(server.submit, 200)
    async with (
        FileOutbox(tmp_path / "outbox.sqlite") as outbox,
        pilot(preferences.model_copy(update={"url": proxy.url}), cores=20, outbox=outbox) as (node, reporter, _),
    ):
        handles = [node.submit(described(number, **sh("sleep 1"))) for number in jobs]
        for at in (30, 90, 150):
            await handles[at].wait()
            await asked(server.order, "kill")
            await anyio.sleep(2)
            await asked(server.order, "start")
    assert reporter.undelivered == reporter.refused == ()
    assert await asked(server.statuses, jobs) == dict.fromkeys(jobs, ("Done", "Execution Complete"))
    for some in (jobs[:100], jobs[100:]):
        for history in (await asked(server.histories, some)).values():
            once = list(dict.fromkeys(history))
            # It writes a job's status and its history one after the other. Killed in between, it refuses what it has
            # not written down of what it has done; it says so.
            if not any(said.source.endswith("(SM)") for said in once):
                assert is_legal(once)
                assert told(once) == DONE


# -- credentials ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("early", [True, False], ids=["known to be", "not known to be"])
async def test_an_expired_token_is_refreshed(
    server: DiracxServer, preferences: Preferences, pilot: Any, proxy: Proxy, early: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (number,) = await asked(server.submit)
    path = preferences.credentials_path
    good = json.loads(path.read_text())
    expired = await asked(server.order, f"expired {good['access_token']}")
    path.write_text(json.dumps({**good, "access_token": expired, "expires_on": 0 if early else 2**32}))
    caplog.set_level(logging.DEBUG)
    async with pilot(preferences.model_copy(update={"url": proxy.url})) as (node, reporter, _):
        node.submit(described(number))
    assert reporter.undelivered == ()
    assert await asked(server.statuses, [number]) == {number: ("Done", "Execution Complete")}
    assert proxy.count("POST", "/api/auth/token") == 1
    renewed = json.loads(path.read_text())
    assert renewed["access_token"] not in {expired, good["access_token"]}
    assert renewed["expires_on"] > good["expires_on"] - 3600
    for secret in (expired, *(str(each[key]) for each in (good, renewed) for key in ("access_token", "refresh_token"))):
        assert secret not in caplog.text


async def test_without_good_credentials_reports_wait_for_somebody_to_renew_them(
    server: DiracxServer, preferences: Preferences, pilot: Any
) -> None:
    (number,) = await asked(server.submit)
    good = preferences.credentials_path.read_text()
    preferences.credentials_path.write_text(json.dumps({**json.loads(good), "access_token": "x", "refresh_token": "y"}))
    async with pilot(preferences) as (node, reporter, diracx):
        with pytest.raises(CredentialsRefused) as refused:
            await diracx.set_parameters({number: {"a": "b"}})
        assert "HTTP 401" in str(refused.value)
        await node.submit(described(number)).wait()
        assert reporter.waiting > 0
        preferences.credentials_path.write_text(good)
    assert reporter.undelivered == ()
    assert await asked(server.statuses, [number]) == {number: ("Done", "Execution Complete")}


# -- sandboxes and pilots ------------------------------------------------------------------------------------------------


async def test_sandboxes_survive_the_round_trip(server: DiracxServer, preferences: Preferences, root: Path) -> None:
    """What one job leaves is what another one is given."""
    first, second = await asked(server.submit, 2)
    site = Site(sandbox_store="diracx://sandboxes", sandbox_format="tar.bz2", sandbox_limit_bytes=100 * 2**20)
    async with AsyncExitStack() as stack:
        diracx = await stack.enter_async_context(open_diracx(preferences))
        reporter = await stack.enter_async_context(open_reporter(diracx))
        transfers = await stack.enter_async_context(open_transfers(site, storages={"diracx": sandboxes(diracx)}))
        group = await stack.enter_async_context(anyio.create_task_group())
        async with Node(transfers=transfers, ledger=Ledger(2), root=root) as node:
            group.start_soon(reporter.listen, node)
            script = "echo cargo > hold.txt; mkdir logs; echo a line > logs/a.log"
            one = await node.submit(described(first, **sh(script), output_sandbox=["hold.txt", "logs"])).wait()
            assert one.status is Status.DONE, one.failure
            (pfn,) = await asked(server.ask, "GET", f"/api/jobs/{first}/sandbox/output")
            words = {"input_sandbox": [pfn if pfn.startswith("SB:") else f"SB:SandboxSE|{pfn}"], **sh("cat hold.txt")}
            two = await node.submit(described(second, **words, output_sandbox=["std.out"])).wait()
            assert two.status is Status.DONE, two.failure
            node.close_events()
    (again,) = await asked(server.ask, "GET", f"/api/jobs/{second}/sandbox/output")
    assert again != pfn
    assert (await asked(server.content, again))["std.out"] == b"cargo\n"


async def test_a_sandbox_whose_answers_are_lost_is_stored_and_assigned_once(
    server: DiracxServer, preferences: Preferences, root: Path, proxy: Proxy, caplog: pytest.LogCaptureFixture
) -> None:
    (number,) = await asked(server.submit)
    seen: set[str] = set()

    def lost_the_first_time(method: str, path: str, body: bytes) -> str:
        fate = "" if f"{method} {path}" in seen else "lost"
        seen.add(f"{method} {path}")
        return fate

    proxy.fate = lost_the_first_time
    caplog.set_level(logging.DEBUG)
    site = Site(sandbox_store="diracx://sandboxes", sandbox_format="tar.bz2")
    async with (
        open_diracx(preferences.model_copy(update={"url": proxy.url})) as diracx,
        open_transfers(site, storages={"diracx": sandboxes(diracx)}) as transfers,
        Node(transfers=transfers, ledger=Ledger(1), root=root) as node,
    ):
        result = await node.submit(described(number, **sh("echo hello"), output_sandbox=["std.out"])).wait()
    assert result.status is Status.DONE, result.failure
    (pfn,) = await asked(server.ask, "GET", f"/api/jobs/{number}/sandbox/output")
    assert (await asked(server.content, pfn))["std.out"] == b"hello\n"
    assert "X-Amz-Signature" not in caplog.text


async def test_a_pilot_s_own_token_does_for_no_sandbox(
    server: DiracxServer, preferences: Preferences, root: Path
) -> None:
    (number,) = await asked(server.submit)
    site = Site(sandbox_store="diracx://sandboxes", sandbox_format="tar.bz2")
    async with (
        open_diracx(preferences.model_copy(update={"owner_credentials_path": None})) as diracx,
        open_transfers(site, storages={"diracx": sandboxes(diracx)}) as transfers,
        Node(transfers=transfers, ledger=Ledger(1), root=root) as node,
    ):
        result = await node.submit(described(number, **sh("echo hello"), output_sandbox=["std.out"])).wait()
    assert result.status is Status.FAILED
    assert "HTTP 403" in str(result.failure)


async def test_a_pilot_is_registered_once_and_tells_of_itself(server: DiracxServer, preferences: Preferences) -> None:
    stamp = f"stamp-{random.randrange(2**32)}"
    async with open_diracx(preferences) as diracx:
        await diracx.register_pilot(stamp, "testvo", destination_site="LCG.Test.org", pilot_status="Running")
        await diracx.register_pilot(stamp, "testvo")
        await diracx.set_pilot(stamp, Status="Done", StatusReason="no more jobs", CurrentJobID=7)
        with pytest.raises(DiracxRefused, match="HTTP 403"):
            await diracx.register_pilot(f"{stamp}-2", "anothervo")
    words = {"search": [{"parameter": "PilotStamp", "operator": "eq", "value": stamp}]}
    (pilot,) = await asked(lambda: server.ask("POST", "/api/pilots/search", words))
    assert (pilot["Status"], pilot["StatusReason"], pilot["DestinationSite"]) == (
        "Done",
        "no more jobs",
        "LCG.Test.org",
    )


async def test_one_job_is_reported_by_its_handle(
    server: DiracxServer, preferences: Preferences, root: Path, out: Path
) -> None:
    (number,) = await asked(server.submit)
    handle = JobHandle()
    async with (
        open_diracx(preferences) as diracx,
        open_reporter(diracx, ce=ComputingElement(site="LCG.Test.org")) as reporter,
        anyio.create_task_group() as group,
    ):
        group.start_soon(reporter.follow, handle)
        await run_job(described(number), handle=handle, root=root, site=Site(output_directory=str(out)))
    history = (await asked(server.histories, [number]))[number]
    assert told(history) == DONE
    assert {said.source for said in history} == {"JobWrapper@LCG.Test.org"}


# -- from the command line -----------------------------------------------------------------------------------------------


Loadmaster = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def loadmaster_command(preferences: Preferences, tmp_path: Path) -> Iterator[Loadmaster]:
    """The command, in a process of its own."""
    with ExitStack() as processes:

        def run(*words: object, url: str = preferences.url, **environ: str) -> subprocess.Popen[str]:
            told = {
                "DIRACX_URL": url,
                "DIRACX_CREDENTIALS_PATH": str(preferences.credentials_path),
                "LOADMASTER_OWNER_CREDENTIALS_PATH": str(preferences.owner_credentials_path),
            }
            process = subprocess.Popen(
                [sys.executable, "-m", "loadmaster", *map(str, words)], cwd=tmp_path, env={**os.environ, **told, **environ},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            processes.enter_context(process)
            processes.callback(process.kill)
            return process

        yield run


def test_a_job_is_run_and_reported_by_its_number(
    server: DiracxServer, loadmaster_command: Loadmaster, tmp_path: Path
) -> None:
    (number,) = server.submit()
    (tmp_path / "job.json").write_text(json.dumps({**sh("echo hello"), "output_sandbox": ["std.out"]}))
    done = loadmaster_command("run", "job.json", "--reporter", "diracx", "--job-id", number)
    told_there, problems = done.communicate(timeout=120)
    assert done.returncode == 0, problems
    assert told_there.startswith("Done\n")
    assert server.statuses([number]) == {number: ("Done", "Execution Complete")}
    (pfn,) = server.ask("GET", f"/api/jobs/{number}/sandbox/output")
    assert server.content(pfn) == {"std.out": b"hello\n"}


def test_a_node_tells_of_its_jobs_and_of_itself(
    server: DiracxServer, loadmaster_command: Loadmaster, tmp_path: Path
) -> None:
    jobs, stamp = server.submit(5), f"stamp-{random.randrange(2**32)}"
    lines = [json.dumps({"job_id": str(number), "executable": "/bin/true"}) for number in jobs]
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    done = loadmaster_command("node", "jobs.jsonl", "--reporter", "diracx", DIRAC_PILOT_STAMP=stamp)
    _, problems = done.communicate(timeout=120)
    assert done.returncode == 0, problems
    assert server.statuses(jobs) == dict.fromkeys(jobs, ("Done", "Execution Complete"))
    words = {"search": [{"parameter": "PilotStamp", "operator": "eq", "value": stamp}]}
    (pilot,) = server.ask("POST", "/api/pilots/search", words)
    assert (pilot["Status"], pilot["VO"]) == ("Done", "testvo")


def test_what_a_killed_agent_could_not_tell_is_told_by_the_next(
    server: DiracxServer, loadmaster_command: Loadmaster, proxy: Proxy, tmp_path: Path
) -> None:
    """The server is away, the job ends, and the agent is killed: all it had to say is in the outbox."""
    (number,) = server.submit()
    (tmp_path / "job.json").write_text('{"executable": "/bin/true"}')
    (tmp_path / "none.jsonl").touch()
    proxy.fate = lambda *asked: "reset"
    words = ("--reporter", "diracx", "--outbox", "outbox.sqlite")
    agent = loadmaster_command("run", "job.json", "--job-id", number, "--events", "events", *words, url=proxy.url)
    wait_for(lambda: _reports_in(tmp_path / "outbox.sqlite") >= len(DONE))
    agent.kill()
    agent.communicate()
    after = loadmaster_command("node", "none.jsonl", *words)
    _, problems = after.communicate(timeout=120)
    assert after.returncode == 0, problems
    assert told(server.histories([number])[number]) == DONE


def test_a_payload_that_outlives_its_agent_beats_again_and_can_be_killed(
    server: DiracxServer, loadmaster_command: Loadmaster, tmp_path: Path
) -> None:
    """The next agent has it by the journal, and tells nothing twice."""
    (number,) = server.submit()
    (tmp_path / "jobs.jsonl").write_text(json.dumps({"job_id": str(number), **sh("sleep 600")}))
    words = ("node", "jobs.jsonl", "--journal", "journal", "--reporter", "diracx")
    agent = loadmaster_command(*words)
    wait_for(lambda: server.statuses([number])[number] == ("Running", "Application") and server.beats(number))
    agent.kill()
    agent.communicate()
    before = server.histories([number])[number]
    after = loadmaster_command(*words)
    server.kill(number)
    _, problems = after.communicate(timeout=120)
    assert after.returncode == 2, problems
    history = server.histories([number])[number]
    assert history[: len(before)] == before
    assert len(set(history)) == len(history)
    assert server.statuses([number]) == {number: ("Killed", "Received Kill signal")}


def wait_for(fact: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _reports_in(path: Path) -> int:
    """How many statuses wait there; it has an owner, so a copy is looked at."""
    copy = path.with_name("copy.sqlite")
    try:
        for end in ("", "-wal"):
            shutil.copyfile(f"{path}{end}", f"{copy}{end}")
        with closing(sqlite3.connect(copy)) as database:
            return int(database.execute("SELECT count(*) FROM reports WHERE report LIKE '%status%'").fetchone()[0])
    except (sqlite3.Error, OSError):
        return 0


@pytest.mark.parametrize(
    ("words", "environ", "told"),
    [
        (["--reporter", "diracx"], {}, ": DiracX knows jobs by numbers: --job-id N"),
        (["--reporter", "diracx", "--job-id", "7"], {"DIRACX_URL": ""}, "DIRACX_URL is not set"),
        (["--outbox", "somewhere"], {}, "--outbox: there is no --reporter"),
    ],
)
def test_what_is_missing_is_told_before_anything_is_begun(
    loadmaster_command: Loadmaster, tmp_path: Path, words: list[str], environ: dict[str, str], told: str
) -> None:
    (tmp_path / "job.json").write_text('{"executable": "/bin/true"}')
    done = loadmaster_command("run", "job.json", *words, **environ)
    _, problems = done.communicate(timeout=60)
    assert done.returncode == 1
    assert told in problems


@pytest.mark.parametrize(
    ("words", "file", "told"),
    [
        (["run", "job.json"], None, "No such file or directory"),
        (["node", "job.json"], "", "not a file of DiracX's credentials"),
        (["resume", "journal"], None, "No such file or directory"),
    ],
)
def test_without_credentials_nothing_is_begun_that_could_not_be_told(
    tmp_path: Path, words: list[str], file: str | None, told: str
) -> None:
    """The job ran to its end, and the command hung for a minute before it said that nobody had heard of it."""
    (tmp_path / "job.json").write_text(json.dumps({"job_id": "7", **sh(f"touch {tmp_path}/ran")}))
    Logbook.open(tmp_path / "journal").close()
    path = tmp_path / "credentials.json"
    if file is not None:
        path.write_text(file)
    environ = {"DIRACX_URL": "http://127.0.0.1:9", "DIRACX_CREDENTIALS_PATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-m", "loadmaster", *words, "--reporter", "diracx"],
        cwd=tmp_path, env={**os.environ, **environ}, capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    problem = f"loadmaster: --reporter diracx: {path}: {told} (DIRACX_CREDENTIALS_PATH says where they are)\n"
    assert done.stderr == problem
    assert not (tmp_path / "ran").exists()
