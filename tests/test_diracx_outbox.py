"""Reports that wait, in memory and on disk."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from loadmaster import RuntimeFault
from loadmaster.dirac import JobStatus
from loadmaster.diracx.outbox import (
    MADE,
    FileOutbox,
    Kept,
    MemoryOutbox,
    ParameterReport,
    Report,
    RescheduleReport,
    StatusReport,
)

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)

REPORTS: list[Report] = [
    StatusReport(1, NOON, JobStatus("Running", "Job Initialization")),
    ParameterReport(1, {"HostName": "wn7", "ünüsual": "\ud800"}),
    StatusReport(2, NOON, JobStatus(minor="Application", application="step 3")),
    RescheduleReport(2),
]


def of_attempts(kept: Kept) -> dict[str, int]:
    return {name: heard for name, heard in kept.heard.items() if name != MADE}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal" / "outbox.sqlite"


async def test_what_was_put_is_there_in_its_order_when_it_is_opened_again(path: Path) -> None:
    async with FileOutbox(path) as outbox:
        first = await outbox.put(REPORTS[:2], {"1/1": 3})
        second = await outbox.put(REPORTS[2:], {"2/1": 9, "1/1": 4})
    async with FileOutbox(path) as outbox:
        kept = await outbox.load()
        assert kept.filed == first + second
        assert [filed.report for filed in kept.filed] == REPORTS
        assert of_attempts(kept) == {"1/1": 4, "2/1": 9}
        await outbox.drop([filed.number for filed in first], ["1/1"])
    async with FileOutbox(path) as outbox:
        kept = await outbox.load()
        assert kept.filed == second
        assert of_attempts(kept) == {"1/1": 4, "2/1": 9}  # what is over may be heard again, from a journal
        assert kept.over == {"1/1"}


async def test_what_is_over_is_forgotten_once_no_journal_knows_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FileOutbox(path) as outbox:
        await outbox.put([], {"1/1": 4, "2/1": 9})
        await outbox.drop([], ["1/1"])
    monkeypatch.setattr("loadmaster.diracx.outbox.KEPT_SECONDS", -1.0)
    async with FileOutbox(path) as outbox:
        assert of_attempts(await outbox.load()) == {"2/1": 9}


async def test_numbers_are_not_given_twice(path: Path) -> None:
    async with FileOutbox(path) as outbox:
        (first,) = await outbox.put(REPORTS[:1], {})
        await outbox.drop([first.number])
    async with FileOutbox(path) as outbox:
        (second,) = await outbox.put(REPORTS[:1], {})
        assert second.number > first.number


WRITER = """
import sys
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
import anyio
from loadmaster.dirac import JobStatus
from loadmaster.diracx.outbox import MADE, FileOutbox, Kept, StatusReport

async def main() -> None:
    async with FileOutbox(Path(sys.argv[1])) as outbox:
        for number in count(1):
            await outbox.put([StatusReport(number, datetime.now(UTC), JobStatus("Running"))], {"a": number})
            print(number, flush=True)

anyio.run(main)
"""


def test_what_was_put_survives_a_kill(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    with writer, writer.stdout as lines:
        said = [int(next(lines)) for _ in range(20)]
        writer.send_signal(signal.SIGKILL)
        said += [int(line) for line in lines]
    with sqlite3.connect(path) as database:
        found = [number for (number,) in database.execute("SELECT number FROM reports ORDER BY number")]
        ((heard,),) = database.execute("SELECT events FROM heard WHERE attempt = 'a'")
    database.close()
    assert found[: len(said)] == said
    assert len(found) - len(said) in {0, 1}  # one may be there that nobody was told of
    assert heard == found[-1]


async def test_one_process_has_it_at_a_time(path: Path) -> None:
    async with FileOutbox(path):
        with pytest.raises(RuntimeFault, match="another process has this outbox"):
            async with FileOutbox(path):
                pass
    async with FileOutbox(path):
        pass


async def test_a_file_that_is_none_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("what is this? " * 1000)
    with pytest.raises(RuntimeFault, match="not a database"):
        async with FileOutbox(path):
            pass


async def test_one_of_a_later_version_is_refused(path: Path) -> None:
    async with FileOutbox(path):
        pass
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(RuntimeFault, match="is of version 7, and we know 1"):
        async with FileOutbox(path):
            pass


async def test_on_a_full_disk_nothing_is_half_put_and_later_it_works_again(small_disk: Path) -> None:
    async with FileOutbox(small_disk / "outbox.sqlite") as outbox:
        before = await outbox.put(REPORTS[:1], {"a": 1})
        block = small_disk / "block"
        with pytest.raises(OSError, match="No space"), block.open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        long = ParameterReport(1, {"a": "x" * 300_000})
        with pytest.raises(RuntimeFault, match="full"):
            await outbox.put([REPORTS[0], long], {"a": 2})
        block.unlink()
        after = await outbox.put(REPORTS[1:2], {"a": 3})
        kept = await outbox.load()
        assert kept.filed == before + after
        assert of_attempts(kept) == {"a": 3}


async def test_the_one_in_memory_gives_numbers_and_keeps_nothing() -> None:
    outbox = MemoryOutbox()
    filed = await outbox.put(REPORTS, {})
    assert [each.report for each in filed] == REPORTS
    assert len({each.number for each in filed}) == len(REPORTS)
    assert (await outbox.load()).filed == ()
