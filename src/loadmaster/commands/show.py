"""`loadmaster show JOURNAL JOB`: a job's life with its times, all attempts, also while an agent writes to the journal."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import pairwise

from loadmaster.commands.arguments import Commands, add_journal, number
from loadmaster.commands.codes import LOOKED, NOT_PREPARED, OK
from loadmaster.console.plain import printable, size
from loadmaster.console.terminal import stderr_display
from loadmaster.events import (
    CompanionFailed,
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    JobAccepted,
    JobFinished,
    KillOrdered,
    LimitReached,
    OutputMissing,
    ParameterReported,
    PayloadAdopted,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    Remembered,
    SlotGranted,
    SoftStopOrdered,
    StageInStarted,
)
from loadmaster.logbook import Agent, History, Logbook
from loadmaster.names import shown
from loadmaster.reporter import written
from loadmaster.result import StoredFile


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    show = commands.add_parser("show", help=line, epilog=LOOKED)
    show.set_defaults(command=_show)
    add_journal(show)
    show.add_argument("job", metavar="JOB", help="the job's id")
    show.add_argument("--attempt", type=number(1, 1_000_000), metavar="N", help="that attempt only")
    show.add_argument("--json", action="store_true", help="its events, a line of JSON each, for programs")


def _show(options: argparse.Namespace) -> int:
    with Logbook.look(options.journal) as book:
        histories, agents = list(_attempts(book, options.job, options.attempt)), book.agents()
    if not histories:
        stderr_display(quiet=True).say(f"loadmaster: {options.journal}: there is no such job: {options.job}")
        return NOT_PREPARED
    with suppress(BrokenPipeError):
        for history in histories:
            if options.json:
                print("".join(map(written, history.events)), end="", flush=True)
            else:
                _print(history, agents)
    return OK


def _attempts(book: Logbook, job_id: str, wanted: int | None) -> Iterator[History]:
    last, _ = book.last([job_id]).get(job_id, (0, None))
    for attempt in range(1, last + 1) if wanted is None else (wanted,):
        if (history := book.history(job_id, attempt)) is not None:
            yield history


def _print(history: History, agents: Sequence[Agent]) -> None:
    print(printable(f"job {history.job_id}, attempt {history.attempt}: {history.status or 'open'}"))
    began: datetime | None = None
    for time, what, said in _lines(history, agents):
        began = began or time
        seconds = (time - began).total_seconds()
        print(printable(f"  {time:%Y-%m-%d %H:%M:%S} {seconds:10.2f} s  {what:18} {said}".rstrip()))


def _lines(history: History, agents: Sequence[Agent]) -> Iterator[tuple[datetime, str, str]]:
    """Its events; and between them the agents that came meanwhile, each with what had become of the one before."""
    came = deque(pairwise(agents))
    last: datetime | None = None
    for event in history.events:
        while came and came[0][1].began <= event.time:
            replaced, agent = came.popleft()
            if last is not None:
                yield agent.began, "(a new agent)", _told(agent, replaced)
        last = event.time
        yield event.time, event.kind, _said(event)
    if history.status is None:
        for replaced, agent in came:
            yield agent.began, "(a new agent)", _told(agent, replaced)


def _told(agent: Agent, replaced: Agent) -> str:
    left = "had died" if replaced.closed is None else f"had left at {replaced.closed:%H:%M:%S}"
    return f"process {agent.pid} on {agent.host}; process {replaced.pid} on {replaced.host} {left}"


def _said(event: Event) -> str:
    """What there is to say of it besides its name; no environment, which may have secrets."""
    match event:
        case JobAccepted(coordinator=coordinator):
            return coordinator
        case StageInStarted(workdir=workdir):
            return f"in {workdir}"
        case FileStagedIn(file=file) | FileStagedOut(file=file):
            return _file(file)
        case FailoverRequested(file=file, wanted=wanted):
            return f"{_file(file)}, wanted at {shown(wanted)}"
        case OutputMissing(name=name, reason=reason):
            return f"{name}: {reason}"
        case PayloadPrepared(command=command):
            return command if isinstance(command, str) else " ".join(command)
        case SlotGranted(cores=cores, memory_mb=memory):
            return f"{cores} cores" + (f", {memory} MB" if memory else "")
        case PayloadStarted(pid=pid, containment=containment):
            return f"process {pid}, {containment}"
        case PayloadExited(outcome=outcome):
            return f"{outcome}; {outcome.wall_seconds:.1f} s, CPU {outcome.cpu_seconds:.1f} s, by {outcome.ended_by}"
        case ParameterReported(name=name, value=value) | Remembered(name=name, value=value):
            return f"{name} = {value}"
        case PayloadAdopted(agent_pid=pid, host=host):
            return f"by process {pid} on {host}"
        case SoftStopOrdered(signal=number):
            return f"signal {number}"
        case LimitReached(verdict=verdict):
            return str(verdict)
        case KillOrdered(reason=reason):
            return reason
        case CompanionFailed(failure=failure):
            return str(failure)
        case ComputingEnded(failure=failure):
            return str(failure) if failure is not None else ""
        case JobFinished(status=status, failure=failure):
            return f"{status}" + (f": {failure}" if failure is not None else "")
        case _:
            return ""


def _file(file: StoredFile) -> str:
    return f"{file.name}, {size(file.size_bytes)}, {shown(file.url)}"
