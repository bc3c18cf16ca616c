"""The facts of a job's life, in the past tense. `lifecycle` says in what order they may come.

| event                             | when                                                              | kept |
| --------------------------------- | ----------------------------------------------------------------- | ---- |
| `JobAccepted`                     | always first                                                      | yes  |
| `StageInStarted`, `FileStagedIn`* | after JobAccepted                                                 | yes  |
| `StageInEnded`                    | stageIn returned                                                  | yes  |
| `PayloadPrepared`                 | preProcess returned; carries the command and environment          | yes  |
| `SlotGranted`                     | the lease began; carries cores and memory                         | yes  |
| `PayloadStarted`                  | process id, start time, containment                               | yes  |
| `PayloadAdopted`*                 | another agent has died, and this one goes on with it              | yes  |
| `FileStagedIn`*, `FileStagedOut`* | also beside the payload and in postProcess                        | yes  |
| `Heartbeat`*                      | at any time                                                       | no   |
| `OutputPrinted`*                  | while the payload runs, for who follows its output                | no   |
| `TransferProgress`*, `StagingProgress`* | while files move                                            | no   |
| `SoftStopOrdered`, `LimitReached`, `CompanionFailed` | the payload is ended for it, after this           | yes  |
| `PayloadExited`                   | exactly once if PayloadStarted, whatever the cause                | yes  |
| `ParameterReported`*              | a coordinator had something to say                                | yes  |
| `Remembered`*                     | a coordinator has something to remember, also after a restart     | yes  |
| `KillOrdered`                     | somebody ordered the job to end, before anything is done about it | yes  |
| `ComputingEnded`                  | exactly once, with a failure or none; then only outputs move      | yes  |
| `StageOutStarted`, `OutputMissing`*, `FailoverRequested`* | after ComputingEnded                      | yes  |
| `RegistrationRequested`*          | an output is there, but no catalog took it                        | yes  |
| `JobFinished`                     | the end, exactly once                                             | yes  |
| `OperationDone`*, `OperationDropped`* | after JobFinished: what became of what it had left to be done | yes  |

A kept event is in the journal before anybody is told. The others are offered to whoever follows at the moment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, ClassVar

from pydantic import TypeAdapter
from pydantic_core import PydanticSerializationError

from loadmaster.result import Failure, PayloadOutcome, Phase, Status, StoredFile, Usage, Verdict


@dataclass(frozen=True, slots=True)
class Event:
    """What every event carries: whose it is, which attempt, when (UTC)."""

    kept: ClassVar[bool] = True

    job_id: str
    attempt: int
    time: datetime

    @property
    def kind(self) -> str:
        """The name of the event, as it is written to files."""
        return type(self).__name__


@dataclass(frozen=True, slots=True)
class JobAccepted(Event):
    """The job is ours from here on. Carries its description in our own words."""

    description: Mapping[str, Any] = field(default_factory=dict)
    coordinator: str = ""
    """The class of its coordinator, as `module:Class`, where it has one of its own."""
    lost: int = 0
    """How many attempts before this one, one after the other, were lost on this node."""
    outputs: str = ""
    """Where outputs go that have no other target: the site's `output_directory`, where it has one."""
    site: str = ""
    """The file of the site, where it was read from one."""


@dataclass(frozen=True, slots=True)
class StageInStarted(Event):
    """Inputs are being brought in: into this directory, which can be told from another that is made in its place."""

    workdir: str = ""
    identity: str = ""


@dataclass(frozen=True, slots=True)
class FileStagedIn(Event):
    """An input is whole and verified in the work directory."""

    file: StoredFile


@dataclass(frozen=True, slots=True)
class StageInEnded(Event):
    """stageIn returned."""


@dataclass(frozen=True, slots=True)
class PayloadPrepared(Event):
    """preProcess returned."""

    command: str | tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class SlotGranted(Event):
    """The lease of a slot began; it ends with the payload."""

    cores: int
    memory_mb: int | None
    cpus: tuple[int, ...] = ()
    """Which processors it stays on; none: any."""
    gpus: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PayloadStarted(Event):
    """The payload runs. `start_ticks` is field 22 of /proc/PID/stat: with the pid it names one process for good."""

    pid: int
    start_ticks: int
    containment: str
    shim: str = ""
    """Which helper holds it: `c`, or its `python` twin where no compiler was found; empty when none does."""
    shim_pid: int = 0
    shim_start_ticks: int = 0
    boot_id: str = ""
    """Of the machine; process ids and start times name somebody else once it was started again."""


@dataclass(frozen=True, slots=True)
class PayloadAdopted(Event):
    """The agent that had the payload has died. This one goes on with it, or has found how it ended."""

    agent_pid: int
    host: str


@dataclass(frozen=True, slots=True)
class SoftStopOrdered(Event):
    """The payload's time is nearly over, and it is asked to wind down by this signal after this; it is not asked twice."""

    signal: int


@dataclass(frozen=True, slots=True)
class LimitReached(Event):
    """The payload is over a limit. It is ended after this, also by another agent."""

    verdict: Verdict


@dataclass(frozen=True, slots=True)
class CompanionFailed(Event):
    """A task beside the payload has failed, and the job with it. The payload is ended after this, also by another agent."""

    failure: Failure


@dataclass(frozen=True, slots=True)
class PayloadExited(Event):
    """The payload and what it left are gone. One that did not succeed leaves its last lines."""

    outcome: PayloadOutcome
    last_lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ParameterReported(Event):
    """A coordinator had something to say about the job."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Remembered(Event):
    """A coordinator wants to know this again after a restart. Any JSON."""

    name: str
    value: Any


@dataclass(frozen=True, slots=True)
class KillOrdered(Event):
    """Somebody ordered the job to end, and why. What computes is ended after this, also by another agent."""

    reason: str


@dataclass(frozen=True, slots=True)
class ComputingEnded(Event):
    """No hook but stageOut is called any more; a restart only stages out."""

    failure: Failure | None


@dataclass(frozen=True, slots=True)
class StageOutStarted(Event):
    """Outputs are being taken out."""


@dataclass(frozen=True, slots=True)
class FileStagedOut(Event):
    """An output is whole and verified at its target."""

    file: StoredFile


@dataclass(frozen=True, slots=True)
class OutputMissing(Event):
    """No file was found for a declared output, or one that may not leave; the reason says which."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class FailoverRequested(Event):
    """An output is safe, but not where it was asked for: somebody has to move it."""

    file: StoredFile
    wanted: str


@dataclass(frozen=True, slots=True)
class RegistrationRequested(Event):
    """An output is where it should be, but the catalog could not be told: somebody has to do that."""

    file: StoredFile
    reason: str = ""


@dataclass(frozen=True, slots=True)
class RemovalRequested(Event):
    """What an agent that was killed has left of uploads to a URL could not be removed: somebody has to do that."""

    url: str
    parts: tuple[str, ...] = ()
    """The names beside it that there may be."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class JobFinished(Event):
    """The end. `failure` is why, when the job failed only after computing had ended."""

    status: Status
    failure: Failure | None


@dataclass(frozen=True, slots=True)
class OperationDone(Event):
    """Something a job that is Completed had left to be done has been done. Once nothing is left, the job is Done."""

    operation: int
    """Its number in the journal."""
    what: str
    """As it stands in the result's `pending`."""


@dataclass(frozen=True, slots=True)
class OperationDropped(Event):
    """Nobody will do any more what a job had left to be done; the job stays Completed."""

    operation: int
    what: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Heartbeat(Event):
    """How the job is doing: it comes in every phase."""

    kept: ClassVar[bool] = False

    phase: Phase
    seconds: float
    """How long the job has been in this phase."""
    usage: Usage | None = None
    """What the payload uses, or what it used at the last look once it has ended; None before it."""
    last_lines: tuple[str, ...] = ()
    """The last lines the payload printed."""


@dataclass(frozen=True, slots=True)
class OutputPrinted(Event):
    """The payload has printed something to its standard output or error."""

    kept: ClassVar[bool] = False

    name: str
    """The file it is in."""
    text: str
    skipped_bytes: int = 0
    """So much before it is left out here: it printed faster than it is told."""


@dataclass(frozen=True, slots=True)
class TransferProgress(Event):
    """How far one file has come."""

    kept: ClassVar[bool] = False

    name: str
    url: str
    done_bytes: int
    size_bytes: int | None


@dataclass(frozen=True, slots=True)
class StagingProgress(Event):
    """How far all files have come that are being brought in, or taken out, together.

    The size of all and the seconds that are left are None while they cannot be known; both may be wrong.
    """

    kept: ClassVar[bool] = False

    direction: str
    done_files: int
    files: int
    done_bytes: int
    size_bytes: int | None
    bytes_per_second: float
    seconds_left: float | None


KINDS: Mapping[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}


def dump(event: Event) -> dict[str, Any]:
    """The event as JSON's types, with its `kind`."""
    return {"kind": event.kind, **asdict(event), "time": event.time.isoformat()}


def load(data: Mapping[str, Any]) -> Event:
    """The event a dictionary of `dump` stands for. Raises ValueError when it stands for none."""
    facts = dict(data)
    kind = facts.pop("kind", None)
    if not isinstance(kind, str) or kind not in KINDS:
        raise ValueError(f"{data!r:.80}: not an event we know")
    return _adapter(kind).validate_python(facts)


def dumps(event: Event) -> str:
    """The event as a line of JSON, quickly; `loads` has it back."""
    if not (
        isinstance(event, LimitReached) or (isinstance(event, PayloadExited) and event.outcome.verdict is not None)
    ):
        # Pydantic's serializer takes a tenth of the time, but turns what is infinite (a threshold may be) into null,
        # and names that are not UTF-8 into an error.
        with suppress(PydanticSerializationError):
            begins, to_json = _writer(event.kind)
            return begins + to_json(event, warnings=False)[1:].decode()
    return json.dumps(dump(event), separators=(",", ":"))


def loads(text: str) -> Event:
    """The event a line of `dumps` stands for. Raises ValueError when it stands for none."""
    data = json.loads(text)
    if not isinstance(data, dict):
        raise ValueError(f"{text!r:.80}: not an event")  # noqa: TRY004 - of the text
    return load(data)


@cache
def _writer(kind: str) -> tuple[str, Callable[..., bytes]]:
    """How a line of them begins, and what writes the rest, brace and all."""
    return f'{{"kind":"{kind}",', _adapter(kind).serializer.to_json


@cache
def _adapter(kind: str) -> TypeAdapter[Event]:
    return TypeAdapter(KINDS[kind])
