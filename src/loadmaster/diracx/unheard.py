"""Attempts at jobs that have ended in a journal, and of which an outbox has not the end.

An event is on the journal's disk before a reporter hears of it, and its report on the outbox's disk before it is sent. Who
dies between the two has an outbox that is behind its journal, never ahead of it; the next process reads there what is
missing. All that the outbox has to know is since when it belongs to the journal: who ran without a reporter before that was
not to be reported.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from loadmaster.diracx.jobs import attempt_name
from loadmaster.diracx.outbox import MADE
from loadmaster.journal import RETENTION
from loadmaster.logbook import History, Logbook

MARK: Final = "journal"
"""Among the attempts of an outbox: the number of the last job that the journal had before. No attempt is called so."""


def unheard(
    directory: Path, reported: Mapping[str, int], unfinished: Iterable[str], *, now: datetime
) -> tuple[int, list[History]]:
    """The mark, and these attempts in their order. `reported`: of each how many events have been; `unfinished`: the names of
    those of which more was to come.

    Those that ended so long ago that journals forget them, and outboxes too, are not told once more. Raises `JournalFault`.
    Blocks; reads only, so it does not matter whether an agent has the journal.
    """
    with Logbook.look(directory) as book:
        mark = reported[MARK] if MARK in reported else book.ask(lambda database: _mark(database, reported, now))
        ended = book.ask(lambda database: _ended(database, mark, now))
        known = {name.rpartition("/")[0] for name in reported}
        begun = [(job_id, int(attempt)) for job_id, attempt, _ in (name.split("/", 2) for name in unfinished)]
        wanted = [*begun, *(key for key in ended if "/".join(map(str, key)) not in known)]
        found = [history for key in wanted if (history := book.history(*key)) is not None]
    return mark, [each for each in found if each.status is not None and _has_more(each, reported)]


def _has_more(history: History, reported: Mapping[str, int]) -> bool:
    return len(history.events) > reported.get(attempt_name(history.events[0]), 0)


def _mark(database: sqlite3.Connection, reported: Mapping[str, int], now: datetime) -> int:
    """The number of the last job that had ended when the outbox was made."""
    made = datetime.fromtimestamp(reported[MADE] / 1e6, UTC) if MADE in reported else now
    query = "SELECT coalesce(max(number), 0) FROM jobs WHERE ended < ?"
    return int(database.execute(query, (made.isoformat(timespec="microseconds"),)).fetchone()[0])


def _ended(database: sqlite3.Connection, mark: int, now: datetime) -> list[tuple[str, int]]:
    (last,) = database.execute("SELECT coalesce(max(number), 0) FROM jobs").fetchone()
    return database.execute(
        "SELECT job_id, attempt FROM jobs WHERE number > ? AND status IS NOT NULL AND ended >= ? ORDER BY number",
        (mark if mark <= last else 0, (now - RETENTION).isoformat()),  # beyond its end: the journal was begun anew
    ).fetchall()
