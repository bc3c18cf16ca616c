"""What a reporter makes of events, without a server that takes any of it: all of it is in the outbox."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest

from conftest import until
from loadmaster import JobDescription, JobHandle, Ledger, Node, Site, run_job
from loadmaster.diracx import reporter as module
from loadmaster.diracx.client import open_diracx
from loadmaster.diracx.outbox import Filed, FileOutbox, Report, StatusReport
from loadmaster.diracx.preferences import Preferences
from loadmaster.diracx.reporter import open_reporter
from loadmaster.events import Event
from loadmaster.sources import Iterated
from test_diracx_jobs import life

MINORS = ["Job Initialization", "Application", "Application Finished Successfully", "Execution Complete"]


@pytest.fixture
def nobody(tmp_path: Path) -> Preferences:
    """A server that is not there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{found.getsockname()[1]}"
    path = tmp_path / "credentials.json"
    path.write_text('{"access_token": "a", "expires_on": 99999999999}')
    return Preferences(url=url, credentials_path=path)


def resumed(events: Iterable[Event]) -> JobHandle:
    """The handle of a job that has these events behind it."""
    return JobHandle.resumed(None, events)


async def minors(outbox: FileOutbox) -> list[str]:
    return [each.report.said.minor for each in (await outbox.load()).filed if isinstance(each.report, StatusReport)]


@pytest.mark.parametrize("cut", [0, 1, 4, 6, 8, 9])
async def test_after_a_restart_a_job_s_history_is_reported_from_where_it_was(
    nobody: Preferences, tmp_path: Path, cut: int
) -> None:
    events = life()
    for known in (events[:cut], events):
        async with (
            FileOutbox(tmp_path / "outbox.sqlite") as outbox,
            open_diracx(nobody) as diracx,
            open_reporter(diracx, outbox=outbox, flush_seconds=0) as reporter,
        ):
            handle = resumed(known)
            handle.close()
            await reporter.follow(handle)
    async with FileOutbox(tmp_path / "outbox.sqlite") as outbox:
        assert await minors(outbox) == MINORS


async def test_a_node_s_job_that_was_begun_by_another_process_is_reported_whole(
    nobody: Preferences, tmp_path: Path
) -> None:
    """The first event that is heard is one from the middle of its life."""
    events = life()
    handle = resumed(events[:5])
    async with (
        FileOutbox(tmp_path / "outbox.sqlite") as outbox,
        open_diracx(nobody) as diracx,
        open_reporter(diracx, outbox=outbox, flush_seconds=0) as reporter,
    ):
        await reporter._hear([events[4]], lambda _: handle)
        assert await minors(outbox) == MINORS[:2]
        whole = resumed(events)
        await reporter._hear(events[5:], lambda _: whole)
        assert await minors(outbox) == MINORS


async def test_reports_that_cannot_be_kept_on_disk_are_kept_in_memory(
    nobody: Preferences, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        FileOutbox(small_disk / "outbox.sqlite") as outbox,
        open_diracx(nobody) as diracx,
        open_reporter(diracx, outbox=outbox, flush_seconds=0) as reporter,
    ):
        with pytest.raises(OSError, match="No space"), (small_disk / "block").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        handle = resumed(life())
        handle.close()
        await reporter.follow(handle)
        said = [each.said.minor for each in reporter.undelivered if isinstance(each, StatusReport)]
        assert said == MINORS
    assert "reports are kept in memory only" in caplog.text


async def test_leaving_in_a_hurry_takes_no_longer_than_it_may(
    nobody: Preferences, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.2)
    with anyio.fail_after(30), anyio.CancelScope() as host:
        async with open_diracx(nobody) as diracx, open_reporter(diracx) as reporter:
            handle = resumed(life())
            handle.close()
            await reporter.follow(handle)
            host.cancel()
            await anyio.sleep_forever()
    assert host.cancelled_caught


async def test_what_is_lost_is_told(nobody: Preferences, caplog: pytest.LogCaptureFixture) -> None:
    async with open_diracx(nobody) as diracx, open_reporter(diracx, flush_seconds=0) as reporter:
        handle = resumed(life())
        handle.close()
        await reporter.follow(handle)
    assert "reports of jobs 7 were not delivered: they are lost" in caplog.text


async def test_no_more_jobs_are_begun_while_too_much_waits_to_be_told(
    nobody: Preferences, root: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING", 20)
    monkeypatch.setattr(module, "LEAVE_SECONDS", 0.1)

    async def jobs() -> Any:
        for number in range(1, 1000):
            yield JobDescription(job_id=str(number), executable="/bin/true")

    with anyio.CancelScope() as leaving:
        async with (
            aclosing(jobs()) as source,
            open_diracx(nobody) as diracx,
            open_reporter(diracx, flush_seconds=0) as reporter,
            anyio.create_task_group() as group,
            Node(ledger=Ledger(2), root=root, site=Site(output_directory=str(out)), ahead=2) as node,
        ):
            group.start_soon(reporter.listen, node)
            group.start_soon(node.serve, reporter.paced(Iterated(source)))
            await until(lambda: reporter.waiting >= 20, 30)
            await node.wait_idle()
            waiting = reporter.waiting
            assert waiting < 200
            await anyio.sleep(0.1)
            assert reporter.waiting == waiting
            leaving.cancel()


async def test_a_job_is_not_held_up_by_a_server_that_is_not_there(nobody: Preferences, root: Path, out: Path) -> None:
    handle = JobHandle()
    async with open_diracx(nobody) as diracx, open_reporter(diracx, flush_seconds=0) as reporter:
        async with anyio.create_task_group() as group:
            group.start_soon(reporter.follow, handle)
            job = JobDescription(job_id="7", executable="/bin/true")
            result = await run_job(job, handle=handle, root=root, site=Site(output_directory=str(out)))
            assert result.failure is None
        said = [each.said.minor for each in reporter.undelivered if isinstance(each, StatusReport)]
        assert said == MINORS


class PowerFails(FileOutbox):
    """Of what was put, so much is on the disk when the machine is started again."""

    def __init__(self, path: Path, puts: int) -> None:
        super().__init__(path)
        self.puts = puts

    async def put(self, reports: Sequence[Report], heard: Mapping[str, int]) -> list[Filed]:
        self.puts -= 1
        return [Filed(0, each) for each in reports] if self.puts < 0 else await super().put(reports, heard)


async def said_of(outbox: FileOutbox) -> dict[int, list[str]]:
    said: dict[int, list[str]] = {}
    for each in (await outbox.load()).filed:
        if isinstance(each.report, StatusReport):
            said.setdefault(each.report.job, []).append(each.report.said.minor)
    return said


@pytest.mark.parametrize("puts", [0, 1, 3, 8])
async def test_what_the_journal_has_and_the_outbox_has_not_when_the_power_fails_is_reported_by_the_next_agent(
    nobody: Preferences, tmp_path: Path, root: Path, out: Path, puts: int
) -> None:
    """They are two files, and the journal is written first. A job of which nothing was in the outbox stayed unreported: it
    had ended, so nobody went on with it."""
    path = tmp_path / "outbox.sqlite"
    words: dict[str, Any] = {"root": root, "journal": tmp_path / "journal"}
    site = Site(output_directory=str(out))
    async with Node(site=site, ledger=Ledger(2), **words) as node:  # without a reporter: not to be told later either
        await node.submit(JobDescription(job_id="99", executable="/bin/true")).wait()
    opened: list[FileOutbox] = [PowerFails(path, puts), FileOutbox(path), FileOutbox(path)]
    for outbox in opened:
        async with (
            outbox,
            open_diracx(nobody) as diracx,
            open_reporter(diracx, outbox=outbox, flush_seconds=0) as reporter,
            anyio.create_task_group() as group,
            Node(site=site, **words) as node,
        ):
            group.start_soon(reporter.listen, node)
            if isinstance(outbox, PowerFails):
                for number in range(1, 5):
                    await node.submit(JobDescription(job_id=str(number), executable="/bin/true")).wait()
    async with FileOutbox(path) as outbox:
        assert await said_of(outbox) == dict.fromkeys(range(1, 5), MINORS)


async def test_an_attempt_whose_end_a_journal_has_lost_is_reported_with_the_end_it_has_then(
    nobody: Preferences, tmp_path: Path
) -> None:
    """What had been heard of it was counted, and so much of what came instead was held for told."""
    events = life()
    path = tmp_path / "outbox.sqlite"
    async with (
        FileOutbox(path) as outbox,
        open_diracx(nobody) as diracx,
        open_reporter(diracx, outbox=outbox, flush_seconds=0) as reporter,
    ):
        handle = resumed(events[:8])
        handle.close()
        await reporter.follow(handle)
    async with FileOutbox(path) as outbox, open_diracx(nobody) as diracx:
        async with open_reporter(diracx, outbox=outbox, flush_seconds=0) as reporter:
            cut = resumed(events[:5])
            await reporter._hear([events[4]], lambda _: cut)
            await reporter._hear(events[-3:], lambda _: cut)
        assert (await minors(outbox))[-1] == MINORS[-1]
