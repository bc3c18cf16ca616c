"""Which of a node's jobs may begin: those that wait, by their priority and then as they came, and those that have been
begun and do not compute yet. `loadmaster.ahead` has the rule. No clock, no files, no await.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, Protocol, TypeVar

from loadmaster.ahead import Ahead, Preparing, has_room, input_bytes, next_slow, places
from loadmaster.description import JobDescription


class Applicant(Protocol):
    """A job, as far as this goes."""

    @property
    def job(self) -> JobDescription:
        """What it says of itself."""
        ...

    @property
    def number(self) -> int:
        """Its place among all that came."""
        ...


A = TypeVar("A", bound=Applicant)


class Admission(Generic[A]):
    """Who waits, and who has been begun ahead of a slot."""

    def __init__(self, terms: Ahead) -> None:
        self.terms = terms
        self._waiting: dict[int, A] = {}
        self._order: list[tuple[int, int]] = []  # a heap of priorities and numbers; those that left are skipped
        self._preparing: dict[int, Preparing] = {}  # by number, the oldest first

    def __repr__(self) -> str:
        return f"<Admission [{len(self._waiting)} waiting, {len(self._preparing)} begun]>"

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def put(self, applicant: A) -> None:
        """Have it wait for its turn."""
        self._waiting[applicant.number] = applicant
        heappush(self._order, (-applicant.job.priority, applicant.number))

    def withdraw(self, applicant: A) -> bool:
        """It waits no more. False if it did not."""
        return self._waiting.pop(applicant.number, None) is not None

    def clear(self) -> None:
        """Nobody waits."""
        self._waiting.clear()

    def next(self, now: float) -> A | None:
        """Whoever may be begun now; None: nobody. He waits no more, and is to be begun."""
        while self._order and self._order[0][1] not in self._waiting:
            heappop(self._order)
        if not self._order or self.places(now) < 1:
            return None
        applicant = self._waiting[self._order[0][1]]
        if not has_room(self.terms, self._preparing.values(), input_bytes(applicant.job)):
            return None
        return self._waiting.pop(heappop(self._order)[1])

    def begin(self, applicant: A, now: float) -> None:
        """It has been begun, and holds a place."""
        self._preparing[applicant.number] = Preparing(now, input_bytes(applicant.job))

    def get_ready(self, applicant: A) -> None:
        """It waits for nothing but a slot."""
        if (preparing := self._preparing.get(applicant.number)) is not None:
            preparing.ready = True

    def leave(self, applicant: A) -> bool:
        """It computes, or never will, and its place is another's. False if it had none."""
        return self._preparing.pop(applicant.number, None) is not None

    def places(self, now: float) -> int:
        """How many more may be begun."""
        return places(self.terms, self._preparing.values(), now)

    def next_slow(self, now: float) -> float:
        """When a place becomes free because whoever has it is slow; infinity: nobody will be."""
        return next_slow(self.terms, self._preparing.values(), now)
