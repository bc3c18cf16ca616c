"""`loadmaster check JOB.json`: what a description means, and all that is wrong with it as far as it can be known here."""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from typing import Final

import anyio

from loadmaster.commands.arguments import Commands, add_job
from loadmaster.commands.beforehand import look_ahead
from loadmaster.commands.codes import BAD_USAGE, NOT_PREPARED, OK
from loadmaster.commands.files import as_coordinator, find_class, log_to, read_job, understand_site
from loadmaster.console.plain import printable
from loadmaster.coordinator import Coordinator
from loadmaster.errors import InvalidJob
from loadmaster.signatures import miscalled, misspellings

WHAT: Final = """Say what a description means, and name all that is wrong with it: inputs that are not there, an executable
that cannot be found, outputs that have nowhere to go, words of the site that are not understood, a coordinator that cannot
be imported, or has hooks that are misspelled or cannot be called, a deadline in the past. Nothing is moved, and no server is
asked without --online."""

ENDS: Final = f"""Exit codes: 0 nothing is wrong with it, as far as can be known here; 1 something is, each is named;
{BAD_USAGE}"""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    check = commands.add_parser("check", help=line, description=WHAT, epilog=ENDS)
    add_job(check)
    check.add_argument("--online", action="store_true", help="ask servers too whether they have the inputs")
    check.set_defaults(command=_check)


class _Heard:
    """What the log has said meanwhile."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def _check(options: argparse.Namespace) -> int:
    job, ce = read_job(options)
    site, problems = understand_site(options)
    words = job.model_dump(mode="json", exclude_defaults=True, exclude={"extra"})
    print(
        json.dumps(words | {"computing_element": ce.model_dump(mode="json", exclude_defaults=True)}, indent=2),
        flush=True,
    )
    if job.extra:
        print(f"kept for the coordinator, not understood: {', '.join(sorted(job.extra))}", file=sys.stderr)
    coordinator: type[Coordinator] | None = None
    heard = _Heard()
    try:
        with log_to(heard):
            found_class = find_class(options)
            coordinator = as_coordinator(found_class)
        problems += [*misspellings(found_class), *miscalled(found_class)]
    except InvalidJob as exc:
        problems.append(str(exc))
    for line in heard.lines:  # other classes of its file have slips too
        if not any(line.endswith(problem) for problem in problems):
            print(printable(line), file=sys.stderr)
    found = anyio.run(partial(look_ahead, job, ce, site, coordinator, online=options.online))
    problems += found.problems
    for problem in problems:
        print(printable(f"{options.job}: {problem}"), file=sys.stderr)
    for note in found.notes:
        print(printable(note), file=sys.stderr)
    if problems:
        return NOT_PREPARED
    print(f"{options.job}: the description of job {job.job_id} is valid", file=sys.stderr)
    return OK
