"""Kill what a shim should have killed and cannot: it was stopped, hindered or killed by the payload it held.

Everything here blocks, for a moment. Nobody is signalled by number alone: a pidfd is opened first, and what /proc says is
compared after.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Final

from loadmaster.payload.usage import descendants, open_processes, open_session, read_stat

LOOKS: Final = 100
"""Of a tree that forks while it is being stopped; two or three do for most."""


def kill_below(top: int) -> int:
    """Stop all descendants of a process, until none is found running, and kill them; how many there were.

    Those who die leave their places under a process limit to those who fork; those who stop do not.
    """
    for _ in range(LOOKS):
        if not _signal(descendants(top), signal.SIGSTOP, lambda pid: _is_below(pid, top)):
            break
    return _signal(descendants(top), signal.SIGKILL, lambda pid: _is_below(pid, top))


def kill_session(leader: int, start_ticks: int) -> int:
    """Kill the processes of a session; how many there were. Reads all of /proc.

    None when the session's number is already somebody else's.
    """
    own = read_stat(leader)
    if leader <= 1 or (own is not None and own.start_ticks != start_ticks):
        return 0
    pids = (int(name) for name in os.listdir("/proc") if name.isdecimal())

    def is_of_it(pid: int) -> bool:
        found = read_stat(pid)
        return found is not None and found.session == leader and found.start_ticks >= start_ticks

    return _signal(filter(is_of_it, pids), signal.SIGKILL, is_of_it)


def kill_init(pid: int, start_ticks: int) -> list[int]:
    """Kill process 1 of a namespace, and all in there with it; a pidfd that tells when they are gone, or none if they are.

    Raises OSError, with none open.
    """
    opened = open_processes([pid] if pid > 1 else [], lambda found: found.start_ticks == start_ticks)
    for pidfd in opened:
        own = read_stat(pid)
        if own is not None and own.start_ticks == start_ticks:  # still who it was, now that we have hold of it
            with suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    return opened


def kill_left(leader: int, start_ticks: int) -> list[int]:
    """Kill whoever is below a process that was a session's leader, or in its session; a pidfd of each that was there.

    Of so many at most as there are few descriptors. Raises OSError, with none open.
    """
    own = read_stat(leader)
    is_itself = own is not None and own.start_ticks == start_ticks
    left = [leader, *descendants(leader)] if is_itself else []
    opened = open_processes(left)
    try:
        if is_itself:
            kill_below(leader)
        kill_session(leader, start_ticks)
        if not opened and (own is None or is_itself):
            opened = open_session(leader, start_ticks)
    except BaseException:
        for pidfd in opened:
            os.close(pidfd)
        raise
    return opened


def _signal(pids: Iterable[int], number: signal.Signals, is_ours: Callable[[int], bool]) -> int:
    """Signal those that run, if they are still who they were; how many there were."""
    count = 0
    for pid in pids:
        found = read_stat(pid)
        if found is None or (found.state in "tT" and number is signal.SIGSTOP):
            continue
        with suppress(ProcessLookupError, PermissionError):  # gone; or set-uid, and then we have no means
            pidfd = os.pidfd_open(pid)
            try:
                if is_ours(pid):
                    signal.pidfd_send_signal(pidfd, number)
                    count += found.state in "RS" or (number is signal.SIGKILL and found.state not in "ZX")
            finally:
                os.close(pidfd)
    return count


def _is_below(pid: int, top: int) -> bool:
    """Whether a process is a descendant. Its ancestors are asked, not remembered."""
    seen: set[int] = set()
    while pid > 1 and pid not in seen:
        seen.add(pid)
        if (pid := _parent(pid)) == top:
            return True
    return False


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            return int(file.readall().rpartition(b")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
