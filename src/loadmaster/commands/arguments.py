"""What commands are asked with: kinds of arguments, and those that several have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

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


def number(least: int, most: int) -> Callable[[str], int]:
    """A whole number between two."""

    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {least} to {most} is expected")
        return int(text)

    return number


def size_bytes(text: str) -> int:
    """`500M`, `16G`, `1000`: in powers of 1024, as memory has it."""
    factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text.upper().removesuffix("IB")[-1:], 1)
    digits = text.upper().removesuffix("IB").rstrip("KMGT")
    if not digits.isdecimal() or not 0 < int(digits) < 2**40:
        raise argparse.ArgumentTypeError(f"{text!r}: a size is expected, as 500M or 16G")
    return int(digits) * factor


def seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `2h`."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:], 1.0)
    try:
        seconds = float(text.rstrip("smh")) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: a time is expected, as 90, 30s, 5m or 2h")
    return seconds
