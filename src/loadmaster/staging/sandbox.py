"""Sandboxes: archives among the inputs are unpacked, outputs are packed. Functions that block.

In a worker thread they stop between blocks when the job is killed or cancelled, and leave nothing half-made.
"""

from __future__ import annotations

import bz2
import os
import shutil
import stat
import tarfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any, BinaryIO, Final, Literal, cast

from anyio import from_thread

from loadmaster.errors import StagingFailed
from loadmaster.names import MAX_NAME_BYTES, check_local_name
from loadmaster.staging.archives import BLOCK_BYTES, BROKEN, ArchiveLimits, Entry, Kind, Refused, entries, zstd_library
from loadmaster.storage.checksums import Checksum, running
from loadmaster.workdir import Workdir

SandboxFormat = Literal["tar.bz2", "tar.zst"]

LATEST: Final = 2**33
"""The last time a file is given, in the year 2242: a date no file system can hold is not worth a job."""

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


# -- in ----------------------------------------------------------------------------------------------------------


def unpack(
    workdir: Workdir,
    name: str,
    taken: Collection[str] = (),
    limits: ArchiveLimits = ArchiveLimits(),  # noqa: B008  # frozen
) -> None:
    """Unpack an archive into the work directory, all of it or nothing; a file that is none stays as it is.

    Files, directories, and links that lead to somewhere in the archive's own tree. Anything else, and a name that is
    `taken` or leads out of the directory, raises `StagingFailed` that names it. What the directory has already is replaced.
    """
    with os.fdopen(workdir.open_output(name), "rb") as file:
        try:
            found = entries(file, name, limits)
            if found is None:
                return
            with _aside(workdir) as (top, aside):
                with _Tree(aside, limits) as tree:
                    _fill(tree, found, frozenset(taken), limits)
                _move(aside, top, "", only_look=True)
                _move(aside, top, "")
        except OSError as exc:
            raise StagingFailed("cannot unpack", [f"{name}: {exc.strerror or exc}"]) from exc
        except BROKEN as exc:
            raise StagingFailed("cannot unpack", [f"{name}: {exc}"]) from exc


@contextmanager
def _aside(workdir: Workdir) -> Iterator[tuple[int, int]]:
    """The work directory, and a new directory in it that is removed again with everything in it."""
    top, name = workdir.descriptor(), f".{os.urandom(8).hex()}.part"
    try:
        os.mkdir(name, 0o700, dir_fd=top)
        try:
            aside = os.open(name, _DIRECTORY, dir_fd=top)
            try:
                yield top, aside
            finally:
                os.close(aside)
        finally:
            shutil.rmtree(name, dir_fd=top, ignore_errors=True)
    finally:
        os.close(top)


class _Tree:
    """A tree that only we write to. A name is made once; the directory that was used last is kept open."""

    def __init__(self, top: int, limits: ArchiveLimits) -> None:
        self._top, self._most = top, limits.entries
        self._folder, self._descriptor = "", os.dup(top)
        self._made = 0

    def __enter__(self) -> _Tree:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def enter(self, folder: str) -> int:
        """A descriptor of a directory that is made if need be; good until the next call."""
        if folder != self._folder:
            descriptor = os.dup(self._top)
            try:
                for part in folder.split("/") if folder else ():
                    below = self._step(part, descriptor)
                    os.close(descriptor)
                    descriptor = below
            except BaseException:
                os.close(descriptor)
                raise
            os.close(self._descriptor)
            self._folder, self._descriptor = folder, descriptor
        return self._descriptor

    def create(self, name: str) -> int:
        """A descriptor of a new file."""
        folder, _, last = name.rpartition("/")
        return os.open(last, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self.enter(folder))

    def link(self, name: str, target: str) -> None:
        """Another name for a file that is there already."""
        folder, _, last = target.rpartition("/")
        source = os.dup(self.enter(folder))
        try:
            if not stat.S_ISREG(os.stat(last, dir_fd=source, follow_symlinks=False).st_mode):
                raise Refused("is a hard link to what is not a file")
            folder, _, new = name.rpartition("/")
            os.link(last, new, src_dir_fd=source, dst_dir_fd=self.enter(folder), follow_symlinks=False)
        finally:
            os.close(source)

    def symlink(self, name: str, target: str) -> None:
        """A symbolic link."""
        folder, _, last = name.rpartition("/")
        os.symlink(target, last, dir_fd=self.enter(folder))

    def _step(self, part: str, folder: int) -> int:
        with suppress(FileExistsError):
            os.mkdir(part, 0o755, dir_fd=folder)
            self._made += 1
            if self._made > self._most:
                raise Refused(f"makes more than {self._most:,} directories")
        return os.open(part, _DIRECTORY, dir_fd=folder)


def _fill(tree: _Tree, found: Iterator[Entry], taken: frozenset[str], limits: ArchiveLimits) -> None:
    """Write everything. Links come last, hard ones before symbolic ones: so nothing is ever written through one."""
    above = {str(parent) for name in taken for parent in PurePosixPath(name).parents}
    links: list[tuple[str, Entry]] = []
    for entry in found:
        _heed_cancellation()
        name = entry.name.removeprefix("./").rstrip("/")
        if name in {"", "."} and entry.kind is Kind.DIRECTORY:
            continue
        with _blamed(entry):
            _allow(check_local_name(name), entry.kind, taken, above, limits)
            if entry.kind is Kind.DIRECTORY:
                tree.enter(name)
            elif entry.kind is Kind.FILE:
                _write(tree.create(name), entry)
            else:
                links.append((name, entry))
    links.sort(key=lambda link: link[1].kind is Kind.SYMLINK)
    for name, entry in links:
        with _blamed(entry):
            if entry.kind is Kind.SYMLINK:
                tree.symlink(name, _leads_inside(name, entry.target))
            else:
                tree.link(name, check_local_name(entry.target.removeprefix("./")))


@contextmanager
def _blamed(entry: Entry) -> Iterator[None]:
    """Say of which entry it is that something is wrong."""
    try:
        yield
    except FileExistsError as exc:
        raise Refused(f"{entry.name!r} is in it twice") from exc
    except NotADirectoryError as exc:
        raise Refused(f"{entry.name!r} is in something that is a file too") from exc
    except FileNotFoundError as exc:
        raise Refused(f"{entry.name!r} is a hard link to {entry.target!r}, which is not in it") from exc
    except Refused as exc:
        told = str(exc)
        raise Refused(told if repr(entry.name) in told else f"{entry.name!r} {told}") from exc
    except OSError as exc:
        raise OSError(exc.errno, f"{entry.name!r}: {exc.strerror or exc}") from exc
    except ValueError as exc:  # of names
        told = str(exc)
        raise Refused(told if repr(entry.name) in told else f"{entry.name!r}: {told}") from exc


def _allow(name: str, kind: Kind, taken: frozenset[str], above: set[str], limits: ArchiveLimits) -> None:
    folders = [str(parent) for parent in PurePosixPath(name).parents]
    if len(folders) > limits.depth:
        raise Refused(f"{name[:40]!r}… lies deeper than {limits.depth} directories")
    if name in taken or not taken.isdisjoint(folders):
        raise Refused(f"{name!r} is the name of another input, or of a log")
    if name in above and kind is not Kind.DIRECTORY:
        raise Refused(f"{name!r} is where another input, or a log, has its directory")


def _leads_inside(name: str, target: str) -> str:
    """The target of a symbolic link, once it is sure that it leads to somewhere in the same tree.

    `..` only at the beginning, and not above the top. So every link leads from a real directory up and then down, and
    no chain of them leads out, whatever the links on the way are.
    """
    if not target or target.startswith("/") or len(target) > MAX_NAME_BYTES or not target.isprintable():
        raise Refused(f"is a symbolic link out of the archive, to {target[:80]!r}")
    parts = [part for part in target.split("/") if part not in {"", "."}]
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    if ".." in parts[ups:] or ups > name.count("/"):
        raise Refused(f"is a symbolic link out of the archive, to {target[:80]!r}")
    return target


def _write(descriptor: int, entry: Entry) -> None:
    with os.fdopen(descriptor, "wb", buffering=0) as target:
        for block in entry.blocks:
            _heed_cancellation()
            left = memoryview(block)
            while left:
                left = left[target.write(left) :]
        os.fchmod(descriptor, entry.mode & 0o755 | 0o600)
        if 0 <= entry.mtime < LATEST:
            os.utime(descriptor, (entry.mtime, entry.mtime))


def _move(source: int, target: int, folder: str, *, only_look: bool = False) -> None:
    """Move what is in one directory into another, over files; or only see that nothing would be in the way."""
    with os.scandir(source) as found:
        names = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in found]
    for name, is_directory in names:
        try:
            there = stat.S_ISDIR(os.stat(name, dir_fd=target, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            if not only_look:
                os.rename(name, name, src_dir_fd=source, dst_dir_fd=target)
            continue
        if there != is_directory:
            raise Refused(f"{folder + name!r} cannot be put in place of what is {'' if there else 'not '}a directory")
        if not is_directory:
            if not only_look:
                os.replace(name, name, src_dir_fd=source, dst_dir_fd=target)
            continue
        with _opened(name, source) as below, _opened(name, target) as below_target:
            _move(below, below_target, f"{folder}{name}/", only_look=only_look)


@contextmanager
def _opened(name: str, folder: int) -> Iterator[int]:
    descriptor = os.open(name, _DIRECTORY, dir_fd=folder)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# -- out ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Packed:
    """An archive of outputs in the work directory."""

    name: str
    """`<checksum>.<format>`, as DIRAC calls its sandboxes."""
    file: str
    """What it is called in the work directory: hidden, so that no pattern of the job's outputs finds it."""
    size_bytes: int
    checksum: Checksum
    files: int
    """How many are in it."""
    left_out: tuple[tuple[str, str], ...]
    """What may not leave or could not be packed, each with its reason."""
    gone: tuple[str, ...]
    """What was not there."""
    oversize: bool
    """More than the limit: DIRAC's wrapper then takes it to grid storage, as output data."""


def pack_sandbox(
    workdir: Workdir,
    names: Sequence[str],
    sandbox_format: SandboxFormat = "tar.bz2",
    limit_bytes: int | None = None,
    called: Mapping[str, str] = MappingProxyType({}),
    *,
    algorithm: str = "md5",
) -> Packed:
    """Pack outputs flat, by the last parts of their names, into one archive in the work directory.

    In the order of their names, owned by nobody, with their times in whole seconds: the same files give the same archive.
    `called`: what a file is called in the work directory, if that is another name. `algorithm`: of the archive's checksum
    and so of its name. Raises `StagingFailed`, and leaves no archive, when it cannot be written.
    """
    left_out: list[tuple[str, str]] = []
    gone: list[str] = []
    flat: dict[str, str] = {}
    for name in sorted(set(names)):
        last = name.rpartition("/")[2]
        if last in flat:
            left_out.append((name, f"has the same last part as {flat[last]}"))
        else:
            flat[last] = name
    part = f".{os.urandom(8).hex()}.part"
    files = 0
    with _removed_if_failed(workdir, part, f"the output sandbox as {sandbox_format}"):
        with os.fdopen(workdir.create(part), "wb", buffering=0) as out:
            summed = _Summed(out, algorithm)
            compressed = _compressed(summed, sandbox_format)
            with compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
                for last, name in flat.items():
                    try:
                        files += _add(workdir, tar, called.get(name, name), last, left_out)
                    except FileNotFoundError:
                        gone.append(name)
        checksum = summed.running.result()
        archive = f"{checksum.digits}.{sandbox_format}"
        workdir.rename(part, f".{archive}")
    oversize = limit_bytes is not None and summed.size_bytes > limit_bytes
    return Packed(
        archive, f".{archive}", summed.size_bytes, checksum, files, tuple(left_out), tuple(gone), oversize
    )  # fmt: skip


def pack(workdir: Workdir, directory: str, archive: str) -> list[tuple[str, str]]:
    """Make a tar archive of a directory in the work directory. Returns what was left out, each with its reason.

    What is left out is what may not leave: links out of the work directory, FIFOs, sockets, devices. Raises
    `StagingFailed`, and leaves no archive, when it cannot be written.
    """
    left_out: list[tuple[str, str]] = []
    above = PurePosixPath(directory).parent
    with (
        _removed_if_failed(workdir, archive, directory),
        os.fdopen(workdir.create(archive), "wb") as out,
        tarfile.open(fileobj=out, mode="w") as tar,
    ):
        for name in workdir.files_below(directory):
            try:
                _add(workdir, tar, name, str(PurePosixPath(name).relative_to(above)), left_out)
            except FileNotFoundError as exc:
                left_out.append((name, exc.strerror or str(exc)))
    return left_out


@contextmanager
def _removed_if_failed(workdir: Workdir, archive: str, what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as exc:
        with suppress(OSError):
            workdir.remove(archive)
        if isinstance(exc, OSError | Refused):
            raise StagingFailed("cannot pack", [f"{what}: {getattr(exc, 'strerror', None) or exc}"]) from exc
        raise


def _add(workdir: Workdir, tar: tarfile.TarFile, name: str, as_name: str, left_out: list[tuple[str, str]]) -> bool:
    """Add a file, or its name to what was left out; whether it was added. Raises FileNotFoundError."""
    _heed_cancellation()
    try:
        descriptor = workdir.open_output(name)
    except FileNotFoundError:
        raise
    except OSError as exc:
        left_out.append((name, exc.strerror or str(exc)))
        return False
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        found = os.fstat(descriptor)
        header = tarfile.TarInfo(as_name)
        header.size, header.mtime, header.mode = found.st_size, int(found.st_mtime), stat.S_IMODE(found.st_mode) & 0o777
        content = _Steady(file)
        tar.addfile(header, cast(BinaryIO, content))
    if content.short:
        left_out.append((name, "became shorter while it was packed; zeros are in place of the rest"))
    tar.members.clear()  # type: ignore[attr-defined]  # all headers, kept for questions nobody asks
    return True


class _Steady:
    """A file of the size its header says, whoever still writes to it."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.short = False

    def read(self, count: int) -> bytes:
        _heed_cancellation()
        data = b""
        while len(data) < count and (more := self._file.read(count - len(data))):
            data += more
        if len(data) < count:
            self.short = True
        return data.ljust(count, b"\0")


class _Summed:
    """Writes to a file; knows the size and the checksum of what it wrote."""

    def __init__(self, out: Any, algorithm: str) -> None:
        self._out = out
        self.running = running(algorithm)
        self.size_bytes = 0

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        while left:
            left = left[self._out.write(left) :]
        self.running.update(data)
        self.size_bytes += len(data)
        return len(data)


class _Compressor:
    """Compresses what is written to it; the last of it comes when it is closed without an error."""

    def __init__(self, out: _Summed, encoder: Any) -> None:
        self._out, self._encoder = out, encoder

    def __enter__(self) -> _Compressor:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._out.write(self._encoder.flush())

    def write(self, data: bytes) -> int:
        for start in range(0, len(data), BLOCK_BYTES):
            if packed := self._encoder.compress(data[start : start + BLOCK_BYTES]):
                self._out.write(packed)
        return len(data)


def _compressed(out: _Summed, sandbox_format: SandboxFormat) -> Any:
    encoder = bz2.BZ2Compressor() if sandbox_format == "tar.bz2" else zstd_library().ZstdCompressor()
    return _Compressor(out, encoder)


def _heed_cancellation() -> None:
    with suppress(RuntimeError):  # not in a worker thread: nobody can cancel it
        from_thread.check_cancelled()
