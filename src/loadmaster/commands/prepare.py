"""`loadmaster prepare JOB.json -o BUNDLE`: a job's files, and what is to be executed, into a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from loadmaster.bundle import Contents, Part
from loadmaster.commands.arguments import Commands, add_job
from loadmaster.commands.codes import TABLE
from loadmaster.commands.files import load_job, read_coordinator, read_site
from loadmaster.commands.parts import add_display, run_it

WHAT: Final = """The first of three parts of a job: bring its files in (stageIn) and decide what is executed (preProcess).
The bundle is a directory that can be copied to another host (cp -a, tar, rsync -a) for the second and the third. Nothing of
SITE.toml is in it; what the job says of itself, its environment too, is. One that was stopped is gone on with."""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    prepare = commands.add_parser("prepare", help=line, description=WHAT, epilog=TABLE)
    prepare.set_defaults(command=_prepare)
    add_job(prepare)
    prepare.add_argument("-o", "--bundle", type=Path, metavar="BUNDLE", required=True, help="the bundle's directory")
    add_display(prepare)


def _prepare(options: argparse.Namespace) -> int:
    written, ce = load_job(options)
    here = written.relative_to(options.job.absolute().parent, outputs=Path.cwd())
    # Where outputs go that are named by a relative path is a matter of where the last part is run.
    job = here.model_copy(update={"output_se": written.output_se, "output_data": written.output_data})
    coordinator = read_coordinator(options)
    return run_it(
        options, Part.PREPARE, options.bundle, site=read_site(options), coordinator=coordinator,
        new=Contents(job, ce, options.coordinator or ""), outputs=Path.cwd(),
    )  # fmt: skip
