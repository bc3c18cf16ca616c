"""What a person sees of a job: lines, or on a terminal a live display."""

from __future__ import annotations

import sys
from contextlib import suppress
from io import StringIO
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final, Protocol, TextIO

from loadmaster.console.plain import Silent, live_region, printable, size
from loadmaster.events import (
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    Heartbeat,
    JobAccepted,
    JobFinished,
    OutputMissing,
    OutputPrinted,
    ParameterReported,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    StageInStarted,
    StageOutStarted,
    TransferProgress,
)
from loadmaster.handle import JobHandle
from loadmaster.names import shown
from loadmaster.result import Phase, StoredFile

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

FILE_BARS: Final = 12
"""More bars than this scroll off a small terminal."""


class Display(Protocol):
    """Something that shows events."""

    def show(self, event: Event) -> None:
        """Take one event in."""
        ...

    def say(self, line: str) -> None:
        """Print a line of its own."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


async def follow(handle: JobHandle, display: Display, *, output: bool = False, known: int = 0) -> None:
    """Show a job until it is over, but for the first `known` events; `output`: also what its payload prints."""
    async for event in handle.follow(output=output):
        if known:  # what has been recorded comes first, and in its order
            known -= 1
        else:
            display.show(event)


def open_display(stream: TextIO, *, quiet: bool) -> Display:
    """The display that fits: none, live bars on a terminal if `rich` is installed, else lines."""
    if quiet:
        return Silent(stream)
    if stream.isatty():
        try:
            return Live(stream)
        except ImportError:
            pass
    return Lines(stream)


def describe(event: Event) -> list[str]:
    """What an event says to a person: a line, and below it what the payload said; nothing if it says nothing."""
    line = _line(event)
    said: list[str] = []
    if isinstance(event, PayloadExited):
        said = [f"         | {text}" for text in event.last_lines]
    elif isinstance(event, OutputPrinted):
        skipped = [f"  | [... {size(event.skipped_bytes)} more ...]"] if event.skipped_bytes else []
        said = skipped + [f"  | {text}" for text in event.text.splitlines()]
    return [printable(text) for text in ([line] if line else []) + said]


def _line(event: Event) -> str | None:
    match event:
        case JobAccepted():
            return f"job {event.job_id}, attempt {event.attempt}"
        case StageInStarted():
            return "staging in"
        case FileStagedIn(file=file):
            return f"  in   {file.name}  {size(file.size_bytes)}  from {place(file)}"
        case PayloadPrepared(command=command):
            return f"payload: {command if isinstance(command, str) else ' '.join(command)}"
        case PayloadStarted(pid=pid, containment=containment):
            return f"payload runs (process {pid}, {containment})"
        case PayloadExited(outcome=outcome):
            memory = f", {size(outcome.peak_memory_bytes)} at most" if outcome.peak_memory_bytes else ""
            softly = ", as it was asked to" if outcome.stopped_softly else ""
            used = f"{outcome.wall_seconds:.1f} s, CPU {outcome.cpu_seconds:.1f} s{memory}"
            return f"payload ended: {outcome}{softly}, {used}"
        case ParameterReported(name=name, value=value):
            return f"  {name}: {value}"
        case ComputingEnded(failure=failure) if failure is not None:
            return f"failed in {failure.phase}: {failure}"
        case StageOutStarted():
            return "staging out"
        case FileStagedOut(file=file):
            return f"  out  {file.name}  {size(file.size_bytes)}  to {shown(file.url)}"
        case FailoverRequested(file=file, wanted=wanted):
            return f"  out  {file.name}  {size(file.size_bytes)}  to {shown(file.url)}, to be moved to {shown(wanted)}"
        case OutputMissing(name=name, reason=reason):
            return f"  no   {name}: {reason}"
        case JobFinished(status=status, failure=failure):
            return f"job {event.job_id}: {status}" + (f" ({failure})" if failure is not None else "")
        case _:
            return None


def place(file: StoredFile) -> str:
    """Where a file is, in a person's words."""
    return f"LFN:{file.lfn} on {file.storage_element}" if file.lfn else shown(file.url)


class Lines(Silent):
    """A line for each event: for logs and pipes."""

    def show(self, event: Event) -> None:
        """Print what the event says, with its time (UTC)."""
        for line in describe(event):
            self.say(f"{event.time:%H:%M:%S} {line}")


class Live:
    """Lines above, and below them a bar for every file under way and the payload's figures. Needs `rich`."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._console = Console(file=stream, highlight=False)
        self._files: Progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            console=self._console,
            transient=True,
        )
        self._phase: Progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(), console=self._console,
            transient=True,
        )  # fmt: skip
        self._bars: dict[str, TaskID] = {}
        self._phase_task: TaskID | None = None
        self._live = live_region(self._console, self._phase, self._files)

    def show(self, event: Event) -> None:
        """Print what the event says, and move the bars."""
        for line in describe(event):
            self.say(f"{event.time:%H:%M:%S} {line}")
        match event:
            case StageInStarted():
                self._enter("staging in")
            case PayloadPrepared():
                self._enter("waiting for a slot")
            case PayloadStarted():
                self._enter("payload")
            case Heartbeat(phase=Phase.PAYLOAD, usage=usage, last_lines=last) if usage is not None:
                figures = (
                    f"CPU {usage.cpu_seconds:.1f} s  memory {size(usage.memory_bytes)}  processes {usage.processes}"
                )
                said = f"  | {last[-1]}" if last else ""
                self._rename(printable(f"payload  {figures}{said}"[: self._console.width - 12]))
            case ComputingEnded() | StageOutStarted():
                self._enter("staging out")
            case TransferProgress(name=name, done_bytes=done, size_bytes=total):
                self._move(name, done, total)
            case FileStagedIn(file=file) | FileStagedOut(file=file) | FailoverRequested(file=file):
                self._drop(file.name)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        with suppress(OSError, ValueError):  # as in `Silent`
            self._console.print(printable(line), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bars away."""
        with suppress(OSError, ValueError):
            self._live()

    def _enter(self, phase: str) -> None:
        if self._phase_task is not None:
            self._phase.remove_task(self._phase_task)
        self._phase_task = self._phase.add_task(phase, total=None)

    def _rename(self, description: str) -> None:
        if self._phase_task is not None:
            self._phase.update(self._phase_task, description=description)

    def _move(self, name: str, done: int, total: int | None) -> None:
        if name not in self._bars and len(self._bars) < FILE_BARS:
            self._bars[name] = self._files.add_task(printable(PurePosixPath(name).name[:40]), total=total)
        if name in self._bars:
            self._files.update(self._bars[name], completed=done)

    def _drop(self, name: str) -> None:
        if name in self._bars:
            self._files.remove_task(self._bars.pop(name))


def stderr_display(*, quiet: bool) -> Display:
    """The display of a command: on standard error, so that standard output has only results."""
    return open_display(sys.stderr or StringIO(), quiet=quiet)  # there is none when it was closed (2>&-)
