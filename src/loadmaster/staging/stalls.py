"""Who looks at what moves next to nothing: one task for all parties, for bytes have no edge to wait for."""

from __future__ import annotations

import time
from typing import Protocol

import anyio


class Party(Protocol):
    """One who has transfers under way."""

    def look(self, now: float) -> None:
        """Give up those that have stalled; `now` is by the monotonic clock."""
        ...


class Stalls:
    """Has parties look at their transfers, four times in `seconds`, for as long as there are any."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: after how long without progress a transfer has stalled."""
        self.seconds = seconds
        self._parties: set[Party] = set()
        self._wanted = anyio.Event()

    def __repr__(self) -> str:
        return f"<Stalls {len(self._parties)} parties>"

    def join(self, party: Party) -> None:
        """Be called from now on."""
        self._parties.add(party)
        self._wanted.set()

    def leave(self, party: Party) -> None:
        """Be called no more."""
        self._parties.discard(party)

    async def watch(self) -> None:
        """Until cancelled. A party that comes and goes between two looks costs nothing."""
        while True:
            await self._wanted.wait()
            await anyio.sleep(self.seconds / 4)
            now = time.monotonic()
            for party in list(self._parties):
                party.look(now)
            if not self._parties:
                self._wanted = anyio.Event()
