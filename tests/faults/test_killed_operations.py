"""A node that is killed while it does what jobs have left to be done, again and again, until all of it has been done."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import anyio
import pytest

from conftest import sh
from loadmaster import JobDescription, Ledger, Node, Site, Status, pending
from loadmaster.logbook import Logbook
from loadmaster.pending import Backoff
from loadmaster.storage.catalog import SqliteCatalog

AGENT = """
import sys
from pathlib import Path
import anyio
from loadmaster import Ledger, Node, Site
from loadmaster.pending import Backoff

async def main(directory):
    async with Node(
        site=Site.load(directory / "site.toml"), ledger=Ledger(1), root=directory / "root",
        journal=directory / "journal", backoff=Backoff(0.01, 0.05),
    ) as node:
        print("here", flush=True)
        while await node.pending():
            await anyio.sleep(0.2)

anyio.run(main, Path(sys.argv[1]), backend=sys.argv[2])
"""

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


async def leave_something(directory: Path, files: int) -> None:
    site = Site.load(directory / "site.toml")
    backoff = Backoff(0.01, 0.05)
    script = f"for i in $(seq {files}); do head -c 300000 /dev/urandom > o.$i; done"
    job = JobDescription(job_id="7", **sh(script), output_data=["o.*"], owner="ann")
    async with Node(
        site=site, ledger=Ledger(1), root=directory / "root", journal=directory / "journal", backoff=backoff
    ) as node:
        assert (await node.submit(job).wait()).status is Status.COMPLETED


@pytest.mark.parametrize(
    ("kills", "files"),
    [
        pytest.param(4, 60, id="short"),
        pytest.param(40, 300, id="long", marks=[pytest.mark.long, pytest.mark.timeout(600)]),
    ],
)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_file_is_where_it_was_wanted_exactly_once(tmp_path: Path, backend: str, kills: int, files: int) -> None:
    (tmp_path / "site.toml").write_text(SITE)
    (tmp_path / "disk").write_text("in the way")
    anyio.run(leave_something, tmp_path, files, backend="asyncio")
    (tmp_path / "disk").unlink()
    with Logbook.beside(tmp_path / "journal") as database:  # those that were tried meanwhile are stuck
        wanted = {each.file.lfn: each.file for each in pending.every(database) if each.file is not None}
        pending.retry(database, [each.number for each in pending.every(database)])
    assert len(wanted) == files
    chance, died = random.Random(files), 0
    while died < kills or agent(tmp_path, backend, None):
        died += 1
        assert died < 3 * kills + 10
        if not agent(tmp_path, backend, chance.uniform(0.0, 0.15)):
            break
    with Logbook.look(tmp_path / "journal") as book:
        assert book.ask(pending.every) == []
        history = book.history("7")
        assert history is not None
        assert history.status == Status.DONE
        done = [each for each in history.events if each.kind == "OperationDone"]
        assert len(done) == files, "done twice, or not at all"
    assert not [path for path in (tmp_path / "buffer").rglob("*") if path.is_file()]
    found = {
        f"/{path.relative_to(tmp_path / 'disk')}": path.stat().st_size for path in (tmp_path / "disk").rglob("o.*")
    }
    assert found == {lfn: file.size_bytes for lfn, file in wanted.items()}
    entries = anyio.run(SqliteCatalog(tmp_path / "catalog.sqlite").lookup, sorted(found), backend="asyncio")
    assert all([replica.storage_element for replica in entry.replicas] == ["DISK"] for entry in entries.values())
    assert [path.name for path in (tmp_path / "journal" / "moving").iterdir()] == []


def agent(directory: Path, backend: str, seconds: float | None) -> bool:
    """Whether it was killed, so long after it was there; None: let it come to its end."""
    words = [sys.executable, "-c", AGENT, str(directory), backend]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if seconds is not None:
            time.sleep(seconds)
            process.send_signal(signal.SIGKILL)
        code = process.wait(120)
        assert code in {0, -signal.SIGKILL}
        return code != 0
