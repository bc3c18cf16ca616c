"""What commands are asked with: kinds of arguments, and those that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from loadmaster.units import A_SIZE, A_TIME, bytes_of, seconds_of

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Where a command's parser is added."""


def add_job(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command about one job."""
    parser.add_argument(
        "job", type=Path, metavar="JOB.json", help='a job description, or DIRAC\'s: {"Job": {...}, "CE": {...}}, or JDL'
    )
    parser.add_argument("--ce", type=Path, metavar="CE.json", help="the computing element")
    parser.add_argument("--config", type=Path, metavar="SITE.toml", help="storage elements, catalog, sandbox store")
    parser.add_argument(
        "--coordinator",
        metavar="MODULE:CLASS",
        help="a coordinator: module:Class, path/to/file.py:Class, or its registered name; dirac: the one of the installed "
        "DIRAC extensions, dirac:PACKAGE: of one of them",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where outputs go that have no other target (default: outputs/<job id>)",
    )


def add_journal(parser: argparse.ArgumentParser) -> None:
    """A journal to be looked at."""
    parser.add_argument("journal", type=journal, metavar="JOURNAL", help="the journal's directory, or a bundle's")


def journal(text: str) -> Path:
    """The directory of a journal; of a bundle, which has one in it, that."""
    path = Path(text)
    return path / "journal" if (path / "journal").is_dir() else path


def add_slots(parser: argparse.ArgumentParser, usual: str = "all there is") -> None:
    """What jobs may have of the machine."""
    parser.add_argument("--cores", type=number(1, 100_000), metavar="N", help=f"of so many cores (default: {usual})")
    parser.add_argument(
        "--memory", type=size_bytes, metavar="SIZE", help=f"of so much memory, as 500M or 16G (default: {usual})"
    )


def add_scratch(parser: argparse.ArgumentParser) -> None:
    """Where work directories are made; `--root` is what it was called for one job."""
    parser.add_argument(
        "--scratch", type=Path, metavar="DIR", help="where work directories are made (default: a temporary directory)"
    )
    parser.add_argument("--root", dest="scratch", type=Path, help=argparse.SUPPRESS)


def number(least: int, most: int) -> Callable[[str], int]:
    """A whole number between two."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {least} to {most} is expected")
        return int(text)

    return number


def size_bytes(text: str) -> int:
    """`500M`, `16G`, `2 GB`, at least `1M`: 1000 alone are bytes, and nobody means that."""
    try:
        size = int(str(bytes_of(text)))
    except ValueError:
        size = -1
    if not 0 <= size < 2**80:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {A_SIZE}")
    if size < 2**20:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: is less than 1M; without a unit it is bytes")
    return size


def seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `2h`."""
    try:
        seconds = float(str(seconds_of(text)))
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r:.60}: {A_TIME}")
    return seconds
