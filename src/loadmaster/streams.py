"""What happens to many jobs, as one stream for each who wants to read it."""

from __future__ import annotations

from collections import deque
from typing import Final
from weakref import WeakSet

import anyio

from loadmaster.events import Event

EVENTS_KEPT: Final = 100_000
"""For a reader who is behind: some 20 MB. What is older is lost to him, and counted."""


class EventStream:
    """The events from now on, of all jobs; read by one task. One who is far behind misses the oldest, and blocks nobody."""

    def __init__(self, *, transient: bool) -> None:
        self.transient = transient
        self.missed = 0
        """How many were lost because nobody read them."""
        self._events: deque[Event] = deque()
        self._news: anyio.Event | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<EventStream {len(self._events)} to be read, {self.missed} missed>"

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> Event:
        """The next one; ends when there will be no more."""
        while not self._events:
            if self._closed:
                raise StopAsyncIteration
            self._news = anyio.Event()
            await self._news.wait()
            self._news = None
        return self._events.popleft()

    def take(self) -> list[Event]:
        """All that is there already."""
        there = list(self._events)
        self._events.clear()
        return there

    def put(self, event: Event) -> None:
        """One more."""
        if len(self._events) >= EVENTS_KEPT:
            self._events.popleft()
            self.missed += 1
        self._events.append(event)
        self._wake()

    def close(self) -> None:
        """No more will come: the reader has what is left, then the end."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._news is not None:
            self._news.set()


class EventStreams:
    """Those who read. A stream is forgotten when its reader drops it."""

    def __init__(self) -> None:
        self._streams: WeakSet[EventStream] | tuple[()] = ()
        """Most often nobody: to go through a WeakSet costs more than all the rest of an event."""
        self._closed = False

    @property
    def wants_transient(self) -> bool:
        """Whether anybody reads heartbeats and progress."""
        return any(stream.transient for stream in self._streams)

    def open(self, *, transient: bool) -> EventStream:
        """One more reader, who hears everything from now on."""
        stream = EventStream(transient=transient)
        self._streams = self._streams or WeakSet()
        self._streams.add(stream)
        if self._closed:
            stream.close()
        return stream

    def tell(self, event: Event) -> None:
        """Everybody who wants to hear this kind."""
        for stream in self._streams:
            if event.kept or stream.transient:
                stream.put(event)

    def close(self) -> None:
        """No more events."""
        self._closed = True
        for stream in self._streams:
            stream.close()
