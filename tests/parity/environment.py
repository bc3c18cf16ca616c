"""DIRAC in a virtual environment of its own, and cases run in it. DIRAC is GPL: it is installed beside us, run as a program
of its own, and nothing of it is imported here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

VERSION: Final = "9.1.22"
"""The one the record was made with."""

WITHOUT_DEPENDENCIES: Final = (f"DIRAC=={VERSION}", f"DIRACCommon=={VERSION}", "diraccfg==1.0.1")
IMPORTED: Final = (
    "cachetools", "importlib_metadata", "importlib_resources", "packaging", "psutil", "pyasn1", "pyasn1-modules",
    "pydantic", "pyparsing", "requests", "typing_extensions", "zstandard",
)  # fmt: skip
"""What of DIRAC's some sixty dependencies the job wrapper imports; M2Crypto and diracx are placeholders in the driver."""

DRIVER: Final = Path(__file__).with_name("driver.py")


class NotThere(Exception):
    """DIRAC cannot be had on this machine; why."""


def cache() -> Path:
    """Where the environment is kept from one run to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    number = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Path(os.environ.get("LOADMASTER_DIRAC_ENVIRONMENT", f"{base}/loadmaster/dirac-{VERSION}-python{number}"))


def dirac_python() -> Path:
    """The interpreter that has DIRAC; installed if need be, which takes a minute. Raises `NotThere`."""
    home = cache()
    python = home / "bin" / "python"
    if not (home / "complete").exists():
        shutil.rmtree(home, ignore_errors=True)
        home.parent.mkdir(parents=True, exist_ok=True)
        _run([sys.executable, "-m", "venv", str(home)])
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        _run([*pip, "--no-deps", *WITHOUT_DEPENDENCIES])
        _run([*pip, *IMPORTED])
        (home / "complete").touch()
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise NotThere(f"{command[0]}: {exc}") from exc
    if done.returncode:
        raise NotThere(f"{' '.join(command[1:5])}: {(done.stderr.strip() or done.stdout.strip())[-500:]}")


def ask(python: Path, case: Mapping[str, Any], *, seconds: float = 180) -> dict[str, Any]:
    """What DIRAC's wrapper answers to one case. A few seconds at least: it sleeps five before it looks at a payload."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, answer, log = (Path(scratch) / name for name in ("case.json", "answer.json", "log"))
        asked.write_text(json.dumps(case))
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
        env["PARITY_SCRATCH"] = env["HOME"] = str(Path(scratch) / "scratch")
        with log.open("w") as output:
            subprocess.run(
                [python, DRIVER, asked, answer], env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                timeout=seconds, start_new_session=True, check=False,
            )  # fmt: skip
        if not answer.exists():
            raise RuntimeError(f"{case['name']}: the driver gave no answer: {log.read_text()[-2000:]}")
        answered: dict[str, Any] = json.loads(answer.read_text())
        return answered


def ask_all(python: Path, cases: Iterable[Mapping[str, Any]], *, at_once: int = 16) -> dict[str, dict[str, Any]]:
    """The answers to many cases, by name. They sleep most of the time: more at once than there are cores."""
    cases = list(cases)
    with ThreadPoolExecutor(at_once) as threads:
        return dict(
            zip((case["name"] for case in cases), threads.map(lambda each: ask(python, each), cases), strict=True)
        )
