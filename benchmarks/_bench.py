"""What the benchmarks share: the machine they ran on, medians of interleaved rounds, and tables."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, Final

PACKAGES: Final = ("loadmaster", "anyio", "pydantic", "trio", "uvloop")


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure measured several times: other programs of the machine move single ones, seldom the median."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(median(values), min(values), max(values))

    def show(self, digits: int = 2) -> str:
        """`median (min..max)`."""
        return f"{self.median:.{digits}f} ({self.min:.{digits}f}..{self.max:.{digits}f})"


def machine() -> dict[str, Any]:
    """What the figures depend on and nobody would remember."""
    return {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": round(os.getloadavg()[0], 2),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }


def print_machine(facts: Mapping[str, Any]) -> None:
    """The machine in two lines."""
    print(
        f"{facts['cores']} cores ({facts['processor']}), {facts['kernel']}, {facts['python']}, "
        f"load {facts['load']} before the start"
    )
    print(", ".join(f"{name} {number}" for name, number in facts["versions"].items()))


def interleave(variants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each variant returned in each round. One round of all before the next, so that a busy minute of the
    machine hits all of them; every second round backwards, so that none always follows the same neighbour."""
    found: dict[str, list[Any]] = {name: [] for name in variants}
    for number in range(rounds):
        _progress(f"  round {number + 1} of {rounds}")
        for name in list(variants)[:: -1 if number % 2 else 1]:
            found[name].append(variants[name]())
    _progress("")
    return found


def print_table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table for people: the first column to the left, figures to the right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    print(f"\n{title}")
    for number, (first, *rest) in enumerate(lines):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))]
        print("  " + "   ".join(cells).rstrip())
        if number == 0:
            print("  " + "   ".join("-" * width for width in widths))


class Report:
    """What a benchmark tells: tables for people, as they come; or, for machines, one JSON object when it is closed."""

    def __init__(self, *, as_json: bool) -> None:
        self._tables: list[dict[str, Any]] | None = [] if as_json else None
        self._machine = machine()
        if not as_json:
            print_machine(self._machine)

    def table(self, title: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table; a figure is a number or a spread, and how many digits of it a person wants."""
        if self._tables is None:
            print_table(title, heads, [[_shown(cell) for cell in row] for row in rows])
        else:
            self._tables.append({"title": title, "rows": [_as_object(heads, row) for row in rows]})

    def close(self) -> None:
        """It was all."""
        if self._tables is not None:
            json.dump({"machine": self._machine, "tables": self._tables}, sys.stdout, indent=2)
            print()


Cell = str | tuple[Spread | float, int]


def _shown(cell: Cell) -> str:
    if isinstance(cell, str):
        return cell
    figure, digits = cell
    if isinstance(figure, Spread):
        return figure.show(digits)
    return "" if figure != figure else f"{figure:.{digits}f}"  # one that is no number was not measured


def _as_object(heads: Sequence[str], row: Sequence[Cell]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for head, cell in zip(heads, row, strict=True):
        figure = cell if isinstance(cell, str) else cell[0]
        found[head or "what"] = asdict(figure) if isinstance(figure, Spread) else None if figure != figure else figure
    return found


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
