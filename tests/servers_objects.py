"""Servers for the tests of object stores and of XRootD, on 127.0.0.1, in directories of the tests', ended with them."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import _servers

from conftest import TEMPORARY
from servers import or_skip


@contextmanager
def moto(home: Path) -> Iterator[str]:
    """An endpoint that speaks S3, and as much of it as Google's own XML interface has in common with it."""
    with or_skip(), _servers.moto(home) as url:
        yield url


AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""Everybody's: they are in the emulator's documentation."""


@contextmanager
def azurite(home: Path) -> Iterator[str]:
    """An endpoint of Azure's emulator, its account included."""
    port = _servers.free_port()
    quiet = ["--silent", "--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence"]
    with or_skip():
        command = [_servers.program("azurite-blob"), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with or_skip(), _servers.running([*command, *quiet], port, home):
        yield f"http://127.0.0.1:{port}/{AZURE_ACCOUNT}"


@contextmanager
def xrootd() -> Iterator[tuple[str, Path, subprocess.Popen[bytes]]]:
    """The URL of an XRootD server, the directory it serves, and its process. Started by root it becomes nobody.

    Not below pytest's own directory, which only its owner may enter.
    """
    with tempfile.TemporaryDirectory(dir=TEMPORARY, ignore_cleanup_errors=True) as name:
        home, root = Path(name), Path(name, "root")
        chksum = "xrootd.chksum max 2 adler32 crc32c md5\n"
        with or_skip(), _servers.xrootd_process(home, root, chksum) as (url, process):
            yield url, root, process
