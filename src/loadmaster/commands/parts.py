"""What `loadmaster prepare`, `payload` and `finish` have in common: one part of a bundle's job."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import anyio

from loadmaster.bundle import Bundle, Contents, Ended, Part, open_bundle
from loadmaster.commands.codes import part_code
from loadmaster.commands.files import log_to, open_new
from loadmaster.commands.run import LIVE_SECONDS, obey, print_result
from loadmaster.console.orders import Orders, told_to_stop
from loadmaster.console.terminal import Display, follow, stderr_display
from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.payload.supervise import HEARTBEAT_SECONDS
from loadmaster.reporter import write_events
from loadmaster.result import Status
from loadmaster.site import Site
from loadmaster.tasks import single_error


def add_display(parser: argparse.ArgumentParser) -> None:
    """The arguments about what is shown."""
    parser.add_argument("--events", type=Path, metavar="FILE", help="write every event as a line of JSON")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run_it(
    options: argparse.Namespace,
    part: Part,
    directory: Path,
    *,
    site: Site | None,
    coordinator: type[Coordinator] = JobExecutionCoordinator,
    new: Contents | None = None,
    outputs: Path | None = None,
) -> int:
    """Run the part, say what came of it, and return the exit code."""
    display = stderr_display(quiet=options.quiet)
    heartbeat = LIVE_SECONDS if sys.stderr and sys.stderr.isatty() else HEARTBEAT_SECONDS

    async def in_bundle() -> Ended | None:
        async with open_bundle(directory, new) as bundle:
            if (before := bundle.check(part)) is not None:
                return before
            run = partial(
                bundle.run, part, coordinator=coordinator, site=site, outputs=outputs, heartbeat_seconds=heartbeat
            )
            return await _fly(bundle, run, orders, display, open_new(options.events), getattr(options, "follow", False))

    with told_to_stop() as orders, log_to(display):
        try:
            ended = anyio.run(in_bundle)
        finally:
            display.close()
    if ended is None:
        display.say(f"abandoned; `{part.command}` goes on with it")
        return 128 + orders.seen[0]
    if not options.quiet:
        _print(ended, part, directory)
    elif (failure := ended.failure) is not None:
        display.say(f"loadmaster: {failure}")
    return 128 + orders.seen[0] if orders.seen and _was_killed(ended) else part_code(ended)


async def _fly(
    bundle: Bundle, run: Any, orders: Orders, display: Display, events: TextIO | None, output: bool
) -> Ended | None:
    """What came of it; None when it was abandoned."""
    ended: Ended | None = None
    with single_error():
        async with anyio.create_task_group() as listening:
            handle = await bundle.handle()
            listening.start_soon(obey, orders, handle, display, listening.cancel_scope)
            async with anyio.create_task_group() as followers:
                followers.start_soon(partial(follow, handle, display, output=output, known=len(handle.history)))
                if events is not None:
                    followers.start_soon(write_events, handle, events)
                ended = await run(handle=handle)
            listening.cancel_scope.cancel()
    return ended


def _was_killed(ended: Ended) -> bool:
    if ended.result is not None:
        return ended.result.status is Status.KILLED
    return ended.failure is not None and ended.failure.kind == "JobWasKilled"


def _print(ended: Ended, part: Part, directory: Path) -> None:
    if ended.result is not None:
        print_result(ended.result, kept=None)
        return
    following = Part.PAYLOAD if part is Part.PREPARE else Part.FINISH
    said = ended.failure if ended.failure is not None else ended.outcome
    lines = [] if said is None else [str(said)]
    lines.append(f"next: {following.command} {directory}")
    with suppress(OSError, ValueError):
        print("\n".join(lines), flush=True)
