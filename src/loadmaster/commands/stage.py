"""`loadmaster stage MANIFEST`: move many files."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import anyio

from loadmaster.commands.arguments import Commands, number, seconds
from loadmaster.commands.codes import BAD_USAGE, NOT_DELIVERED, NOT_PREPARED, OK
from loadmaster.commands.files import check_writable, keep, log_to, open_new
from loadmaster.console.account import Record, Report, told
from loadmaster.console.gauge import stderr_gauge
from loadmaster.console.manifest import BadManifest, Manifest
from loadmaster.console.orders import told_to_stop
from loadmaster.console.stage import Terms, stage
from loadmaster.site import Site
from loadmaster.storage.kinds import unserved

WHAT: Final = """Move the files of a manifest, many at once, each verified: downloads, uploads, copies, and from server to
server. What is there already is left alone, so running it again does only what is missing."""

ENDS: Final = f"""Exit codes: 0 everything is in its place; 1 the manifest is bad (every bad line is named, nothing was
moved); 3 files failed (each is named, with the reason), or the --summary could not be written; 130, 143 and 129 told to stop
by SIGINT, SIGTERM or SIGHUP before all files were begun; {BAD_USAGE}"""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    move = commands.add_parser("stage", help=line, description=WHAT, epilog=ENDS)
    move.set_defaults(command=_stage)
    move.add_argument("manifest", metavar="MANIFEST", help='JSON Lines: {"source", "target"}; - for standard input')
    move.add_argument("--config", type=Path, metavar="SITE.toml", help="[storage.*] tables, streams, retries")
    move.add_argument("--streams", type=number(1, 256), metavar="N", help="files at once, in each direction")
    move.add_argument("--retries", type=number(0, 100), metavar="N", help="how often a file is tried again")
    move.add_argument(
        "--deadline", type=seconds, metavar="SECONDS", help="what is not there by then fails (30s, 5m, 2h)"
    )
    move.add_argument(
        "--resume", action="store_true", help="keep what has come of a file with a checksum, and go on from there"
    )
    move.add_argument("--verify", action="store_true", help="check also the content of what is there already")
    move.add_argument("--all", action="store_true", help="move everything, do not look what is there already")
    move.add_argument("--sync", action="store_true", help="have each file on the disk before it gets its name")
    move.add_argument("--events", type=Path, metavar="FILE", help="write what came of each file as a line of JSON")
    move.add_argument("--summary", type=Path, metavar="FILE", help="write the summary and the failures as JSON")
    move.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _stage(options: argparse.Namespace) -> int:
    site = Site.load(options.config) if options.config else Site()
    words = {name: value for name in ("streams", "retries") if (value := getattr(options, name)) is not None}
    terms = Terms(
        everything=options.all, verify=options.verify, resume=options.resume, sync=options.sync,
        deadline_seconds=options.deadline,
    )  # fmt: skip
    check_writable(options.summary, "--summary")
    gauge = stderr_gauge(quiet=options.quiet)
    try:
        with ExitStack() as opened:
            manifest = opened.enter_context(_open_manifest(options.manifest))
            record = opened.enter_context(Record.open(open_new(options.events)))
            orders = opened.enter_context(told_to_stop())
            opened.enter_context(log_to(gauge))
            report = Report(gauge, record, manifest)
            tally = anyio.run(stage, manifest, site.model_copy(update=words), terms, report, orders)
            written = options.summary is None or keep(options.summary, record.summary(tally), "--summary")
    except BadManifest as exc:
        for problem in exc.problems:
            gauge.say(f"{exc.name}: {problem}")
        return NOT_PREPARED
    finally:
        gauge.close()
    if not options.quiet:
        with suppress(OSError, ValueError):
            print(told(tally), flush=True)
    if orders.seen and tally.left:
        return 128 + orders.seen[0]
    return NOT_DELIVERED if tally.failed or not written else OK


@contextmanager
def _open_manifest(name: str) -> Iterator[Manifest]:
    """A manifest that has been read and is good. Raises `BadManifest`."""
    try:
        with sys.stdin.buffer if name == "-" else open(name, "rb") as stream:
            manifest = Manifest.read(stream, name, os.getcwd(), unserved=unserved)
    except OSError as exc:
        raise BadManifest(name, [exc.strerror or str(exc)]) from exc
    with closing(manifest):
        yield manifest
