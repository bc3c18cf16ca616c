"""What the tests of control groups share: hierarchies as a node may have them, and processes that join a group."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from loadmaster.payload.cgroup import Group
from loadmaster.payload.hierarchies import V2, Hierarchies, find_hierarchies, own_candidates

ZOO: Final = Path(__file__).parent / "zoo"

JOIN: Final = (
    "import os, sys\nfor one in sys.argv[1].split(','): os.write(int(one), b'0')\nos.execvp(sys.argv[2], sys.argv[2:])"
)
"""What the shim does before it executes the payload."""

Join = Callable[..., "subprocess.Popen[str]"]


def joined(group: Group, argv: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """A process that is in a group before it is what it will be."""
    words = [sys.executable, "-I", "-S", "-c", JOIN, ",".join(map(str, group.descriptors)), *argv]
    return subprocess.Popen(
        words, pass_fds=group.descriptors, cwd=cwd, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def v1_only(directory: Path) -> Hierarchies:
    """What there is when nothing is known of v2: two files of /proc, without the lines that speak of it."""
    for name, sign in (("cgroup", "0::"), ("mountinfo", " - cgroup2 ")):
        lines = Path("/proc/self", name).read_text().splitlines(keepends=True)
        (directory / name).write_text("".join(line for line in lines if sign not in line))
    return find_hierarchies(proc=directory)


def own_v2() -> Path | None:
    """The v2 group of the tests, if it is in sight."""
    proc = Path("/proc/self")
    found = own_candidates((proc / "cgroup").read_text(), (proc / "mountinfo").read_text())
    return next((one.path for one in found if one.kind == V2), None)


def groups_in_sight() -> set[str]:
    """Everything of ours below the mounted hierarchies."""
    found: set[str] = set()
    with suppress(OSError):
        for top, names, _ in os.walk("/sys/fs/cgroup"):
            found.update(os.path.join(top, name) for name in names if name.startswith("loadmaster"))
    return found
