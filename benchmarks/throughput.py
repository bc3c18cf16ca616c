"""Two thousand short jobs on all cores: how many a second, and what CPU each costs, beside what else runs jobs on a node.

    python benchmarks/throughput.py [--jobs 2000] [--cores N] [--rounds 3] [--quick] [--json] [--only NAME...]
                                    [--directory DIR] [--peers VENV | --no-peers]

`true`: /bin/true. `copy`: /bin/cp of a file of 4 KiB to another; ours stage the one in and the other out. Each contender
runs in a process of its own (`_contenders.py` has what exactly), one after the other, in turns. Parsl and Dask are
installed into an environment of their own, which is removed afterwards; GNU parallel is used if it is there.

    bare       Popen and a pidfd; no logs, no directories
    floor      by hand: work directory, two logs, a session, two synced lines in a journal, all removed; unsynced: without
    node       ours, complete: held in a PID namespace where the system allows it; session: without a shim; journal: every
               event on disk before it is told
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from shutil import which
from typing import Any, Final

from _bench import Spread, interleave, machine, print_machine, print_table

from loadmaster import Node

JOURNALLED: Final = "journal" in signature(Node).parameters
OURS: Final = ("node", *(("node-journal",) if JOURNALLED else ()), "node-uvloop", "node-trio", "node-session")
BY_HAND: Final = ("bare", "floor", "floor-unsynced")
INSTALLED: Final = {"parsl-threads": "parsl", "parsl-htex": "parsl", "dask": "dask"}
SECONDS: Final = 600.0
"""Nobody takes that long."""

HERE: Final = Path(__file__).parent


@contextmanager
def peers(venv: Path | None, wanted: bool, missing: dict[str, str]) -> Iterator[Path | None]:
    """The interpreter that has Parsl and Dask, if they can be had."""
    if not wanted:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="loadmaster-peers-") as directory:
        place = venv or Path(directory)
        if not (place / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", place], check=True)
        python = place / "bin" / "python"
        for package in sorted(set(INSTALLED.values())):
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                missing[package] = (done.stderr.strip().splitlines() or ["cannot be installed"])[-1]
        yield python


def once(python: str, name: str, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """What a contender took, once."""
    with tempfile.TemporaryDirectory(prefix="loadmaster-throughput-", dir=options.directory) as directory:
        command = [python, str(HERE / "_contenders.py"), name, kind, str(options.jobs), str(options.cores), directory]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode != 0:
            raise SystemExit(f"{name}: {done.stderr.strip()[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
    return {
        "jobs_per_second": options.jobs / found["seconds"],
        "cpu_ms_per_job": 1000 * found["cpu_seconds"] / options.jobs,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every contender that is there, in turns."""
    missing: dict[str, str] = {}
    with peers(options.peers, not options.no_peers, missing) as python:
        there = dict.fromkeys((*BY_HAND, *OURS), sys.executable)
        if which("parallel"):
            there["parallel"] = sys.executable
        else:
            missing["parallel"] = "not in PATH"
        if python is not None:
            there |= {name: str(python) for name, package in INSTALLED.items() if package not in missing}
        there = {
            name: interpreter
            for name, interpreter in there.items()
            if (not options.only or name in options.only) and (not name.endswith("uvloop") or find_spec("uvloop"))
        }
        kinds = {
            kind: interleave(
                {name: partial(once, interpreter, name, kind, options) for name, interpreter in there.items()},
                options.rounds,
            )
            for kind in ("true", "copy")
        }
    return {
        "machine": machine(), "jobs": options.jobs, "cores": options.cores, "missing": missing,
        "kinds": {kind: {name: spreads(rounds) for name, rounds in found.items()} for kind, found in kinds.items()},
    }  # fmt: skip


def spreads(rounds: list[dict[str, float]]) -> dict[str, Spread]:
    """Each figure's median and range."""
    return {figure: Spread.of([each[figure] for each in rounds]) for figure in rounds[0]}


def tell(found: Mapping[str, Any]) -> None:
    """The tables."""
    print_machine(found["machine"])
    for kind, rows in found["kinds"].items():
        floor = rows["floor"]["jobs_per_second"].median if "floor" in rows else None
        by_rate = sorted(rows.items(), key=lambda row: -row[1]["jobs_per_second"].median)
        print_table(
            f"{kind}: {found['jobs']} jobs on {found['cores']} cores",
            ["", "jobs/s", "CPU, ms a job", "times the floor"],
            [
                (
                    name,
                    row["jobs_per_second"].show(0),
                    row["cpu_ms_per_job"].show(),
                    f"{floor / row['jobs_per_second'].median:.2f}" if floor else "",
                )
                for name, row in by_rate
            ],
        )
    for name, why in found["missing"].items():
        print(f"  {name} is missing: {why}")


def main() -> None:
    """Measure and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, help="how many; default 2000")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="so many at a time; default: all")
    parser.add_argument("--rounds", type=int, help="default 3")
    parser.add_argument("--quick", action="store_true", help="200 jobs, once: to see that it works")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the contenders, only these")
    parser.add_argument("--directory", type=Path, help="where the jobs' files are; default: the temporary directory")
    parser.add_argument("--peers", type=Path, metavar="VENV", help="an environment for the peers, which is kept")
    parser.add_argument("--no-peers", action="store_true", help="without those that have to be installed")
    options = parser.parse_args()
    options.jobs = options.jobs or (200 if options.quick else 2000)
    options.rounds = options.rounds or (1 if options.quick else 3)
    found = measure(options)
    if options.json:
        json.dump(found, sys.stdout, default=asdict, indent=2)
        print()
    else:
        tell(found)


if __name__ == "__main__":
    main()
