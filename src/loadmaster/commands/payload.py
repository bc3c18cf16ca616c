"""`loadmaster payload BUNDLE`: the payload of a job that was prepared, where there may be no network."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from loadmaster.bundle import Part
from loadmaster.commands.arguments import Commands
from loadmaster.commands.codes import TABLE
from loadmaster.commands.parts import add_display, run_it
from loadmaster.site import Site

WHAT: Final = """The second of three parts of a job: run its payload, watched and within its limits. Nothing is moved, and no
hook of its coordinator is called. One whose agent was killed is gone on with."""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    payload = commands.add_parser("payload", help=line, description=WHAT, epilog=TABLE)
    payload.set_defaults(command=_payload)
    payload.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's directory")
    payload.add_argument(
        "--config", type=Path, metavar="SITE.toml", help="what holds payloads here: its table [payload]"
    )
    payload.add_argument("--follow", action="store_true", help="show what the payload prints, as it prints it")
    add_display(payload)


def _payload(options: argparse.Namespace) -> int:
    site = Site.load(options.config) if options.config else Site()
    # Only what is about payloads: a catalog or a cache that is not here would keep it from running.
    return run_it(options, Part.PAYLOAD, options.bundle, site=Site(payload=site.payload))
