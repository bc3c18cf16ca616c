"""Who may move files now: so many lanes of a node in each direction, so many of a storage element, parties in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol

from loadmaster.storage.base import Direction


class Road(NamedTuple):
    """Which way, by which kind of storage, to or from which storage element (or host, if it has no name)."""

    direction: Direction
    scheme: str
    element: str


class Taker(Protocol):
    """One who wants files moved; a job, as a rule."""

    def wanted(self) -> Iterable[Road]:
        """The roads it has something for, what is most wanted first."""
        ...

    def take(self, road: Road) -> None:
        """A lane of this road is yours; take something along, and release it when that has arrived."""
        ...


class Lanes:
    """The lanes of a node. Every change ends in `assign`, which grants what is free to whoever's turn it is."""

    def __init__(
        self,
        streams: int,
        element_streams: Mapping[str, int] | None = None,
        scheme_streams: Mapping[str, int] | None = None,
    ) -> None:
        """The last two: of these, no more than so many for one element, or by one kind of storage."""
        self.streams = streams
        self._scheme_limits = dict(scheme_streams or {})
        self._used_by_scheme: dict[tuple[Direction, str], int] = {}
        self._free = dict.fromkeys(Direction, streams)
        self._limits = dict(element_streams or {})
        self._used: dict[tuple[Direction, str], int] = {}
        self._takers: deque[Taker] = deque()
        self._assigning = False
        self._heard: dict[str, float] = {}

    def __repr__(self) -> str:
        free = ", ".join(f"{count} {direction.value}" for direction, count in self._free.items())
        return f"<Lanes [{free} free, {len(self._takers)} parties]>"

    def limit(self, element: str) -> int | None:
        """How many files may move at once to or from an element; None if there is no such limit."""
        return self._limits.get(element)

    def width(self, road: Road) -> int:
        """How many lanes a road can have at most."""
        return min(self.streams, self._scheme_limits.get(road.scheme, self.streams))

    def hear_of(self, scheme: str, now: float) -> None:
        """A storage of this scheme has files under way, or has ended some, for whichever party."""
        self._heard[scheme] = now

    def last_heard_of(self, scheme: str) -> float:
        """When that was, by the monotonic clock."""
        return self._heard.get(scheme, 0.0)

    def join(self, taker: Taker) -> None:
        """Be among those who take turns."""
        self._takers.append(taker)

    def leave(self, taker: Taker) -> None:
        """Take no more turns. What was taken is still to be released."""
        self._takers.remove(taker)

    def release(self, road: Road) -> None:
        """Give a lane back."""
        self._free[road.direction] += 1
        self._used[road.direction, road.element] -= 1
        self._used_by_scheme[road.direction, road.scheme] -= 1
        self.assign()

    def assign(self) -> None:
        """Grant free lanes, one to a taker at a time, until nobody wants one of those that are left."""
        if self._assigning:  # a taker that releases within `take`
            return
        self._assigning = True
        try:
            while any(self._free.values()) and (turn := self._next()) is not None:
                taker, road = turn
                self._takers.remove(taker)
                self._takers.append(taker)  # only who was granted something goes to the end: nobody starves
                self._free[road.direction] -= 1
                self._used[road.direction, road.element] = self._in_use(road) + 1
                self._used_by_scheme[road.direction, road.scheme] = self._in_use_by_scheme(road) + 1
                taker.take(road)
        finally:
            self._assigning = False

    def _next(self) -> tuple[Taker, Road] | None:
        for taker in self._takers:
            for road in taker.wanted():
                if self._is_free(road):
                    return taker, road
        return None

    def _is_free(self, road: Road) -> bool:
        limit = self._limits.get(road.element)
        if limit is not None and self._in_use(road) >= limit:
            return False
        return self._free[road.direction] > 0 and self._in_use_by_scheme(road) < self.width(road)

    def _in_use(self, road: Road) -> int:
        return self._used.get((road.direction, road.element), 0)

    def _in_use_by_scheme(self, road: Road) -> int:
        return self._used_by_scheme.get((road.direction, road.scheme), 0)
