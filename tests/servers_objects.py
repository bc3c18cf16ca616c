"""Servers for the tests of object stores and of XRootD, on 127.0.0.1, in directories of the tests', ended with them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from conftest import TEMPORARY

START_SECONDS = 30.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def program(name: str) -> str:
    """Where a program is: in PATH, beside the interpreter, where npm puts those of this directory. Skips without it."""
    places = [os.environ.get("PATH", ""), str(Path(sys.executable).parent), "/usr/sbin", "node_modules/.bin"]
    path = shutil.which(name, path=os.pathsep.join(places))
    if path is None:
        pytest.skip(f"{name} is not installed")
    return os.path.abspath(path)


@contextmanager
def running(command: Sequence[str], port: int, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server of a group of its own, from when its port answers."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        give_up = time.monotonic() + START_SECONDS
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > give_up:
                said = (home / "server.log").read_text(errors="replace")[-400:]
                pytest.skip(f"{command[0]} did not start: {said}")
            time.sleep(0.02)
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # a test has ended it
        for order in (signal.SIGCONT, signal.SIGTERM):
            os.killpg(process.pid, order)
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(port: int) -> bool:
    with socket.socket() as trial:
        return trial.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def moto(home: Path) -> Iterator[str]:
    """An endpoint that speaks S3, and as much of it as Google's own XML interface has in common with it."""
    port = free_port()
    with running([program("moto_server"), "-H", "127.0.0.1", "-p", str(port)], port, home):
        yield f"http://127.0.0.1:{port}"


AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Everybody's: they are in the emulator's documentation."""


@contextmanager
def azurite(home: Path) -> Iterator[str]:
    """An endpoint of Azure's emulator, its account included."""
    port = free_port()
    command = [program("azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    quiet = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]
    with running([*command, *quiet], port, home):
        yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"


XROOTD = """
xrd.port {port}
xrd.network nodnr
oss.localroot {root}
all.export /
all.adminpath {home}/admin
all.pidpath {home}/admin
xrootd.chksum max 2 adler32 crc32c md5
"""


@contextmanager
def xrootd() -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """The URL of an XRootD server, the directory it serves, and its process. Started by root it becomes nobody.

    Not below pytest's own directory, which only its owner may enter.
    """
    with tempfile.TemporaryDirectory(dir=TEMPORARY, ignore_cleanup_errors=True) as name:
        home, port = Path(name), free_port()
        root = home / "root"
        for directory in (home / "admin", root):
            directory.mkdir()
        (home / "xrootd.cfg").write_text(XROOTD.format(port=port, root=root, home=home))
        command = [program("xrootd"), "-c", str(home / "xrootd.cfg"), "-l", str(home / "xrootd.log"), "-n", "tests"]
        if os.geteuid() == 0:
            for directory in (home, home / "admin", root):
                shutil.chown(directory, "nobody", "nogroup")
            command += ["-R", "nobody"]
        with running(command, port, home) as process:
            yield f"root://127.0.0.1:{port}/", root, process
