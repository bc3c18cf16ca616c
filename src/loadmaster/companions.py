"""A coordinator's tasks that live beside the payload: started with it, gone after it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
from anyio.abc import TaskGroup

from loadmaster.errors import JobError
from loadmaster.hooks import call_hook
from loadmaster.tasks import single_error

Task = tuple[Callable[..., Awaitable[Any]], tuple[Any, ...]]


class Companions:
    """The tasks of one payload."""

    def __init__(self) -> None:
        self._queue: list[Task] = []
        self._group: TaskGroup | None = None
        self._over = False
        self.error: JobError | None = None
        """What the first one that failed said; it ends the payload."""

    def __repr__(self) -> str:
        return f"<Companions {'over' if self._over else 'running' if self._group else f'{len(self._queue)} queued'}>"

    def start_soon(self, function: Callable[..., Awaitable[Any]], *args: Any) -> None:
        """Start a task now if the payload runs, with it if it will. Raises RuntimeError when it has ended."""
        if self._over:
            raise RuntimeError("the payload has ended: nothing can be started beside it any more")
        if self._group is None:
            self._queue.append((function, args))
        else:
            self._group.start_soon(self._run, self._group, function, args)

    def close(self) -> None:
        """No payload comes any more: what was queued is forgotten, and nothing more is taken."""
        self._over = True

    @asynccontextmanager
    async def alongside(self) -> AsyncIterator[None]:
        """Run the tasks for as long as the block lasts. The first error of one cancels the block, and is raised."""
        with single_error():
            async with anyio.create_task_group() as self._group:
                for function, args in self._queue:
                    self._group.start_soon(self._run, self._group, function, args)
                try:
                    yield
                finally:
                    self._over = True
                    self._group.cancel_scope.cancel()
        if self.error is not None:
            raise self.error

    async def _run(self, group: TaskGroup, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
        try:
            await call_hook(getattr(function, "__qualname__", repr(function)), function, *args)
        except JobError as error:
            self.error = self.error or error
            group.cancel_scope.cancel()
