"""What is started, all of it: the program, its world, and what the kernel is to hold it to."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from loadmaster.description import Containment, Isolation

UMASK: Final = 0o022
"""Outputs can be read by the site's other accounts, as DIRAC's wrapper has it."""

CPU_MARGIN_SECONDS: Final = 5
"""The kernel's CPU limit comes so much after ours, KILL as long again after XCPU: it is there for when we are not."""

_HERE: Final = Path(__file__).parent


class Refused(Exception):
    """The node does not allow a containment or an isolation; the message says what and why."""


class Group(Protocol):
    """A payload's control groups, made before it starts and removed after its end by whoever made them."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Each an open `cgroup.procs` or `tasks`, to which the payload's first process writes `0`."""
        ...

    def kill(self) -> None:
        """Kill everybody in it. Blocks for a moment."""
        ...

    def usage(self) -> object:
        """What it uses. Blocks for a moment."""
        ...

    def remove(self) -> bool:
        """Remove it; False while somebody is in it."""
        ...


@dataclass(frozen=True, slots=True)
class Launch:
    """A payload that is to be started."""

    argv: Sequence[str]
    """The program by its path, and its arguments."""
    env: Mapping[str, str]
    cwd: Path
    """The work directory."""
    stdout: int
    stderr: int
    """Open descriptors."""
    grace_seconds: float
    """Between TERM and KILL, as the shim keeps it."""
    umask: int = UMASK
    nice: int = 0
    """0..19, added to our own."""
    cores: frozenset[int] = frozenset()
    """The CPUs it may use; empty: ours."""
    cpu_seconds: float | None = None
    """A process that has used some seconds more gets XCPU from the kernel, then KILL. For each process by itself."""
    isolation: Isolation = Isolation.NONE
    image: str | None = None
    """What apptainer runs it in: a path, or `docker://...`."""
    join: tuple[int, ...] = ()
    """Control groups' `cgroup.procs` or `tasks`, open for writing, that it joins before anything is executed."""
    group: Group | None = None
    """Its descriptors are joined too, and it is killed with the tree."""
    private: bool = False
    """Own /tmp and a read-only rest, as the shim makes it; see `Isolation.NAMESPACES`."""
    wrapped: bool = False
    """The program is a wrapper, to which the environment is not given and TERM does nothing; shim.c says how."""

    state: int = -1
    """A directory in which the shim leaves what the next agent has to know; without one, none can adopt the payload."""
    orphan_seconds: float = 0.0
    """With one: how long it may run without an agent. 0: for ever."""
    hidden: tuple[int, ...] = ()
    """Directories of ours that a payload with mounts of its own finds empty, as it does `state`."""

    lock: int = -1
    """What says, as long as it is open, that somebody lives in the work directory. A shim inherits it, the payload does
    not."""

    @property
    def joined(self) -> tuple[int, ...]:
        """All control groups to join."""
        return (*self.join, *(self.group.descriptors if self.group is not None else ()))

    @property
    def cpu_limit(self) -> tuple[int, int] | None:
        """RLIMIT_CPU, soft and hard, or None."""
        if self.cpu_seconds is None:
            return None
        soft = math.ceil(self.cpu_seconds) + CPU_MARGIN_SECONDS
        return soft, soft + CPU_MARGIN_SECONDS

    def settings(self, mode: Containment, numbered: Callable[[int], int] = int) -> str:
        """For the shim; shim.c says what they mean. `numbered`: what a descriptor's number is there."""
        words = ["n"] if mode is not Containment.SESSION else []
        if self.nice:
            words.append(f"nice={self.nice}")
        if self.cores:
            words.append(f"cpus={'+'.join(map(str, sorted(self.cores)))}")
        if self.cpu_limit is not None:
            words.append("cpu={}:{}".format(*self.cpu_limit))
        words += [f"join={numbered(descriptor)}" for descriptor in self.joined]
        if mode is Containment.PID_NAMESPACE:
            words += [f"hide={numbered(descriptor)}" for descriptor in self.hidden]
        if self.state >= 0 and self.orphan_seconds > 0:
            words.append(f"orphan={max(1, round(self.orphan_seconds * 1000))}")
        words += [name for name in ("private", "wrapped") if getattr(self, name)]
        return ",".join(words) or "-"


def shim_kind() -> str:
    """Which shim this installation has: `c`, or its `python` twin where no compiler was found."""
    return "c" if os.access(_HERE / "shim", os.X_OK) else "python"


def shim_command() -> list[str]:
    """The words before the shim's own."""
    if shim_kind() == "c":
        return [str(_HERE / "shim")]
    return [sys.executable, "-I", "-S", str(_HERE / "shim.py")]
