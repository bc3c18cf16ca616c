"""The command line: `loadmaster run JOB.json`, `check JOB.json`, `node SOURCE` and `stage MANIFEST`.

Exit codes: 0 done or completed; 1 the description is bad or the job could not be prepared; 2 the payload failed or was
stopped by a limit; 3 outputs could not be delivered; 4 reschedule; 130 and 143 told to stop by SIGINT or SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import Any, Final, TextIO

import anyio

from loadmaster import dirac
from loadmaster.account import Record, Report, told
from loadmaster.board import Board, open_board
from loadmaster.board import told as told_of_node
from loadmaster.coordinator import Coordinator, JobExecutionCoordinator
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.errors import InvalidJob, LoadmasterError
from loadmaster.gauge import Gauge, stderr_gauge
from loadmaster.handle import JobHandle
from loadmaster.hooks import find_coordinator
from loadmaster.machine import MIB, detect
from loadmaster.manifest import BadManifest, Manifest
from loadmaster.names import file_url, shown
from loadmaster.node import Node
from loadmaster.orders import Orders, told_to_stop
from loadmaster.payload.supervise import HEARTBEAT_SECONDS
from loadmaster.reporter import write_events
from loadmaster.result import JobResult, Phase, Status
from loadmaster.runner import run_job
from loadmaster.site import Site
from loadmaster.sources import JobFiles, JobLines
from loadmaster.stage import Terms, stage
from loadmaster.staging.engine import open_transfers
from loadmaster.staging.inquiry import Inquiry, ask_for_inputs
from loadmaster.staging.plan import check_outputs
from loadmaster.tasks import leaves, single_error
from loadmaster.terminal import Display, follow, printable, size, stderr_display
from loadmaster.work import work
from loadmaster.workdir import default_root

OK: Final = 0
NOT_PREPARED: Final = 1
PAYLOAD_FAILED: Final = 2
NOT_DELIVERED: Final = 3
RESCHEDULE: Final = 4

STAGE: Final = """Move the files of a manifest, many at once, each verified: downloads, uploads, copies, and from server to
server. What is there already is left alone, so running it again does only what is missing."""

STAGE_ENDS: Final = """Exit codes: 0 everything is in its place; 1 the manifest is bad (every bad line is named, nothing was
moved); 3 files failed (each is named, with the reason); 130 and 143 told to stop before all files were begun."""

NODE: Final = """Run the jobs of a file or a directory, as many at once as this machine has room for; the files of the next
ones come while others compute. The first Ctrl-C lets what computes finish, the second kills it, the third leaves."""

NODE_ENDS: Final = """Exit codes: 0 every job is done; 1 the source cannot be read, or has lines that are no jobs (each is
named, the others were run); 2 jobs failed; 130 and 143 told to stop before all were done."""

LIVE_SECONDS: Final = 1.0
"""Between two looks at the payload's CPU and memory while a person watches."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is returned, not raised, but for usage errors."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except (LoadmasterError, OSError) as exc:
        stderr_display(quiet=True).say(f"loadmaster: {exc}")
        return NOT_PREPARED
    except (KeyboardInterrupt, BaseExceptionGroup) as exc:  # the second Ctrl-C while a coordinator blocks the loop
        if not any(isinstance(each, KeyboardInterrupt) for each in leaves(exc)):
            raise
        stderr_display(quiet=True).say("loadmaster: interrupted; nothing more was done")
        return 128 + signal.SIGINT
    return code


def command() -> None:
    """The console script: run a command and leave with its exit code, without waiting for a hook that blocks a thread."""
    code = main()
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)  # every file has been closed by now; threads that still run are somebody's blocking calls


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="loadmaster",
        description="Run a batch job: bring its files in, watch its payload, take its outputs out. Or move many files.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('loadmaster')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    job = argparse.ArgumentParser(add_help=False)
    job.add_argument(
        "job", type=Path, metavar="JOB.json", help='a job description, or DIRAC\'s {"Job": {...}, "CE": {...}}'
    )
    job.add_argument("--ce", type=Path, metavar="CE.json", help="the computing element")
    job.add_argument("--config", type=Path, metavar="SITE.toml", help="storage elements, catalog, sandbox store")
    job.add_argument(
        "--coordinator",
        metavar="MODULE:CLASS",
        help="a coordinator: module:Class, path/to/file.py:Class, or its registered name",
    )
    job.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where outputs go that have no other target (default: outputs/<job id>)",
    )

    run = commands.add_parser("run", parents=[job], help="run one job", epilog=(__doc__ or "").partition("\n\n")[2])
    run.set_defaults(command=_run)
    run.add_argument(
        "--root", type=Path, metavar="DIR", help="where work directories are made (default: a temporary directory)"
    )
    run.add_argument("--events", type=Path, metavar="FILE", help="write every event as a line of JSON")
    run.add_argument("--result", type=Path, metavar="FILE", help="write the result as JSON")
    run.add_argument("--keep-workdir", action="store_true", help="leave the work directory where it is, and say where")
    run.add_argument("--follow", action="store_true", help="show what the payload prints, as it prints it")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")

    check = commands.add_parser(
        "check", parents=[job], help="say what a job description means, what is wrong with it, what inputs are missing"
    )
    check.add_argument("--online", action="store_true", help="ask servers too whether they have the inputs")
    check.set_defaults(command=_check)

    move = commands.add_parser("stage", help="move many files", description=STAGE, epilog=STAGE_ENDS)
    move.set_defaults(command=_stage)
    move.add_argument("manifest", metavar="MANIFEST", help='JSON Lines: {"source", "target"}; - for standard input')
    move.add_argument("--config", type=Path, metavar="SITE.toml", help="[storage.*] tables, streams, retries")
    move.add_argument("--streams", type=_number(1, 256), metavar="N", help="files at once, in each direction")
    move.add_argument("--retries", type=_number(0, 100), metavar="N", help="how often a file is tried again")
    move.add_argument(
        "--deadline", type=_seconds, metavar="SECONDS", help="what is not there by then fails (30s, 5m, 2h)"
    )
    move.add_argument(
        "--resume", action="store_true", help="keep what has come of a file with a checksum, and go on from there"
    )
    move.add_argument("--verify", action="store_true", help="check also the content of what is there already")
    move.add_argument("--all", action="store_true", help="move everything, do not look what is there already")
    move.add_argument("--sync", action="store_true", help="have each file on the disk before it gets its name")
    move.add_argument("--events", type=Path, metavar="FILE", help="write what came of each file as a line of JSON")
    move.add_argument("--summary", type=Path, metavar="FILE", help="write the summary and the failures as JSON")
    move.add_argument("--quiet", action="store_true", help="print nothing but errors")

    node = commands.add_parser("node", help="run many jobs", description=NODE, epilog=NODE_ENDS)
    node.set_defaults(command=_node)
    node.add_argument(
        "source", type=Path, metavar="SOURCE", help="JSON Lines: a job a line; or a directory of job files"
    )
    node.add_argument("--ce", type=Path, metavar="CE.json", help="the computing element")
    node.add_argument("--config", type=Path, metavar="SITE.toml", help="storage elements, catalog, sandbox store")
    node.add_argument("--coordinator", metavar="MODULE:CLASS", help="a coordinator, as for `run`")
    node.add_argument(
        "--cores", type=_number(1, 100_000), metavar="N", help="of so many cores (default: all there are)"
    )
    node.add_argument("--memory", type=_bytes, metavar="SIZE", help="of so much memory (500M, 16G)")
    node.add_argument("--scratch", type=Path, metavar="DIR", help="where work directories are made")
    node.add_argument("--output", type=Path, metavar="DIR", help="where outputs go that have no other target (outputs)")
    node.add_argument("--events", type=Path, metavar="FILE", help="write every event as a line of JSON")
    node.add_argument("--results", type=Path, metavar="DIR", help="write each job's result to a file there")
    node.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def _number(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}: a number from {least} to {most} is expected")
        return int(text)

    return number


def _bytes(text: str) -> int:
    """`500M`, `16G`, `1000`: in powers of 1024, as memory has it."""
    factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text.upper().removesuffix("IB")[-1:], 1)
    digits = text.upper().removesuffix("IB").rstrip("KMGT")
    if not digits.isdecimal() or not 0 < int(digits) < 2**40:
        raise argparse.ArgumentTypeError(f"{text!r}: a size is expected, as 500M or 16G")
    return int(digits) * factor


def _seconds(text: str) -> float:
    """`90`, `90s`, `1.5m`, `2h`."""
    unit = {"s": 1.0, "m": 60.0, "h": 3600.0}.get(text[-1:], 1.0)
    try:
        seconds = float(text.rstrip("smh")) * unit
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r}: a time is expected, as 90, 30s, 5m or 2h")
    return seconds


# -- check -------------------------------------------------------------------------------------------------------


def _check(options: argparse.Namespace) -> int:
    job, ce = _read_job(options)
    site = _read_site(options, job)
    _read_coordinator(options)
    check_outputs(job, site)
    words = job.model_dump(mode="json", exclude_defaults=True, exclude={"extra"})
    print(json.dumps(words | {"computing_element": ce.model_dump(mode="json", exclude_defaults=True)}, indent=2))
    if job.extra:
        print(f"kept for the coordinator, not understood: {', '.join(sorted(job.extra))}", file=sys.stderr)
    found = anyio.run(_ask, job, site, options.online)
    for problem in found.problems:
        print(printable(f"{options.job}: {problem}"), file=sys.stderr)
    if found.not_asked:
        print(f"{found.not_asked} of the inputs are at servers, which were not asked: --online does", file=sys.stderr)
    if found.problems:
        return NOT_PREPARED
    print(f"{options.job}: the description of job {job.job_id} is valid", file=sys.stderr)
    return OK


async def _ask(job: JobDescription, site: Site, online: bool) -> Inquiry:
    async with open_transfers(site.model_copy(update={"cache": None})) as transfers:  # which would be made
        return await ask_for_inputs(job, transfers, online=online)


# -- run ---------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace) -> int:
    job, ce = _read_job(options)
    coordinator = _read_coordinator(options)
    root = (options.root or default_root()).absolute()
    display = stderr_display(quiet=options.quiet)
    site = _read_site(options, job)
    heartbeat = LIVE_SECONDS if sys.stderr and sys.stderr.isatty() else HEARTBEAT_SECONDS
    check_outputs(job, site)
    _check_writable(options.result)
    events = _open_new(options.events)
    with told_to_stop() as orders, _log_to(display):
        run = partial(
            run_job, job, ce=ce, coordinator=coordinator, site=site, root=root,
            keep_workdir=options.keep_workdir, heartbeat_seconds=heartbeat,
        )  # fmt: skip
        try:
            result = anyio.run(_fly, run, orders, display, events, options.follow)
        finally:
            display.close()
    if result is None:
        display.say("abandoned: the payload was stopped, nothing more was delivered")
        return 128 + orders.seen[0]
    if options.result:
        _write_whole(options.result, json.dumps(result.to_json(), indent=2) + "\n")
    if not options.quiet:
        _print_result(result, kept=root / job.job_id if options.keep_workdir else None)
    elif result.failure is not None:
        display.say(f"loadmaster: job {result.job_id}: {result.failure}")
    return 128 + orders.seen[0] if result.status is Status.KILLED and orders.seen else exit_code(result)


async def _fly(
    run: Callable[..., Awaitable[JobResult]], orders: Orders, display: Display, events: TextIO | None, output: bool
) -> JobResult | None:
    """The job's result; None when it was abandoned."""
    handle = JobHandle()
    result = None
    with single_error():
        async with anyio.create_task_group() as listening:
            listening.start_soon(_obey, orders, handle, display, listening.cancel_scope)
            async with anyio.create_task_group() as followers:
                followers.start_soon(partial(follow, handle, display, output=output))
                if events is not None:
                    followers.start_soon(write_events, handle, events)
                result = await run(handle=handle)
            listening.cancel_scope.cancel()
    return result


async def _obey(orders: Orders, handle: JobHandle, display: Display, everything: anyio.CancelScope) -> None:
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


# -- node --------------------------------------------------------------------------------------------------------


def _node(options: argparse.Namespace) -> int:
    ce = ComputingElement.load(_read_json(options.ce) if options.ce else {})
    coordinator = _read_coordinator(options)
    site = Site.load(options.config) if options.config else Site()
    if not site.output_directory:
        outputs = (options.output or Path("outputs")).absolute()
        site = site.model_copy(update={"output_directory": f"{file_url(outputs)}/{{job_id}}"})
    scratch = (options.scratch or default_root()).absolute()
    scratch.mkdir(parents=True, exist_ok=True)
    memory_mb = options.memory // MIB if options.memory else None
    ledger = detect(scratch).ledger(cores=options.cores, memory_mb=memory_mb)
    if options.results:
        options.results.mkdir(parents=True, exist_ok=True)
    events = _open_new(options.events)
    board = open_board(sys.stderr or StringIO(), quiet=options.quiet)
    try:
        with ExitStack() as opened:
            if events is not None:
                opened.enter_context(closing(events))
            source: JobFiles | JobLines
            if options.source.is_dir():
                source = JobFiles(options.source, outputs=Path.cwd())
            else:
                source = opened.enter_context(closing(JobLines(options.source, outputs=Path.cwd())))
            orders = opened.enter_context(told_to_stop())
            opened.enter_context(_log_to(board))
            node = Node(ce, site=site, ledger=ledger, root=scratch, coordinator=coordinator)
            shift = anyio.run(partial(work, node, source, board, orders, results=options.results, events=events))
    finally:
        board.close()
    for problem in shift.refused:
        board.say(f"loadmaster: {problem}")
    if shift.figures is not None and not options.quiet:
        with suppress(OSError, ValueError):
            print(told_of_node(shift.figures), flush=True)
    if orders.seen and (shift.figures is None or shift.figures.given_back or shift.figures.ended["Killed"]):
        return 128 + orders.seen[0]
    return PAYLOAD_FAILED if shift.failed else NOT_PREPARED if shift.refused else OK


# -- stage -------------------------------------------------------------------------------------------------------


def _stage(options: argparse.Namespace) -> int:
    site = Site.load(options.config) if options.config else Site()
    words = {name: value for name in ("streams", "retries") if (value := getattr(options, name)) is not None}
    terms = Terms(
        everything=options.all, verify=options.verify, resume=options.resume, sync=options.sync,
        deadline_seconds=options.deadline,
    )  # fmt: skip
    _check_writable(options.summary, "--summary")
    gauge = stderr_gauge(quiet=options.quiet)
    try:
        with ExitStack() as opened:
            manifest = opened.enter_context(_open_manifest(options.manifest))
            record = opened.enter_context(Record.open(_open_new(options.events)))
            orders = opened.enter_context(told_to_stop())
            opened.enter_context(_log_to(gauge))
            report = Report(gauge, record, manifest)
            tally = anyio.run(stage, manifest, site.model_copy(update=words), terms, report, orders)
            if options.summary:
                _write_whole(options.summary, record.summary(tally))
    except BadManifest as exc:
        for problem in exc.problems:
            gauge.say(f"{exc.name}: {problem}")
        return NOT_PREPARED
    finally:
        gauge.close()
    if not options.quiet:
        with suppress(OSError, ValueError):
            print(told(tally), flush=True)
    if orders.seen and tally.left:
        return 128 + orders.seen[0]
    return NOT_DELIVERED if tally.failed else OK


@contextmanager
def _open_manifest(name: str) -> Iterator[Manifest]:
    """A manifest that has been read and is good. Raises `BadManifest`."""
    try:
        with sys.stdin.buffer if name == "-" else open(name, "rb") as stream:
            manifest = Manifest.read(stream, name, os.getcwd())
    except OSError as exc:
        raise BadManifest(name, [exc.strerror or str(exc)]) from exc
    with closing(manifest):
        yield manifest


# -- how it ended ------------------------------------------------------------------------------------------------


def exit_code(result: JobResult) -> int:
    """The exit code that tells a result to a shell."""
    if result.failure is None:
        return OK
    if result.status is Status.RESCHEDULED:
        return RESCHEDULE
    match result.failure.phase:
        case Phase.STAGE_IN | Phase.PRE_PROCESS:
            return NOT_PREPARED
        case Phase.STAGE_OUT:
            return NOT_DELIVERED
        case _:
            return NOT_PREPARED if result.failure.kind == "PayloadNotStarted" else PAYLOAD_FAILED


def _print_result(result: JobResult, kept: Path | None) -> None:
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


# -- reading and writing -----------------------------------------------------------------------------------------


def _read_job(options: argparse.Namespace) -> tuple[JobDescription, ComputingElement]:
    words, ce_words = dirac.split_wrapper_file(_read_json(options.job))
    if options.ce is not None:
        ce_words = {**ce_words, **_read_json(options.ce)}
    try:
        job = JobDescription.load(words).relative_to(options.job.absolute().parent, outputs=Path.cwd())
        return job, ComputingElement.load(ce_words)
    except InvalidJob as exc:
        raise InvalidJob(f"{options.job}: {exc}") from exc


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as exc:
        raise InvalidJob(f"{path}: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise InvalidJob(f"{path}: not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidJob(f"{path}: an object {{...}} is expected, not {type(data).__name__}")
    return data


def _read_site(options: argparse.Namespace, job: JobDescription) -> Site:
    output = (options.output or Path("outputs") / job.job_id).absolute()
    site = Site.load(options.config) if options.config else Site()
    return site if site.output_directory else site.model_copy(update={"output_directory": file_url(output)})


def _read_coordinator(options: argparse.Namespace) -> type[Coordinator]:
    if options.coordinator is None:
        return JobExecutionCoordinator
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; this process is ours
    found = find_coordinator(options.coordinator)
    return dirac.adapt(found) if dirac.is_synchronous(found) else found


def _check_writable(path: Path | None, option: str = "--result") -> None:
    """Refuse a place for the result now, rather than when there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise InvalidJob(f"{option} {path}: cannot be written")


def _open_new(path: Path | None) -> TextIO | None:
    """The file for the events, empty. Raises `InvalidJob`."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as exc:
        raise InvalidJob(f"--events {path}: {exc.strerror}") from exc


def _write_whole(path: Path, text: str) -> None:
    """Write a file beside its name and rename it; what is no file of its own (a link, /dev/stdout) is written to."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def _log_to(display: Display | Gauge | Board) -> Iterator[None]:
    """Show the package's warnings among the job's lines."""

    class ToDisplay(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            display.say(f"{record.levelname.lower()}: {record.getMessage()}")

    handler = ToDisplay(logging.WARNING)
    logger = logging.getLogger("loadmaster")
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
