"""When something is tried again that has failed: ever later, and not sooner than we are told. No clock, no await."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from random import random
from typing import Final

FIRST_WAIT_SECONDS: Final = 0.5
LONGEST_WAIT_SECONDS: Final = 30.0
MOST_TOLD_SECONDS: Final = 300.0
"""Of what a server may ask us to wait."""


def wait_seconds(tries: int, retry_after: float | None, chance: float) -> float:
    """How long to wait after so many tries: up to twice as long each time, by a chance from 0 to 1."""
    longest = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 2.0 ** min(tries, 16))
    wait = longest * (0.5 + 0.5 * chance)
    return wait if retry_after is None else max(wait, min(retry_after, MOST_TOLD_SECONDS))


def any_chance() -> float:
    """So that those who failed together do not come again together."""
    return random()  # noqa: S311 - no secret


@dataclass(eq=False, slots=True)
class Pace:
    """Of one thing."""

    tries: int = 0
    not_before: float = -inf

    def put_off(self, now: float, retry_after: float | None, chance: float) -> None:
        """It has failed once more."""
        self.not_before = now + wait_seconds(self.tries, retry_after, chance)
        self.tries += 1

    def reset(self) -> None:
        """It has gone well."""
        self.tries, self.not_before = 0, -inf
