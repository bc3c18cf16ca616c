"""The control groups this process may make: where, and what they can do. Detected by making one, never assumed.

| item   | cgroup v2                      | v1, each in a hierarchy of its own or not |
| ------ | ------------------------------ | ----------------------------------------- |
| kill   | `cgroup.kill`                  | the freezer, and a signal to each         |
| events | `cgroup.events`: who is left   | -                                         |
| cpu    | `cpu.stat`, needs no controller| `cpuacct`                                 |
| memory | the memory controller          | `memory`                                  |
| pids   | the pids controller            | `pids`                                    |
| io     | the io controller              | - (does not see what is written back)     |

A v2 group that has processes cannot give controllers to the groups below. So where an agent runs in a delegated group
itself, the groups in it have the core files only: kill, events and cpu. A site that wants more delegates a group that
is empty (systemd: `Delegate=yes` with `DelegateSubgroup=`), and names it to us; only there are controllers enabled.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

from loadmaster.payload.cgroupfs import GroupDirectory, read_file, remove_left, write_file

V2: Final = "cgroup2"
V1: Final = "cgroup"

ENABLED: Final = ("memory", "pids", "io")
"""What is enabled in a delegated group if it can be. CPU time is counted without a controller."""

_FILES: Final = {
    V2: {
        "kill": "cgroup.kill", "freeze": "cgroup.freeze", "events": "cgroup.events", "cpu": "cpu.stat",
        "memory": "memory.max", "pids": "pids.max", "io": "io.stat",
    },
    V1: {
        "freeze": "freezer.state", "cpu": "cpuacct.usage", "memory": "memory.limit_in_bytes", "pids": "pids.max",
    },
}  # fmt: skip
"""The file that shows that a group has an item."""

_USEFUL_V1: Final = frozenset({"freezer", "cpuacct", "memory", "pids"})
_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A directory of a hierarchy in which groups could perhaps be made."""

    path: Path
    kind: str
    """`cgroup2` or `cgroup`, as the kernel calls the two file systems."""
    delegated: bool = False


@dataclass(frozen=True, slots=True)
class Hierarchies:
    """What groups can do here: for each item the directory they are made in, or None."""

    kill: Path | None = None
    freeze: Path | None = None
    events: Path | None = None
    cpu: Path | None = None
    memory: Path | None = None
    pids: Path | None = None
    io: Path | None = None
    refusals: tuple[str, ...] = ()
    """Why nothing can be made in the other directories."""

    @property
    def directories(self) -> tuple[Path, ...]:
        """Where a payload's groups are made, each once: as few as give all items."""
        return tuple(dict.fromkeys(path for _, path in self.items()))

    def items(self) -> Iterator[tuple[str, Path]]:
        """What there is, and where."""
        for field in fields(self):
            if isinstance(path := getattr(self, field.name), Path):
                yield field.name, path

    def __str__(self) -> str:
        return ", ".join(f"{item}: {path}" for item, path in self.items()) or f"none ({'; '.join(self.refusals)})"


def find_hierarchies(delegated: Sequence[Path] = (), *, proc: Path = Path("/proc/self")) -> Hierarchies:
    """What the groups this process may make can do. Blocks for some milliseconds; nobody needs it twice.

    `delegated` are directories the site has given us; they come first, for what they have, and then the groups this
    process is in. In each one a group is made, a process of ours moved there, and both removed again; so are the empty
    groups that agents which have died left there.
    """
    mounts = (proc / "mountinfo").read_text(errors="surrogateescape")
    candidates = [
        *candidates_of(delegated, mounts),
        *own_candidates((proc / "cgroup").read_text(errors="surrogateescape"), mounts),
    ]
    found: list[tuple[Candidate, frozenset[str]]] = []
    refusals = [f"{path}: no control group" for path in delegated if path not in {one.path for one in candidates}]
    for candidate in dict.fromkeys(candidates):
        try:
            found.append((candidate, _probe(candidate)))
        except OSError as exc:
            refusals.append(f"{candidate.path}: {exc.strerror}")
    return choose(found, refusals)


def choose(found: Iterable[tuple[Candidate, frozenset[str]]], refusals: Iterable[str] = ()) -> Hierarchies:
    """For each item the first directory whose groups have its file; a freezer only where there is no better way to kill."""
    places: dict[str, Path] = {}
    for candidate, files in found:
        for item, file in _FILES[candidate.kind].items():
            if file in files:
                places.setdefault(item, candidate.path)
    if "kill" in places:
        places.pop("freeze", None)
    return Hierarchies(**places, refusals=tuple(refusals))


def candidates_of(delegated: Iterable[Path], mountinfo: str) -> Iterator[Candidate]:
    """The directories given that are in a hierarchy."""
    for path in delegated:
        real = Path(os.path.realpath(path))
        mounts = [one for one in _mounts(mountinfo) if real.is_relative_to(one.point)]
        if mounts and (mount := max(mounts, key=lambda one: len(one.point.parts))).kind in _FILES:
            yield Candidate(path, mount.kind, delegated=True)


def own_candidates(cgroup: str, mountinfo: str) -> Iterator[Candidate]:
    """The directories of the groups a process is in, v2 first, as far as they are mounted in its sight."""
    mounts = list(_mounts(mountinfo))
    for line in sorted(cgroup.splitlines(), key=lambda line: not line.startswith("0::")):
        _, controllers, path = line.split(":", 2)
        names = frozenset(controllers.split(",")) - {""}
        if names and not names & _USEFUL_V1:
            continue
        for mount in reversed(mounts):  # the last one mounted hides those below
            right = mount.kind == (V1 if names else V2) and names <= mount.options
            if right and (inside := _inside(path, mount.root)) is not None:
                yield Candidate(mount.point / inside, mount.kind)
                break


@dataclass(frozen=True, slots=True)
class _Mount:
    point: Path
    root: str
    kind: str
    options: frozenset[str]


def _mounts(mountinfo: str) -> Iterator[_Mount]:
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, (kind, _, options) = before.split(" "), after.split(" ", 2)
        yield _Mount(Path(_plain(words[4])), _plain(words[3]), kind, frozenset(options.split(",")))


def _plain(word: str) -> str:
    """A name of mountinfo without its octal escapes."""
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), word)


def _inside(path: str, root: str) -> str | None:
    """The part of a group's path below what is mounted; None outside, as when a namespace hides what is above."""
    if ".." in path.split("/") or not f"{path}/".startswith(f"{root.rstrip('/')}/"):
        return None
    return path[len(root.rstrip("/")) :].lstrip("/")


def _probe(candidate: Candidate) -> frozenset[str]:
    """The files of a group made there, which a process of ours could be moved to. Raises OSError."""
    remove_left(candidate.path)
    if candidate.delegated and candidate.kind == V2:
        _enable_controllers(candidate.path)
    with ExitStack() as stack:
        group = GroupDirectory.make(candidate.path, "probe")
        stack.callback(group.close)
        stack.callback(group.remove)
        moved = subprocess.Popen(
            ["/bin/sh", "-c", "read end"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(moved.communicate)
        procs = group.open_procs()
        stack.callback(os.close, procs)
        os.write(procs, str(moved.pid).encode())
        return group.files()


def _enable_controllers(path: Path) -> None:
    """Let the groups in a delegated one have controllers, each that is there; not if somebody is in it."""
    if read_file(path / "cgroup.procs"):
        return
    there = (read_file(path / "cgroup.controllers") or "").split()
    enabled = (read_file(path / "cgroup.subtree_control") or "").split()
    for name in ENABLED:
        if name in there and name not in enabled:
            _try_enable(path, name)


def _try_enable(path: Path, name: str) -> None:
    """One controller. Not being able to is no error: the item is then found missing."""
    try:
        write_file(path / "cgroup.subtree_control", f"+{name}")
    except OSError:
        return
