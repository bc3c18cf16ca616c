"""What is told of a staging: to a person as it goes on, to programs in files."""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from tempfile import TemporaryFile
from typing import IO, Any, Final, TextIO

import anyio
from anyio import to_thread

from loadmaster.console.gauge import Gauge, Pace, duration
from loadmaster.console.manifest import Manifest
from loadmaster.console.plain import size
from loadmaster.console.stage import Ended, Outcome, Stage, Tally
from loadmaster.names import shown

log = logging.getLogger(__name__)

TICK_SECONDS: Final = 0.5
"""Between two looks at how far it is; a person cannot use more."""

RATE_SECONDS: Final = 10.0
"""The rates that are shown are of the last so many seconds."""


class Record:
    """What came of each file, as lines of JSON. Lines wait in memory until `write`, which blocks."""

    def __init__(self, events: TextIO | None) -> None:
        self._events = events
        self._waiting: list[dict[str, Any]] = []
        self._failures: IO[str] | None = None

    @classmethod
    @contextmanager
    def open(cls, events: TextIO | None) -> Iterator[Record]:
        """A record in this file, if there is one; closed with everything in it."""
        record = cls(events)
        try:
            yield record
        finally:
            record.write()
            if record._failures is not None:
                record._failures.close()
            if events is not None:
                with suppress(OSError):
                    events.close()

    def add(self, ended: Ended) -> None:
        """One more. Waits for nothing."""
        if self._events is not None or ended.outcome is Outcome.FAILED:
            self._waiting.append(facts(ended))

    def write(self) -> None:
        """Write what waits. A file that can no longer be written to is given up, with an error in the log."""
        waiting, self._waiting = self._waiting, []
        lines = [json.dumps(each) + "\n" for each in waiting]
        failures = [line for line, each in zip(lines, waiting, strict=True) if each["outcome"] == Outcome.FAILED]
        try:
            if failures:
                if self._failures is None:
                    self._failures = TemporaryFile("w+", prefix="loadmaster-failures-", encoding="utf-8")  # noqa: SIM115
                self._failures.writelines(failures)
            if self._events is not None:
                self._events.writelines(lines)
                self._events.flush()
        except OSError as exc:
            name = getattr(self._events, "name", "the record")
            log.error("%s: no more events are written: %s", name, exc.strerror)  # noqa: TRY400 - a sentence, no traceback
            self._events = None

    def summary(self, tally: Tally) -> str:
        """The summary and the failures, as JSON."""
        self.write()
        failures: list[Any] = []
        if self._failures is not None:
            self._failures.seek(0)
            failures = [json.loads(line) for line in self._failures]
        words = {
            "files": tally.files, "moved": tally.moved, "there": tally.there, "failed": tally.failed, "left": tally.left,
            "moved_bytes": tally.moved_bytes, "there_bytes": tally.there_bytes, "attempts": tally.attempts,
            "seconds": round(tally.seconds, 3), "failures": failures,
        }  # fmt: skip
        return json.dumps(words, indent=2) + "\n"


class Report:
    """Tells of every failure, once, and of how far it is."""

    def __init__(self, gauge: Gauge, record: Record, manifest: Manifest) -> None:
        self._gauge, self._record, self._manifest = gauge, record, manifest
        self._samples: deque[tuple[float, int, int]] = deque()

    def say(self, line: str) -> None:
        """A line for a person."""
        self._gauge.say(line)

    def ended(self, ended: Ended) -> None:
        """It is known what came of a file."""
        self._record.add(ended)
        if ended.outcome is Outcome.FAILED:
            reason = (ended.reason or "").removeprefix(f"{ended.entry.target}: ")
            self.say(f"line {ended.entry.line}: {shown(ended.entry.target)}: {reason}")

    async def follow(self, staging: Stage) -> None:
        """Tell how far it is, until cancelled."""
        while True:
            await anyio.sleep(TICK_SECONDS)  # bytes that pass have no edge, and a person reads no faster
            self._gauge.move(self._pace(staging.tally, staging.passing_bytes))
            await to_thread.run_sync(self._record.write)

    def _pace(self, tally: Tally, passing_bytes: int) -> Pace:
        now = time.monotonic()
        self._samples.append((now, tally.moved, tally.moved_bytes + passing_bytes))
        while now - self._samples[0][0] > RATE_SECONDS:
            self._samples.popleft()
        then, files, moved_bytes = self._samples[0]
        seconds = max(now - then, TICK_SECONDS)
        files_per_second = (tally.moved - files) / seconds
        bytes_per_second = max(0, self._samples[-1][2] - moved_bytes) / seconds
        done, of_bytes = tally.moved_bytes + tally.there_bytes + passing_bytes, self._manifest.size_bytes
        left: float | None = None
        if of_bytes and bytes_per_second:
            left = max(0, of_bytes - done) / bytes_per_second
        elif files_per_second:
            left = tally.left / files_per_second
        return Pace(
            tally.files - tally.left,
            tally.files,
            done,
            of_bytes,
            files_per_second,
            bytes_per_second,
            left,
            tally.failed,
        )


def told(tally: Tally) -> str:
    """A staging in a line for people."""
    seconds = max(tally.seconds, 1e-6)
    what = "file" if tally.moved == 1 else "files"
    parts = [
        f"{tally.moved:,} {what} moved, {size(tally.moved_bytes)} in {duration(tally.seconds)}"
        f" ({tally.moved / seconds:,.0f} files/s, {size(round(tally.moved_bytes / seconds))}/s)"
    ]
    parts += [f"{tally.there:,} were there already"] if tally.there else []
    parts += [f"{retries:,} retries"] if (retries := tally.attempts - tally.moved - tally.failed) > 0 else []
    parts += [f"{tally.failed:,} failed"] if tally.failed else []
    parts += [f"{tally.left:,} not begun"] if tally.left else []
    return "; ".join(parts)


def facts(ended: Ended) -> dict[str, Any]:
    """What came of a file, in JSON's types."""
    info = ended.info
    return {
        "time": datetime.now(UTC).isoformat(),
        "line": ended.entry.line,
        "outcome": ended.outcome,
        "source": ended.entry.source,
        "target": ended.entry.target,
        "size_bytes": info.size_bytes if info is not None else None,
        "checksum": str(info.checksum) if info is not None and info.checksum is not None else None,
        "attempts": ended.attempts,
        "reason": ended.reason,
    }
