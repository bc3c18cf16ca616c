"""The house: a module imports only from lower floors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import loadmaster

SOURCE = Path(loadmaster.__file__).parent

# A number after the point is a landing: still the same floor of the design, but above its neighbours there.
FLOORS: dict[str, float] = {
    # words
    "errors": 0,
    "names": 1,
    "units": 1,
    "description": 1.5,
    "result": 1.5,
    "events": 2,
    # decisions
    "lifecycle": 3,
    "line": 2.5,
    "topology": 2.5,
    "ledger": 3,
    "allocation": 2.5,
    "gpus": 3,
    "machine": 3.5,
    "limits": 3,
    "ahead": 3,
    "admission": 3.5,
    "occupancy": 3.5,
    # mechanisms
    "handle": 4,
    "logfile": 3.4,
    "logbook": 3.5,
    "journal": 4.2,
    "scribe": 3,
    "pending": 4,
    "occupants": 3,
    "workdir": 4,
    "world": 3,
    "site": 4,
    "answers": 3,
    "tasks": 3,
    "threads": 3,
    "streams": 3,
    "notices": 3,
    "bell": 3,
    "hooks": 4,
    "signatures": 3,
    "storage": 4.5,
    "payload": 5,
    "staging": 5,
    "companions": 5.5,
    # one job
    "leftovers": 5.9,
    "coordinator": 6,
    "takeover": 6,
    "runner": 7,
    "reporter": 7,
    "sources": 7,
    "recovery": 7,
    "operations": 6,
    "bundle": 8,
    # many jobs
    "book": 7.5,
    "leases": 7.6,
    "dispatch": 7.7,
    "records": 7.8,
    "serving": 7.8,
    "node": 8,
    # the doors
    "dirac": 9,
    "diracx": 9.05,
    "testing": 9,
    "conformance": 9,
    "console": 9.1,
    "commands": 9.4,
    "cli": 9.5,
    "__main__": 10,
    "__init__": 10,
}

MODULES = sorted(SOURCE.rglob("*.py"))


def place(path: Path) -> str:
    """Where a module lives: its own name, or that of its folder."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """The dotted names of this package's modules that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "loadmaster")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative imports hide which floor they come from"
            if node.module == "loadmaster":
                yield from (f"loadmaster.{alias.name}" for alias in node.names)
            elif node.module is not None and node.module.startswith("loadmaster."):
                yield node.module


@cache
def imports_of(file: Path) -> tuple[str, ...]:
    return tuple(imported(ast.parse(file.read_text(encoding="utf-8"))))


def floor(name: str) -> float:
    assert name in FLOORS, f"loadmaster.{name} has no floor yet: add it to FLOORS in tests/test_floors.py"
    return FLOORS[name]


def offences(path: Path, text: str) -> list[str]:
    """What a module imports that is not below it. A folder's own modules may import each other."""
    own = place(path)
    below = [name.split(".")[1] for name in imported(ast.parse(text)) if name != "loadmaster"]
    return [f"{own} imports {name}" for name in below if name != own and not floor(name) < floor(own)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_module_imports_only_from_lower_floors(path: Path) -> None:
    assert offences(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_folders_modules_do_not_import_in_circles(path: Path) -> None:
    """Within a folder the floors say nothing, so follow the imports: none leads back to where it began."""
    start = ".".join(("loadmaster", *path.relative_to(SOURCE).with_suffix("").parts))
    seen: set[str] = set()
    ahead = [start]
    while ahead:
        file = SOURCE.parent.joinpath(*ahead.pop().split(".")).with_suffix(".py")
        if file.is_file():
            for name in imports_of(file):
                assert name != start, f"{start} imports itself, by way of {file.relative_to(SOURCE)}"
                if name not in seen:
                    seen.add(name)
                    ahead.append(name)


@pytest.mark.parametrize(
    ("line", "offence"),
    [
        ("from loadmaster.runner import run_job", "description imports runner"),
        ("import loadmaster.cli", "description imports cli"),
        ("def f():\n    from loadmaster import node", "description imports node"),
        ("from loadmaster.storage.base import Storage", "description imports storage"),
    ],
)
def test_an_import_from_above_is_seen_wherever_it_stands(line: str, offence: str) -> None:
    assert offences(SOURCE / "description.py", line) == [offence]


def test_a_module_without_a_floor_is_told_where_to_go() -> None:
    with pytest.raises(AssertionError, match=r"add it to FLOORS in tests/test_floors\.py"):
        offences(SOURCE / "attic.py", "from loadmaster import errors")


SLOW_TO_IMPORT = ("rich", "sqlite3", "pycurl", "loadmaster.node", "loadmaster.machine", "loadmaster.storage.http")
"""A pilot starts cold on each node: what not every job needs is loaded by who needs it."""


def test_what_is_slow_to_import_is_imported_when_it_is_used() -> None:
    script = f"import sys, loadmaster; print([name for name in {SLOW_TO_IMPORT!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


OF_A_JOB = ("loadmaster.coordinator", "loadmaster.events", "loadmaster.dirac", "loadmaster.payload.supervise")


def test_a_command_that_moves_files_does_not_load_what_runs_jobs() -> None:
    """A third of its start went there: 0.15 s of CPU."""
    script = f"""
import sys
from loadmaster.cli import main
code = main(["stage", "/dev/null", "--quiet"])
print(code, "loadmaster.staging.engine" in sys.modules, [name for name in {OF_A_JOB!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 True []"


def test_every_public_name_is_there_and_is_listed() -> None:
    assert [name for name in loadmaster.__all__ if not hasattr(loadmaster, name)] == []
    assert set(loadmaster.__all__) <= set(dir(loadmaster))
    with pytest.raises(AttributeError, match="has no attribute 'Nodes'"):
        loadmaster.Nodes  # noqa: B018
