"""Whether a payload still runs in a work directory whose agent has died.

A payload's shim has a lock on the directory for its life, as has process 1 of its namespace: apart from the agent's own,
which dies with him. A payload without a shim is noted in an attribute of the directory, where the file system has such:
nothing of ours is to be open in it. It may take the note away; it is its own files that are emptied then.

Everything here blocks, for a moment.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

NOTE: Final = "user.loadmaster.session"
MOST_NAMED: Final = 5
"""Processes in a sentence."""

BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_FLOCK: Final = struct.Struct("hhqqi4x")


def hold(directory: int) -> int:
    """A descriptor for a shim to inherit, the caller's to close: as long as one is open, a payload lives in there. It
    holds nothing where the file system has no locks. Raises OSError."""
    own = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
    with suppress(OSError):  # not a flock: that is the agents', one of whom goes on with the payload
        fcntl.fcntl(own, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    return own


def note_session(directory: int, leader: int, start_ticks: int) -> None:
    """Say that a payload lives in there that has no shim: by its session."""
    with suppress(OSError):
        os.setxattr(directory, NOTE, f"{_boot_id()} {leader} {start_ticks}".encode())


def is_occupied(directory: int) -> bool:
    """Whether a payload lives in there, its agent or not."""
    try:
        found = fcntl.fcntl(directory, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
        if _FLOCK.unpack(found)[0] != fcntl.F_UNLCK:
            return True
    except OSError:
        pass
    return any(_of_noted_session(directory))


def who(directory: int) -> str:
    """Those who work in there, for a sentence: as far as they can be seen, by the directory they are in."""
    found = []
    own = os.fstat(directory)
    for pid in _processes():
        with suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/cwd"), own):
                found.append(str(pid))
    if not found:
        return "by processes that cannot be seen from here"
    return f"process {', '.join(found[:MOST_NAMED])}{', ...' if len(found) > MOST_NAMED else ''}"


def _of_noted_session(directory: int) -> Iterator[int]:
    try:
        boot, leader, start_ticks = os.getxattr(directory, NOTE).decode().split()
        session, began = int(leader), int(start_ticks)
    except (OSError, ValueError):
        return
    if boot != _boot_id() or session <= 1:
        return
    stats = ((pid, _stat(pid)) for pid in (session, *_processes()))
    for number, (pid, stat) in enumerate(stats):
        if number == 0 and stat is not None and stat[2] != began:
            return  # the number is somebody else's by now
        if stat is not None and stat[0] not in "ZX" and stat[1] == session and stat[2] >= began:
            yield pid


def _stat(pid: int) -> tuple[str, int, int] | None:
    """A process's state, its session, and when it began."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
        fields = text.rpartition(b")")[2].split()  # the name before it is its own to choose
        return fields[0].decode(), int(fields[3]), int(fields[19])
    except (OSError, IndexError):
        return None


def _processes() -> Iterator[int]:
    return (int(name) for name in sorted(os.listdir("/proc"), key=len) if name.isdecimal())


@cache
def _boot_id() -> str:
    return BOOT_ID.read_text().strip()
