"""The command line, up to where its commands are: a Ctrl-C while they are loaded is heard here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

COMMANDS: Final[Mapping[str, str]] = {
    "run": "run one job",
    "check": "say what a job description means, and what is wrong with it here",
    "node": "run many jobs",
    "stage": "move many files",
    "pending": "what jobs of a journal have left to be done",
    "prepare": "the first part of a job: bring its files in, into a bundle that can be taken elsewhere",
    "payload": "the second part: run the payload of a bundle; needs no network",
    "finish": "the third part: take the outputs out of a bundle",
    "jobs": "list the jobs of a journal",
    "show": "tell the life of a job in a journal",
    "resume": "go on with the jobs that are open in a journal",
}

INTERRUPTED: Final = 130
"""As a shell has it: 128 and the number of SIGINT."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is returned, not raised, but for usage errors."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        from loadmaster.commands.entry import carried_out, parsed  # with all that a command needs: a third of a second

        options = parsed(words, COMMANDS)
    except KeyboardInterrupt:
        with suppress(OSError, AttributeError):
            sys.stderr.write("loadmaster: interrupted; nothing was begun\n")
        return INTERRUPTED
    return carried_out(options)


def command() -> None:
    """The console script: run a command and leave with its exit code, without waiting for a hook that blocks a thread."""
    code = main()
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # every file has been closed by now; threads that still run are somebody's blocking calls
