"""What `loadmaster node` does: a source's jobs on this node, to its end, or until it is told to stop."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, Protocol, TextIO

import anyio
from anyio import to_thread

from loadmaster.console.board import Board
from loadmaster.console.orders import Orders
from loadmaster.description import JobDescription
from loadmaster.events import Event
from loadmaster.handle import JobHandle
from loadmaster.node import Node
from loadmaster.occupancy import NodeStatistics
from loadmaster.reporter import written
from loadmaster.result import JobResult
from loadmaster.sources import JobFile, JobFiles, JobLines, JobSource, Nothing
from loadmaster.tasks import single_error

LOOK_SECONDS: Final = 0.5
"""Between two changes of the table."""


class Reporter(Protocol):
    """Who is told of a node's jobs."""

    async def listen(self, node: Node) -> None:
        """Hear all events of the node, until they end."""
        ...

    def paced(self, source: JobSource) -> JobSource:
        """The source, which waits while too much is still to be told."""
        ...


@dataclass(slots=True)
class Shift:
    """What came of it."""

    figures: NodeStatistics | None = None
    refused: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """What in the source is no job file."""
    failed: int = 0
    exhausted: bool = False
    """Whether the source has no more."""
    left: bool = False
    """Told to stop, and to leave at once."""


async def work(
    node: Node,
    source: JobLines | JobFile | JobFiles | Nothing,
    board: Board,
    orders: Orders,
    *,
    results: Path | None,
    events: TextIO | None,
    reporter: AbstractAsyncContextManager[Reporter | None] = nullcontext(),  # noqa: B008  # it has no state
) -> Shift:
    """Run the jobs of a source. The first order drains the node, the second kills what runs, the third leaves at once.

    `reporter`: is opened before the node, told of everything, and closed after it.
    """
    shift = Shift()
    numbers = Counter[str]()

    async def ended(_: JobDescription | None, result: JobResult) -> None:
        shift.failed += result.failure is not None
        board.end(result)
        if results is not None:
            numbers[result.job_id] += 1
            again = f".{numbers[result.job_id]}" if numbers[result.job_id] > 1 else ""
            await to_thread.run_sync(_write_whole, results / f"{result.job_id}{again}.json", result)

    with single_error():
        async with anyio.create_task_group() as beside:
            async with reporter as telling, node, anyio.create_task_group() as reading:
                beside.start_soon(_obey, orders, node, board, beside.cancel_scope, shift)
                beside.start_soon(_show, node, board)
                if events is not None:
                    reading.start_soon(partial(_write, node, events, board.say))
                if telling is not None:
                    reading.start_soon(telling.listen, node)
                if isinstance(source, Nothing):
                    for handle in node.resumed:
                        reading.start_soon(_see_through, node, handle, ended)
                await node.serve(source if telling is None else telling.paced(source), ended=ended)
                await node.wait_idle()
                shift.figures = node.statistics()
                node.close_events()
            beside.cancel_scope.cancel()
    shift.refused, shift.skipped, shift.exhausted = source.refused, source.skipped, source.exhausted
    return shift


async def _see_through(node: Node, handle: JobHandle, ended: Callable[[None, JobResult], Awaitable[None]]) -> None:
    """A job that was open, to the end of its last attempt."""
    result = await handle.wait()
    while (following := node.handle(result.job_id)) is not None and following.attempt > result.attempt:
        result = await following.wait()
    await ended(None, result)


async def _obey(orders: Orders, node: Node, board: Board, everything: anyio.CancelScope, shift: Shift) -> None:
    name = await orders.next()
    board.say(f"{name}: nothing new is begun; what computes may finish (once more: kill it)")
    node.begin_drain()
    name = await orders.next()
    board.say(f"{name}: payloads are killed; their sandboxes are still delivered (once more: leave at once)")
    node.kill_all(f"told to stop by {name}")
    name = await orders.next()
    board.say(f"{name}: leaving; nothing more is delivered")
    node.kill_all(f"told to leave by {name}", hurry=True)  # or each payload would still have its grace
    shift.left = True
    everything.cancel()


async def _show(node: Node, board: Board) -> None:
    while True:  # the table changes as time passes, whether anything happens or not
        board.move(node.statistics())
        await anyio.sleep(LOOK_SECONDS)


async def _write(node: Node, file: TextIO, say: Callable[[str], None]) -> None:
    stream = node.events()
    turn = anyio.Lock()

    async def put(lines: str) -> None:
        async with turn:
            await to_thread.run_sync(lambda: (file.write(lines), file.flush()))

    async def put_occupations() -> None:
        async with aclosing(node.occupations()) as occupations:
            async for occupation in occupations:
                await put(json.dumps(occupation.to_json()) + "\n")

    try:
        with single_error():
            async with anyio.create_task_group() as beside:
                beside.start_soon(put_occupations)
                async for event in stream:
                    batch: list[Event] = [event, *stream.take()]
                    await put("".join(map(written, batch)))
                beside.cancel_scope.cancel()
    except OSError as exc:
        say(f"{file.name}: no more events are written: {exc.strerror}")
    finally:
        with suppress(OSError):  # what could not be written before is tried again
            file.close()


def _write_whole(path: Path, result: JobResult) -> None:
    """Beside its name, then renamed: nobody reads half a result."""
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(json.dumps(result.to_json(), indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
