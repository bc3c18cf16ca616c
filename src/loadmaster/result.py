"""What came of it: how a payload ended and what it used, how a job ended and what arrived. Frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from signal import Signals
from typing import Any, Final, Self

from loadmaster import errors
from loadmaster.errors import JobError, RetryHook


class Status(StrEnum):
    """How a job ended."""

    DONE = "Done"
    COMPLETED = "Completed"
    """Every output is safe, but something is still pending: a file is not yet where it was asked for."""
    FAILED = "Failed"
    KILLED = "Killed"
    RESCHEDULED = "Rescheduled"


class Phase(StrEnum):
    """The part of a job's life something happened in."""

    STAGE_IN = "stage-in"
    PRE_PROCESS = "pre-process"
    PAYLOAD = "payload"
    POST_PROCESS = "post-process"
    STAGE_OUT = "stage-out"


class EndedBy(StrEnum):
    """Who ended a payload."""

    ITSELF = "itself"
    LIMIT = "limit"
    KILL = "kill"
    COORDINATOR = "coordinator"
    CANCELLATION = "cancellation"
    LOST = "lost"
    """Nobody knows: what held it is gone, with an agent that died or a machine that was started anew."""
    ORPHANED = "orphaned"
    """Its shim: it had been without an agent for as long as the site allows."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A limit that was exceeded: which, by what value, and what was allowed. Less than allowed: it was a minimum."""

    limit: str
    value: float
    threshold: float
    unit: str
    """`s`, `bytes`, `%`, nothing for numbers, or `UTC` for points in time as seconds since 1970."""
    because: str = ""
    """What else there is to say: how the threshold came to be, or who acted on it."""

    def __str__(self) -> str:
        value, threshold = quantity(self.value, self.unit), quantity(self.threshold, self.unit)
        why = f" ({self.because})" if self.because else ""
        if self.unit == "UTC":
            return f"{self.limit} of {threshold} was over at {value}{why}"
        relation = "under the minimum" if self.value < self.threshold else "over the limit"
        return f"{self.limit} of {value} is {relation} of {threshold}{why}"


def quantity(number: float, unit: str) -> str:
    """A number that people can read, with its unit."""
    if unit == "UTC":
        return f"{datetime.fromtimestamp(number, UTC):%Y-%m-%d %H:%M:%S} UTC"
    if unit == "bytes":
        for larger in ("bytes", "kB", "MB", "GB", "TB"):
            unit = larger
            if abs(number) < 1000 or larger == "TB":
                break
            number /= 1000
    return f"{_rounded(number)} {unit}".rstrip()


def _rounded(number: float) -> str:
    """Four digits, or all before the point: a limit of a day is 86400 s, not 8.64e+04 s."""
    return f"{number:.4g}" if number < 1000 else f"{number:.0f}"


_VERDICTS: Final = (errors.SkipPayload, errors.RescheduleJob, errors.HoldJob, errors.RetryHook)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a job did not succeed: the class of the error, its message, the phase it happened in."""

    kind: str
    message: str
    phase: Phase

    @classmethod
    def of(cls, error: JobError, phase: Phase) -> Self:
        """The failure an error stands for; a verdict of somebody's own class counts as the one it derives from."""
        kind = next((verdict for verdict in _VERDICTS if isinstance(error, verdict)), type(error))
        return cls(kind.__name__, str(error), phase)

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True, slots=True)
class Usage:
    """What a payload uses, all of its processes together. None: not looked at this time."""

    wall_seconds: float
    cpu_seconds: float = 0.0
    """User and system time, of processes that are gone as well."""
    rss_bytes: int = 0
    """Resident sizes added up; what several processes share counts in each."""
    processes: int = 0
    pss_bytes: int | None = None
    """The same with shared pages divided among those that share them. Dear, so only known when it has to be."""
    system_seconds: float = 0.0
    threads: int = 0
    read_bytes: int = 0
    written_bytes: int = 0
    """From and to storage, by processes that are gone as well."""
    workdir_bytes: int | None = None
    workdir_files: int | None = None
    workdir_whole: bool = True
    """False when there may be more: the walk over a work directory is bounded, and not let in everywhere."""
    free_disk_bytes: int | None = None
    """Where the work directory is."""
    output_bytes: int = 0
    """Standard output and error, as long as they have become."""
    outputs_bytes: int | None = None
    """What would have to be delivered if the payload ended now."""

    @property
    def memory_bytes(self) -> int:
        """The best we know: with sharing accounted for, or without."""
        return self.rss_bytes if self.pss_bytes is None else self.pss_bytes


@dataclass(frozen=True, slots=True)
class PayloadOutcome:
    """How a payload ended and what it used.

    `exit_code` and `signal`: one of them is None; both are when the status was lost. CPU seconds are the
    kernel's, of the payload and whatever was waited for below it. `peak_memory_bytes` is the largest resident size seen
    of its processes together, or None when nobody knows; `peak_pss_bytes` the largest with shared pages counted once,
    or None when it never came near its limit of memory; `peak_processes` None when it was too short to be looked at.
    """

    exit_code: int | None
    signal: int | None
    wall_seconds: float
    cpu_seconds: float
    peak_memory_bytes: int | None
    ended_by: EndedBy = EndedBy.ITSELF
    verdict: Verdict | None = None
    system_seconds: float = 0.0
    """The part of the CPU seconds spent in the kernel."""
    read_bytes: int = 0
    written_bytes: int = 0
    """From and to storage, past the page cache. As of the last look, when we are not root."""
    peak_pss_bytes: int | None = None
    peak_processes: int | None = None
    ending_seconds: float = 0.0
    """From the order to end it, or its own end, until nobody was left."""
    grace_expired: bool = False
    """Whether somebody had to be killed who had been asked to end."""
    orphans: int = 0
    """Its processes that outlived their parents, as far as the containment tells: some ended by themselves, others were
    what the payload left behind."""
    left_behind: bool = False
    """Whether something is still there although it was killed: it hangs in the kernel. Or may be: what held it was lost."""
    disk_full: bool = False
    """Whether the disk of its work directory was full when it had failed: what it had to say may not be in its logs."""
    node_out_of_memory: bool = False
    """Whether the kernel killed some of it because the node, or a group above ours, had no memory left."""
    stop_signal: int | None = None
    """The signal of the soft stop that was asked for, if it was."""

    @property
    def user_seconds(self) -> float:
        """The part of the CPU seconds not spent in the kernel."""
        return max(0.0, self.cpu_seconds - self.system_seconds)

    @property
    def has_no_status(self) -> bool:
        """Whether its status was lost."""
        return self.exit_code is None and self.signal is None

    @property
    def succeeded(self) -> bool:
        """Whether the payload ended by itself, with status 0, or as it was softly asked to."""
        return self.ended_by is EndedBy.ITSELF and (self.exit_code == 0 or self.stopped_softly)

    @property
    def stopped_softly(self) -> bool:
        """Whether it ended by the signal of a soft stop, itself or as a shell says it of what it ran: with 128 + N."""
        number = self.stop_signal
        return number is not None and (self.signal == number or self.exit_code == 128 + number)

    def __str__(self) -> str:
        if self.signal is not None:
            end = f"ended by signal {self.signal}{_signal_name(self.signal)}"
        else:
            end = "exit status unknown" if self.exit_code is None else f"exit code {self.exit_code}"
        end += ", the disk of its work directory is full" if self.disk_full else ""
        return end + (", the node had no memory left" if self.node_out_of_memory else "")


def _signal_name(number: int) -> str:
    try:
        return f" ({Signals(number).name})"
    except ValueError:  # a real-time signal has no name
        return ""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file that arrived: its name in the work directory, where it is, and what passed."""

    name: str
    url: str
    size_bytes: int
    checksum: str
    """Of the bytes that passed, with its algorithm: `adler32:0a1b2c3d`."""
    lfn: str | None = None
    storage_element: str | None = None

    @property
    def adler32(self) -> str:
        """The digits of the checksum if it is an adler32, else nothing."""
        algorithm, _, digits = self.checksum.partition(":")
        return digits if algorithm == "adler32" else ""


@dataclass(frozen=True, slots=True)
class JobResult:
    """What came of one attempt at a job. Values only, so it can be kept, sent and compared."""

    job_id: str
    attempt: int
    status: Status
    failure: Failure | None
    outcome: PayloadOutcome | None
    inputs: tuple[StoredFile, ...] = ()
    outputs: tuple[StoredFile, ...] = ()
    missing_outputs: tuple[str, ...] = ()
    """Names or patterns no file was found for."""
    pending: tuple[str, ...] = ()
    """What is still to be done elsewhere, a line each; the job is Completed, not Done, while there is any."""
    parameters: Mapping[str, str] = field(default_factory=dict)
    """What the coordinator reported."""

    def raise_for_status(self) -> None:
        """Raise what the failure stands for, if there is one, for those who want an exception."""
        if self.failure is not None:
            kind = getattr(errors, self.failure.kind, None)
            if isinstance(kind, type) and issubclass(kind, JobError) and kind is not RetryHook:
                raise kind(self.failure.message)
            raise JobError(str(self.failure))  # a community's own class, known by its name alone

    def to_json(self) -> dict[str, Any]:
        """The result as JSON's types."""
        return asdict(self)
