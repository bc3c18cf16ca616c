"""What the processes of a session use, read from /proc."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

TICKS_PER_SECOND: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat we need. CPU includes the children the process has waited for."""

    state: str
    group: int
    session: int
    cpu_ticks: int
    start_ticks: int
    resident_pages: int


@dataclass(frozen=True, slots=True)
class SessionUsage:
    """CPU and memory of all processes of a session that are there."""

    cpu_seconds: float
    memory_bytes: int
    processes: int


def read_stat(pid: int) -> Stat | None:
    """One process, or None when it is gone. Parsed from the last `)`: the name before it is the process's to choose."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # the last: /proc mounted with hidepid
        return None
    return Stat(
        fields[0].decode(),
        int(fields[2]),
        int(fields[3]),
        sum(map(int, fields[11:15])),
        int(fields[19]),
        int(fields[21]),
    )


def read_session(session: int) -> SessionUsage:
    """Add up the processes of a session. Reads all of /proc: some 10 us for every process of the machine."""
    cpu = memory = count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal() and (found := read_stat(int(name))) and found.session == session:
            cpu += found.cpu_ticks
            memory += found.resident_pages
            count += 1
    return SessionUsage(cpu / TICKS_PER_SECOND, memory * PAGE_BYTES, count)


def open_group(group: int) -> list[int]:
    """A pidfd of every process of a group that has not ended. Reads all of /proc; raises OSError, with none open."""
    found: list[int] = []
    try:
        for name in os.listdir("/proc"):
            if name.isdecimal() and (stat := read_stat(int(name))) and stat.group == group and stat.state not in "ZX":
                with suppress(ProcessLookupError):
                    found.append(os.pidfd_open(int(name)))
    except OSError:
        for pidfd in found:
            os.close(pidfd)
        raise
    return found
