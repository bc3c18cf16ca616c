"""`loadmaster check JOB.json`: what a description means, what is wrong with it, what inputs are missing."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Final

import anyio

from loadmaster.commands.arguments import Commands, add_job
from loadmaster.commands.codes import BAD_USAGE, NOT_PREPARED, OK
from loadmaster.commands.files import read_coordinator, read_job, read_site
from loadmaster.description import JobDescription
from loadmaster.site import Site
from loadmaster.staging.engine import open_transfers
from loadmaster.staging.inquiry import Inquiry, ask_for_inputs
from loadmaster.staging.plan import check_outputs
from loadmaster.terminal import printable

ENDS: Final = f"""Exit codes: 0 nothing is wrong with it, as far as can be known here; 1 something is, each is named;
{BAD_USAGE}"""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    check = commands.add_parser("check", help=line, epilog=ENDS)
    add_job(check)
    check.add_argument("--online", action="store_true", help="ask servers too whether they have the inputs")
    check.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    job, ce = read_job(options)
    site = read_site(options, job)
    read_coordinator(options)
    check_outputs(job, site)
    words = job.model_dump(mode="json", exclude_defaults=True, exclude={"extra"})
    print(json.dumps(words | {"computing_element": ce.model_dump(mode="json", exclude_defaults=True)}, indent=2))
    if job.extra:
        print(f"kept for the coordinator, not understood: {', '.join(sorted(job.extra))}", file=sys.stderr)
    found = anyio.run(_ask, job, site, options.online)
    for problem in found.problems:
        print(printable(f"{options.job}: {problem}"), file=sys.stderr)
    if found.not_asked:
        print(f"{found.not_asked} of the inputs are at servers, which were not asked: --online does", file=sys.stderr)
    if found.problems:
        return NOT_PREPARED
    print(f"{options.job}: the description of job {job.job_id} is valid", file=sys.stderr)
    return OK


async def _ask(job: JobDescription, site: Site, online: bool) -> Inquiry:
    async with open_transfers(site.model_copy(update={"cache": None})) as transfers:  # which would be made
        return await ask_for_inputs(job, transfers, online=online)
