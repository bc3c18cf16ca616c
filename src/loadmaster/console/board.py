"""What a person sees of a node at work: a line for each job that ends, and where all of them stand."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final, Protocol, TextIO

from loadmaster.console.gauge import LINE_SECONDS, duration
from loadmaster.console.plain import Silent, live_region, printable, size
from loadmaster.occupancy import NodeStatistics
from loadmaster.result import JobResult, Status

ROWS: Final = ("waiting", "waiting for disk", "staging in", "ready", "computing", "delivering")


class Board(Protocol):
    """Something that shows where a node's jobs stand."""

    def say(self, line: str) -> None:
        """Print a line of its own."""
        ...

    def end(self, result: JobResult) -> None:
        """A job has ended."""
        ...

    def move(self, figures: NodeStatistics) -> None:
        """Where the others stand."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


def open_board(stream: TextIO, *, quiet: bool) -> Board:
    """The board that fits: none, a live table on a terminal if `rich` is installed, else lines."""
    if quiet:
        return SilentBoard(stream)
    if stream.isatty():
        try:
            return LiveBoard(stream)
        except ImportError:
            pass
    return LineBoard(stream)


class SilentBoard(Silent):
    """Says only what it is asked to say."""

    def end(self, result: JobResult) -> None:
        """Nothing."""

    def move(self, figures: NodeStatistics) -> None:
        """Nothing."""


class LineBoard(SilentBoard):
    """A line for each job that ends, and one every ten seconds, with their time (UTC): for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._next = time.monotonic() + LINE_SECONDS

    def end(self, result: JobResult) -> None:
        """Print how it ended."""
        self.say(f"{datetime.now(UTC):%H:%M:%S} {ended(result)}")

    def move(self, figures: NodeStatistics) -> None:
        """Print a line if it is time for one."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            self.say(f"{datetime.now(UTC):%H:%M:%S} {', '.join(f'{what} {count}' for what, count in rows(figures))}")


class LiveBoard:
    """Lines for what has failed, below them a table of where the others stand. Needs `rich`."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import Progress, TextColumn

        self._console = Console(file=stream, highlight=False)
        name = TextColumn("{task.description:<20}", markup=False)
        self._table: Progress = Progress(
            name, TextColumn("{task.fields[count]}", markup=False), console=self._console, transient=True
        )
        self._lines: dict[str, object] = {}
        self._stop = live_region(self._console, self._table)

    def say(self, line: str) -> None:
        """Print a line above the table."""
        with suppress(OSError, ValueError):  # as in `Silent`
            self._console.print(printable(line), markup=False, soft_wrap=True)

    def end(self, result: JobResult) -> None:
        """Print how it ended, if that is worth a line."""
        if result.status is not Status.DONE:
            self.say(ended(result))

    def move(self, figures: NodeStatistics) -> None:
        """Change the table."""
        for what, count in rows(figures):
            if what not in self._lines:
                self._lines[what] = self._table.add_task(what, total=None, count=count)
            self._table.update(self._lines[what], count=count)  # type: ignore[arg-type]  # rich's own number

    def close(self) -> None:
        """Take the table away."""
        with suppress(OSError, ValueError):
            self._stop()


def ended(result: JobResult) -> str:
    """How a job ended, in a line."""
    took = f" ({duration(result.outcome.wall_seconds)})" if result.outcome is not None else ""
    return f"{result.job_id}  {result.status}{took}" + (f"  {result.failure}" if result.failure is not None else "")


def rows(figures: NodeStatistics) -> Iterator[tuple[str, str]]:
    """The table: what, how many."""
    for phase in ROWS:
        if figures.jobs[phase] or phase in {"staging in", "computing", "delivering"}:
            yield phase, f"{figures.jobs[phase]:,}"
    for status, count in figures.ended.items():
        if count:
            yield status, f"{count:,}"
    why = ", ".join(f"{cores} {reason}" for reason, cores in figures.idle.items())
    yield "cores", f"{figures.busy_cores} of {figures.cores} busy" + (f"; idle: {why}" if why else "")
    yield "in, out", f"{size(figures.bytes_in)}, {size(figures.bytes_out)}"


def told(figures: NodeStatistics) -> str:
    """What it was in all, in a line."""
    jobs = dict(figures.ended)
    if figures.begun_again:  # the same jobs, which are counted where their last attempt ended
        jobs[Status.RESCHEDULED] -= figures.begun_again
    counts = ", ".join(f"{count:,} {status}" for status, count in jobs.items() if count)
    counts = counts or ("no new jobs" if figures.recalled else "no jobs")
    before = f" ({figures.recalled:,} had ended before, and were not run again)" if figures.recalled else ""
    lost = f", {figures.begun_again:,} begun again after an attempt was lost" if figures.begun_again else ""
    back = f", {figures.given_back:,} of them given back" if figures.given_back else ""
    return (
        f"{counts}{back}{lost}{before} in {duration(figures.seconds)}; cores busy {figures.occupancy:.0%}, "
        f"{duration(figures.cpu_seconds)} of CPU; {size(figures.bytes_in)} in, {size(figures.bytes_out)} out"
    )
