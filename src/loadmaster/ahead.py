"""How far a node runs ahead of its slots: whether one more job may be begun now. No clock, no files, no await.

A job that has been begun and does not compute yet has a place. One that takes long to get ready does not count any more,
so that a storage that hangs keeps nobody from the cores; but there is an end to that, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile
from math import inf
from typing import Final

from loadmaster.description import JobDescription

SLOW_SECONDS: Final = 10.0
"""A job that is not ready after that long gives its place to another: longer than most stage-ins, and less than a node
should be idle for one job's sake."""

SLOW_TIMES: Final = 4
"""So many times the places may be held by jobs that are slow: each has a work directory and streams."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far staging may run ahead of the slots."""

    jobs: int
    bytes: int | None = None
    """Of inputs whose size is known; None: what the disk has room for. One job is always let in."""
    slow_seconds: float = SLOW_SECONDS

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"{self.jobs} jobs ahead: without one nothing would ever begin")


@dataclass(eq=False, slots=True)
class Preparing:
    """A job that has been begun and does not compute yet."""

    since: float
    input_bytes: int
    ready: bool = False
    """It waits for nothing but a slot."""


def places(terms: Ahead, preparing: Collection[Preparing], now: float) -> int:
    """How many more jobs may be begun, as far as their number goes. `preparing`: the oldest first."""
    old = takewhile(lambda each: now >= each.since + terms.slow_seconds, preparing)
    slow = sum(not each.ready for each in old)
    return terms.jobs + min(slow, SLOW_TIMES * terms.jobs) - len(preparing)


def has_room(terms: Ahead, preparing: Collection[Preparing], input_bytes: int) -> bool:
    """Whether a job with inputs of that size may be begun, as far as the bytes go."""
    if terms.bytes is None or not preparing:
        return True
    return sum(each.input_bytes for each in preparing) + input_bytes <= terms.bytes


def next_slow(terms: Ahead, preparing: Iterable[Preparing], now: float) -> float:
    """When the next of them gives its place up; infinity if none will. `preparing`: the oldest first."""
    whens = (each.since + terms.slow_seconds for each in preparing if not each.ready)
    return next((when for when in whens if when > now), inf)


def input_bytes(job: JobDescription) -> int:
    """The sizes of its inputs, as far as it says them."""
    return sum(file.size_bytes or 0 for file in (*job.input_sandbox, *job.input_data))


def disk_bytes(job: JobDescription) -> int:
    """What is reserved for its stay: what it says, or at least its inputs."""
    return job.disk_bytes if job.disk_bytes is not None else input_bytes(job)
