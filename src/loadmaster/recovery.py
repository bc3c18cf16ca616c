"""What an earlier agent of this node has left: jobs to go on with, and things that nobody wants any more."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyio import to_thread

from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.errors import IllegalEvent, InvalidJob, PayloadHeld, RescheduleJob, WorkdirFault
from loadmaster.events import Event, JobAccepted, JobFinished, SlotGranted
from loadmaster.handle import JobHandle, KeepsState, Write
from loadmaster.hooks import find_coordinator, reference_of
from loadmaster.journal import NodeJournal
from loadmaster.lifecycle import Lifecycle
from loadmaster.logbook import History, state_name
from loadmaster.payload.adopt import end_held
from loadmaster.payload.found import Lost
from loadmaster.payload.state import remove_state
from loadmaster.workdir import Workdir

log = logging.getLogger(__name__)

MOST_RERUNS = 3
"""So many attempts in a row that were lost: whatever loses them, this node is not the place for the job."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """A job that is to be gone on with."""

    job: JobDescription
    handle: JobHandle
    coordinator: type[Coordinator]


class Succession(KeepsState):
    """The journal of one job of a node: the end of an attempt that was lost is written together with the next one's
    beginning, so there is no moment at which nobody has the job. `follows` is that beginning."""

    def __init__(self, journal: NodeJournal, wanted: Callable[[], bool]) -> None:
        self.life: Lifecycle | None = None
        self.follows: JobAccepted | None = None
        self.directory = journal.directory
        self._journal = journal
        self._wanted = wanted

    async def append(self, event: Event) -> None:
        """Return when it is on disk."""
        errors: list[Exception | None] = []
        await self.write_soon((event,), errors.append).settled()
        if (error := errors[0]) is not None:
            raise error

    def write_soon(self, events: Sequence[Event], told: Callable[[Exception | None], None]) -> Write:
        """As the node's, with the next attempt's beginning where there is to be one."""
        event = events[-1]
        if not (isinstance(event, JobFinished) and self._is_lost(event) and self._wanted()):
            return self._journal.write_soon(events, told)
        assert self.life is not None and self.life.accepted is not None  # noqa: S101 - it is about to finish
        accepted = self.life.accepted
        follows = JobAccepted(
            event.job_id,
            event.attempt + 1,
            event.time,
            accepted.description,
            accepted.coordinator,
            accepted.lost + 1,
            accepted.outputs,
            accepted.site,
        )

        def both(fault: Exception | None) -> None:
            self.follows = follows if fault is None else None
            told(fault)

        self.has_next = True
        return self._journal.write_soon([*events, follows], both)

    def _is_lost(self, event: JobFinished) -> bool:
        if self.life is None or self.life.accepted is None or self.life.accepted.lost >= MOST_RERUNS:
            return False
        if self.life.outcome is not None and self.life.outcome.left_behind:  # it is not to run twice at the same time
            return False
        failure = self.life.failure or event.failure
        return failure is not None and failure.kind == "PayloadLost"

    def state_directory(self, job_id: str, attempt: int) -> Path:
        """As the node's."""
        return self._journal.state_directory(job_id, attempt)


def resumed(history: History, journal: Succession, coordinator: type[Coordinator]) -> Resumed | None:
    """The job of a history; None, with an error in the log, where it makes no sense. Blocks."""
    try:
        handle = JobHandle.resumed(journal, history.events)
        journal.life = handle.life
        if (accepted := handle.life.accepted) is None:
            raise IllegalEvent("its history has no beginning")
        job = JobDescription.model_validate({**accepted.description, "job_id": history.job_id})
        return Resumed(job, handle, coordinator_of(accepted.coordinator, coordinator))
    except (IllegalEvent, InvalidJob, ValueError) as exc:
        log.error("job %s, attempt %d: cannot be gone on with: %s", history.job_id, history.attempt, exc)  # noqa: TRY400
        return None


def coordinator_of(reference: str, usual: type[Coordinator]) -> type[Coordinator]:
    """The class of a job's coordinator: the node's own if it is that, else it is imported. Where it cannot be, one that
    has the job rescheduled: nobody else's hooks are to be called for it."""
    if reference == reference_of(usual):
        return usual
    try:
        found: type[Any] = find_coordinator(reference) if reference else JobExecutionCoordinator
    except InvalidJob as exc:
        reason = f"its coordinator is not here any more: {exc}"

        class Missing(JobExecutionCoordinator):
            def __init__(self, jobArgs: JobDescription, ceArgs: ComputingElement) -> None:
                raise RescheduleJob(reason)

        return Missing
    return found


async def tidy(journal: NodeJournal, root: Path, going_on: Sequence[History]) -> None:
    """Remove what belongs to jobs that have ended: an agent that died between the last record and the last `rmdir` could
    not. Work directories that the journal knows nothing of are somebody else's.

    A payload of a job that has no slot, as far as the journal knows, is ended before anybody waits for one; what is kept of
    it stays, for it is the end of the attempt (takeover.py).
    """
    granted = {
        state_name(each.job_id, each.attempt): any(isinstance(event, SlotGranted) for event in each.events)
        for each in going_on
    }
    for path in await to_thread.run_sync(lambda: list((journal.directory / "payloads").iterdir())):
        if not granted.get(path.name, False):
            await _end_forgotten(path, keep=path.name in granted)
    names = await to_thread.run_sync(_directories, root)
    last = await journal.last(names)
    open_ids = {each.job_id for each in going_on}
    for name in names:
        if name in last and name not in open_ids:
            await to_thread.run_sync(_remove_workdir, root, name)


async def _end_forgotten(state: Path, *, keep: bool) -> None:
    """Whoever runs there is to be ended first: a damaged journal may have lost him, and the job come again."""
    try:
        found = await end_held(state)
    except PayloadHeld as exc:
        log.error("%s; it is left alone", exc)  # noqa: TRY400 - a sentence
        return
    if isinstance(found, Lost) and found.left_behind:
        log.error("%s: what runs there could not be ended; it is left alone", state)
    elif not keep:
        await to_thread.run_sync(_remove_state, state)


def _directories(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]


def _remove_workdir(root: Path, name: str) -> None:
    try:
        Workdir.make(root, name).close()
    except WorkdirFault as exc:
        log.warning("%s", exc)


def _remove_state(path: Path) -> None:
    try:
        remove_state(path)
    except OSError as exc:
        log.warning("%s: is left there: %s", path, exc.strerror)
