"""Sandboxes: archives among the inputs are unpacked, directories among the outputs are packed. Functions that block."""

from __future__ import annotations

import lzma
import os
import stat
import tarfile
import zlib
from collections.abc import Container
from contextlib import suppress
from pathlib import PurePosixPath
from typing import BinaryIO

from anyio import from_thread

from loadmaster.errors import StagingFailed
from loadmaster.names import check_local_name
from loadmaster.workdir import NotDeliverable, Workdir

COPY_BYTES = 1024 * 1024

_BROKEN = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
"""What reading a damaged archive may raise; the decompressors' errors have no common parent."""


def unpack(workdir: Workdir, name: str, taken: Container[str] = ()) -> None:
    """Unpack a tar archive of any compression into the work directory; a file that is none stays as it is.

    Files and directories only: a link, a device, a file with holes, a name that is `taken` or leads out of the directory
    raises `StagingFailed`. In a worker thread it stops between blocks when the job is killed or cancelled.
    """
    with os.fdopen(workdir.open_output(name), "rb") as file:
        try:
            if not tarfile.is_tarfile(file):
                return
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:*") as archive:
                for member in archive:
                    _unpack_member(workdir, archive, member, taken)
                while archive.fileobj is not None and archive.fileobj.read(COPY_BYTES):
                    continue  # to its very end: only there a decompressor compares checksums
        except _BROKEN as exc:
            raise StagingFailed("cannot unpack", [f"{name}: {exc}"]) from exc


def pack(workdir: Workdir, directory: str, archive: str) -> list[tuple[str, str]]:
    """Make a tar archive of a directory in the work directory. Returns what was left out, each with its reason.

    What is left out is what may not leave: links out of the work directory, FIFOs, sockets, devices. Raises
    `StagingFailed`, and leaves no archive, when it cannot be written.
    """
    left_out = []
    try:
        with os.fdopen(workdir.create(archive), "wb") as out, tarfile.open(fileobj=out, mode="w") as tar:
            for name in workdir.files_below(directory):
                try:
                    descriptor = workdir.open_output(name)
                except OSError as exc:
                    left_out.append((name, exc.strerror or str(exc)))
                    continue
                with os.fdopen(descriptor, "rb") as file:
                    tar.addfile(_header(name, directory, file), file)
    except OSError as exc:
        with suppress(OSError):
            workdir.remove(archive)
        raise StagingFailed("cannot pack", [f"{directory}: {exc.strerror or exc}"]) from exc
    return left_out


def _header(name: str, directory: str, file: BinaryIO) -> tarfile.TarInfo:
    found = os.fstat(file.fileno())
    header = tarfile.TarInfo(str(PurePosixPath(name).relative_to(PurePosixPath(directory).parent)))
    header.size, header.mtime, header.mode = found.st_size, found.st_mtime, stat.S_IMODE(found.st_mode)
    return header


def _unpack_member(workdir: Workdir, archive: tarfile.TarFile, member: tarfile.TarInfo, taken: Container[str]) -> None:
    name = member.name.removeprefix("./").rstrip("/")
    if member.isdir():
        if name not in {"", "."}:
            workdir.make_directory(check_local_name(name))
        return
    if name in taken:
        raise NotDeliverable(f"{member.name!r} is the name of another input, or of a log")
    if member.issparse():
        raise NotDeliverable(f"{member.name!r} is a file with holes: a few bytes can stand for terabytes")
    content = archive.extractfile(member) if member.isreg() else None
    if content is None:
        raise NotDeliverable(f"{member.name!r} is neither a file nor a directory")
    with os.fdopen(workdir.create(check_local_name(name)), "wb") as target:
        while block := content.read(COPY_BYTES):
            with suppress(RuntimeError):  # not in a worker thread: nobody can cancel it
                from_thread.check_cancelled()
            target.write(block)
        os.fchmod(target.fileno(), stat.S_IMODE(member.mode) & 0o755 | 0o600)
