"""What there is of a payload whose agent has died, as its state directory, /proc and the kernel's locks tell.

Everything here blocks, for a moment. Nobody is signalled.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from loadmaster.description import Containment, Isolation
from loadmaster.errors import PayloadHeld
from loadmaster.payload.adopted import AdoptedTree, EndedTree, open_process
from loadmaster.payload.state import Damaged, LaunchRecord, Started, StateDirectory, boot_id
from loadmaster.payload.usage import read_stat

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class NotStarted:
    """Nothing was ever executed, and nothing will be."""

    reason: str


@dataclass(frozen=True, slots=True)
class Lost:
    """Something may have been executed, and how it ended is not known."""

    reason: str
    rebooted: bool = False
    """The machine was started again. What the payload had written may not be on the disk."""
    left_behind: bool = False
    """Something is still there although it was killed: it must not be started again."""
    sure: bool = False
    """Whether nothing of it can be left. Else there may be something that had left both its parents and its session,
    without a shim, a namespace or a group that would have held it."""

    @property
    def certain(self) -> bool:
        """Whether it may be run again beside nothing."""
        return (self.sure or self.rebooted) and not self.left_behind


@dataclass(frozen=True, slots=True)
class ToEnd:
    """What cannot be adopted, and who is left of it, as far as that is known."""

    reason: str
    known: tuple[Started, ...]


Found = AdoptedTree | EndedTree | NotStarted | Lost | ToEnd


def look(directory: StateDirectory, event: Started | None, boot: str) -> Found | None:
    """What there is; None when a shim lives that has not said yet what it has started."""
    started: Started | None = None
    try:
        launch = undamaged(lambda: directory.launch)
        if is_other_boot(boot) or (launch is not None and is_other_boot(launch.boot_id)):
            return _before_this_boot(directory, launch)
        alive = directory.has_shim()
        started = directory.started if event is None else undamaged(lambda: directory.started)
        if event is not None and (started is None or not _is_same(event, started)):
            started = event  # which nobody could change
        if alive and (found := _adopted(directory, started, launch)) is not None:
            return found
        if alive and directory.has_shim():
            reason = f"{directory.path}: not held by the shim it names"
            return None if started is None else unclear(directory, reason, (started,))
        return _without_shim(directory, started, event, launch)
    except Damaged as exc:
        return unclear(directory, f"damaged: {exc}", tuple(filter(None, (started or event,))))


def _before_this_boot(directory: StateDirectory, launch: LaunchRecord | None) -> EndedTree | Lost:
    """Nobody can be left. A record counts that came to the disk after all it is about."""
    started, ended = undamaged(lambda: directory.started), undamaged(lambda: directory.ended)
    if started is not None and ended is not None and ended.synced:
        return EndedTree(ended.record, started, _containment_of(started, launch), launch.shim if launch else "")
    return Lost("the machine was started again", rebooted=True, sure=True)


def _adopted(
    directory: StateDirectory, started: Started | None, launch: LaunchRecord | None
) -> AdoptedTree | NotStarted | None:
    if started is None or (pidfd := open_process(started.shim_pid, started.shim_start, directory)) is None:
        return None
    if started.error:
        os.close(pidfd)
        return NotStarted(os.strerror(started.error))
    return AdoptedTree(
        pidfd, started, _containment_of(started, launch), state=directory, shim=launch.shim if launch else "",
        isolation=launch.isolation if launch else Isolation.NONE,
    )  # fmt: skip


def _without_shim(
    directory: StateDirectory, started: Started | None, event: Started | None, launch: LaunchRecord | None
) -> EndedTree | NotStarted | ToEnd | None:
    if started is not None and started.error:
        return NotStarted(os.strerror(started.error))
    ended = directory.ended
    if ended is not None and started is not None:
        if _runs(started.payload_pid, started.payload_start):  # nothing outlives a shim that has said this
            return ToEnd("what says that it has ended is not of its shim: it runs", (started,))
        return EndedTree(ended.record, started, _containment_of(started, launch), launch.shim if launch else "")
    if event is None and directory.void():
        return NotStarted("its agent died before anything was executed")
    if directory.has_shim():  # it has just come
        return None
    if started is not None and started.containment is Containment.SESSION:
        return ToEnd("nobody is told how a payload in a session ends but who has started it", (started,))
    return ToEnd("its shim was killed", (started,) if started is not None else ())


def unclear(directory: StateDirectory, reason: str, known: tuple[Started, ...]) -> ToEnd:
    """Whoever holds the lock is its shim, whatever is written there. Raises `PayloadHeld` when we cannot see who does."""
    holder = directory.holder()
    if holder and (own := read_stat(holder)) is not None:
        shim = Started(
            shim_pid=holder,
            shim_start=own.start_ticks,
            payload_pid=0,
            payload_start=0,
            containment=Containment.SUBREAPER,
        )
        return ToEnd(reason, (shim, *known))
    with suppress(Damaged):
        if directory.has_shim() and not any(_runs(one.shim_pid, one.shim_start) for one in known):
            raise PayloadHeld(f"{directory.path}: its shim is nowhere to be seen: of another container, or machine?")
    return ToEnd(reason, known)


def _runs(pid: int, start_ticks: int) -> bool:
    """Whether a process runs."""
    if (pidfd := open_process(pid, start_ticks)) is None:
        return False
    os.close(pidfd)
    return True


def _containment_of(started: Started, launch: LaunchRecord | None) -> Containment:
    """What holds it; a shim does not know of the groups."""
    if started.containment is Containment.SUBREAPER and launch is not None and launch.groups:
        held = [one for one in launch.containment if one in {Containment.SUBREAPER, Containment.CGROUP}]
        return held[0] if held else started.containment
    return started.containment


def _is_same(one: Started, other: Started) -> bool:
    return all(
        getattr(one, name) == getattr(other, name)
        for name in ("shim_pid", "shim_start", "payload_pid", "payload_start")
    )


def is_other_boot(boot: str) -> bool:
    """Whether it is known to be another one than this."""
    return boot not in {"", boot_id()}


def undamaged(read: Callable[[], T | None]) -> T | None:
    """What is read, or None when it is damaged."""
    with suppress(Damaged):
        return read()
    return None
