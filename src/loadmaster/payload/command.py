"""What a payload is told to run: its default command and environment, and what is executed for it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from loadmaster.description import ComputingElement, JobDescription, PayloadSpec
from loadmaster.errors import PayloadNotStarted
from loadmaster.ledger import Slot
from loadmaster.workdir import Workdir
from loadmaster.world import World

THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Unset, each of these libraries takes every core of the node, whatever the slot."""

CUDA_ORDER: Final = "CUDA_DEVICE_ORDER"
"""CUDA numbers GPUs by their speed unless told otherwise; batch systems, and the kernel's files, by their place."""

DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"

SHELL: Final = "/bin/sh"

LONG_COMMAND: Final = 4096
"""Characters of a command that are not looked at for what they are: shlex takes time by the square (3 MB: hours)."""

_PLAIN = re.compile(r"[\w@%+=:,./ '\"-]+", re.ASCII)
_QUOTES = frozenset("'\"")
_EXPANDED = frozenset("$*?[~<>{")
_BETWEEN = ";&|()`\n"
"""What separates commands, or makes one of several; not in quotes."""
_ARCHIVE = re.compile(r"\.(tar(\.\w+)?|t\w?[gx]z|tbz2?|tzst)$", re.ASCII | re.IGNORECASE)
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")


def default_environment(job: JobDescription, ce: ComputingElement, workdir: Workdir, world: World) -> dict[str, str]:
    """The environment a job starts from: a few words of the pilot's, what the job is, and what its description adds."""
    return {
        "PATH": DEFAULT_PATH,
        **world.environment(),
        "PWD": str(workdir.path),
        "TMPDIR": str(workdir.path),
        "JOBID": job.job_id,
        "LOADMASTER_SITE": ce.site,
        **job.environment,
    }


def slot_environment(slot: Slot) -> dict[str, str]:
    """What a payload is told of the slot it was granted; libraries that start a thread per core take it for theirs.

    On a node whose GPUs are assigned, a payload that was given none is told so: it would take somebody else's.
    """
    told = dict.fromkeys(("LOADMASTER_CORES", *THREAD_VARIABLES), str(slot.cores))
    told |= dict.fromkeys(slot.gpu_variables, ",".join(slot.gpus))
    if any(gpu.isdecimal() for gpu in slot.gpus):
        told[CUDA_ORDER] = "PCI_BUS_ID"
    return told


def with_slot(env: Mapping[str, str], slot: Slot) -> dict[str, str]:
    """The environment of a payload that is told its slot. It may know better how many threads it wants, but not which GPUs
    are its own."""
    told = slot_environment(slot)
    return {**told, **env, **{name: told[name] for name in slot.gpu_variables}}


def default_command(job: JobDescription, env: Mapping[str, str], workdir: Workdir) -> str:
    """The shell command of the description: its executable, found, and its arguments as they stand. Blocks.

    A name without `/` is a file of the work directory, or else looked up in the payload's PATH. Raises
    `PayloadNotStarted` when there is no such thing, or it cannot be executed.
    """
    found = shlex.quote(_find_executable(_expand(job.executable, env), env, workdir))
    return f"{found} {job.arguments}".strip()


def executable_problem(job: JobDescription, world: World) -> str | None:
    """Why `default_command` will not find the executable on this machine; None if it will, or if only the job's files, once
    they are there and unpacked, will tell. Blocks."""
    env = {"PATH": DEFAULT_PATH, **world.environment(), **job.environment}
    executable = _expand(job.executable, env)
    if not executable.startswith("/"):
        names = {file.name for file in (*job.input_sandbox, *job.input_data)}
        if os.path.normpath(executable) in names or _VARIABLE.search(executable):  # $PWD, as a rule
            return None
        if any(_ARCHIVE.search(file.name) for file in job.input_sandbox):
            return None
        if "/" in executable:
            return f"executable {executable!r}: is none of the job's inputs"
        if shutil.which(executable, path=env["PATH"]) is None:
            return f"executable {executable!r}: neither a file of the job nor in PATH ({env['PATH']})"
        return None
    if not os.path.isfile(executable):
        return f"executable {executable!r}: {'is not a file' if os.path.exists(executable) else 'no such file'}"
    return None if os.access(executable, os.X_OK) else f"executable {executable!r}: may not be executed"


def argv_of(spec: PayloadSpec, cwd: Path, *, near: bool) -> list[str]:
    """What is executed for a command. Blocks.

    One program with plain arguments is executed as it stands, everything else through the shell. `near`: by this very
    process, which waits while a file is being executed, with its whole interpreter; then the shell also stands between
    us and a file that is not on a local disk, of which nobody knows how long it takes (CVMFS, NFS).

    Raises `PayloadNotStarted` when the program it names is not there, before a shell turns that into exit code 127.
    """
    command, path = spec.command, spec.env.get("PATH", DEFAULT_PATH)
    words = list(command) if isinstance(command, tuple) else _plain_words(command)
    if isinstance(command, tuple):
        program: str | None = command[0]
    elif words is not None:
        program = words[0] if "/" in words[0] else None
    else:
        program = program_of(command)
    found = _check(program, path, cwd) if program is not None else None
    if words is not None and found is not None and not (near and not _is_local_program(Path(found), cwd)):
        return [found, *words[1:]]
    if isinstance(command, tuple):
        return [SHELL, "-c", 'exec "$@"', SHELL, *command]
    return [SHELL, "-c", f"exec {command}" if program is not None else command]


def program_of(command: str) -> str | None:
    """The program a piece of shell runs, if it is only that: one program named by its path, arguments, redirections.

    The shell can then become that program instead of waiting for it, which saves a process and keeps the kernel's word
    on how it ended: a shell turns death by a signal into an exit code that a program might have chosen itself.
    """
    if len(command) > LONG_COMMAND:
        return None
    words = shlex.shlex(command, posix=True, punctuation_chars=_BETWEEN)
    words.whitespace_split, words.commenters, words.whitespace = True, "", " \t"
    try:
        found = list(words)
    except ValueError:  # an open quote: the shell says it better
        return None
    if not found or "/" not in found[0] or "=" in found[0] or any(word[0] in _BETWEEN for word in found if word):
        return None
    return None if (_EXPANDED | {"\n"}) & set(found[0]) else found[0]


def _plain_words(command: str) -> list[str] | None:
    """The words of a command in which the shell would find nothing to expand, or None."""
    if len(command) > LONG_COMMAND or not _PLAIN.fullmatch(command):
        return None
    try:
        words = shlex.split(command) if _QUOTES & set(command) else command.split()
    except ValueError:  # as above
        return None
    return words if words and "=" not in words[0] else None


def _check(program: str, path: str, cwd: Path) -> str:
    """The file of a program. Raises `PayloadNotStarted` if there is none, or it cannot be executed."""
    found = str(cwd / program) if "/" in program else shutil.which(program, path=path)
    try:
        mode = os.stat(found).st_mode if found is not None else 0
    except OSError:
        mode = 0
    if found is None or not mode:
        raise PayloadNotStarted(f"executable {program!r}: no such file")
    if stat.S_ISDIR(mode) or not os.access(found, os.X_OK):
        raise PayloadNotStarted(f"executable {program!r}: may not be executed")
    return found


def _is_local_program(file: Path, cwd: Path) -> bool:
    """Whether a file is a binary on the disk of the shell or of the work directory; a script's interpreter may be far."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        local = {os.stat(SHELL).st_dev, os.stat(cwd).st_dev}
        return os.fstat(descriptor).st_dev in local and os.read(descriptor, 4) == b"\x7fELF"
    finally:
        os.close(descriptor)


def _find_executable(executable: str, env: Mapping[str, str], workdir: Workdir) -> str:
    local = os.path.join(workdir.path, executable)  # an absolute path stays what it is
    if "/" not in executable and not os.path.exists(local):
        on_path = shutil.which(executable, path=env.get("PATH", DEFAULT_PATH))
        if on_path is None:
            raise PayloadNotStarted(
                f"executable {executable!r}: neither a file of the job nor in PATH ({env.get('PATH')})"
            )
        return on_path
    if not os.path.isfile(local):
        raise PayloadNotStarted(
            f"executable {executable!r}: {'is not a file' if os.path.exists(local) else 'no such file'}"
        )
    if not os.access(local, os.X_OK):
        if f"{os.path.realpath(local)}/".startswith(f"{os.path.realpath(workdir.path)}/"):
            with suppress(PermissionError):
                os.chmod(local, os.stat(local).st_mode | 0o755)  # noqa: S103 - as DIRAC does
        if not os.access(local, os.X_OK):
            raise PayloadNotStarted(f"executable {executable!r}: may not be executed")
    return local


def _expand(text: str, env: Mapping[str, str]) -> str:
    """`$NAME` and `${NAME}` from the payload's environment; unknown ones stay."""
    return _VARIABLE.sub(lambda match: env.get(match[1].strip("{}"), match[0]), text)
