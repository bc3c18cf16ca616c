"""What a person sees of many files being staged: a line now and then, or on a terminal a live display."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import StringIO
from typing import Final, Protocol, TextIO

from loadmaster.console.plain import Silent, live_region, printable, size

LINE_SECONDS: Final = 10.0
"""Between two lines, where they pile up in a log."""


class Gauge(Protocol):
    """Something that shows how far the moving of many files is."""

    def say(self, line: str) -> None:
        """Print a line of its own."""
        ...

    def move(self, pace: Pace) -> None:
        """Show where it stands."""
        ...

    def close(self) -> None:
        """Give the terminal back."""
        ...


@dataclass(frozen=True, slots=True)
class Pace:
    """How far the moving of many files is, and how fast."""

    files: int
    of_files: int
    bytes: int
    of_bytes: int | None
    files_per_second: float
    bytes_per_second: float
    seconds_left: float | None
    failed: int = 0

    def __str__(self) -> str:
        failed = f", {self.failed:,} failed" if self.failed else ""
        left = f", {duration(self.seconds_left)} left" if self.seconds_left is not None else ""
        of_bytes = f" of {size(self.of_bytes)}" if self.of_bytes is not None else ""
        return (
            f"{self.files:,} of {self.of_files:,} files{failed}, {size(self.bytes)}{of_bytes}, "
            f"{self.files_per_second:,.0f} files/s, {size(round(self.bytes_per_second))}/s{left}"
        )


def open_gauge(stream: TextIO, *, quiet: bool) -> Gauge:
    """The gauge that fits: none, a live one on a terminal if `rich` is installed, else a line now and then."""
    if quiet:
        return SilentGauge(stream)
    if stream.isatty():
        try:
            return LiveGauge(stream)
        except ImportError:
            pass
    return LineGauge(stream)


class SilentGauge(Silent):
    """Says only what it is asked to say."""

    def move(self, pace: Pace) -> None:
        """Nothing."""


class LineGauge(SilentGauge):
    """A line every ten seconds, with its time (UTC): for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._next = time.monotonic() + LINE_SECONDS

    def move(self, pace: Pace) -> None:
        """Print a line if it is time for one."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LINE_SECONDS
            self.say(f"{datetime.now(UTC):%H:%M:%S} {pace}")


class LiveGauge:
    """Lines above, below them a bar with all of it. Needs `rich`."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(file=stream, highlight=False)
        text = TextColumn("{task.description}", markup=False)
        self._progress: Progress = Progress(BarColumn(), text, console=self._console, transient=True)
        self._bar = self._progress.add_task("", total=None)
        self._stop = live_region(self._console, self._progress)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        with suppress(OSError, ValueError):  # as in `Silent`
            self._console.print(printable(line), markup=False, soft_wrap=True)

    def move(self, pace: Pace) -> None:
        """Move the bar."""
        done, total = (pace.bytes, pace.of_bytes) if pace.of_bytes else (pace.files, pace.of_files)
        self._progress.update(self._bar, description=str(pace), completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        with suppress(OSError, ValueError):
            self._stop()


def duration(seconds: float) -> str:
    """A time for people: `0.24 s`, `7.1 s`, `55 s`, `4 min`, `2.5 h`."""
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def stderr_gauge(*, quiet: bool) -> Gauge:
    """The gauge of a command: on standard error, so that standard output has only results."""
    return open_gauge(sys.stderr or StringIO(), quiet=quiet)
