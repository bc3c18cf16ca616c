"""What uploads of a job are called until they are whole, so that an agent which comes after one that was killed knows.

Nothing is written down for each: a name is computed from the attempt at the job, the place where the file goes, and which
try at that it is. Only when there are more tries at one place than anybody would expect is their number recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from hashlib import blake2b
from typing import Final

TRIES: Final = 4
"""Tries at one place that are reckoned with for every file, when it is looked for what is left of it."""


class PartNames:
    """The names of one attempt's uploads, in one life of its agent."""

    def __init__(self, mark: str, tries: int, expect: Callable[[int], Awaitable[None]]) -> None:
        """`mark`: what no other attempt has. `tries`: how many are on record; `expect` is to have more of them there."""
        self._mark = mark
        self._tries = tries
        self._expect = expect
        self._begun = Counter[str]()

    def __repr__(self) -> str:
        return f"<PartNames of {len(self._begun)} places, up to {self._tries} for each>"

    async def make_room(self, url: str) -> None:
        """Have the next name on record."""
        if self._begun[url] >= self._tries:
            self._tries *= 2
            await self._expect(self._tries)

    def next(self, url: str) -> str:
        """The name beside the URL for one more try."""
        number = self._begun[url]
        self._begun[url] = number + 1
        return self._name(url, number)

    def all(self, url: str) -> list[str]:
        """All names there may be beside the URL."""
        return [self._name(url, number) for number in range(self._tries)]

    def _name(self, url: str, number: int) -> str:
        words = f"{self._mark}\0{number}\0{url}".encode(errors="surrogatepass")
        return f".{blake2b(words, digest_size=8).hexdigest()}.part"
