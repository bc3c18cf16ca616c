"""`loadmaster jobs JOURNAL`: its jobs in a table, also while an agent writes to it."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress

from loadmaster.commands.arguments import Commands, add_journal, number
from loadmaster.commands.codes import LOOKED, OK
from loadmaster.console.plain import printable
from loadmaster.logbook import JobLine, Logbook

LISTED = 20


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    jobs = commands.add_parser("jobs", help=line, epilog=LOOKED)
    jobs.set_defaults(command=_jobs)
    add_journal(jobs)
    jobs.add_argument(
        "--last",
        type=number(0, 1_000_000),
        default=LISTED,
        metavar="N",
        help=f"so many of those that have ended, the latest first ({LISTED})",
    )
    jobs.add_argument("--json", action="store_true", help="a line of JSON for each job, for programs")


def _jobs(options: argparse.Namespace) -> int:
    with Logbook.look(options.journal) as book:
        lines, (still_open, ended) = book.lines(last=options.last), book.counts()
    with suppress(BrokenPipeError):
        if options.json:
            for line in lines:
                print(json.dumps(_facts(line)))
        else:
            _print_table([HEADS, *map(_cells, lines)])
            told = [f"{count} {status}" for status, count in sorted(ended.items())]
            print(", ".join([f"{still_open} open", *told]), flush=True)
    return OK


HEADS = ("job", "attempt", "status", "accepted", "latest", "event")


def _cells(line: JobLine) -> tuple[str, ...]:
    accepted, latest = (f"{event.time:%Y-%m-%d %H:%M:%S}" for event in (line.accepted, line.last))
    return printable(line.job_id), str(line.attempt), line.status or "open", accepted, latest, line.last.kind


def _facts(line: JobLine) -> dict[str, str | int]:
    """The same for programs."""
    return {
        "job": line.job_id, "attempt": line.attempt, "status": line.status or "open",
        "accepted": line.accepted.time.isoformat(), "latest": line.last.time.isoformat(), "event": line.last.kind,
    }  # fmt: skip


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
