"""What a node's cores did, and why they did nothing. Time comes in as an argument."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from loadmaster.ledger import NO_JOB, Ledger

INPUTS: Final = "waiting for inputs"
DISK: Final = "disk"
"""Why a core is idle, beyond what the ledger knows: a job has been begun, and its files are on their way; or it waits
until there is room for them."""


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """What a node does, and has done since it was opened. The difference of two of them is what happened in between."""

    seconds: float
    """Since it was opened."""
    jobs: Mapping[str, int]
    """How many are in each phase now: waiting, waiting for disk, staging in, ready, computing, delivering."""
    ended: Mapping[str, int]
    """How many have ended, by status."""
    given_back: int
    """Of those that ended as Rescheduled: how many had not computed."""
    interrupted: int
    cores: int
    busy_cores: int
    busy_core_seconds: float
    """Cores times how long payloads had them, from the grant; also those of others, if they share the ledger."""
    cpu_seconds: float
    """What the payloads that have ended used of that."""
    idle: Mapping[str, int]
    """Why cores are idle now: how many for each reason."""
    idle_core_seconds: Mapping[str, float]
    """The same since it was opened. With the busy ones it adds up to all there were."""
    bytes_in: int
    bytes_out: int
    pending: int = 0
    """What jobs of the journal have left to be done, as of the last look."""
    stuck: int = 0
    """How much of it nobody will try before an administrator says so."""
    operations_done: int = 0
    recalled: int = 0
    """How many had ended before they were given to this node: the journal has them, and they were not run again."""
    begun_again: int = 0
    """Of those that ended as Rescheduled: how many were attempts that were lost, whose next one was begun here."""

    @property
    def core_seconds(self) -> float:
        """What there was."""
        return self.cores * self.seconds

    @property
    def occupancy(self) -> float:
        """The part of the time that payloads had the cores."""
        return self.busy_core_seconds / self.core_seconds if self.core_seconds else 0.0

    def since(self, earlier: NodeStatistics) -> NodeStatistics:
        """The same, with what was counted from then on."""
        reasons = {
            reason: seconds - earlier.idle_core_seconds.get(reason, 0.0)
            for reason, seconds in self.idle_core_seconds.items()
        }
        ended = Counter(self.ended)
        ended.subtract(earlier.ended)
        return NodeStatistics(
            self.seconds - earlier.seconds, self.jobs, MappingProxyType(+ended), self.given_back - earlier.given_back,
            self.interrupted - earlier.interrupted, self.cores, self.busy_cores,
            self.busy_core_seconds - earlier.busy_core_seconds, self.cpu_seconds - earlier.cpu_seconds,
            self.idle, MappingProxyType(reasons), self.bytes_in - earlier.bytes_in, self.bytes_out - earlier.bytes_out,
            self.pending, self.stuck, self.operations_done - earlier.operations_done,
            self.recalled - earlier.recalled, self.begun_again - earlier.begun_again,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Occupation:
    """What the cores do from a moment on."""

    time: datetime
    cores: int
    busy_cores: int
    """Those that payloads have."""
    idle: Mapping[str, int]
    """The others: how many for each reason."""

    def to_json(self) -> dict[str, Any]:
        """As JSON's types, with a `kind` as events have one."""
        return {
            "kind": "Occupation", "time": self.time.isoformat(), "cores": self.cores, "busy_cores": self.busy_cores,
            "idle": dict(self.idle),
        }  # fmt: skip


class Meter:
    """Adds up what the cores did between two looks: what was found at one holds until the next."""

    def __init__(self, now: float) -> None:
        self.began = self.looked = now
        self.busy = 0
        self.busy_core_seconds = 0.0
        self.idle: Mapping[str, int] = {}
        self.idle_core_seconds = Counter[str]()

    def look(self, now: float, busy: int, idle: Mapping[str, int]) -> None:
        """So many cores are busy from now on, and so many idle, for these reasons."""
        passed = now - self.looked
        self.busy_core_seconds += passed * self.busy
        for reason, cores in self.idle.items():
            self.idle_core_seconds[reason] += passed * cores  # type: ignore[assignment]  # seconds, not counts
        self.looked, self.busy, self.idle = now, busy, idle


def idle_reasons(ledger: Ledger, *, for_disk: int, for_inputs: int, waiting: bool) -> dict[str, int]:
    """Why cores are free, of which the ledger knows only that nobody asks for them.

    `for_disk`, `for_inputs`: cores that jobs will ask for when they have disk, or their files; `waiting`: there are
    more jobs, which may not be begun yet.
    """
    if ledger.free_cores <= 0:
        return {}
    reasons = ledger.idle_reasons()
    left = reasons.pop(NO_JOB, 0)
    for reason, wanted in ((INPUTS, for_inputs), (DISK, for_disk), (INPUTS, left if waiting else 0), (NO_JOB, left)):
        if taken := min(left, wanted):
            reasons[reason] = reasons.get(reason, 0) + taken
            left -= taken
    return reasons
