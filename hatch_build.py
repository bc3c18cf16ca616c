"""The build step: compile the shim into the package. Without a compiler there is none, and its Python twin is used.

`CC` names the compiler, `cc` by default.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = "loadmaster/payload"


def compile_shim(source: Path, target: Path) -> str | None:
    """Compile; None, or why there is no shim. Static first: it starts in half the time, and runs on every libc."""
    reason = "Linux only"
    if not sys.platform.startswith("linux"):
        return reason
    words = shlex.split(os.environ.get("CC") or "cc")
    for linking in (["-static"], []):
        try:
            done = subprocess.run(
                [*words, "-Os", *linking, "-s", "-o", str(target), str(source)], capture_output=True, text=True
            )
        except OSError as exc:
            return str(exc)
        if done.returncode == 0:
            target.chmod(0o755)
            return None
        reason = done.stderr.strip() or f"{words[0]} ended with {done.returncode}"
    return reason


class ShimHook(BuildHookInterface[Any]):
    """Puts the shim into a wheel, or beside its source for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Before each build."""
        if self.target_name != "wheel":
            return
        source = Path(self.root, "src", PACKAGE, "shim.c")
        self.scratch = tempfile.TemporaryDirectory()
        built = Path(self.scratch.name, "shim")
        in_place = source.with_suffix("")
        if reason := compile_shim(source, built):
            self.app.display_warning(f"loadmaster: no compiled shim, its Python twin will be used: {reason}")
            if version == "editable":
                in_place.unlink(missing_ok=True)  # one of an older source
            return
        if version == "editable":
            new = in_place.with_suffix(".new")  # renamed into place: the old one may be running
            new.write_bytes(built.read_bytes())
            new.chmod(0o755)
            new.replace(in_place)
        else:
            build_data["force_include"][str(built)] = f"{PACKAGE}/shim"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """After each build."""
        if self.target_name == "wheel":
            self.scratch.cleanup()
