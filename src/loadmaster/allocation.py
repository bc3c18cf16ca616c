"""What a batch system says it gave us of this node, in variables and files it documents.

| system        | cores                                             | memory                                   |
| ------------- | ------------------------------------------------- | ---------------------------------------- |
| Slurm         | SLURM_CPUS_ON_NODE; a task of `srun` also          | SLURM_MEM_PER_NODE, SLURM_MEM_PER_CPU    |
|               | SLURM_CPUS_PER_TASK                               |                                          |
| HTCondor      | Cpus of the machine's ad (_CONDOR_MACHINE_AD)     | Memory of the ad; Disk, too              |
| PBS, Torque   | NCPUS; PBS_NUM_PPN                                |                                          |
| LSF           | LSB_MCPU_HOSTS, LSB_DJOB_NUMPROC                  |                                          |
| Grid Engine   | NSLOTS; PE_HOSTFILE for several hosts             |                                          |

Variables of a system count only inside a job of it: shells inherit them, and other programs call theirs the same.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SPECIAL_STEPS: Final = 4294967290
"""Slurm's steps from this number on are no tasks of `srun`: the batch script, an interactive shell."""

LONGEST_FILE: Final = 1_000_000
"""Bytes of one file that are read; the longest, an ad of a machine, has some 20,000."""


@dataclass(frozen=True, slots=True)
class Figure:
    """How much there is, and who says so."""

    value: int
    source: str

    def __str__(self) -> str:
        return f"{self.value} ({self.source})"


@dataclass(frozen=True, slots=True)
class Allocation:
    """What was given, as far as it was said."""

    cores: tuple[Figure, ...] = ()
    memory_mb: tuple[Figure, ...] = ()
    disk_bytes: tuple[Figure, ...] = ()


class Tree:
    """The files of a machine: those below `/`, or a copy of some of them elsewhere."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str) -> Path:
        """Where a file is that the machine knows under an absolute name."""
        return self.root / name.lstrip("/")

    def text(self, name: str) -> str | None:
        """What is in a file, without the blanks at its ends; None when it cannot be read."""
        try:
            with self.path(name).open(encoding="utf-8", errors="replace") as file:
                return file.read(LONGEST_FILE).strip()
        except (OSError, ValueError):  # a NUL in its name
            return None

    def names(self, directory: str) -> list[str]:
        """What a directory holds, in order; nothing when it cannot be read."""
        try:
            return sorted(os.listdir(self.path(directory)))
        except OSError:
            return []


def allocation(environ: Mapping[str, str], tree: Tree, host: str) -> Allocation:
    """What the batch systems say whose job we are in. Blocks: some of it is in files."""
    ad = dict(_machine_ad(environ, tree))
    memory = [Figure(ad["Memory"], "Memory of HTCondor's machine ad")] if "Memory" in ad else []
    disk = [Figure(ad["Disk"] * 1024, "Disk of HTCondor's machine ad")] if "Disk" in ad else []
    cores = [Figure(ad["Cpus"], "Cpus of HTCondor's machine ad")] if "Cpus" in ad else []
    if "SLURM_JOB_ID" in environ:
        slurms_cores, slurms_memory = _slurm(environ)
        cores += slurms_cores
        memory += slurms_memory
    if "PBS_JOBID" in environ:
        cores += _numbers(environ, "PBS_NUM_PPN", "NCPUS")
    if "LSB_JOBID" in environ:
        cores += _lsf(environ, host)
    if "SGE_TASK_ID" in environ:
        cores += _grid_engine(environ, tree, host)
    return Allocation(tuple(cores), tuple(memory), tuple(disk))


def _number(text: str | None) -> int:
    """A positive number, or 0."""
    return int(text) if text is not None and re.fullmatch("[0-9]{1,18}", text.strip()) else 0


def _numbers(environ: Mapping[str, str], *names: str) -> list[Figure]:
    return [Figure(number, name) for name in names if (number := _number(environ.get(name)))]


def _slurm(environ: Mapping[str, str]) -> tuple[list[Figure], list[Figure]]:
    """Cores and memory, in MB. A batch script has all of its node's share, a task of `srun` only its own part: beside a
    batch script SLURM_CPUS_PER_TASK is about tasks it may start."""
    is_task = "SLURM_STEP_ID" in environ and _number(environ["SLURM_STEP_ID"]) < SPECIAL_STEPS
    alike = re.fullmatch(r"([0-9]+)(\(x[0-9]+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "")) if is_task else None
    tasks = max(1, _number(alike[1])) if alike else 1
    part = f", one of {tasks} tasks" if tasks > 1 else ""
    cpus, per_cpu = (_number(environ.get(name)) for name in ("SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_CPU"))
    cores = [Figure(max(1, cpus // tasks), f"SLURM_CPUS_ON_NODE{part}")] if cpus else []
    cores += _numbers(environ, "SLURM_CPUS_PER_TASK") if is_task else []
    memory = [
        Figure(max(1, whole.value // tasks), whole.source + part) for whole in _numbers(environ, "SLURM_MEM_PER_NODE")
    ]
    if per_cpu and cpus:
        figure = max(1, cpus // tasks) * per_cpu
        memory.append(Figure(figure, f"SLURM_MEM_PER_CPU, for each of SLURM_CPUS_ON_NODE{part}"))
    return cores, memory


def _machine_ad(environ: Mapping[str, str], tree: Tree) -> Iterator[tuple[str, int]]:
    """The numbers of the slot's ad: a line is `Cpus = 8`."""
    for line in (tree.text(environ.get("_CONDOR_MACHINE_AD", "")) or "").splitlines():
        name, _, value = line.partition("=")
        if number := _number(value):
            yield name.strip(), number


def _lsf(environ: Mapping[str, str], host: str) -> Iterator[Figure]:
    """`LSB_MCPU_HOSTS` is `hostA 4 hostB 2`; with one host the number of all is ours."""
    words = environ.get("LSB_MCPU_HOSTS", "").split()
    of_hosts = list(zip(words[::2], words[1::2], strict=False))
    for name, slots in of_hosts:
        if _same_host(name, host) and _number(slots):
            yield Figure(_number(slots), f"LSB_MCPU_HOSTS for {name}")
    if len(of_hosts) <= 1:
        yield from _numbers(environ, "LSB_DJOB_NUMPROC")


def _grid_engine(environ: Mapping[str, str], tree: Tree, host: str) -> Iterator[Figure]:
    """A line of `PE_HOSTFILE` is `host slots queue processors`; with one host NSLOTS is ours."""
    if _number(environ.get("NHOSTS", "1")) <= 1:
        yield from _numbers(environ, "NSLOTS")
        return
    for line in (tree.text(environ.get("PE_HOSTFILE", "")) or "").splitlines():
        name, _, rest = line.partition(" ")
        slots = rest.split()[:1]
        if slots and _same_host(name, host) and _number(slots[0]):
            yield Figure(_number(slots[0]), f"PE_HOSTFILE for {name}")


def _same_host(one: str, other: str) -> bool:
    """With and without its domain."""
    return one.partition(".")[0].lower() == other.partition(".")[0].lower()
