"""That something has changed, as something to await: for whoever looks again whenever it has."""

from __future__ import annotations

import anyio


class Bell:
    """Costs next to nothing to ring while nobody listens. Look first, then `wait`: with no await in between no ring is
    missed; with one, remember `rings` before you look, and `wait_beyond` it."""

    def __init__(self) -> None:
        self.rings = 0
        self._heard: anyio.Event | None = None

    def __repr__(self) -> str:
        return f"<Bell, rung {self.rings} times>"

    def ring(self) -> None:
        """Wake whoever waits; all that is rung before they run is one ring to them."""
        self.rings += 1
        if self._heard is not None:
            self._heard.set()
            self._heard = None

    async def wait(self) -> None:
        """Until the next ring."""
        if self._heard is None:
            self._heard = anyio.Event()
        await self._heard.wait()

    async def wait_beyond(self, rings: int) -> None:
        """Until it has been rung more than so many times, which may be so already."""
        if self.rings == rings:
            await self.wait()
