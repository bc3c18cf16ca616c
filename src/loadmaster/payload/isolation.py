"""What a payload sees of the node: a launch, turned into one in the isolation it asks for.

docs/containment.md says what each of them leaves in sight. Everything here blocks, for some milliseconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from loadmaster.description import Containment, Isolation
from loadmaster.payload.launch import Launch, Refused, shim_command

DEFAULT_PATH: Final = "/usr/local/bin:/usr/bin:/bin"

COVERED: Final = ("/tmp", "/var/tmp", "/run", "/dev/shm")  # noqa: S108 - to be covered
"""Where daemons have their sockets, and other jobs what they share."""

TRIAL_SECONDS: Final = 10


def isolated(launch: Launch, containment: Containment) -> Launch:
    """The launch that has the isolation it asks for. Raises `Refused`: what is missing, and what to do about it."""
    match launch.isolation:
        case Isolation.NONE:
            return launch
        case Isolation.NAMESPACES:
            if containment is not Containment.PID_NAMESPACE:
                raise Refused(f"isolation {launch.isolation} takes containment pid-namespace, and not {containment}")
            return replace(launch, private=True)
        case Isolation.BUBBLEWRAP:
            return _in_bubblewrap(launch)
        case Isolation.APPTAINER:
            return _in_apptainer(launch)


# -- bubblewrap --------------------------------------------------------------------------------------------------


def bubblewrap_words(bwrap: str, cwd: Path, *, visible: tuple[str, ...] = ()) -> list[str]:
    """The call of bwrap, without what it is to run. `visible` are directories to be seen where they are covered."""
    words = [bwrap, "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try", "--die-with-parent"]
    words += ["--cap-drop", "ALL", "--ro-bind", "/", "/", "--dev-bind", "/dev", "/dev", "--proc", "/proc"]
    for place in COVERED:
        if os.path.isdir(place) and not os.path.islink(place):
            words += ["--tmpfs", place]
    resolver = os.path.realpath("/etc/resolv.conf")  # below /run on many nodes; the network is kept
    for place in (resolver, *visible):
        if any(Path(place).is_relative_to(covered) for covered in COVERED):
            words += ["--ro-bind-try", place, place]
    return [*words, "--bind", str(cwd), str(cwd), "--chdir", str(cwd)]


def _in_bubblewrap(launch: Launch) -> Launch:
    """Below bwrap the shim comes once more, for two things bwrap does not do.

    The payload's environment reaches only the payload: an LD_PRELOAD would run in bwrap, which is outside. And a TERM,
    which everybody gets, would end bwrap at once and the payload without its grace; so bwrap ignores it.
    """
    bwrap = _find("bwrap", "bubblewrap: there is no bwrap on the PATH; install the package bubblewrap")
    shim = shim_command()
    own = {os.path.dirname(shim[-1])} | ({sys.prefix, sys.base_prefix} if len(shim) > 1 else set())
    words = bubblewrap_words(bwrap, launch.cwd, visible=tuple(sorted(own)))
    _try([*words, "--", "/bin/true"])
    inner = [*shim, "-1", "-1", "3", "0", "session", "-"]
    return replace(launch, argv=[*words, "--", *inner, *launch.argv], wrapped=True)


def _try(words: list[str]) -> None:
    """Raises `Refused` where it does not run: a payload that bwrap cannot start would look like one that failed."""
    try:
        done = subprocess.run(words, env={}, stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise Refused(f"bubblewrap: {exc}") from exc
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
        raise Refused(f"bubblewrap: {said}; an ordinary user needs user namespaces (user.max_user_namespaces)")


# -- apptainer ---------------------------------------------------------------------------------------------------


def apptainer_words(program: str, cwd: Path, image: str) -> list[str]:
    """The call of apptainer, or singularity, without what it is to run."""
    return [program, "exec", "--contain", "--cleanenv", "--bind", f"{cwd}:{cwd}", "--pwd", str(cwd), image]


def apptainer_environment(program: str, env: dict[str, str]) -> dict[str, str]:
    """Variables for apptainer, which hands on those meant for the payload and no others.

    As they are they would steer apptainer itself, which is outside: APPTAINER_BIND, LD_PRELOAD.
    """
    prefix = "SINGULARITYENV_" if Path(program).name == "singularity" else "APPTAINERENV_"
    own = {
        name: os.environ[name] for name in ("HOME", "APPTAINER_CACHEDIR", "SINGULARITY_CACHEDIR") if name in os.environ
    }
    return {"PATH": DEFAULT_PATH, **own, **{prefix + name: value for name, value in env.items()}}


def _in_apptainer(launch: Launch) -> Launch:
    if launch.image is None or launch.image.startswith("-"):  # which would be one more option
        raise Refused(f"apptainer: no image was named, a path or docker://...: {launch.image}")
    if any(character in str(launch.cwd) for character in ":,"):
        raise Refused(f"apptainer: cannot be told of a work directory with a colon or a comma: {launch.cwd}")
    missing = "apptainer: there is neither apptainer nor singularity on the PATH; install the package apptainer"
    program = shutil.which("apptainer") or _find("singularity", missing)
    return replace(
        launch,
        argv=[*apptainer_words(program, launch.cwd, launch.image), *launch.argv],
        env=apptainer_environment(program, dict(launch.env)),
    )


def _find(program: str, missing: str) -> str:
    if found := shutil.which(program):
        return found
    raise Refused(missing)
