"""A payload that another agent has started: one whose shim lives, and one that has ended while nobody was its agent."""

from __future__ import annotations

import logging
import os
import time

from anyio import lowlevel

from loadmaster.description import Containment, Isolation
from loadmaster.payload.launch import Group
from loadmaster.payload.process import ExitRecord
from loadmaster.payload.shimtree import HeldByShim, helpers_of, is_readable
from loadmaster.payload.state import Damaged, Started, StateDirectory
from loadmaster.payload.tree import Tree
from loadmaster.payload.usage import TICKS_PER_SECOND, TreeUsage, read_stat

log = logging.getLogger(__name__)


class AdoptedTree(HeldByShim):
    """A payload below a shim that is not below us."""

    adopted = True

    def __init__(
        self, pidfd: int, found: Started, containment: Containment, *, state: StateDirectory | None = None,
        shim: str = "", isolation: Isolation = Isolation.NONE,
    ) -> None:  # fmt: skip
        self.containment, self.shim = containment, shim
        self.pid, self.start_ticks = found.payload_pid, found.payload_start
        self.shim_pid, self.shim_start_ticks = found.shim_pid, found.shim_start
        self.init_pid, self.init_start_ticks = found.init_pid, found.init_start
        self.fenced = found.fenced
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - (found.payload_start or found.shim_start) / TICKS_PER_SECOND
        self.started = time.monotonic() - age
        self._pidfd, self._state = pidfd, state
        self._helpers = helpers_of(containment, isolation)

    def hold(self, group: Group | None) -> None:
        """It is in this group too, if there is one."""
        self._group = group

    @property
    def asked(self) -> str:  # type: ignore[override]
        return self._record().asked if self.gone else "-"

    def _has_record(self) -> bool:
        return self._record() != ExitRecord()

    def _record(self) -> ExitRecord:
        try:
            ended = self._state.ended if self._state is not None else None
        except Damaged as exc:
            log.warning("process %d: how it ended is not known: %s", self.pid, exc)
            return ExitRecord()
        return ended.record if ended is not None else ExitRecord()

    def reap(self) -> ExitRecord:
        self.leave()
        record = self._record()
        self._reported = record != ExitRecord()
        return record

    def leave(self) -> None:
        """Let go of it, as it is."""
        os.close(self._pidfd)
        self._pidfd = -1

    def usage(self) -> TreeUsage:
        if self.gone:  # its number may be another's: it is not ours to reap
            return TreeUsage()
        return super().usage()


class EndedTree(Tree):
    """A payload that has ended while nobody was its agent."""

    adopted = True
    gone = True
    holds_all = True

    def __init__(self, record: ExitRecord, found: Started, containment: Containment, shim: str) -> None:
        self.containment, self.shim = containment, shim
        self.pid, self.start_ticks = found.payload_pid, found.payload_start
        self.shim_pid, self.shim_start_ticks = found.shim_pid, found.shim_start
        self.started = time.monotonic() - (record.wall_seconds or 0.0)
        self.asked = record.asked
        self._record = record

    def hold(self, group: Group | None) -> None:
        """Nothing of it is left to be held."""

    async def wait(self) -> None:
        await lowlevel.checkpoint()

    async def end(self, grace_seconds: float) -> bool:
        return True

    def hurry(self) -> None:
        return

    def reap(self) -> ExitRecord:
        return self._record

    def usage(self) -> TreeUsage:
        return TreeUsage()


def open_process(pid: int, start_ticks: int, directory: StateDirectory | None = None) -> int | None:
    """A descriptor of a process that runs and is the one that started then; None when there is none. Raises OSError."""
    if pid <= 1:
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    own = read_stat(pid)
    hidden = own is None and directory is not None and directory.holder() == pid  # by /proc (hidepid)
    if is_readable(pidfd) or not (hidden or (own is not None and own.start_ticks == start_ticks)):
        os.close(pidfd)
        return None
    return pidfd
