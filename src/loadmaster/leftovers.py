"""What a job's uploads leave at storages when their agent is killed, removed by the agent that goes on with the job.

    begun under names that can be told ──(killed)──▶ told from the job's outputs and its history ──▶ removed
                                                                                                  └─▶ RemovalRequested

Only where the job has a journal: without one, nobody comes after.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Final

import anyio

from loadmaster.events import Remembered, RemovalRequested
from loadmaster.handle import JobHandle
from loadmaster.lifecycle import Stage
from loadmaster.staging.engine import Transfers
from loadmaster.staging.partnames import TRIES, PartNames
from loadmaster.staging.plan import Delivery
from loadmaster.threads import briefly

log = logging.getLogger(__name__)

PLACES: Final = "loadmaster.places."
"""With a number: where outputs go whose names the job's description does not have."""

MOST_TRIES: Final = "loadmaster.tries"


class Leftovers:
    """Of one job's uploads: what its earlier agents have left, and names for what this one begins."""

    def __init__(
        self,
        transfers: Transfers,
        handle: JobHandle,
        plan: Callable[[str], Delivery | None],
        places: Callable[[bool], Iterable[str]],
    ) -> None:
        """`plan` says where an output goes that leaves early. `places`: where outputs go, as far as the description alone
        says; with True also those that are in the work directory, for which it blocks."""
        self._transfers = transfers
        self._handle = handle
        self._plan = plan
        self._places = places
        memory = handle.life.memory
        earlier = [urls for name, urls in memory.items() if name.startswith(PLACES)]
        self._notes = len(earlier)
        self._recorded = {url for urls in earlier for url in urls}
        self._done = not handle.life.has_reached(Stage.GRANTED)  # an agent may die before the start is on disk
        self._turn = anyio.Lock()

    def __repr__(self) -> str:
        return f"<Leftovers {'removed' if self._done else 'not looked for yet'}>"

    @cached_property
    def parts(self) -> PartNames:
        """What uploads are called until they are whole. Not before the job is accepted."""
        return PartNames(_mark(self._handle), self._handle.life.memory.get(MOST_TRIES, TRIES), self._expect)

    async def begin(self) -> None:
        """Remove what earlier agents have left. To be called before anything is sent; does nothing the second time."""
        if self._done:
            return
        async with self._turn:
            if not self._done:
                found = await briefly(lambda: set(self._places(True)))
                left = await self._transfers.clear(sorted(found | self._recorded), self.parts)
                for url, error in left.items():
                    log.warning("%s: what may be left of an upload is removed later: %s", url, error)
                    await self._handle.record(RemovalRequested, url, tuple(self.parts.all(url)), str(error))
                self._done = True

    async def sending(self, names: Sequence[str]) -> None:
        """Have on record where these go, if the next agent could not tell; called before they are sent early."""
        plans = [self._plan(name) for name in names]
        await self._record({plan.targets[0].url for plan in plans if plan is not None})

    async def delivering(self, deliveries: Sequence[Delivery]) -> None:
        """The same, for outputs that leave after the payload: for all of them one event, or none. A directory of this
        machine takes files that have no name: there is nothing to be found."""
        places = [place.url for each in deliveries for place in (*each.targets, *each.failover)]
        await self._record({url for url in places if not url.startswith("file://")})

    async def _record(self, urls: set[str]) -> None:
        if unknown := urls - self._recorded:
            unknown -= self._declared
        if unknown:
            self._recorded |= unknown
            self._notes += 1
            await self._handle.record(Remembered, f"{PLACES}{self._notes}", sorted(unknown))

    @cached_property
    def _declared(self) -> set[str]:
        return set(self._places(False))

    async def left(self, places: Iterable[str]) -> None:
        """Have somebody else remove what could not be removed now."""
        for url in sorted(places):
            await self._handle.record(RemovalRequested, url, tuple(self.parts.all(url)))

    async def _expect(self, tries: int) -> None:
        await self._handle.record(Remembered, MOST_TRIES, tries)


def _mark(handle: JobHandle) -> str:
    """What no other attempt at a job has, also not on another node, and every agent can tell: when it was accepted."""
    accepted = handle.life.accepted
    begun = accepted.time.timestamp() if accepted is not None else 0.0
    return f"{begun:.6f} {handle.attempt} {handle.job_id}"
