"""What this machine offers us, and who says so: kernel, control groups, batch system. Of several figures the smallest
counts. Nothing is assumed, nothing is written, and everything is read from below one root.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

from loadmaster.allocation import Figure, Tree, allocation
from loadmaster.gpus import Gpus, find_gpus
from loadmaster.ledger import Ledger
from loadmaster.topology import Cpu

MIB: Final = 2**20

UNLIMITED: Final = 2**60
"""The first version of control groups writes no limit as the largest number of pages there could be, in bytes."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is for us. The figures are sorted, the smallest first; it is the one that counts."""

    core_figures: tuple[Figure, ...]
    memory_figures: tuple[Figure, ...]
    """In MiB."""
    disk_figures: tuple[Figure, ...]
    """In bytes; empty when no directory was asked for."""
    cpus: tuple[Cpu, ...]
    """The processors we may run on."""
    cpus_are_ours: bool
    """Somebody said that they are for us: we may not run on others, or a batch system gave us as many."""
    gpus: Gpus

    @property
    def cores(self) -> Figure:
        """How many may be used at once: less than the processors when a quota or a batch system says so."""
        return self.core_figures[0]

    @property
    def memory_mb(self) -> Figure | None:
        """How much there is for all of us, this process included."""
        return next(iter(self.memory_figures), None)

    @property
    def disk_bytes(self) -> Figure | None:
        """How much is free."""
        return next(iter(self.disk_figures), None)

    def ledger(
        self,
        *,
        cores: int | None = None,
        memory_mb: int | None = None,
        disk_bytes: int | None = None,
        extras: Mapping[str, int] = MappingProxyType({}),
        patience: int | None = None,
    ) -> Ledger:
        """A ledger of what there is; what is given here has the last word.

        Processors are assigned by number only when all we may run on are ours, or are asked for here. Otherwise others
        run on them, too, and if they choose by number they choose the same ones, while the rest are idle.
        """
        granted = cores or self.cores.value
        ours = granted == len(self.cpus) and (self.cpus_are_ours or cores is not None)
        return Ledger(
            granted,
            memory_mb or (self.memory_mb.value if self.memory_mb else None),
            cpus=self.cpus if ours else (),
            gpus=self.gpus.gpus,
            gpu_variables=self.gpus.variables,
            disk_bytes=disk_bytes or (self.disk_bytes.value if self.disk_bytes else None),
            extras=extras,
            patience=patience,
        )


def detect(
    directory: Path | None = None,
    *,
    root: Path = Path("/"),
    environ: Mapping[str, str] = os.environ,
    affinity: Collection[int] | None = None,
    host: str | None = None,
) -> Machine:
    """What there is for this process, and on the disk of `directory`. Blocks, for some milliseconds.

    `root`, `affinity` and `host` stand for another machine than this one.
    """
    tree = Tree(root)
    given = allocation(environ, tree, host or os.uname().nodename)
    groups = list(_control_groups(tree))
    online = _numbers_of(tree.text("/sys/devices/system/cpu/online"))
    mask = frozenset(affinity if affinity is not None else os.sched_getaffinity(0))
    cores = [Figure(len(mask), "affinity mask")]
    for group, cpuset in _cpusets(tree, groups):
        mask = mask & cpuset or mask
        cores.append(Figure(len(cpuset), group))
    return Machine(
        _sorted([*cores, *_quotas(tree, groups), *given.cores]),
        _sorted([*_memory(tree, groups), *given.memory_mb]),
        _sorted([*_disk(directory), *given.disk_bytes]) if directory is not None else (),
        _topology(tree, mask),
        len(mask) < len(online) or any(figure.value == len(mask) for figure in given.cores),
        find_gpus(tree, environ),
    )


def _sorted(figures: list[Figure]) -> tuple[Figure, ...]:
    return tuple(sorted(figures, key=lambda figure: figure.value))


# -- control groups ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Group:
    """A directory of a hierarchy of control groups: our own group, or one above it."""

    directory: str
    controllers: frozenset[str]
    """Empty: the unified hierarchy, which has all of them."""
    own: bool


def _control_groups(tree: Tree) -> Iterator[_Group]:
    """Our own group and those above it that can be seen, in each hierarchy; limits above apply to us, too."""
    mounts = list(_mounts(tree))
    for line in (tree.text("/proc/self/cgroup") or "").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        controllers = frozenset(filter(None, names.split(",")))
        for kind, options, mount_root, mount_point in mounts:
            if kind == "cgroup2" if not controllers else (kind == "cgroup" and controllers <= options):
                below = PurePosixPath(_below(path, mount_root))
                for group in (below, *below.parents):
                    yield _Group(str(mount_point / group), controllers, own=group == below)
                break


def _mounts(tree: Tree) -> Iterator[tuple[str, frozenset[str], str, PurePosixPath]]:
    """Kind, options, root and mount point of each mounted hierarchy."""
    for line in (tree.text("/proc/self/mountinfo") or "").splitlines():
        here, _, there = line.partition(" - ")
        fields, filesystem = here.split(), there.split()
        if len(fields) >= 5 and len(filesystem) >= 3 and filesystem[0] in {"cgroup", "cgroup2"}:
            options = frozenset(filesystem[2].split(","))
            yield filesystem[0], options, fields[3], PurePosixPath(fields[4].replace("\\040", " "))


def _below(path: str, mount_root: str) -> str:
    """A group's path below the mount point. In a container only a part of the tree is mounted, and what the kernel
    calls our group may lie outside of it: then the mount point is as near as we get."""
    parts, above = PurePosixPath(path).parts[1:], PurePosixPath(mount_root).parts[1:]
    if ".." in parts or parts[: len(above)] != above:
        return "."
    return str(PurePosixPath(*parts[len(above) :]))


def _quotas(tree: Tree, groups: list[_Group]) -> Iterator[Figure]:
    """CPU time per time, in whole cores: 1.5 are one, and half a one is one as well."""
    for group in groups:
        if not group.controllers:
            name = "cpu.max"
            quota, period = [*(tree.text(f"{group.directory}/{name}") or "").split(), "", ""][:2]
        elif "cpu" in group.controllers:
            name = "cpu.cfs_quota_us"
            quota = tree.text(f"{group.directory}/{name}") or ""
            period = tree.text(f"{group.directory}/cpu.cfs_period_us") or ""
        else:
            continue
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield Figure(max(1, int(quota) // int(period)), f"{name} of {group.directory}")


def _cpusets(tree: Tree, groups: list[_Group]) -> Iterator[tuple[str, frozenset[int]]]:
    for group in groups:
        if not group.own or (group.controllers and "cpuset" not in group.controllers):
            continue
        for name in ("cpuset.effective_cpus", "cpuset.cpus") if group.controllers else ("cpuset.cpus.effective",):
            if cpus := _numbers_of(tree.text(f"{group.directory}/{name}")):
                yield f"{name} of {group.directory}", cpus
                break


def _memory(tree: Tree, groups: list[_Group]) -> Iterator[Figure]:
    """What the kernel has, and what a control group lets us have: at `memory.high` it begins to slow us down."""
    total = _fields(tree.text("/proc/meminfo")).get("MemTotal:", 0)
    if total:
        yield Figure(total // 1024, "MemTotal")
    for group in groups:
        if group.controllers and "memory" not in group.controllers:
            continue
        for name in ("memory.max", "memory.high") if not group.controllers else ("memory.limit_in_bytes",):
            text = tree.text(f"{group.directory}/{name}") or ""
            if text.isdecimal() and MIB <= int(text) < UNLIMITED:
                yield Figure(int(text) // MIB, f"{name} of {group.directory}")
        if group.own and group.controllers:  # also what limits groups we cannot see
            limit = _fields(tree.text(f"{group.directory}/memory.stat")).get("hierarchical_memory_limit", UNLIMITED)
            if MIB <= limit < UNLIMITED:
                yield Figure(limit // MIB, f"hierarchical_memory_limit of {group.directory}")


def _fields(text: str | None) -> dict[str, int]:
    """Lines of a name, blanks and a number."""
    lines = (line.split() for line in (text or "").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


# -- processors and disk -----------------------------------------------------------------------------------------


def _topology(tree: Tree, mask: frozenset[int]) -> tuple[Cpu, ...]:
    """The processors of a mask, with their NUMA nodes and the cores they share with each other."""
    nodes = {}
    for name in tree.names("/sys/devices/system/node"):
        if name.startswith("node") and name[4:].isdecimal():
            cpus = _numbers_of(tree.text(f"/sys/devices/system/node/{name}/cpulist"))
            nodes.update(dict.fromkeys(cpus, int(name[4:])))
    found = []
    for number in sorted(mask):
        where = f"/sys/devices/system/cpu/cpu{number}/topology"
        siblings = _numbers_of(tree.text(f"{where}/core_cpus_list") or tree.text(f"{where}/thread_siblings_list"))
        found.append(Cpu(number, nodes.get(number, 0), min(siblings, default=number)))
    return tuple(found)


def _numbers_of(text: str | None) -> frozenset[int]:
    """The kernel's lists: `0-3,8`."""
    found: set[int] = set()
    for part in (text or "").split(","):
        first, _, last = part.strip().partition("-")
        if first.isdecimal() and (last or first).isdecimal():
            found |= set(range(int(first), min(int(last or first), int(first) + 2**16) + 1))
    return frozenset(found)


def _disk(directory: Path | None) -> Iterator[Figure]:
    if directory is not None:
        found = os.statvfs(directory)
        yield Figure(found.f_bavail * found.f_frsize, f"free on the disk of {directory}")
