"""Asking a payload to wind down before it has to end: a signal to those of its processes that can be asked.

DIRAC's StopSigRegex, StopSigNumber and StopSigFinishSeconds. A payload that then ends with 128 + the signal's number, or by
that signal, has succeeded.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadmaster.description import JobDescription
from loadmaster.payload.usage import read_stat

MATCHING_SECONDS: Final = 5.0
"""A pattern that takes longer than this on the command lines of a payload is one that never ends."""

_MATCH: Final = """
import re, sys
pattern, *lines = sys.stdin.buffer.read().decode("utf-8", "replace").split("\\0\\0")
found = re.compile(pattern)
print(*(number for number, line in enumerate(lines) if found.search(line)))
"""


@dataclass(frozen=True, slots=True)
class SoftStop:
    """Which processes are asked, by what signal, and how long before the payload's time is over."""

    pattern: str
    number: int
    seconds: float

    @classmethod
    def of(cls, job: JobDescription) -> SoftStop | None:
        """What a description asks for, if it does."""
        return None if job.stop_pattern is None else cls(job.stop_pattern, job.stop_signal, job.stop_seconds)

    def ask(self, pids: Iterable[int]) -> int:
        """Signal those of the processes whose command line the pattern is found in; how many. Blocks.

        Raises TimeoutError for a pattern that never ends.
        """
        found = [(pid, stat.start_ticks, _command_line(pid)) for pid in pids if (stat := read_stat(pid))]
        asked = 0
        for index in _matching(self.pattern, [line for _, _, line in found]):
            pid, start_ticks, _ = found[index]
            with suppress(OSError):  # gone
                pidfd = os.pidfd_open(pid)
                try:
                    if (stat := read_stat(pid)) and stat.start_ticks == start_ticks:  # still who it was
                        signal.pidfd_send_signal(pidfd, self.number)
                        asked += 1
                finally:
                    os.close(pidfd)
        return asked


def _command_line(pid: int) -> bytes:
    """The words of a process's command, with blanks between them."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ")
    return b""


def _matching(pattern: str, lines: list[bytes]) -> list[int]:
    """Which lines a pattern is found in. In a process of its own: both are the user's, and may be made never to end."""
    if not lines:
        return []
    words = b"\0\0".join([os.fsencode(pattern), *lines])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH], input=words, capture_output=True, check=True, env={},
            timeout=MATCHING_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise TimeoutError(f"stop_pattern {pattern!r} takes more than {MATCHING_SECONDS:.0f} s to match") from exc
    return [int(word) for word in done.stdout.split()]
