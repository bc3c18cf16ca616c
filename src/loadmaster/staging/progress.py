"""How far many files have come together: bytes, files, rate, time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio

from loadmaster.staging.party import Party

PROGRESS_SECONDS: Final = 0.5
"""Between two looks at the bytes of running transfers; a person cannot use more."""

RATE_LOOKS: Final = 10
"""The rate is of the last five seconds: soon right, and calm enough to be read."""


@dataclass(frozen=True, slots=True)
class Overall:
    """What has come of all files of one call."""

    done_files: int
    files: int
    done_bytes: int
    passing_bytes: int
    """Those of them that are of files under way."""
    size_bytes: int | None
    """Of all files; None while it is not known of each."""
    bytes_per_second: float
    seconds_left: float | None
    transfers: int
    """How many were begun, the same file's second and third included."""


class Meter:
    """The rate of a party. A look costs as much as there are transfers under way, and nothing in between."""

    def __init__(self, party: Party, files: int | None = None) -> None:
        """`files`: how many there will be, where the source does not tell before its end."""
        self._party, self._files = party, files
        self._looks: deque[tuple[float, int]] = deque(maxlen=RATE_LOOKS)

    def look(self, now: float) -> Overall:
        """How far it is."""
        party = self._party
        passing = sum(transfer.first_byte + transfer.so_far_bytes for transfer in party.moving)
        done = party.done_bytes + passing
        self._looks.append((now, done))
        (begun, before), seconds = self._looks[0], now - self._looks[0][0]
        rate = max(0, done - before) / seconds if seconds > 0 and now > begun else 0.0
        size = party.size_bytes if party.has_all and not party.unsized_files else None
        left = max(0, size - done) / rate if size is not None and rate > 0 else None
        files = party.files if party.has_all or self._files is None else self._files
        return Overall(party.done_files, files, done, passing, size, rate, left, party.transfers)


async def report(party: Party, meter: Meter, one: Callable[..., None] | None, all_: Callable[[Overall], None]) -> None:
    """Tell how far the transfers are, now and then, until cancelled: bytes have no edge to wait for."""
    while True:
        await anyio.sleep(PROGRESS_SECONDS)
        if one is not None:
            for transfer in party.moving:
                if transfer.errand is not None and transfer.begun:
                    done = transfer.first_byte + transfer.so_far_bytes
                    one(transfer.errand.name, transfer.url, done, transfer.errand.size_bytes)
        all_(meter.look(anyio.current_time()))
