"""Whether a job's inputs can be had: asked before it runs, and nothing is moved."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from anyio import to_thread

from loadmaster.description import JobDescription
from loadmaster.errors import InvalidSite, StagingFailed, StorageError
from loadmaster.names import local_file, shown
from loadmaster.staging.engine import Transfers
from loadmaster.staging.plan import Fetch, lfns_of, plan_fetches
from loadmaster.storage.base import FileInfo, Replica
from loadmaster.storage.local import translated
from loadmaster.tasks import for_each


@dataclass(frozen=True, slots=True)
class Inquiry:
    """What came of it."""

    problems: tuple[str, ...]
    """A line for each input that cannot be had, and for all that keeps us from knowing."""
    not_asked: int
    """Inputs that are only at servers, which were left alone."""


async def ask_for_inputs(job: JobDescription, transfers: Transfers, *, online: bool = False) -> Inquiry:
    """Look for every input: files of this machine, logical names in the catalog and, if `online`, files at servers."""
    problems: list[str] = []
    not_asked = 0

    async def one(wanted: tuple[str, Fetch]) -> None:
        nonlocal not_asked
        field, fetch = wanted
        answers = [await _answer(fetch, replica, transfers, online) for replica in fetch.sources]
        if all(isinstance(answer, str) for answer in answers):
            problems.append(f"{field}: {_named(fetch)}{'; '.join(map(str, answers))}")
        elif not any(isinstance(answer, FileInfo) for answer in answers):
            not_asked += 1

    fetches: list[tuple[str, Fetch]] = []
    for field, files in (("input_sandbox", job.input_sandbox), ("input_data", job.input_data)):
        try:
            known = await transfers.lookup(lfns_of(files))
        except StagingFailed as exc:
            problems.append(f"{field}: {exc}")
            continue
        for file in files:
            try:
                fetches += [(field, fetch) for fetch in plan_fetches([file], known, transfers.site)]
            except StagingFailed as exc:
                problems += [f"{field}: {problem}" for problem in exc.problems]
    await for_each(fetches, one, transfers.site.most_streams)
    return Inquiry(tuple(problems), not_asked)


async def _answer(fetch: Fetch, replica: Replica, transfers: Transfers, online: bool) -> FileInfo | str | None:
    """What is there, why it is not, or None when nobody was asked."""
    if not replica.url.startswith("file://") and not online:
        return None
    try:
        if replica.url.startswith("file://"):
            found = await to_thread.run_sync(_readable, replica.url)
        else:
            found = await (await transfers.storage(replica.url)).stat(replica.url)
    except (StorageError, InvalidSite) as exc:
        return str(exc)
    if fetch.size_bytes is not None and found.size_bytes != fetch.size_bytes:
        return f"{shown(replica.url)}: has {found.size_bytes} bytes, expected {fetch.size_bytes}"
    return found


def _readable(url: str) -> FileInfo:
    """Opened, for permissions alone do not tell; but not what is no file. Raises `StorageError`."""
    with translated(url):
        path = local_file(url)
    with translated(path):
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("is a directory" if stat.S_ISDIR(found.st_mode) else "is not a regular file")
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return FileInfo(found.st_size)


def _named(fetch: Fetch) -> str:
    """The logical name, if that is what was asked for."""
    return f"LFN:{fetch.lfn}: " if fetch.lfn is not None else ""
