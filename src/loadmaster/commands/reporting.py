"""`--reporter`: who is told what becomes of jobs, besides a person."""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadmaster.commands.arguments import number
from loadmaster.description import ComputingElement, JobDescription
from loadmaster.errors import InvalidJob, InvalidSite
from loadmaster.site import Site

if TYPE_CHECKING:
    from loadmaster.diracx.preferences import Preferences
    from loadmaster.diracx.reporter import Reporter

HELP: Final = """tell a DiracX server what becomes of it, and do what that says; DIRACX_URL, DIRACX_CREDENTIALS_PATH and
DIRACX_CA_PATH say which and with what credentials, or a file of such lines that DIRACX_DOTENV names"""

OUTBOX: Final = "outbox.sqlite"
"""Where reports wait in a journal's directory."""

SANDBOX_BYTES: Final = 100 * 1024**2
"""As large as DiracX takes them."""


def add_reporter(parser: argparse.ArgumentParser) -> None:
    """The arguments of a command whose jobs can be reported."""
    parser.add_argument("--reporter", choices=["diracx"], help=HELP)
    parser.add_argument(
        "--outbox",
        type=Path,
        metavar="FILE",
        help="where reports wait that the server has not taken, also for later (default: beside the journal)",
    )


def add_job_id(parser: argparse.ArgumentParser) -> None:
    """What the job is called, whatever its description says."""
    parser.add_argument("--job-id", type=number(1, 2**63 - 1), metavar="N", help="the job's number at the server")


def with_id(options: argparse.Namespace, job: JobDescription) -> JobDescription:
    """The job, by its number. Raises `InvalidJob` when it is to be reported and has none."""
    if options.job_id is not None:
        return job.model_copy(update={"job_id": str(options.job_id)})
    if options.reporter is not None and not (job.job_id.isascii() and job.job_id.isdecimal()):
        raise InvalidJob(f"job {job.job_id}: DiracX knows jobs by numbers: --job-id N")
    return job


class Reporting:
    """What the options mean, checked before anything is begun."""

    def __init__(self, options: argparse.Namespace, ce: ComputingElement) -> None:
        """Raises `InvalidSite` when it is not said which server, there are no credentials for it, or what is needed is not
        installed."""
        self._ce = ce
        self._outbox: Path | None = options.outbox
        if options.reporter is not None and options.outbox is None and options.journal is not None:
            self._outbox = options.journal / OUTBOX
        self._preferences = None if options.reporter is None else _preferences()
        if options.reporter is None and options.outbox is not None:
            raise InvalidSite("--outbox: there is no --reporter")

    def site(self, site: Site) -> Site:
        """The site; with DiracX's sandboxes, if it has no others, and the credentials of the jobs' owner are there."""
        if self._preferences is None or self._preferences.owner_credentials_path is None or site.sandbox_store:
            return site
        words = {
            "sandbox_store": "diracx://sandboxes",
            "sandbox_format": "tar.bz2" if site.sandbox_format == "files" else site.sandbox_format,
            "sandbox_limit_bytes": SANDBOX_BYTES,
        }
        return site.model_copy(update=words)

    @asynccontextmanager
    async def opened(self, *, pilot: bool = False) -> AsyncIterator[Reporter | None]:
        """The reporter, if one is asked for. `pilot`: whether the pilot is told of, too, if it has a stamp."""
        if self._preferences is None:
            yield None
            return
        from loadmaster.diracx.client import open_diracx
        from loadmaster.diracx.outbox import FileOutbox
        from loadmaster.diracx.pilots import STAMP, known_pilot
        from loadmaster.diracx.reporter import open_reporter

        async with AsyncExitStack() as stack:
            diracx = await stack.enter_async_context(open_diracx(self._preferences))
            if pilot and (stamp := os.environ.get(STAMP)):
                await stack.enter_async_context(known_pilot(diracx, stamp, self._ce))
            outbox = None if self._outbox is None else await stack.enter_async_context(FileOutbox(self._outbox))
            yield await stack.enter_async_context(open_reporter(diracx, outbox=outbox, ce=self._ce))


def _preferences() -> Preferences:
    try:
        import_module("loadmaster.diracx.exchange")  # with httpx, loaded when it is asked for
    except ImportError as exc:
        raise InvalidSite(f"--reporter diracx: {exc}") from exc
    from loadmaster.diracx.credentials import check_credentials
    from loadmaster.diracx.errors import CredentialsRefused
    from loadmaster.diracx.preferences import CREDENTIALS, OWNER, Preferences

    preferences = Preferences.load(os.environ)
    for path, said_by in ((preferences.credentials_path, CREDENTIALS), (preferences.owner_credentials_path, OWNER)):
        try:
            if path is not None:
                check_credentials(path)
        except CredentialsRefused as exc:
            raise InvalidSite(f"--reporter diracx: {exc} ({said_by} says where they are)") from exc
    return preferences
