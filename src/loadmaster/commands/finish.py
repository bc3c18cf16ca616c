"""`loadmaster finish BUNDLE`: what the payload has made, out of a bundle to where it is wanted."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from loadmaster.bundle import NAME, Contents, Part
from loadmaster.commands.arguments import Commands
from loadmaster.commands.begun import check_bundle
from loadmaster.commands.codes import TABLE
from loadmaster.commands.files import read_coordinator, read_site
from loadmaster.commands.parts import add_display, run_it
from loadmaster.errors import InvalidBundle, InvalidJob

WHAT: Final = """The last of three parts of a job: look at what the payload left (postProcess) and take it out (stageOut).
The work directory is removed, the bundle stays. Run again it says what came of the job."""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    finish = commands.add_parser("finish", help=line, description=WHAT, epilog=TABLE)
    finish.set_defaults(command=_finish)
    finish.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's directory")
    finish.add_argument("--config", type=Path, metavar="SITE.toml", help="storage elements, catalog, sandbox store")
    finish.add_argument("--coordinator", metavar="MODULE:CLASS", help="a coordinator (default: as `prepare` was told)")
    finish.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where outputs go that have no other target (default: outputs/<job id>)",
    )
    add_display(finish)


def _finish(options: argparse.Namespace) -> int:
    path = options.bundle / NAME
    try:
        contents = Contents.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        why = f"is no bundle: there is no {NAME} in it" if options.bundle.is_dir() else exc.strerror
        raise InvalidBundle(f"{options.bundle}: {why}") from exc
    except OSError as exc:
        raise InvalidBundle(f"{path}: {exc.strerror}") from exc
    except (ValueError, KeyError, InvalidJob) as exc:
        raise InvalidBundle(f"{path}: {exc}") from exc
    options.coordinator = options.coordinator or contents.coordinator or None
    check_bundle(options)
    coordinator, site = read_coordinator(options), read_site(options)
    return run_it(options, Part.FINISH, options.bundle, site=site, coordinator=coordinator, outputs=Path.cwd())
