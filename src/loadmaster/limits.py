"""Usage samples -> verdict, and when to look again. No clock, no files, no await: time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from loadmaster.model import ComputingElement, JobDescription, Limits, Verdict

CPU_MARGIN: Final = 1.2
"""A payload may use a fifth more CPU than its description foresees (DIRAC's JobCPULimitMargin, 20 %)."""

SHORTEST_LOOK_SECONDS: Final = 0.05
"""A look at /proc costs some milliseconds: closer to a limit than this is not worth one more."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a payload uses, all of its processes together."""

    wall_seconds: float
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    processes: int = 0


def limits_of(job: JobDescription, ce: ComputingElement) -> Limits:
    """The limits of a job on a node: its own, and the CPU it foresees, in this node's seconds and with a margin."""
    if job.limits.cpu_seconds is not None or not job.cpu_work:
        return job.limits
    return job.limits.model_copy(update={"cpu_seconds": job.cpu_work / ce.cpu_normalization_factor * CPU_MARGIN})


def judge(usage: Usage, limits: Limits) -> Verdict | None:
    """The limit that is exceeded, or None."""
    if limits.wall_seconds is not None and usage.wall_seconds >= limits.wall_seconds:
        return Verdict("wall time", usage.wall_seconds, limits.wall_seconds, "s")
    if limits.cpu_seconds is not None and usage.cpu_seconds >= limits.cpu_seconds:
        return Verdict("CPU time", usage.cpu_seconds, limits.cpu_seconds, "s")
    return None


def seconds_until_look(usage: Usage, limits: Limits, *, cores: int, heartbeat_seconds: float) -> float:
    """How long a payload may be left alone: until a limit could be reached at the earliest, or a heartbeat is due.

    CPU time cannot grow faster than the wall clock times the machine's cores, so a far-off limit needs no looks at all.
    """
    look = heartbeat_seconds
    if limits.wall_seconds is not None:
        look = min(look, limits.wall_seconds - usage.wall_seconds)
    if limits.cpu_seconds is not None:
        look = min(look, (limits.cpu_seconds - usage.cpu_seconds) / cores)
    return max(look, SHORTEST_LOOK_SECONDS)
