"""A job in parts, each perhaps on another host: a directory that has all of it, and can be copied between two parts.

    prepare (stageIn, preProcess) ──▶ payload (no network needed) ──▶ finish (postProcess, stageOut)

    <bundle>/bundle.json     the job, its computing element, the name of its coordinator
    <bundle>/journal/        what has happened
    <bundle>/work/<job id>   the work directory

It is the straight path of `loadmaster.runner`, left after a part and entered again by the next. Only the work directory's
place is another: the history is read as if it had always been here. A part that was killed is gone on with where it was;
only between parts is a copy as good as the original. Nothing of a site's configuration is in there.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, Final

from anyio import to_thread

from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.errors import InvalidBundle, InvalidJob
from loadmaster.events import Event, PayloadPrepared, StageInStarted
from loadmaster.handle import JobHandle
from loadmaster.journal import NodeJournal, open_journal
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.payload.supervise import HEARTBEAT_SECONDS
from loadmaster.result import Failure, JobResult, PayloadOutcome
from loadmaster.runner import run_part
from loadmaster.site import Site
from loadmaster.workdir import take_over

log = logging.getLogger(__name__)

FORMAT: Final = 1

NAME: Final = "bundle.json"

_DELIVERING: Final = frozenset({Stage.COMPUTED, Stage.STAGING_OUT})


class Part(Enum):
    """A part of a job, and how far it goes."""

    PREPARE = Stage.PREPARED
    PAYLOAD = Stage.EXITED
    FINISH = Stage.FINISHED

    @property
    def command(self) -> str:
        """What runs it."""
        return f"loadmaster {self.name.lower()}"


@dataclass(frozen=True, slots=True)
class Contents:
    """What is in a bundle besides its history."""

    job: JobDescription
    ce: ComputingElement
    coordinator: str = ""
    """As it was named; empty for the one of jobs without special wishes."""
    settled: str = ""
    """The stage at the end of the last part that came to its end: what is on the disk is whole, wherever it was copied."""
    home: str = ""
    """The identity of the work directory when the last part began: one that was killed goes on in there, or nowhere."""

    def dumps(self) -> str:
        """As JSON."""
        words = {
            "format": FORMAT,
            "job": self.job.model_dump(mode="json", exclude_defaults=True) | {"job_id": self.job.job_id},
            "ce": self.ce.model_dump(mode="json", exclude_defaults=True),
            "coordinator": self.coordinator,
            "settled": self.settled,
            "home": self.home,
        }
        return json.dumps(words, indent=2) + "\n"

    @classmethod
    def loads(cls, text: str) -> Contents:
        """What `dumps` made. Raises ValueError."""
        words = json.loads(text)
        if not isinstance(words, dict) or words.get("format") != FORMAT:
            raise ValueError("not a bundle of this version of loadmaster")
        texts: list[Any] = [words.get(name, "") for name in ("coordinator", "settled", "home")]
        if not all(isinstance(each, str) for each in texts):
            raise ValueError("a text is expected")
        return cls(JobDescription.model_validate(words["job"]), ComputingElement.model_validate(words["ce"]), *texts)


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a part: the job's result if it is over, else how its payload ended, if it has."""

    result: JobResult | None = None
    outcome: PayloadOutcome | None = None
    failure: Failure | None = None
    """Why the last part has nothing to do but to deliver what there is."""


class Bundle:
    """An open bundle: nobody else can run a part of it. Made by `open_bundle`."""

    def __init__(self, directory: Path, contents: Contents, journal: NodeJournal, events: tuple[Event, ...]) -> None:
        self.directory = directory
        self.contents = contents
        self._workdir = directory / "work" / contents.job.job_id
        self._journal = journal
        self._events = events
        self.life = Lifecycle.of(events)
        """What has been done."""

    def __repr__(self) -> str:
        return f"<Bundle {self.directory}: {self.life.stage.name.lower()}>"

    @property
    def attempt(self) -> int:
        """Which try at the job it is."""
        return 1 if self.life.identity is None else self.life.identity[1]

    def check(self, part: Part) -> Ended | None:
        """What came of a part that is over; None for one that is to be run. Raises `InvalidBundle`: it is not its turn."""
        life, name = self.life, f"{self.directory}: job {self.contents.job.job_id}"
        if life.stage is Stage.FINISHED:
            result = life.result()
            if part is Part.FINISH or (part is Part.PREPARE and life.slot is None):
                return Ended(result, result.outcome, result.failure)
            raise InvalidBundle(f"{name} has ended as {result.status}: there is nothing left to be run")
        if part is Part.PREPARE:
            if (
                life.stage in _DELIVERING and life.slot is None
            ):  # it could not be prepared, and that is not delivered yet
                return None
            if life.has_reached(Stage.GRANTED):
                raise InvalidBundle(
                    f"{name} has been prepared, and its payload begun: go on with `{_next(life).command}`"
                )
            return Ended() if life.stage is Stage.PREPARED else None
        if not life.has_reached(Stage.PREPARED):
            raise InvalidBundle(f"{name} has not been prepared: begin with `{Part.PREPARE.command}`")
        if part is Part.PAYLOAD:
            return Ended(None, life.outcome, life.failure) if life.has_reached(Stage.EXITED) else None
        if not life.has_reached(Stage.EXITED):
            raise InvalidBundle(f"{name}: its payload has not ended: run `{Part.PAYLOAD.command}` first")
        return None

    async def handle(self) -> JobHandle:
        """The handle of the job, for `run`: with its history, as it reads from here."""
        begun, contents = self.life.stage_in, self.contents
        here = await to_thread.run_sync(take_over, self._workdir) if begun is not None else None
        if contents.settled == self.life.stage.name:
            identity = here or ""
            await self._write(replace(contents, home=identity))
        else:
            identity = contents.home or (begun.identity if begun is not None else "")
        events = [_moved(event, self.life, self._workdir, identity) for event in self._events]
        return JobHandle.resumed(self._journal, events)

    async def run(
        self,
        part: Part,
        *,
        handle: JobHandle,
        coordinator: type[Coordinator] = JobExecutionCoordinator,
        site: Site | None = None,
        outputs: Path | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
    ) -> Ended:
        """Run a part, or go on with it. `outputs`: where the relative paths of outputs are taken from.

        Cancellation leaves it to be gone on with. Raises as `run_job` does.
        """
        job, contents = self.contents.job, self.contents
        if outputs is not None:
            job = job.relative_to(self.directory, outputs=outputs)
        handle.open(job.job_id, self.attempt)
        result = await run_part(
            job, part.value, handle=handle, ce=contents.ce, coordinator=coordinator, site=site,
            root=self._workdir.parent, heartbeat_seconds=heartbeat_seconds,
        )  # fmt: skip
        self.life = handle.life
        if result is None:
            await to_thread.run_sync(_sync_all, self.directory)
            await self._write(replace(self.contents, settled=handle.life.stage.name))
        return Ended(result, handle.life.outcome, handle.life.failure if result is None else result.failure)

    async def _write(self, contents: Contents) -> None:
        await to_thread.run_sync(_write, self.directory / NAME, contents.dumps())
        self.contents = contents


@asynccontextmanager
async def open_bundle(directory: Path, new: Contents | None = None) -> AsyncIterator[Bundle]:
    """The bundle in a directory, for this process alone; made of `new` if it is not there.

    Raises `InvalidBundle`: it is none, or another job's; `JournalFault`: somebody else has it open.
    """
    directory = await to_thread.run_sync(partial(_place, directory, new=new is not None))
    async with open_journal(directory / "journal") as journal:
        contents = await to_thread.run_sync(_contents, directory, new)
        history = await journal.history(contents.job.job_id)
        yield Bundle(directory, contents, journal, history.events if history is not None else ())


def _next(life: Lifecycle) -> Part:
    return Part.FINISH if life.has_reached(Stage.EXITED) else Part.PAYLOAD


def _moved(event: Event, life: Lifecycle, workdir: Path, identity: str) -> Event:
    """An event as if the work directory had always been here."""
    if isinstance(event, StageInStarted):
        return replace(event, workdir=str(workdir), identity=identity)
    if isinstance(event, PayloadPrepared) and life.stage_in is not None:
        old, new = life.stage_in.workdir, str(workdir)
        command = event.command
        return replace(
            event,
            command=_renamed(command, old, new)
            if isinstance(command, str)
            else tuple(_renamed(w, old, new) for w in command),
            env={name: _renamed(value, old, new) for name, value in event.env.items()},
        )
    return event


def _renamed(text: str, old: str, new: str) -> str:
    """The text with one path in place of another, wherever that stands as a path or the beginning of one."""
    before, *others = text.split(old)
    for each in others:
        goes_on = each[:1].isalnum() or each[:1] in {"_", "-", "."}
        before += f"{old if goes_on else new}{each}"
    return before


# -- the directory -----------------------------------------------------------------------------------------------------


def _place(directory: Path, *, new: bool) -> Path:
    directory = directory.absolute()
    try:
        if new:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = os.listdir(directory)
    except OSError as exc:
        raise InvalidBundle(f"{directory}: {exc.strerror}") from exc
    if NAME not in names and (not new or not {"journal"}.issuperset(names)):
        raise InvalidBundle(f"{directory}: {'is not empty, and ' if new else ''}is no bundle: there is no {NAME} in it")
    return directory


def _contents(directory: Path, new: Contents | None) -> Contents:
    path = directory / NAME
    try:
        found = Contents.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if new is None:
            raise InvalidBundle(f"{directory}: is no bundle: there is no {NAME} in it") from None
        (directory / "work").mkdir(mode=0o700, exist_ok=True)
        _write(path, new.dumps())
        return new
    except OSError as exc:
        raise InvalidBundle(f"{path}: {exc.strerror}") from exc
    except (ValueError, KeyError, InvalidJob) as exc:
        raise InvalidBundle(f"{path}: {exc}") from exc
    if new is not None and (found.job, found.ce) != (new.job, new.ce):
        raise InvalidBundle(f"{directory}: is the bundle of another job ({found.job.job_id}): give this one its own")
    (directory / "work").mkdir(mode=0o700, exist_ok=True)
    return found


def _write(path: Path, text: str) -> None:
    """Beside, synced, renamed."""
    beside = path.with_name(f".{path.name}.part")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    os.replace(beside, path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _sync_all(directory: Path) -> None:
    """Have all of it on the disk: a part that is over is said to be whole."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(directory))
    finally:
        os.close(descriptor)
