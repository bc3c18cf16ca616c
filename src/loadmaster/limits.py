"""Usage samples -> verdict, and when to look again. No clock, no files, no await: time is an argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from math import inf
from types import MappingProxyType
from typing import Final

from loadmaster.description import ComputingElement, JobDescription, Limits
from loadmaster.result import Usage, Verdict, quantity

CPU_MARGIN: Final = 1.2
"""A payload may use a fifth more CPU than its description foresees (DIRAC's JobCPULimitMargin, 20 %)."""

SHORTEST_LOOK_SECONDS: Final = 0.05
"""A look at /proc costs some milliseconds: closer to a limit than this is not worth one more."""

BLIND_LOOK_SECONDS: Final = (0.1, 5.0)
"""What may grow at any rate (memory, processes, files) is looked at as often as a tenth of the payload's age, within
these. A fill of memory at 1 GB/s, about what one core can do, is then noticed 0.1 GB late in the first second, and
always within five: DIRAC's watchdog looks after 1800 s."""

DELIVERY_SECONDS: Final = 30.0
"""What delivering outputs takes besides their bytes: postProcess, connections, the end of the job."""

WALK_SHARE: Final = 0.05
"""The work directory is walked so seldom that walking takes at most this part of the time."""

WINDOW_STEPS: Final = 60
"""So many samples of the CPU ratio's window are remembered at most: it is known to a sixtieth."""

CPU_RATIO: Final = "CPU ratio"
"""The name of that limit in its verdict."""

UNCHECKED: Final = "DISABLE_WATCHDOG_CPU_WALLCLOCK_CHECK"
"""DIRAC's: a variable of this name, or a file in the work directory, turns the CPU ratio's limit off."""


# -- a job's limits on a node ------------------------------------------------------------------------------------


def limits_of(job: JobDescription, ce: ComputingElement, environ: Mapping[str, str] = MappingProxyType({})) -> Limits:
    """The limits of a job on a node: its own, and the CPU it foresees, in this node's seconds and with a margin.

    DIRAC's switches apply: `RemoteExecution` turns all limits off, since what runs here only waits for what runs
    elsewhere; `JobType` Test, `DisableCPUCheck`, and DISABLE_WATCHDOG_CPU_WALLCLOCK_CHECK in the job's environment or
    the pilot's (`environ`) turn off the CPU ratio. The memory a job asks for (`memory_mb`) sizes its slot and is no
    limit: only `limits.memory_bytes` is.
    """
    if _is_on(job.extra.get("RemoteExecution")):
        return Limits(grace_seconds=job.limits.grace_seconds)
    limits = job.limits
    if limits.cpu_seconds is None and job.cpu_work:
        foreseen = job.cpu_work / ce.cpu_normalization_factor
        limits = limits.model_copy(update={"cpu_seconds": foreseen * CPU_MARGIN})
    unchecked = UNCHECKED in job.environment or UNCHECKED in environ
    if job.job_type.lower() == "test" or _is_on(job.extra.get("DisableCPUCheck")) or unchecked:
        return without_cpu_ratio(limits)
    return limits


def without_cpu_ratio(limits: Limits) -> Limits:
    """The same limits, but a payload may idle."""
    return limits.model_copy(update={"cpu_ratio": None})


def _is_on(value: object) -> bool:
    """A switch of a JDL: there, and not one of the words for no."""
    if isinstance(value, str):
        return value.strip().lower() not in {"", "0", "false", "no", "n", "off", "none"}
    return bool(value)


# -- judging -----------------------------------------------------------------------------------------------------


def judge(samples: Sequence[Usage], limits: Limits, *, now: datetime) -> Verdict | None:
    """The first limit that is exceeded, or None. The last sample is judged; earlier ones count for the CPU ratio.

    A time is exceeded when it is reached, an amount when there is more, a minimum when there is less.
    """
    return next(_exceeded(samples, limits, now), None)


def _exceeded(samples: Sequence[Usage], limits: Limits, now: datetime) -> Iterator[Verdict]:
    usage = samples[-1]
    if limits.deadline is not None and now >= limits.deadline - stop_margin(usage, limits):
        yield deadline_verdict(limits.deadline, usage, limits, now=now)
    for name, seconds, allowed in (
        ("wall time", usage.wall_seconds, limits.wall_seconds),
        ("CPU time", usage.cpu_seconds, limits.cpu_seconds),
    ):
        if allowed is not None and seconds >= allowed:
            yield Verdict(name, seconds, allowed, "s")
    for name, amount, most, unit in (
        # By PSS alone: ten children that share 200 MB have resident sizes of 2.2 GB together and take 200 MB.
        ("memory", usage.pss_bytes, limits.memory_bytes, "bytes"),
        ("number of processes", usage.processes, limits.processes, ""),
        ("work directory size", usage.workdir_bytes, limits.workdir_bytes, "bytes"),
        ("output size", usage.output_bytes, limits.output_bytes, "bytes"),
    ):
        if amount is not None and most is not None and amount > most:
            yield Verdict(name, amount, most, unit)
    free, least = usage.free_disk_bytes, limits.free_disk_bytes
    if free is not None and least is not None and free < least:
        yield Verdict("free disk", free, least, "bytes")
    ratio = cpu_ratio(samples, limits.cpu_ratio_window_seconds)
    if ratio is not None and limits.cpu_ratio is not None and ratio < limits.cpu_ratio:
        yield Verdict(CPU_RATIO, 100 * ratio, 100 * limits.cpu_ratio, "%")


def stop_margin(usage: Usage, limits: Limits) -> timedelta:
    """How long before the deadline a payload is stopped: until it has ended, and its outputs as they are now are out."""
    if usage.outputs_bytes is None:
        return timedelta(seconds=limits.grace_seconds if usage.wall_seconds > 0 else 0)
    return timedelta(
        seconds=limits.grace_seconds + DELIVERY_SECONDS + usage.outputs_bytes / limits.upload_bytes_per_second
    )


def deadline_verdict(deadline: datetime, usage: Usage, limits: Limits, *, now: datetime) -> Verdict:
    """That a deadline, or the time to stop for it, has come."""
    margin = stop_margin(usage, limits)
    because = ""
    if margin:
        size = quantity(usage.outputs_bytes or 0, "bytes")
        because = f"{deadline:%H:%M:%S} less {margin.total_seconds():.0f} s to end it and deliver {size}"
    return Verdict("deadline", now.timestamp(), (deadline - margin).timestamp(), "UTC", because)


def seconds_left(usage: Usage, limits: Limits, *, now: datetime) -> float:
    """How long a payload still has until the first of its limits of time; infinite when there is none.

    Its CPU time is taken to grow as it has so far, but at least as one core does it.
    """
    left = inf
    if limits.deadline is not None:
        left = (limits.deadline - stop_margin(usage, limits) - now).total_seconds()
    if limits.wall_seconds is not None:
        left = min(left, limits.wall_seconds - usage.wall_seconds)
    if limits.cpu_seconds is not None:
        pace = max(1.0, usage.cpu_seconds / usage.wall_seconds if usage.wall_seconds > 0 else 1.0)
        left = min(left, (limits.cpu_seconds - usage.cpu_seconds) / pace)
    return left


def cpu_ratio(samples: Sequence[Usage], window_seconds: float) -> float | None:
    """CPU time per wall time since the last sample that is a window old; None when the payload is younger than that."""
    last = samples[-1]
    first = next((old for old in reversed(samples) if _is_window_old(old, last, window_seconds)), None)
    if first is None:
        return None
    return (last.cpu_seconds - first.cpu_seconds) / (last.wall_seconds - first.wall_seconds)


def remembered(samples: Sequence[Usage], usage: Usage, limits: Limits) -> tuple[Usage, ...]:
    """The samples that later judgements need, and a new one, which is the last."""
    if limits.cpu_ratio is None:
        return (usage,)
    window = limits.cpu_ratio_window_seconds
    kept = list(samples)
    while len(kept) > 1 and _is_window_old(kept[1], usage, window):
        del kept[0]
    # The newest is only worth keeping when it is a step away from the one before it.
    if len(kept) > 1 and kept[-1].wall_seconds - kept[-2].wall_seconds < window / WINDOW_STEPS:
        del kept[-1]
    return (*kept, usage)


def _is_window_old(old: Usage, last: Usage, window_seconds: float) -> bool:
    return last.wall_seconds - old.wall_seconds >= window_seconds


# -- when to look ------------------------------------------------------------------------------------------------


def seconds_until_look(usage: Usage, limits: Limits, *, now: datetime, cores: int, heartbeat_seconds: float) -> float:
    """How long a payload may be left alone: until a limit could be reached at the earliest, or a heartbeat is due.

    CPU time cannot grow faster than the wall clock times the machine's cores, so a far-off limit needs no looks at all.
    For memory, processes and files nothing of the kind is known: see `BLIND_LOOK_SECONDS`.
    """
    look = heartbeat_seconds
    if limits.deadline is not None:
        then = usage if usage.wall_seconds > 0 else replace(usage, wall_seconds=SHORTEST_LOOK_SECONDS)  # with its grace
        left = (limits.deadline - stop_margin(then, limits) - now).total_seconds()
        look = min(look, left if usage.outputs_bytes is None else left / 2)  # outputs may grow meanwhile
    if limits.wall_seconds is not None:
        look = min(look, limits.wall_seconds - usage.wall_seconds)
    if limits.cpu_seconds is not None:
        look = min(look, (limits.cpu_seconds - usage.cpu_seconds) / cores)
    if limits.cpu_ratio is not None:
        window = limits.cpu_ratio_window_seconds
        look = min(look, max(window - usage.wall_seconds, window / 10))
    if _may_grow_at_any_rate(limits):
        look = min(look, _blind_look(usage.wall_seconds))
    return max(look, SHORTEST_LOOK_SECONDS)


def needs_pss(rss_bytes: int, limits: Limits) -> bool:
    """Whether the resident sizes leave open if there is too much memory: shared pages make the sum too large."""
    return limits.memory_bytes is not None and rss_bytes > limits.memory_bytes


def seconds_until_walk(wall_seconds: float, cost_seconds: float) -> float:
    """How long a work directory may be left alone after a walk that took so long."""
    return max(_blind_look(wall_seconds), cost_seconds / WALK_SHARE)


def _may_grow_at_any_rate(limits: Limits) -> bool:
    blind = (
        limits.memory_bytes,
        limits.processes,
        limits.workdir_bytes,
        limits.free_disk_bytes,
        limits.output_bytes,
    )
    return any(limit is not None for limit in blind)


def _blind_look(wall_seconds: float) -> float:
    shortest, longest = BLIND_LOOK_SECONDS
    return min(max(shortest, wall_seconds / 10), longest)
