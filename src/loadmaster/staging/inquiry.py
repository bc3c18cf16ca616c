"""Whether a job's inputs can be had, and its outputs have somewhere to go: asked before it runs, and nothing is moved."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass

from anyio import to_thread

from loadmaster.description import JobDescription
from loadmaster.errors import InvalidJob, InvalidSite, StagingFailed, StorageError
from loadmaster.names import join_url, local_file, shown
from loadmaster.staging.engine import Transfers
from loadmaster.staging.plan import Fetch, lfns_of, plan_delivery, plan_fetches, sandbox_directory
from loadmaster.storage.base import FileInfo, Replica
from loadmaster.storage.kinds import OURS
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
    try:
        if replica.url.startswith("file://"):
            found = await to_thread.run_sync(_readable, replica.url)
        else:
            storage = await transfers.storage(replica.url)  # which asks nobody yet
            if not online:
                return None
            found = await storage.stat(replica.url)
    except (StorageError, InvalidSite) as exc:
        return str(exc)
    if fetch.size_bytes is not None and found.size_bytes != fetch.size_bytes:
        return f"{shown(replica.url)}: has {found.size_bytes} bytes, expected {fetch.size_bytes}"
    return found


async def ask_for_places(job: JobDescription, transfers: Transfers) -> tuple[str, ...]:
    """A line for each output that has nowhere to go, as far as can be known here: nobody serves the URL's scheme, the site's
    words for it are not understood, a directory of this machine cannot be written to. Servers are not asked."""
    site = transfers.site
    problems: list[str] = []
    for file in job.output_data:
        try:
            delivery = plan_delivery(file, file.pattern.rpartition("/")[2], job, site)
        except InvalidJob as exc:
            problems.append(str(exc))
        else:
            problems += await _nowhere("output_data", (*delivery.targets, *delivery.failover), transfers)
    if job.output_sandbox:
        try:
            place = Replica(join_url(sandbox_directory(job, site), "file"))
        except InvalidJob as exc:
            problems.append(str(exc))
        else:
            problems += await _nowhere("output_sandbox", (place,), transfers)
    return tuple(dict.fromkeys(problems))


async def ask_for_site(transfers: Transfers) -> tuple[str, ...]:
    """A line for each thing of a site that cannot be used: its catalog, tables of storages that are not understood."""
    problems: list[str] = []
    try:
        await transfers.lookup(["/"])
    except StagingFailed as exc:
        problems += exc.problems
    for scheme in transfers.site.storage:
        try:
            await transfers.storage(f"{scheme}://")
        except InvalidSite as exc:
            problems.append(str(exc))
        except StorageError as exc:
            if scheme not in OURS:  # one that is not installed here is told of by who needs it
                problems.append(f"[storage.{scheme}] {str(exc).removeprefix(f'{scheme}://: ')}")
    return tuple(problems)


async def _nowhere(field: str, places: Sequence[Replica], transfers: Transfers) -> list[str]:
    """What is said when no place of these will do."""
    reasons = []
    for place in places:
        try:
            if place.url.startswith("file://"):
                await to_thread.run_sync(_check_writable, place.url)
            else:
                await transfers.storage(place.url)
        except (StorageError, InvalidSite) as exc:
            reasons.append(str(exc))
        else:
            return []
    return [f"{field}: {'; '.join(reasons)}"]


def _check_writable(url: str) -> None:
    """By what is there of its path: whether a file can be put there. Raises `StorageError`."""
    with translated(url):
        path = local_file(url)
    with translated(path):
        if os.path.isdir(path):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        above = os.path.dirname(path)
        while True:
            try:
                found = os.stat(above)
                break
            except FileNotFoundError:
                above = os.path.dirname(above)
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(above, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


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
