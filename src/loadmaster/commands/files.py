"""What commands read and write, and what they say when they cannot."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from errno import EACCES, EISDIR, ENOTDIR
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from loadmaster.console.plain import to_stderr
from loadmaster.errors import InvalidJob, InvalidSite
from loadmaster.names import file_url
from loadmaster.site import Site

if TYPE_CHECKING:  # a command that runs no job starts without them
    from loadmaster.coordinator import Coordinator
    from loadmaster.description import ComputingElement, JobDescription


def read_job(options: argparse.Namespace) -> tuple[JobDescription, ComputingElement]:
    """The job of a file, and its computing element. Raises `InvalidJob` that names the file."""
    job, ce = load_job(options)
    return job.relative_to(options.job.absolute().parent, outputs=Path.cwd()), ce


def load_job(options: argparse.Namespace) -> tuple[JobDescription, ComputingElement]:
    """The same, with its paths as they are written."""
    from loadmaster import dirac

    words, ce_words = dirac.split_wrapper_file(_read_words(options.job))
    if options.ce is not None:
        ce_words = {**ce_words, **read_json(options.ce)}
    try:
        return dirac.from_dirac({"Job": words, "CE": ce_words})
    except InvalidJob as exc:
        raise InvalidJob(f"{options.job}: {exc}") from exc


def _read_words(path: Path) -> Mapping[str, Any]:
    """The words of a job in a file, of JSON or of DIRAC's JDL."""
    from loadmaster import dirac

    text = _read_text(path)
    try:
        return dirac.read_jdl(text) if dirac.is_jdl(text) else _object(path, text)
    except InvalidJob as exc:
        raise InvalidJob(f"{path}: {str(exc).removeprefix(f'{path}: ')}") from exc


def read_json(path: Path) -> Mapping[str, Any]:
    """An object in a file. Raises `InvalidJob`."""
    return _object(path, _read_text(path))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as exc:
        raise InvalidJob(f"{path}: {exc.strerror}") from exc
    except ValueError as exc:
        raise InvalidJob(f"{path}: not JSON: {exc}") from exc


def _object(path: Path, text: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise InvalidJob(f"{path}: not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise InvalidJob(f"{path}: an object {{...}} is expected, not {type(data).__name__}")
    return data


def read_site(options: argparse.Namespace) -> Site:
    """The site of --config, with a place for outputs that have none; see `with_outputs`."""
    return with_outputs(options, Site.load(options.config) if options.config else Site())


def understand_site(options: argparse.Namespace) -> tuple[Site, list[str]]:
    """As much of it as can be understood, and what cannot."""
    if not options.config:
        return read_site(options), []
    try:
        site, problems = Site.understand(options.config)
    except InvalidSite as exc:
        return with_outputs(options, Site()), [str(exc)]
    return with_outputs(options, site), [f"{options.config}: {problem}" for problem in problems]


def with_outputs(options: argparse.Namespace, site: Site) -> Site:
    """The same site, with --output, or a directory for each job below `outputs` where neither says another."""
    if options.output is not None:
        check_directory(options.output, "--output")
        return site.model_copy(update={"output_directory": file_url(options.output.absolute())})
    return site if site.output_directory else site.model_copy(update={"output_directory": usual_outputs()})


def usual_outputs() -> str:
    """Where outputs go when nobody says anything: a directory for each job."""
    return f"{file_url(Path('outputs').absolute())}/{{job_id}}"


def read_coordinator(options: argparse.Namespace) -> type[Coordinator]:
    """The class of --coordinator, or the one of jobs without special wishes."""
    with log_to(to_stderr()):
        return as_coordinator(find_class(options))


def find_class(options: argparse.Namespace) -> type[Any]:
    """The same as it is written, which may be one of DIRAC's synchronous ones."""
    from loadmaster import dirac
    from loadmaster.coordinator import JobExecutionCoordinator
    from loadmaster.hooks import find_coordinator

    if options.coordinator is None:
        return JobExecutionCoordinator
    name, _, package = options.coordinator.partition(":")
    if name == "dirac":
        return dirac.find_coordinator(package or None)
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; this process is ours
    return find_coordinator(options.coordinator)


def as_coordinator(found: type[Any]) -> type[Coordinator]:
    """A class that `run_job` takes."""
    from loadmaster import dirac

    return dirac.adapt(found) if dirac.is_synchronous(found) else found


def check_writable(path: Path | None, option: str = "--result") -> None:
    """Refuse a place for the result now, rather than when there is one. Raises `InvalidJob` with the reason."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
        if _is_written_through(path):
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(EACCES, os.strerror(EACCES))
        else:
            with TemporaryFile(dir=path.parent):  # what permissions say is not all: read-only disks, /proc, no space
                pass
    except OSError as exc:
        raise InvalidJob(f"{option} {path}: {exc.strerror}") from exc


def check_directory(path: Path, option: str) -> None:
    """Refuse a directory in which nothing can be put, now rather than when there is something. It is not made."""
    there = next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))
    reason = ENOTDIR if not there.is_dir() else 0 if os.access(there, os.W_OK | os.X_OK) else EACCES
    if reason:
        raise InvalidJob(f"{option} {path}: {os.strerror(reason)}")


def keep(path: Path | None, text: str, option: str = "--result") -> bool:
    """Write what came of it, and say so if that cannot be: it has happened all the same."""
    try:
        if path is not None:
            write_whole(path, text)
    except OSError as exc:
        to_stderr().say(f"loadmaster: {option} {path}: {exc.strerror}: it was not written")
        return False
    return True


def open_new(path: Path | None) -> TextIO | None:
    """The file for the events, empty. Raises `InvalidJob`."""
    if path is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("w", encoding="utf-8")
    except OSError as exc:
        raise InvalidJob(f"--events {path}: {exc.strerror}") from exc


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its name and rename it; what is no file of its own (a link, /dev/stdout) is written to."""
    if _is_written_through(path):
        path.write_text(text, encoding="utf-8")
        return
    beside = path.with_name(f".{path.name}.part")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _is_written_through(path: Path) -> bool:
    return path.is_symlink() or (path.exists() and not path.is_file())


class Sayer(Protocol):
    """What shows a person a line."""

    def say(self, line: str) -> None:
        """Show it."""
        ...


@contextmanager
def log_to(display: Sayer) -> Iterator[None]:
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
