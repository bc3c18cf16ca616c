"""What the open jobs of a journal were begun with: nothing of it is to be forgotten when they are gone on with."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from loadmaster.commands.files import usual_outputs
from loadmaster.console.terminal import stderr_display
from loadmaster.coordinator import Coordinator
from loadmaster.errors import InvalidJob, JournalFault
from loadmaster.events import JobAccepted
from loadmaster.hooks import FILE_MODULE, find_coordinator, reference_of
from loadmaster.names import shown
from loadmaster.site import Site


def as_begun(
    options: argparse.Namespace, site: Site, coordinator: type[Coordinator], *, job_id: str | None = None
) -> Site:
    """The site; with the outputs' directory of the jobs that are open in `options.journal`, where it has none. Blocks.

    Raises `InvalidJob`, before anything is begun, when their coordinator or their site was forgotten, or when they have
    several directories for outputs. `job_id`: of this job only, which is run by the coordinator that is given.
    """
    jobs = [job for job in _open_jobs(options.journal) if job_id in {None, job.job_id}]
    if job_id is None:
        _check_coordinators(options.journal, jobs, coordinator)
    elif options.coordinator is None and jobs and jobs[0].coordinator:
        raise InvalidJob(f"{options.journal}: job {job_id} was begun with --coordinator {_named(jobs[0].coordinator)}")
    _check_site(options, options.journal, jobs)
    return _with_outputs(options, site, sorted({job.outputs for job in jobs if job.outputs}))


def check_bundle(options: argparse.Namespace) -> None:
    """Raise `InvalidJob` when the site that a bundle was prepared with was forgotten. Blocks."""
    _check_site(options, options.bundle, _open_jobs(options.bundle / "journal"))


def _check_site(options: argparse.Namespace, place: Path, jobs: Sequence[JobAccepted]) -> None:
    files = sorted({job.site for job in jobs if job.site})
    if files and options.config is None:
        raise InvalidJob(
            f"{place}: open jobs were begun with --config {' and '.join(files)}: give it again, or another "
            "(--config /dev/null: none)"
        )


def _open_jobs(journal: Path) -> Sequence[JobAccepted]:
    """How those began that are open."""
    from loadmaster.logbook import Logbook  # with sqlite3, loaded when used

    with suppress(JournalFault), Logbook.look(journal) as book:  # one that cannot be read is the node's to speak of
        first = (next(iter(history.events), None) for history in book.open_jobs())
        return [event for event in first if isinstance(event, JobAccepted)]
    return []


def _with_outputs(options: argparse.Namespace, site: Site, places: Sequence[str]) -> Site:
    told = " and ".join(map(shown, places))
    if site.output_directory is None and len(places) > 1:
        raise InvalidJob(f"{options.journal}: the outputs of open jobs were to go to {told}: say by --output where to")
    if site.output_directory is None and places:
        if not options.quiet and places[0] != usual_outputs():
            stderr_display(quiet=False).say(f"outputs go to {told}, as when the open jobs were begun")
        return site.model_copy(update={"output_directory": places[0]})
    if site.output_directory is not None and set(places) - {site.output_directory}:
        stderr_display(quiet=True).say(
            f"loadmaster: the outputs of open jobs go to {shown(site.output_directory)} now, no longer to {told}"
        )
    return site


def _check_coordinators(journal: Path, jobs: Sequence[JobAccepted], coordinator: type[Coordinator]) -> None:
    """Refuse to begin where an open job's coordinator cannot be had: without it, the job would be given up."""
    for reference, count in Counter(job.coordinator for job in jobs).items():
        if reference not in {"", reference_of(coordinator)}:
            try:
                find_coordinator(reference)
            except InvalidJob as exc:
                raise InvalidJob(
                    f"{journal}: {count} open jobs have the coordinator {_named(reference)}, which cannot be found: "
                    f"give --coordinator as when they were begun ({exc})"
                ) from exc


def _named(reference: str) -> str:
    """A coordinator's class, as far as possible as it was given."""
    if FILE_MODULE not in reference:
        return reference
    return reference.removeprefix(FILE_MODULE).replace(":", ".py:")
