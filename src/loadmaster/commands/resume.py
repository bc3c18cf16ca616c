"""`loadmaster resume JOURNAL`: the jobs that an agent has left open, to their ends."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from loadmaster.commands.arguments import Commands
from loadmaster.commands.codes import BAD_USAGE
from loadmaster.commands.node import add_node, run_node
from loadmaster.logbook import Logbook
from loadmaster.sources import Nothing

WHAT: Final = """Go on with the jobs that are open in a journal, where they were left: payloads that still run are kept,
files that have arrived are not moved again. Give it the words of the command that began them: the site, the coordinator,
where work directories are made."""


ENDS: Final = f"""Exit codes: 0 every job is done; 1 there is no journal, or its jobs cannot be gone on with as it was asked;
2 jobs failed; 130, 143 and 129 told to stop by SIGINT, SIGTERM or SIGHUP before all were done; {BAD_USAGE}"""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    resume = commands.add_parser("resume", help=line, description=WHAT, epilog=ENDS)
    resume.set_defaults(command=_resume)
    resume.add_argument("journal", type=Path, metavar="JOURNAL", help="the directory of the journal")
    add_node(resume)


def _resume(options: argparse.Namespace) -> int:
    with Logbook.look(options.journal):  # one that is not there is not made
        pass
    return run_node(options, Nothing())
