"""From the words of a command line to the exit code. Each command is a module beside this one."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from typing import NoReturn

from loadmaster.commands.codes import NOT_PREPARED, USAGE
from loadmaster.console.plain import to_stderr
from loadmaster.errors import LoadmasterError
from loadmaster.tasks import leaves


class _Parser(argparse.ArgumentParser):
    """Leaves with an exit code of its own where the words make no sense."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def parsed(words: Sequence[str], commands: Mapping[str, str]) -> argparse.Namespace:
    """What these words ask for, of commands that each have a line of help: only the one that is among them is loaded.

    Raises SystemExit where they make no sense.
    """
    parser = _Parser(
        prog="loadmaster",
        description="Run a batch job: bring its files in, watch its payload, take its outputs out. Or move many files.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('loadmaster')}")
    parsers = parser.add_subparsers(required=True, metavar="COMMAND")
    asked = next((word for word in words if not word.startswith("-")), "")
    for name, line in commands.items():
        if name == asked:
            import_module(f"loadmaster.commands.{name}").add(parsers, line)
        else:
            parsers.add_parser(name, help=line)
    return parser.parse_args(words)


def carried_out(options: argparse.Namespace) -> int:
    """The exit code of a command, once it has been done."""
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


def _told(error: LoadmasterError | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
