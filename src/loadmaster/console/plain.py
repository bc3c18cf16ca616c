"""What is printed as it is: a line on a stream, a number of bytes. Loads nothing of a job, for commands that run none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from io import StringIO
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from threading import Thread

    from loadmaster.events import Event


class Silent:
    """Says only what it is asked to say."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def show(self, event: Event) -> None:
        """Nothing."""

    def say(self, line: str) -> None:
        """Print a line. A terminal or a pipe that is gone, or a full disk, is no reason to stop a job: it is left out."""
        with suppress(OSError, ValueError):
            print(printable(line), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to give back."""


def to_stderr() -> Silent:
    """Lines on standard error and nothing else, so that standard output has only results."""
    return Silent(sys.stderr or StringIO())  # there is none when it was closed (2>&-)


def live_region(console: object, *parts: object) -> Callable[[], None]:
    """Start a live region of these parts; calling the result ends it."""
    from rich.console import Group
    from rich.live import Live as Region

    region = Region(Group(*parts), console=console, refresh_per_second=8, transient=True)  # type: ignore[arg-type]
    region.start()
    thread: Thread | None = getattr(region, "_refresh_thread", None)

    def stop() -> None:
        region.stop()
        if thread is not None:
            thread.join(1.0)  # it has been told to end, and is not waited for

    return stop


def size(count: int | None) -> str:
    """A number of bytes for people, in powers of 1000 as storage has it."""
    value = float(count or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def printable(text: str) -> str:
    """The text without anything a terminal would obey: names and messages come from payloads."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
