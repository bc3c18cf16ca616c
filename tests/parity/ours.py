"""The same cases through our own runtime, answered in the same words."""

from __future__ import annotations

import os
import sqlite3
import tarfile
import zlib
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import coordinators
import scene
from anyio import to_thread

from loadmaster import ComputingElement, Coordinator, InvalidJob, JobDescription, JobHandle, Site, World, run_job
from loadmaster.description import Limits
from loadmaster.dirac import (
    DiracCoordinator,
    JobStatus,
    Parameters,
    Statuses,
    accounting,
    adapt,
    exit_code,
    failover_operations,
    from_dirac,
    heartbeat,
    node_parameters,
    request_json,
)
from loadmaster.dirac.report import final_output
from loadmaster.dirac.requests import digest
from loadmaster.events import Event, Heartbeat, PayloadExited, PayloadStarted
from loadmaster.result import JobResult, Phase
from loadmaster.storage.base import CatalogEntry, FileInfo, Replica
from loadmaster.storage.catalog import SqliteCatalog
from loadmaster.storage.checksums import Checksum

DOWN = "a file, where a directory has to be"


@dataclass(slots=True)
class Told:
    """What a reporter of DIRAC's would have said of a job while it ran."""

    updates: list[dict[str, str]] = field(default_factory=list)
    status: JobStatus = field(default_factory=JobStatus)
    parameters: dict[str, Any] = field(default_factory=dict)
    heartbeats: list[tuple[dict[str, float], dict[str, str]]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def site_of(case: Mapping[str, Any], root: Path) -> Site:
    """The site of a case, as its pilot would have it."""
    store = root / "store" if "SandboxStore" in case.get("unreachable", ()) else root / "se" / "SandboxSE"
    if "SandboxStore" in case.get("unreachable", ()):
        store.write_text(DOWN)
    return Site(
        name=case["ce"]["Site"],
        vo=scene.VO,
        catalog=str(root / "catalog.sqlite"),
        storage_elements={name: str(root / "se" / name) for name in scene.elements(dict(case)) if name != "SandboxSE"},
        default_se=("SE-USER-A",),
        failover_se=tuple(case.get("failover", ())),
        sandbox_store=str(store),
        sandbox_format="tar.bz2",
        sandbox_limit_bytes=case.get("wrapper", {}).get("OutputSandboxLimit", 10 * 1024**2),
        retries=0,
        payload=World(**case.get("world", {})),
    )


async def fill(catalog: Path, case: Mapping[str, Any], root: Path) -> None:
    """Enter the case's files; last of all, that no more may come, if the case wants it."""
    for lfn, replicas in case.get("replicas", {}).items():
        content = next((text for text in replicas.values() if text is not None), "").encode()
        said = 1 if lfn in case.get("wrong_checksums", ()) else zlib.adler32(content)
        places = tuple(Replica((root / "se" / name / lfn[1:]).as_uri(), name) for name in replicas)
        info = FileInfo(len(content), Checksum.parse(f"adler32:{said:08x}"))
        await SqliteCatalog(catalog).register(CatalogEntry(lfn, info, places))
    if case.get("registration_refused"):
        await SqliteCatalog(catalog).register(CatalogEntry("/vo/first", FileInfo(1, None), ()))
        await to_thread.run_sync(_refuse, catalog)


def _refuse(catalog: Path) -> None:
    with closing(sqlite3.connect(catalog)) as connection, connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON files BEGIN SELECT RAISE(ABORT, 'no more in here'); END"
        )


def pilots_environment(case: Mapping[str, Any], root: Path) -> dict[str, str]:
    """What the pilot of a case has in its environment, DIRAC's driver likewise."""
    usual = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(root), "LANG": "C.UTF-8"}
    return {**usual, **case.get("pilot_environment", {})}


async def answer(case: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """What comes of a case, in an environment that is `pilots_environment`. `root` is not there yet."""
    await to_thread.run_sync(scene.build, dict(case), root)
    diary = root / "hooks.jsonl"
    try:
        job, ce = from_dirac({"Job": case["job"], "CE": {**case["ce"], "Diary": str(diary)}})
    except InvalidJob as exc:
        return {"refused": str(exc)}
    words = case.get("ours", {})
    limits = dict(words.get("limits", {}))
    if "deadline_seconds" in words:
        limits["deadline"] = datetime.now(UTC) + timedelta(seconds=words["deadline_seconds"])
    job = job.model_copy(update={"limits": Limits(grace_seconds=2, **limits), **words.get("words", {})})
    name = case.get("coordinator")
    coordinator: type[Coordinator] = adapt(getattr(coordinators, name)) if name else DiracCoordinator
    await fill(root / "catalog.sqlite", case, root)
    handle, told = JobHandle(), Told()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_listen, handle, case, ce, told)
        result = await run_job(
            job, ce=ce, coordinator=coordinator, site=site_of(case, root), handle=handle, root=root / "work",
            keep_workdir=case.get("wrapper", {}).get("CleanUpFlag") != "True", heartbeat_seconds=0.1,
        )  # fmt: skip
    await anyio.sleep(case.get("ours", {}).get("linger_seconds", 0))  # for what may be alive still
    return scene.steady(await to_thread.run_sync(_answer, dict(case), root, job, ce, result, told), root)  # type: ignore[no-any-return]


async def _listen(handle: JobHandle, case: Mapping[str, Any], ce: ComputingElement, told: Told) -> None:
    watched = "PollingTime" in case.get("wrapper", {})  # elsewhere DIRAC's watchdog has no time to say anything
    statuses, parameters = Statuses(), Parameters(ce, agent="loadmaster", pid=os.getpid())
    async for event in handle.follow():
        told.events.append(event)
        told.updates += [said.to_dirac() for said in statuses.advance(event)]
        told.status = statuses.current
        told.parameters |= parameters.advance(event)
        if isinstance(event, PayloadStarted):
            told.parameters |= await to_thread.run_sync(node_parameters, {})
        if isinstance(event, PayloadExited):
            told.heartbeats.append(({}, final_output(event)))
        if watched and isinstance(event, Heartbeat) and event.phase is Phase.PAYLOAD:
            told.heartbeats.append(heartbeat(event, load_average=1.0))
            if "kill_at_heartbeat" in case and event.last_lines:  # it has begun
                handle.kill("Received Kill signal")


def _answer(
    case: dict[str, Any], root: Path, job: JobDescription, ce: ComputingElement, result: JobResult, told: Told
) -> dict[str, Any]:
    workdir = root / "work" / job.job_id
    files = scene.files_below(workdir, root)
    operations = failover_operations(told.events, site_of(case, root))
    requests = [request_json(operations, job, now=datetime.now(UTC))] if operations else []
    if requests:
        told.parameters["PendingRequest"] = digest(requests[0])
    return {
        "exit_code": int(exit_code(result)),
        "statuses": scene.folded(told.updates),
        "parameters": told.parameters,
        "heartbeats": {
            "dynamic": sorted({name for dynamic, _ in told.heartbeats for name in dynamic}),
            "from": scene.speakers(static["StandardOutput"] for _, static in told.heartbeats),
            "last": told.heartbeats[-1][1]["StandardOutput"] if told.heartbeats else "",
        },
        "rescheduled": int(told.status.status == "Rescheduled"),
        "accounting": [accounting(job, ce, result, told.status)],
        "requests": [scene.request_of(each) for each in requests],
        "sandboxes": _sandboxes(root, job.job_id),
        "registered": _registered(root, case),
        "stored": {
            place: text for place, text in scene.stored(case, root).items() if not place.startswith("SandboxSE:")
        },
        "environment": scene.environment(files),
        "files": files,
        "workdir_left": workdir.exists(),
        "hooks": scene.hooks(root / "hooks.jsonl"),
    }


def _sandboxes(root: Path, job_id: str) -> list[dict[str, Any]]:
    found = []
    store = root / "se" / "SandboxSE" / job_id
    for number, archive in enumerate(sorted(store.glob("*.tar.bz2"))):
        unpacked = root / f"sandbox-{number}"
        with tarfile.open(archive) as members:
            members.extractall(unpacked, filter="data")
            names = members.getnames()
        found.append({"name": archive.name, "members": names, "files": scene.files_below(unpacked, root)})
    return found


def _registered(root: Path, case: dict[str, Any]) -> dict[str, dict[str, Any]]:
    catalog = root / "catalog.sqlite"
    if not catalog.exists():
        return {}
    query = "SELECT files.lfn, size_bytes, checksum, storage_element FROM files JOIN replicas USING (lfn)"
    with closing(sqlite3.connect(catalog)) as connection:
        return {
            lfn: {"Size": size, "Checksum": (checksum or "").partition(":")[2], "SE": element}
            for lfn, size, checksum, element in connection.execute(query)
            if lfn not in case.get("replicas", {})
        }
