"""An agent to be killed: a node with a journal, for the jobs of a file, in a directory of its own.

    python agent.py DIRECTORY BACKEND [--die-after N] [--die-before N] [--full-at N]

It exits with 0 once all jobs have ended. `--die-after`: kill itself with SIGKILL once so many events are on disk;
`--die-before`: when so many would be; `--die-before-kind`, `--die-after-kind`: at the first event of a kind; `--full-at`:
the disk is full for one write; `--power-at`: the power fails then, and what the journal had synced is in `synced`.
`--boot`: it is another boot of the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Sequence
from pathlib import Path

import anyio

from loadmaster import JobDescription, JobExecutionCoordinator, JobResult, Ledger, Node, PayloadSpec, Site, workdir
from loadmaster.description import Containment
from loadmaster.logbook import Logbook, Record
from loadmaster.sources import JobLines
from loadmaster.world import World

CORES = 3


class Careful(JobExecutionCoordinator):
    """Notes each call of a hook, and hands something on from one to the next."""

    async def stageIn(self) -> None:
        await self.note("stageIn")
        await super().stageIn()
        await self.job.remember("staged", [self.jobArgs.job_id, 1])

    async def preProcess(self, command: str, exeEnv: dict[str, str]) -> PayloadSpec:
        await self.note("preProcess")
        assert self.job.memory["staged"] == [self.jobArgs.job_id, 1]
        return PayloadSpec(command=command, env=exeEnv)

    async def postProcess(self) -> None:
        await self.note("postProcess")
        assert self.job.outcome is not None
        await self.job.report("exit", self.job.outcome.exit_code)

    async def note(self, hook: str) -> None:
        line = f"{self.jobArgs.job_id} {self.job.attempt} {hook}\n"
        await anyio.to_thread.run_sync(append, Path(os.environ["CAMPAIGN"]) / "hooks", line)


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line)


def site(directory: Path) -> Site:
    servers = directory / "servers.json"
    there = json.loads(servers.read_text()) if servers.exists() else {"elements": {}, "words": {}}
    return Site(
        storage_elements={
            "DISK": str(directory / "disk"),
            "BUFFER": str(directory / "buffer"),
            "GONE": "nosuch://gone",
            **there["elements"],
        },
        storage=there["words"],
        default_se=["DISK"],
        failover_se=["BUFFER"],
        sandbox_store=str(directory / "sandboxes"),
        catalog=str(directory / "catalog.sqlite"),
        vo="vo",
        retries=0,
        payload=World(containment=[Containment(os.environ.get("CONTAINMENT", "subreaper"))], inherit=["CAMPAIGN"]),
    )


def doomed(
    book: type[Logbook], *, after: int, before: int, full_at: int, power_at: int, before_kind: str, after_kind: str
) -> None:
    """Have this process die, or its disk be full, at an event."""
    usual, written = book.add, 0

    def add(self: Logbook, groups: Sequence[Sequence[Record]]) -> list[Exception | None]:
        nonlocal written
        count = sum(map(len, groups))
        kinds = {record.kind for group in groups for record in group}
        if before_kind in kinds:
            os.kill(os.getpid(), signal.SIGKILL)
        if written < before <= written + count:
            os.kill(os.getpid(), signal.SIGKILL)
        if written < full_at <= written + count:
            written += count
            raise sqlite3.OperationalError("database or disk is full")
        errors = usual(self, groups)
        written += count
        if power_at and written >= power_at:
            synced = self.directory.parent / "synced"
            shutil.rmtree(synced, ignore_errors=True)
            synced.mkdir()
            for path in self.directory.glob("journal.*"):
                if not path.name.endswith("-shm"):
                    shutil.copy(path, synced)
            os.kill(os.getpid(), signal.SIGKILL)
        if (after and written >= after) or after_kind in kinds:
            os.kill(os.getpid(), signal.SIGKILL)
        return errors

    book.add = add  # type: ignore[method-assign]


async def main(directory: Path, cores: int) -> None:
    os.environ["CAMPAIGN"] = str(directory)

    async def ended(job: JobDescription, result: JobResult) -> None:
        line = json.dumps([result.job_id, result.attempt, result.status])
        await anyio.to_thread.run_sync(append, directory / "ended", f"{line}\n")

    async with Node(
        site=site(directory), ledger=Ledger(cores), root=directory / "root", journal=directory / "journal",
        coordinator=Careful,
    ) as node:  # fmt: skip
        for handle in node.resumed:
            if handle.job_id is not None and handle.job_id.startswith("kill"):
                handle.kill("unwanted")
        await node.serve(JobLines(directory / "jobs.jsonl", outputs=directory / "out"), ended=ended)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("backend")
    parser.add_argument("--die-after", type=int, default=0)
    parser.add_argument("--die-before", type=int, default=0)
    parser.add_argument("--full-at", type=int, default=0)
    parser.add_argument("--power-at", type=int, default=0)
    parser.add_argument("--die-before-kind", default="")
    parser.add_argument("--die-after-kind", default="")
    parser.add_argument("--boot", default="")
    parser.add_argument("--cores", type=int, default=CORES)
    words = parser.parse_args()
    doomed(
        Logbook, after=words.die_after, before=words.die_before, full_at=words.full_at, power_at=words.power_at,
        before_kind=words.die_before_kind, after_kind=words.die_after_kind,
    )  # fmt: skip
    if words.boot:
        boot = words.directory / "boot"
        boot.write_text(words.boot)
        workdir.BOOT_ID = boot  # type: ignore[misc]
    options = {"use_uvloop": True} if words.backend == "uvloop" else {}
    anyio.run(
        main, words.directory, words.cores, backend=words.backend.replace("uvloop", "asyncio"), backend_options=options
    )
