"""`loadmaster pending JOURNAL`: what jobs have left to be done; also while an agent has the journal."""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import anyio

from loadmaster import pending
from loadmaster.commands.arguments import Commands, add_journal
from loadmaster.commands.codes import BAD_USAGE, NOT_PREPARED, OK
from loadmaster.commands.files import log_to, write_whole
from loadmaster.commands.unsent import drop_unsent, facts, name_of, read_unsent, told
from loadmaster.console.plain import printable, size
from loadmaster.console.terminal import stderr_display
from loadmaster.description import JobDescription
from loadmaster.dirac import JobStatus
from loadmaster.diracx.outbox import Filed, StatusReport
from loadmaster.errors import InvalidJob, JournalFault, RuntimeFault
from loadmaster.events import JobAccepted
from loadmaster.journal import open_journal
from loadmaster.logbook import Logbook
from loadmaster.operations import Operations, ring
from loadmaster.pending import Operation
from loadmaster.site import Site
from loadmaster.staging.engine import open_transfers

WHAT: Final = """List what jobs have left to be done: files that are safe, but not where they were wanted; files that no
catalog took; reports that no server took (r1, r2, ...). A node with this journal does it by itself, as long as it may
succeed."""

MOST_NAMED: Final = 10
"""Numbers in a sentence."""

ENDS: Final = f"""Exit codes: 0 done; 1 the journal cannot be read, there is no such operation, or --retry has left some;
{BAD_USAGE}"""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    parser = commands.add_parser("pending", help=line, description=WHAT, epilog=ENDS)
    parser.set_defaults(command=_pending)
    add_journal(parser)
    parser.add_argument("--job", metavar="ID", help="only what this job has left")
    parser.add_argument("--json", action="store_true", help="as a list in JSON")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="REQUEST.json",
        help="write it as a request for DIRAC's request system; for several jobs name a directory: a file each",
    )
    parser.add_argument(
        "--drop",
        nargs="+",
        metavar="NUMBER",
        help="have nobody do these, after a question; the numbers of the first column",
    )
    parser.add_argument("--yes", action="store_true", help="drop without the question")
    parser.add_argument(
        "--retry",
        action="store_true",
        help="try all of it now: the agent that has the journal does, or else this command",
    )
    parser.add_argument(
        "--config", type=Path, metavar="SITE.toml", help="storage elements and catalog, for --retry and --export"
    )


def _pending(options: argparse.Namespace) -> int:
    directory = options.journal
    site = Site.load(options.config) if options.config else Site()
    with Logbook.look(directory) as book:
        operations = [each for each in book.ask(_every) if options.job in {None, each.job_id}]
        reports = [each for each in _unsent(directory) if options.job in {None, str(each.report.job)}]
        named = [(str(each.report.job), None) for each in reports]
        attempts = [*((each.job_id, each.attempt) for each in operations), *named]
        jobs = book.ask(lambda database: pending.descriptions(database, attempts))
    if options.drop:
        return _drop(directory, operations, reports, options.drop, sure=options.yes)
    if options.export:
        return _export(options.export, operations, reports, jobs, site)
    if options.retry:
        return _retry(directory, operations, site)
    if options.json:
        print(json.dumps([*map(_facts, operations), *map(facts, reports)], indent=2))
    else:
        _print(operations, reports)
    return OK


def _unsent(directory: Path) -> Sequence[Filed]:
    try:
        return read_unsent(directory)
    except RuntimeFault as exc:
        stderr_display(quiet=True).say(f"loadmaster: reports are not shown: {exc}")
        return ()


def _every(database: sqlite3.Connection) -> list[Operation]:
    try:
        return pending.every(database)
    except sqlite3.OperationalError as exc:
        if "no such table" in str(exc):  # of a version that had none, which no agent has opened since
            return []
        raise


# -- to be read ----------------------------------------------------------------------------------------------------


def _facts(operation: Operation) -> dict[str, Any]:
    file, request = operation.file, operation.request
    kind = "remove" if file is None else "move" if operation.is_move else "register"
    return {
        "operation": operation.number,
        "job_id": operation.job_id,
        "attempt": operation.attempt,
        "kind": kind,
        "file": file and file.name,
        "lfn": file and file.lfn,
        "at": file.url if file is not None else getattr(request, "url", None),
        "wanted": getattr(request, "wanted", None),
        "size_bytes": file and file.size_bytes,
        "checksum": file and file.checksum,
        "since": request.time.isoformat(),
        "tries": operation.tries,
        "next_try": None if operation.due is None else operation.due.isoformat(),
        "stuck": operation.due is None,
        "error": operation.error,
    }


def _print(operations: Sequence[Operation], reports: Sequence[Filed] = ()) -> None:
    if not operations and not reports:
        print("nothing is pending")
        return
    rows = [("NUMBER", "JOB", "SIZE", "TRIES", "NEXT TRY", "WHAT")]
    for each in operations:
        if each.due is None:
            when = "stuck"
        else:
            when = "now" if each.due <= datetime.now(UTC) else f"{each.due:%Y-%m-%d %H:%M:%S} UTC"
        bytes_ = "" if each.file is None else size(each.file.size_bytes)
        rows.append((str(each.number), each.job_id, bytes_, str(each.tries), when, each.what))
    rows += [(name_of(each), str(each.report.job), "", "", "", told(each.report)) for each in reports]
    widths = [max(len(printable(row[column])) for row in rows) for column in range(5)]
    with suppress(BrokenPipeError):
        for index, row in enumerate(rows):
            cells = [printable(cell).ljust(width) for cell, width in zip(row, widths, strict=False)]
            print("  ".join([*cells, printable(row[5])]))
            if 0 < index <= len(operations) and (error := operations[index - 1].error):
                print(f"{' ' * (widths[0] + 2)}{printable(error)}")


# -- to be changed -------------------------------------------------------------------------------------------------


def _drop(
    directory: Path, operations: Sequence[Operation], reports: Sequence[Filed], numbers: Sequence[str], *, sure: bool
) -> int:
    known = {str(each.number): each for each in operations}
    unsent = {name_of(each): each for each in reports}
    if unknown := [number for number in numbers if number not in known and number not in unsent]:
        there = [*known, *unsent]
        more = f" and {len(there) - MOST_NAMED} more" if len(there) > MOST_NAMED else ""
        known_are = (
            f": there {'is' if len(there) == 1 else 'are'} {', '.join(there[:MOST_NAMED])}{more}" if there else ""
        )
        raise InvalidJob(
            f"--drop: nothing pending has the number {', '.join(unknown)}{known_are} (NUMBER is what stands in the first"
            " column, not the line it stands in)"
        )
    chosen = [known[number] for number in dict.fromkeys(numbers) if number in known]
    silent = [unsent[number] for number in dict.fromkeys(numbers) if number in unsent]
    for each in chosen:
        print(f"{each.number}: {printable(each.lost_if_dropped)}")
    for report in silent:
        print(f"{name_of(report)}: nobody will {printable(told(report.report))}")
    if not sure and not _agrees(f"Drop {'it' if len(numbers) == 1 else f'these {len(numbers)}'}? [y/N] "):
        print("nothing was dropped")
        return NOT_PREPARED
    if silent:
        drop_unsent(directory, [report.number for report in silent])
    with Logbook.beside(directory) as database:
        gone = [
            each for each in chosen if pending.drop(database, each, "by an administrator", datetime.now(UTC)) is None
        ]
    for each in gone:
        print(f"{each.number}: was done or dropped meanwhile")
    ring(directory)
    return OK


def _agrees(question: str) -> bool:
    if not (sys.stdin and sys.stdin.isatty()):
        raise InvalidJob("--drop: there is nobody to ask; --yes says that it is meant")
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:
        return False


def _retry(directory: Path, operations: Sequence[Operation], site: Site) -> int:
    with Logbook.beside(directory) as database:
        pending.retry(database, [each.number for each in operations])
    if ring(directory):
        print(f"{len(operations)} due now: the agent that has the journal tries them")
        return OK
    display = stderr_display(quiet=False)

    async def try_all() -> list[Operation]:
        async with open_journal(directory) as journal, open_transfers(site) as transfers:
            working = Operations(journal, transfers, lambda event: display.say(f"job {event.job_id}: done"))
            return await working.try_all(operations)

    try:
        with log_to(display):
            left = anyio.run(try_all)
    except JournalFault as exc:
        display.say(f"{exc}: it tries them when it next looks")
        return OK
    finally:
        display.close()
    if left:
        _print(left)
    return NOT_PREPARED if left else OK


# -- for DIRAC -----------------------------------------------------------------------------------------------------


def _export(
    path: Path,
    operations: Sequence[Operation],
    reports: Sequence[Filed],
    jobs: Mapping[tuple[str, int], JobAccepted],
    site: Site,
) -> int:
    from loadmaster.dirac.requests import (
        RequestFile,
        element_of,
        forward_status,
        move,
        register,
        request_json,
        request_name,
    )

    of_job: dict[tuple[str, int], list[Any]] = {}
    display = stderr_display(quiet=True)
    left_out = False
    for each in operations:
        file = each.file
        key = each.job_id, each.attempt
        if file is None or file.lfn is None or key not in jobs:
            display.say(
                f"loadmaster: {each.number}: {each.what}: has no logical name: DIRAC cannot do it, and it is left out"
            )
            left_out = True
            continue
        at = file.storage_element or element_of(file.url, site)
        target = getattr(each.request, "wanted", None)
        done = (
            (register(RequestFile.of(file), se=at),)
            if target is None
            else move(RequestFile.of(file), source_se=at, target_se=element_of(target, site))
        )
        of_job.setdefault(key, []).extend(done)
    for key, said in _statuses(reports, jobs).items():
        of_job.setdefault(key, []).append(forward_status(key[0], said))
    if not of_job:
        raise InvalidJob("--export: nothing is pending that DIRAC could do")
    if len(of_job) > 1 and not path.is_dir():
        raise InvalidJob(f"--export {path}: {len(of_job)} jobs have something pending: name a directory, or --job ID")
    for key, requested in of_job.items():
        job = JobDescription.model_validate({**jobs[key].description, "job_id": key[0]})
        request = request_json(requested, job, now=datetime.now(UTC))
        own = f"{request_name(job)}.{key[1]}.json".replace("/", "_")
        place = path / own if path.is_dir() else path
        write_whole(place, json.dumps(request, indent=2) + "\n")
        print(printable(str(place)))
    return NOT_PREPARED if left_out else OK


def _statuses(
    reports: Sequence[Filed], jobs: Mapping[tuple[str, int], JobAccepted]
) -> dict[tuple[str, int], list[tuple[datetime, JobStatus]]]:
    """What is still to be said of jobs that the journal knows, by their last attempts. Parameters have no request."""
    last = {job_id: (job_id, attempt) for job_id, attempt in sorted(jobs)}
    found: dict[tuple[str, int], list[tuple[datetime, JobStatus]]] = {}
    for each in reports:
        if isinstance(each.report, StatusReport) and (key := last.get(str(each.report.job))) is not None:
            found.setdefault(key, []).append((each.report.time, each.report.said))
    return found
