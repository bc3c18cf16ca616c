"""`loadmaster run JOB.json`: one job, on this machine."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final, TextIO

import anyio

from loadmaster.commands.arguments import Commands, add_job, add_scratch, add_slots
from loadmaster.commands.begun import as_begun
from loadmaster.commands.codes import NOT_DELIVERED, OK, TABLE, exit_code
from loadmaster.commands.files import (
    check_writable,
    keep,
    log_to,
    open_new,
    read_coordinator,
    read_job,
    with_outputs,
)
from loadmaster.commands.reporting import Reporting, add_job_id, add_reporter, with_id
from loadmaster.console.orders import Orders, told_to_stop
from loadmaster.console.plain import printable, size
from loadmaster.console.terminal import Display, follow, stderr_display
from loadmaster.handle import JobHandle
from loadmaster.ledger import Ledger
from loadmaster.names import shown
from loadmaster.payload.supervise import HEARTBEAT_SECONDS
from loadmaster.reporter import write_events
from loadmaster.result import JobResult, Status
from loadmaster.runner import run_job
from loadmaster.site import Site
from loadmaster.staging.plan import check_outputs
from loadmaster.tasks import single_error
from loadmaster.workdir import default_root

LIVE_SECONDS: Final = 1.0
"""Between two looks at the payload's CPU and memory while a person watches."""


def add(commands: Commands, line: str) -> None:
    """The parser of the command."""
    run = commands.add_parser("run", help=line, epilog=TABLE)
    add_job(run)
    run.set_defaults(command=_run)
    add_slots(run, usual="what the job asks")
    add_scratch(run)
    run.add_argument(
        "--journal",
        type=Path,
        metavar="DIR",
        help="keep what happens there: the next time the job goes on where it was",
    )
    run.add_argument("--events", type=Path, metavar="FILE", help="write every event as a line of JSON")
    run.add_argument("--result", type=Path, metavar="FILE", help="write the result as JSON")
    run.add_argument("--keep-workdir", action="store_true", help="leave the work directory where it is, and say where")
    run.add_argument("--follow", action="store_true", help="show what the payload prints, as it prints it")
    add_reporter(run)
    add_job_id(run)
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _run(options: argparse.Namespace) -> int:
    job, ce = read_job(options)
    job, reporting = with_id(options, job), Reporting(options, ce)
    coordinator = read_coordinator(options)
    root = (options.scratch or default_root()).absolute()
    display = stderr_display(quiet=options.quiet)
    site = Site.load(options.config) if options.config else Site()
    if options.journal is not None:
        site = as_begun(
            options, site if options.output is None else with_outputs(options, site), coordinator, job_id=job.job_id
        )
    site = reporting.site(with_outputs(options, site))
    heartbeat = LIVE_SECONDS if sys.stderr and sys.stderr.isatty() else HEARTBEAT_SECONDS
    check_outputs(job, site)
    check_writable(options.result)
    events = open_new(options.events)
    with told_to_stop() as orders, log_to(display):
        run = partial(
            run_job, job, ce=ce, coordinator=coordinator, site=site, root=root,
            slots=_slots(options, root), keep_workdir=options.keep_workdir, heartbeat_seconds=heartbeat,
        )  # fmt: skip
        try:
            fly = partial(_fly, run, orders, display, events, options.follow, reporting)
            if options.journal is None:
                result = anyio.run(fly, JobHandle(), 1)
            else:
                result = anyio.run(_with_journal, options.journal, job.job_id, fly)
        finally:
            display.close()
    if result is None:
        display.say("abandoned: the payload was stopped, nothing more was delivered")
        return 128 + orders.seen[0]
    written = keep(options.result, json.dumps(result.to_json(), indent=2) + "\n")
    if not options.quiet:
        print_result(result, kept=root / job.job_id if options.keep_workdir else None)
    elif result.failure is not None:
        display.say(f"loadmaster: job {result.job_id}: {result.failure}")
    if result.status is Status.KILLED and orders.seen:
        return 128 + orders.seen[0]
    return exit_code(result) or (OK if written else NOT_DELIVERED)


def _slots(options: argparse.Namespace, root: Path) -> Ledger | None:
    """What there is, if that is said; or else a lone job is granted what it asks."""
    if options.cores is None and options.memory is None:
        return None
    from loadmaster.machine import MIB, detect  # loaded when used

    here = next(path for path in (root, *root.parents) if path.exists())
    return detect(here).ledger(cores=options.cores, memory_mb=options.memory // MIB if options.memory else None)


async def _with_journal(
    directory: Path, job_id: str, fly: Callable[[JobHandle, int], Awaitable[JobResult | None]]
) -> JobResult | None:
    """The same, going on where an earlier run has left the job; the next attempt at one that was rescheduled."""
    from loadmaster.journal import open_journal  # with sqlite3, loaded when used

    async with open_journal(directory) as journal:
        attempt, status = (await journal.last([job_id])).get(job_id, (1, None))
        attempt += status == Status.RESCHEDULED
        return await fly(await journal.handle(job_id, attempt), attempt)


async def _fly(
    run: Callable[..., Awaitable[JobResult]], orders: Orders, display: Display, events: TextIO | None, output: bool,
    reporting: Reporting, handle: JobHandle, attempt: int,
) -> JobResult | None:  # fmt: skip
    """The job's result; None when it was abandoned."""
    result = None
    with single_error():
        async with anyio.create_task_group() as listening:
            listening.start_soon(obey, orders, handle, display, listening.cancel_scope)
            async with reporting.opened() as reporter, anyio.create_task_group() as followers:
                if reporter is not None:
                    followers.start_soon(reporter.follow, handle)
                followers.start_soon(partial(follow, handle, display, output=output))
                if events is not None:
                    followers.start_soon(write_events, handle, events)
                result = await run(handle=handle, attempt=attempt)
            listening.cancel_scope.cancel()
    return result


async def obey(orders: Orders, handle: JobHandle, display: Display, everything: anyio.CancelScope) -> None:
    """The first order kills the job, which still delivers its sandbox; the second leaves at once."""
    name = await orders.next()
    if handle.kill(f"told to stop by {name}"):
        display.say(f"{name}: stopping the payload; its sandbox is still delivered (once more: leave at once)")
    else:
        display.say(f"{name}: the payload has ended, its outputs are being delivered (once more: leave at once)")
    name = await orders.next()
    display.say(f"{name}: leaving; the payload is killed, nothing more is delivered")
    handle.hurry()
    everything.cancel()


def print_result(result: JobResult, kept: Path | None) -> None:
    """The result for people, on standard output; one that cannot be printed has still happened."""
    failure = f": {result.failure}" if result.failure is not None else ""
    lines = [f"{result.status}{failure}"]
    lines += [f"  {file.name}  {size(file.size_bytes)}  {shown(file.url)}" for file in result.outputs]
    lines += [f"  {name}  not delivered" for name in result.missing_outputs]
    lines += [f"  pending: {line}" for line in result.pending]
    if kept is not None:
        lines.append(f"  work directory: {kept}")
    with suppress(OSError, ValueError):
        print("\n".join(map(printable, lines)), flush=True)
