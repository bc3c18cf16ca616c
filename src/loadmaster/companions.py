"""A coordinator's tasks that live beside the payload: started with it, gone after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup

from loadmaster.errors import JobError
from loadmaster.hooks import call_hook

Task = tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]]


class Companions:
    """The tasks of one payload."""

    def __init__(self) -> None:
        self._queue: list[Task] = []
        self._tasks: TaskGroup | None = None
        self._beside = anyio.CancelScope()
        self._running: set[anyio.CancelScope] = set()
        self._none_left: anyio.Event | None = None
        self._over = False
        self.error: JobError | None = None
        """What the first one that failed said; it ends the payload."""

    def __repr__(self) -> str:
        return f"<Companions {'over' if self._over else 'running' if self._tasks else f'{len(self._queue)} queued'}>"

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Start a task now if the payload runs, with it if it will. Raises RuntimeError when it has ended."""
        if self._over:
            raise RuntimeError("the payload has ended: nothing can be started beside it any more")
        if self._tasks is None:
            self._queue.append((function, args))
        else:
            self._running.add(scope := anyio.CancelScope())
            self._tasks.start_soon(self._run, scope, function, args)

    def close(self) -> None:
        """No payload comes any more: what was queued is forgotten, and nothing more is taken."""
        self._over = True

    @asynccontextmanager
    async def alongside(self, tasks: TaskGroup) -> AsyncIterator[None]:
        """Run the tasks in that group for as long as the block lasts; they have ended when it is left. The first error of
        one cancels the block, and is raised."""
        try:
            with self._beside:
                self._tasks = tasks
                for function, args in self._queue:
                    self.start_soon(function, *args)
                yield
        finally:
            self._over = True
            if self._running:
                await self._end()
        if self.error is not None:
            raise self.error

    async def _end(self) -> None:
        self._none_left = anyio.Event()
        for scope in self._running:
            scope.cancel()
        with anyio.CancelScope(shield=True):  # for as long as their own shields last
            await self._none_left.wait()

    async def _run(
        self, scope: anyio.CancelScope, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]
    ) -> None:
        try:
            with scope:
                await call_hook(getattr(function, "__qualname__", repr(function)), function, *args)
        except JobError as error:
            self.error = self.error or error
            self._beside.cancel()
        finally:
            self._running.remove(scope)
            if self._none_left is not None and not self._running:
                self._none_left.set()
