"""`loadmaster node SOURCE`: the jobs of a file or a directory, as many at once as the machine has room for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from errno import EACCES
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Final

import anyio

from loadmaster import dirac
from loadmaster.commands.arguments import Commands, add_scratch, add_slots
from loadmaster.commands.begun import as_begun
from loadmaster.commands.codes import BAD_USAGE, NOT_PREPARED, OK, PAYLOAD_FAILED
from loadmaster.commands.files import check_directory, log_to, open_new, read_coordinator, read_json, usual_outputs
from loadmaster.commands.reporting import Reporting, add_reporter
from loadmaster.console.board import open_board, told
from loadmaster.console.orders import told_to_stop
from loadmaster.console.work import work
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.errors import InvalidJob
from loadmaster.machine import MIB, detect
from loadmaster.names import file_url
from loadmaster.node import Node
from loadmaster.occupancy import NodeStatistics
from loadmaster.site import Site
from loadmaster.sources import LINE_BYTES, JobFile, JobFiles, JobLines, Nothing, read_object
from loadmaster.workdir import default_root

WHAT: Final = """Run the jobs of a file or a directory, as many at once as this machine has room for; the files of the next
ones come while others compute. The first Ctrl-C lets what computes finish, the second kills it, the third leaves."""

SHOWN: Final = 5
"""So many names of files are enough to see what they are."""

ENDS: Final = f"""Exit codes: 0 every job is done; 1 the source cannot be read, or has lines that are no jobs (each is
named, the others were run); 2 jobs failed; 130, 143 and 129 told to stop by SIGINT, SIGTERM or SIGHUP before all were done;
{BAD_USAGE}"""


MOST_REFUSED: Final = 100
"""So many lines that are no jobs are named, and the rest counted."""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    node = commands.add_parser("node", help=line, description=WHAT, epilog=ENDS)
    node.set_defaults(command=_node)
    node.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="JSON Lines: a job a line; or a JDL file (.jdl); or a directory of job files",
    )
    add_node(node)
    node.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="keep all that happens there: the next time jobs go on where they were, and payloads that still run are kept",
    )


def add_node(node: argparse.ArgumentParser) -> None:
    """The arguments of a command that runs many jobs."""
    node.add_argument("--ce", type=Path, metavar="CE.json", help="the computing element")
    node.add_argument("--config", type=Path, metavar="SITE.toml", help="storage elements, catalog, sandbox store")
    node.add_argument("--coordinator", metavar="MODULE:CLASS", help="a coordinator, as for `run`")
    add_slots(node)
    add_scratch(node)
    node.add_argument("--output", type=Path, metavar="DIR", help="where outputs go that have no other target (outputs)")
    node.add_argument("--events", type=Path, metavar="FILE", help="write every event as a line of JSON")
    node.add_argument("--results", type=Path, metavar="DIR", help="write each job's result to a file there")
    add_reporter(node)
    node.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _node(options: argparse.Namespace) -> int:
    path: Path = options.source
    try:
        if not os.access(path, os.R_OK):
            path.stat()  # says why
            raise PermissionError(EACCES, os.strerror(EACCES))
    except OSError as exc:
        raise InvalidJob(
            f"{path}: {exc.strerror}: SOURCE is a file with a job a line, or a directory of job files"
        ) from exc
    with ExitStack() as opened:
        source: JobFiles | JobFile | JobLines
        if path.is_dir():
            source = JobFiles(path, outputs=Path.cwd(), describe=_described, endings=(".json", ".jdl"))
        elif path.suffix == ".jdl":  # it has lines, but they are no jobs
            source = JobFile(path, outputs=Path.cwd(), describe=_described)
        else:
            source = opened.enter_context(closing(JobLines(path, outputs=Path.cwd(), describe=_described)))
        return run_node(options, source)


def _described(text: bytes) -> JobDescription:
    """A job in our words or in DIRAC's, also in its wrapper file or JDL. The computing element in there is not asked: the
    node has one."""
    line = text.decode("utf-8-sig", errors="replace")
    words = dirac.read_jdl(line) if dirac.is_jdl(line) else read_object(text)
    return dirac.from_dirac(words)[0] if "Job" in words or dirac.is_jdl(line) else JobDescription.load(words)


def run_node(options: argparse.Namespace, source: JobFiles | JobFile | JobLines | Nothing) -> int:
    """Run the jobs of a source, after those that are open in the journal; the exit code."""
    ce = ComputingElement.load(read_json(options.ce) if options.ce else {})
    reporting = Reporting(options, ce)
    coordinator = read_coordinator(options)
    site = reporting.site(Site.load(options.config) if options.config else Site())
    if options.output is not None:
        check_directory(options.output, "--output")
        site = site.model_copy(update={"output_directory": f"{file_url(options.output.absolute())}/{{job_id}}"})
    if options.journal is not None:
        site = as_begun(options, site, coordinator)
    if not site.output_directory:
        site = site.model_copy(update={"output_directory": usual_outputs()})
    scratch = (options.scratch or default_root()).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    memory_mb = options.memory // MIB if options.memory else None
    ledger = detect(scratch).ledger(cores=options.cores, memory_mb=memory_mb)
    if options.results:
        check_directory(options.results, "--results")
        options.results.mkdir(parents=True, exist_ok=True)
    events = open_new(options.events)
    board = open_board(sys.stderr or StringIO(), quiet=options.quiet)
    try:
        with ExitStack() as opened:
            if events is not None:
                opened.enter_context(closing(events))
            orders = opened.enter_context(told_to_stop())
            opened.enter_context(log_to(board))
            node = Node(ce, site=site, ledger=ledger, root=scratch, coordinator=coordinator, journal=options.journal)
            reporter = reporting.opened(pilot=True)
            shift = anyio.run(
                partial(work, node, source, board, orders, results=options.results, events=events, reporter=reporter)
            )
    finally:
        board.close()
    if shift.skipped:
        board.say(
            f"loadmaster: {options.source}: skipped, for job files end in .json or .jdl: {_some_of(shift.skipped)}"
        )
    for problem in shift.refused[:MOST_REFUSED]:
        board.say(f"loadmaster: {problem}")
    if (more := len(shift.refused) - MOST_REFUSED) > 0:
        board.say(f"loadmaster: and {more} more")
    if (
        not isinstance(source, Nothing)
        and shift.exhausted
        and shift.figures is not None
        and not shift.refused
        and _had_nothing(shift.figures)
    ):
        there = "a file that ends in .json or .jdl" if options.source.is_dir() else "a line"
        board.say(f"loadmaster: warning: {options.source}: there are no jobs in it ({there} for each is expected)")
    if shift.refused and _is_one_job(options):
        board.say(f"loadmaster: {options.source}: is one job over many lines: `loadmaster run` takes it")
    if shift.figures is not None and not options.quiet:
        with suppress(OSError, ValueError):
            print(told(shift.figures), flush=True)
    figures = shift.figures
    if orders.seen and (figures is None or figures.given_back or figures.ended["Killed"] or not shift.exhausted):
        return 128 + orders.seen[0]
    return PAYLOAD_FAILED if shift.failed else NOT_PREPARED if shift.refused else OK


def _had_nothing(figures: NodeStatistics) -> bool:
    return not (sum(figures.ended.values()) or figures.recalled or figures.interrupted)


def _is_one_job(options: argparse.Namespace) -> bool:
    """Whether the source is a job's file, and not one of a job a line."""
    try:
        source: Path | None = getattr(options, "source", None)
        return (
            source is not None and source.is_file() and source.stat().st_size <= LINE_BYTES and bool(read_json(source))
        )
    except (InvalidJob, OSError):
        return False


def _some_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
