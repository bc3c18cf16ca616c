"""The command line. Each command is a module of `loadmaster.commands`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from typing import Final, NoReturn

from loadmaster.commands.codes import NOT_PREPARED, USAGE
from loadmaster.console.plain import to_stderr
from loadmaster.errors import LoadmasterError
from loadmaster.tasks import leaves

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is returned, not raised, but for usage errors."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser(words).parse_args(words)
    except KeyboardInterrupt:  # while its modules are loaded: there is nothing to say of what was not begun
        return 128 + signal.SIGINT
    try:
        code: int = options.command(options)
    except (LoadmasterError, OSError) as exc:
        to_stderr().say(f"loadmaster: {_told(exc)}")
        return NOT_PREPARED
    except (KeyboardInterrupt, BaseExceptionGroup) as exc:  # the second Ctrl-C while a coordinator blocks the loop
        if not any(isinstance(each, KeyboardInterrupt) for each in leaves(exc)):
            raise
        to_stderr().say("loadmaster: interrupted; nothing more was done")
        return 128 + signal.SIGINT
    return code


def command() -> None:
    """The console script: run a command and leave with its exit code, without waiting for a hook that blocks a thread."""
    code = main()
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # every file has been closed by now; threads that still run are somebody's blocking calls


def _told(error: LoadmasterError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


class _Parser(argparse.ArgumentParser):
    """Leaves with an exit code of its own where the words make no sense."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """For these words: only the command that is among them is loaded."""
    parser = _Parser(
        prog="loadmaster",
        description="Run a batch job: bring its files in, watch its payload, take its outputs out. Or move many files.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('loadmaster')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), "")
    for name, line in COMMANDS.items():
        if name == asked:
            import_module(f"loadmaster.commands.{name}").add(commands, line)
        else:
            commands.add_parser(name, help=line)
    return parser
