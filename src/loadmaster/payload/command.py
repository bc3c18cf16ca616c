"""What a payload is told to run: its default command and environment."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from loadmaster.errors import PayloadNotStarted
from loadmaster.ledger import Slot
from loadmaster.model import ComputingElement, JobDescription
from loadmaster.workdir import Workdir

INHERITED: Final = ("PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "LC_CTYPE", "TZ")
"""What a payload sees of the pilot's environment. Not the rest: it has credentials, and paths of the pilot's own Python."""

DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"

_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def default_environment(job: JobDescription, ce: ComputingElement, workdir: Workdir) -> dict[str, str]:
    """The environment a job starts from: a few words of the pilot's, what the job is, and what its description adds."""
    return {
        "PATH": DEFAULT_PATH,
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        "PWD": str(workdir.path),
        "TMPDIR": str(workdir.path),
        "JOBID": job.job_id,
        "LOADMASTER_SITE": ce.site,
        **job.environment,
    }


def slot_environment(slot: Slot) -> dict[str, str]:
    """What a payload is told of the slot it was granted."""
    return {"LOADMASTER_CORES": str(slot.cores)}


def default_command(job: JobDescription, env: Mapping[str, str], workdir: Workdir) -> str:
    """The shell command of the description: its executable, found, and its arguments as they stand. Blocks.

    A name without `/` is a file of the work directory, or else looked up in the payload's PATH. Raises
    `PayloadNotStarted` when there is no such thing, or it cannot be executed.
    """
    found = shlex.quote(str(_find_executable(_expand(job.executable, env), env, workdir)))
    return f"{found} {job.arguments}".strip()


def _find_executable(executable: str, env: Mapping[str, str], workdir: Workdir) -> Path:
    local = workdir.path / executable  # an absolute path stays what it is
    if "/" not in executable and not local.exists():
        on_path = shutil.which(executable, path=env.get("PATH", DEFAULT_PATH))
        if on_path is None:
            raise PayloadNotStarted(
                f"executable {executable!r}: neither a file of the job nor in PATH ({env.get('PATH')})"
            )
        return Path(on_path)
    if not local.is_file():
        raise PayloadNotStarted(f"executable {executable!r}: {'is not a file' if local.exists() else 'no such file'}")
    if not os.access(local, os.X_OK):
        if local.resolve().is_relative_to(workdir.path.resolve()):
            with suppress(PermissionError):
                local.chmod(local.stat().st_mode | 0o755)
        if not os.access(local, os.X_OK):
            raise PayloadNotStarted(f"executable {executable!r}: may not be executed")
    return local


def _expand(text: str, env: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` from the payload's environment; unknown ones stay."""
    return _VARIABLE.sub(lambda match: env.get(match[1].strip("{}"), match[0]), text)
