"""Where a file is tried next, and when: decided from what went wrong, the site's patience and a chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Patience:
    """How often a file is tried at each place, and how long is waited in between."""

    attempts: int = 4
    first_seconds: float = 1.0
    """The first wait, at most; each next one may be twice as long."""
    most_seconds: float = 60.0
    """No wait is longer, unless a storage asks for it."""
    total_seconds: float = 1800.0
    """All waits for one file together."""


@dataclass(frozen=True, slots=True)
class Step:
    """The next thing to try: the place by its number, after so many seconds."""

    place: int
    wait_seconds: float = 0.0


@dataclass(eq=False, slots=True)
class Course:
    """What has been tried for one file. `wanted` places in order of preference, then those for failover.

    All wanted places get their turn before one of them is tried again, and those that may succeed later get all their
    attempts before a failover place gets its first: a file is better late than in a wrong place.
    """

    wanted: int
    failover: int = 0
    attempts: dict[int, int] = field(default_factory=dict)
    hopeless: set[int] = field(default_factory=set)
    waited_seconds: float = 0.0
    _asked_for: dict[int, float] = field(default_factory=dict)

    def failed(
        self,
        place: int,
        patience: Patience,
        chance: Callable[[], float],
        *,
        retryable: bool,
        retry_after: float | None = None,
    ) -> Step | None:
        """What to do after a failure at a place; None when nothing is left to be done. `chance` gives 0 to 1."""
        self.attempts[place] = self.attempts.get(place, 0) + 1
        if not retryable:
            self.hopeless.add(place)
        self._asked_for[place] = max(0.0, retry_after or 0.0)
        group = range(self.wanted) if place < self.wanted else range(self.wanted, self.wanted + self.failover)
        step = self._next_in(group, patience, chance)
        if step is None and place < self.wanted and self.failover:
            return Step(self.wanted)
        return step

    def _next_in(self, group: range, patience: Patience, chance: Callable[[], float]) -> Step | None:
        alive = [each for each in group if each not in self.hopeless and self._count(each) < patience.attempts]
        if not alive:
            return None
        fewest = min(map(self._count, alive))
        if fewest < max(self._count(each) for each in group):  # the round is not over
            place = next(each for each in alive if self._count(each) == fewest)
            if fewest == 0:
                return Step(place)
        else:
            place = min(alive, key=lambda each: self._asked_for.get(each, 0.0))
        wait = max(delay(patience, fewest, chance), self._asked_for.get(place, 0.0))
        if self.waited_seconds + wait > patience.total_seconds:
            return None
        self.waited_seconds += wait
        return Step(place, wait)

    def _count(self, place: int) -> int:
        return self.attempts.get(place, 0)


def delay(patience: Patience, failures: int, chance: Callable[[], float]) -> float:
    """The wait after so many failures: exponential, and between half of it and all of it by chance, so that a thousand
    files that failed together do not come back together."""
    full = min(patience.most_seconds, patience.first_seconds * 2.0 ** min(failures - 1, 60))
    return full * (0.5 + 0.5 * chance())
