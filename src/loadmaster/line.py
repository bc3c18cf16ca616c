"""A line of those who wait for shares of something, and the rule of who is next. No clock, no files, no await.

Highest priority first, then first come, and whoever fits may go ahead of those who do not; but the head of the line is
gone past at most `patience` times, and who has waited longest at most `seniority` times, whatever the priorities, before
all that comes free is kept for him.

Amounts are tuples of numbers, one for each kind of thing there is: cores, megabytes, GPUs. While something is kept for
somebody, others are granted only what he could not use yet: he is waiting for a GPU, they need none, and leave him
enough of the rest. So from that moment he waits only for those who were granted before it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from operator import le
from typing import Final

import anyio

Amounts = tuple[int, ...]

SENIORITY: Final = 100
"""One grant in a hundred may go against the priorities: nobody waits for ever, and priorities still mean something."""

LOOK_AHEAD: Final = 100
"""So many kinds of request, the first in order, are looked at for one that fits: some 50 us when none does."""


@dataclass(eq=False, slots=True)
class Ticket:
    """A place in the line, and later what was granted."""

    number: int
    priority: int
    needs: Amounts
    most: int
    """Of the first kind it takes up to so many, where they are free."""
    passed: int = 0
    """How many were granted while it was at the head of the line or had waited longest."""
    holds: Amounts = ()
    """Empty while it waits."""
    heard: anyio.Event | None = None
    """Set once it was granted; of somebody who waits for that."""

    @property
    def granted(self) -> bool:
        """Whether it waits no more."""
        return bool(self.holds)

    @property
    def key(self) -> tuple[int, int]:
        """Its place in the order."""
        return -self.priority, self.number


_Kind = tuple[int, Amounts, int]
"""Requests that differ in nothing but their time: of those only the first is of interest."""


class Line:
    """What there is, who holds some of it, and who waits. The cost of a change does not depend on how many wait."""

    def __init__(self, capacity: Amounts, *, patience: int, seniority: int = SENIORITY) -> None:
        self.capacity = capacity
        self.patience = min(patience, seniority)
        self.seniority = seniority
        self.free = capacity
        self._tickets = 0
        self._waiting: OrderedDict[int, Ticket] = OrderedDict()  # by number: in order of arrival
        self._kinds: dict[_Kind, OrderedDict[int, Ticket]] = {}
        self._heads: list[tuple[int, int]] = []  # the key of the first of each kind, in order

    def __len__(self) -> int:
        return len(self._waiting)

    def request(self, needs: Amounts, *, priority: int = 0, most: int = 0) -> Ticket:
        """A place in the line; it is granted at once if there is enough and nobody has a better claim.

        Needs some of the first kind, and no more of any than there is: one that never fits would hold up everybody.
        """
        ticket = Ticket(self._tickets, priority, needs, most)
        self._tickets += 1
        self._enter(ticket)
        self._assign()
        return ticket

    def hold(self, amounts: Amounts) -> Ticket:
        """Take so much without waiting, though it be more than is free: whoever has it had it before this line was made."""
        ticket = Ticket(self._tickets, 0, amounts, 0, holds=amounts)
        self._tickets += 1
        self.free = tuple(free - held for free, held in zip(self.free, amounts, strict=True))
        return ticket

    def give_back(self, ticket: Ticket) -> None:
        """What it holds, or its place in the line."""
        if not ticket.holds:
            self._leave(ticket)
        else:
            self.free = tuple(free + held for free, held in zip(self.free, ticket.holds, strict=True))
        self._assign()

    def claims(self) -> Iterator[Ticket]:
        """Those who have been gone past often enough, the best claim first: what comes free is kept for them."""
        if not self._waiting:
            return
        head, eldest = self._in_front()
        if eldest is not head and eldest.passed >= self.seniority:
            yield eldest
        if head.passed >= self.patience:
            yield head

    def spare(self) -> Amounts:
        """What is free and not kept for anybody."""
        spare = self.free
        for claim in self.claims():
            spare = _less(spare, claim.needs)
        return spare

    def in_order(self) -> Iterator[Ticket]:
        """The first of each kind that waits, as far as is looked."""
        return (self._waiting[number] for _, number in islice(self._heads, LOOK_AHEAD))

    def _assign(self) -> None:
        """Every change ends here: grant while somebody can be granted."""
        while self._waiting and self.free[0] and (found := self._next()) is not None:
            self._grant(*found)

    def _next(self) -> tuple[Ticket, Amounts] | None:
        """Who is next, and how much may be taken."""
        spare = self.free
        for claim in self.claims():
            if _fits(claim.needs, spare):
                return claim, spare
            spare = _less(spare, claim.needs)
        if not spare[0]:
            return None
        ticket = next((ticket for ticket in self.in_order() if _fits(ticket.needs, spare)), None)
        return None if ticket is None else (ticket, spare)

    def _grant(self, ticket: Ticket, spare: Amounts) -> None:
        head, eldest = self._in_front()
        if head is not ticket:
            head.passed += 1
        if eldest is not ticket and eldest is not head:
            eldest.passed += 1
        self._leave(ticket)
        first = max(ticket.needs[0], min(ticket.most, spare[0]))
        ticket.holds = (first, *ticket.needs[1:])
        self.free = tuple(free - held for free, held in zip(self.free, ticket.holds, strict=True))
        if ticket.heard is not None:
            ticket.heard.set()

    def _in_front(self) -> tuple[Ticket, Ticket]:
        """The first of the highest priority, and who has waited longest; may be the same."""
        return self._waiting[self._heads[0][1]], next(iter(self._waiting.values()))

    def _enter(self, ticket: Ticket) -> None:
        self._waiting[ticket.number] = ticket
        kind = self._kinds.setdefault(_kind(ticket), OrderedDict())
        kind[ticket.number] = ticket
        if len(kind) == 1:
            insort(self._heads, ticket.key)

    def _leave(self, ticket: Ticket) -> None:
        del self._waiting[ticket.number]
        kind = self._kinds[_kind(ticket)]
        first = next(iter(kind.values()))
        del kind[ticket.number]
        if first is ticket:
            del self._heads[bisect_left(self._heads, ticket.key)]
            if kind:
                insort(self._heads, next(iter(kind.values())).key)
            else:
                del self._kinds[_kind(ticket)]


def _kind(ticket: Ticket) -> _Kind:
    return ticket.priority, ticket.needs, ticket.most


def _fits(needs: Amounts, free: Amounts) -> bool:
    return all(map(le, needs, free))


def _less(free: Amounts, kept: Amounts) -> Amounts:
    return tuple(max(0, there - keep) for there, keep in zip(free, kept, strict=True))
