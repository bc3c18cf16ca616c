"""What is in an archive: tar in any compression, and zip. Read as a stream, in constant memory, nothing in it believed.

The standard library's readers take whole headers, lists of holes and directories into memory as an archive asks for them.
This one knows files, directories and links, and names every other entry that it refuses.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from importlib import import_module
from typing import Any, BinaryIO, Final, Protocol

from loadmaster.names import MAX_NAME_BYTES

BLOCK_BYTES: Final = 1024 * 1024
RECORD: Final = 512
"""Tar's unit: headers are one, contents are filled up to a multiple."""

HEADER_BYTES: Final = 256 * 1024
"""Of one extended header: a name of 1,024 bytes and some attributes need 2,000; they are held in memory."""

HEADERS: Final = 8
"""Extended headers in a row: in use are two for a long name and a long link, and one of either kind in pax."""

WINDOW_BYTES: Final = 128 * 1024 * 1024
"""What a decompressor may have in memory: what `xz -9` (64 MiB) and `zstd --ultra` (128 MiB) need."""


NAMES: Final = (
    *(".tar", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst"),
    *(".tgz", ".tbz", ".tbz2", ".txz", ".tzst"),
)
"""What says of itself that it is an archive, and is refused when it is not."""


class Refused(ValueError):
    """Something in an archive that is not unpacked; the message names the entry and says why."""


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """How much may come out of an archive."""

    entries: int = 50_000
    """Files, links and directories, also those that are only parts of names. A large software installation has 30,000."""
    total_bytes: int = 20 * 1024**3
    """What sites give a job of disk for each core."""
    file_bytes: int = 10 * 1024**3
    """Of one file."""
    ratio: int = 200
    """How many times its own size an archive may unpack to, once it is more than `ratio_from_bytes`. Text comes to 5-20."""
    ratio_from_bytes: int = 64 * 1024**2
    depth: int = 64
    """Parts of a name."""
    zip: bool = True
    """Whether what is called `*.zip` is an archive at all. Other names never are: `.npz`, `.jar` and `.whl` are zip too."""


class Kind(Enum):
    """What an entry is; the rest is refused while reading."""

    FILE = "a file"
    DIRECTORY = "a directory"
    SYMLINK = "a symbolic link"
    HARDLINK = "a hard link"


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing in an archive. The name and the target are as they are there: check them."""

    name: str
    kind: Kind
    size_bytes: int = 0
    mode: int = 0o644
    mtime: int = 0
    target: str = ""
    blocks: Iterable[bytes] = ()
    """The content of a file; gone when the next entry is asked for."""


def entries(file: BinaryIO, name: str, limits: ArchiveLimits) -> Iterator[Entry] | None:
    """What is in a file, in its order; None when it is no archive.

    The iterator raises `Refused` for what may not be in an archive, or may not be so much, and what the decompressors
    raise (`BROKEN`) for a damaged one. It reads to the very end, for only there checksums are compared.
    """
    start = file.read(RECORD)
    size = file.seek(0, 2)
    file.seek(0)
    if name.lower().endswith(".zip"):
        return _of_zip(file, limits) if limits.zip and start.startswith((b"PK\3\4", b"PK\5\6")) else None
    named = name.lower().endswith(NAMES)
    stream = _Counted(_decompressed(file, start, named), size, limits)
    try:
        first = stream.upto(RECORD)
    except BROKEN:
        if named:
            raise
        return None
    if not _is_header(first):
        if named and first not in {b"", _EMPTY}:
            raise Refused("is not the tar archive that its name says")
        return None
    return _of_tar(first, stream, limits)


# -- the bytes ---------------------------------------------------------------------------------------------------


class _Readable(Protocol):
    def read(self, count: int, /) -> bytes: ...


class _Decoder(Protocol):
    """What bz2, lzma and zstd have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Streams:
    """One decompressed stream after the other, as bzip2, xz and zstd write them when they work in parallel."""

    def __init__(self, file: BinaryIO, decoder: Callable[[], _Decoder]) -> None:
        self._file, self._make, self._decoder = file, decoder, decoder()
        self._input = b""

    def read(self, count: int) -> bytes:
        while True:
            if self._decoder.eof:
                rest = (self._decoder.unused_data or self._file.read(BLOCK_BYTES)).lstrip(b"\0")
                if not rest and not (rest := self._file.read(BLOCK_BYTES).lstrip(b"\0")):
                    return b""
                self._decoder, self._input = self._make(), rest
            elif self._decoder.needs_input and not self._input:
                self._input = self._file.read(BLOCK_BYTES)
                if not self._input:
                    raise EOFError("it ends in the middle of its compressed data")
            data = self._decoder.decompress(self._input, count)
            self._input = b""
            if data:
                return data


def _zstd() -> Any:
    """The library, where there is one: the standard one of Python 3.14, or its backport."""
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            continue
    return None


def zstd_library() -> Any:
    """The module that has `ZstdCompressor` and its like. Raises `Refused` that says what to install."""
    if (module := _zstd()) is None:
        raise Refused("zstd takes Python 3.14 or the package backports.zstd: pip install loadmaster[zstd]")
    return module


BROKEN: Final[tuple[type[Exception], ...]] = (
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    EOFError,
    OSError,
    ValueError,
    RuntimeError,  # zipfile: a compression it does not know
    *([_zstd().ZstdError] if _zstd() is not None else []),
)
"""What reading a damaged archive may raise; the decompressors' errors have no common parent."""


def _decompressed(file: BinaryIO, start: bytes, named: bool) -> _Readable:
    if start.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=file)
    if start.startswith(b"BZh"):
        return _Streams(file, bz2.BZ2Decompressor)
    if start.startswith(b"\xfd7zXZ\0"):
        return _Streams(file, lambda: lzma.LZMADecompressor(memlimit=WINDOW_BYTES))
    if start.startswith(b"\x28\xb5\x2f\xfd") and (named or _zstd() is not None):
        zstd = zstd_library()
        options = {zstd.DecompressionParameter.window_log_max: WINDOW_BYTES.bit_length() - 1}
        return _Streams(file, lambda: zstd.ZstdDecompressor(options=options))
    return file


class _Counted:
    """The bytes of an archive as they unpack, and an end to them."""

    def __init__(self, source: _Readable, packed_bytes: int, limits: ArchiveLimits) -> None:
        self.source = source
        self._left = limits.total_bytes
        self._why = f"unpacks to more than {limits.total_bytes:,} bytes"
        by_ratio = max(limits.ratio_from_bytes, limits.ratio * packed_bytes)
        if by_ratio < self._left:
            self._left = by_ratio
            self._why = f"unpacks to more than {limits.ratio} times its own {packed_bytes:,} bytes"

    def read(self, count: int) -> bytes:
        """Some bytes, none at the end."""
        data = self.source.read(min(count, BLOCK_BYTES))
        self._left -= len(data)
        if self._left < 0:
            raise Refused(self._why)
        return data

    def upto(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        data = self.read(count)
        while len(data) < count and (more := self.read(count - len(data))):
            data += more
        return data

    def blocks(self, count: int) -> Iterator[bytes]:
        """So many bytes in blocks."""
        while count:
            data = self.read(count)
            if not data:
                raise EOFError("it ends in the middle of a file")
            count -= len(data)
            yield data


# -- tar ---------------------------------------------------------------------------------------------------------

_EMPTY: Final = bytes(RECORD)

_KINDS: Final = {
    b"0": Kind.FILE,
    b"\0": Kind.FILE,
    b"7": Kind.FILE,
    b"1": Kind.HARDLINK,
    b"2": Kind.SYMLINK,
    b"5": Kind.DIRECTORY,
}
_OTHERS: Final = {
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a file with holes: a few bytes can stand for terabytes",
    b"D": "a part of an incremental backup",
    b"M": "a part of a file that began in another archive",
}


@dataclass(frozen=True, slots=True)
class _Extended:
    """What headers before a header say of its entry."""

    name: str | None = None
    target: str | None = None
    size_bytes: int | None = None
    mtime: int | None = None
    holes: bool = False


def _of_tar(record: bytes, stream: _Counted, limits: ArchiveLimits) -> Iterator[Entry]:
    count = headers = 0
    extended = _Extended()
    while record != _EMPTY:
        if not _is_header(record):
            raise Refused(f"is damaged: what follows entry {count} is not an entry" if record else "has no end")
        kind, size = record[156:157], _number(record[124:136])
        if kind in {b"L", b"K", b"x", b"X", b"g"}:
            headers += 1
            if size > HEADER_BYTES or headers > HEADERS:
                raise Refused(f"has an extended header of more than {HEADER_BYTES:,} bytes, or too many in a row")
            extended = _extend(extended, kind, b"".join(stream.blocks(size)))
        elif kind == b"V":  # the name of the whole
            size = 0
        else:
            count, headers = count + 1, 0
            entry = _entry(record, size, extended)
            _check(entry, count, limits)
            size = entry.size_bytes
            content = stream.blocks(size)
            yield replace(entry, blocks=content)
            for _ in content:  # what was not asked for
                continue
            extended = _Extended()
        for _ in stream.blocks(-size % RECORD):
            continue
        record = stream.upto(RECORD)
    while stream.read(BLOCK_BYTES):
        continue


def _entry(record: bytes, size: int, extended: _Extended) -> Entry:
    name = _text(record[:100])
    if record[257:263] == b"ustar\0" and record[345]:
        name = f"{_text(record[345:500])}/{name}"
    if extended.name is not None:
        name = extended.name
    code = record[156:157]
    if code in _OTHERS or extended.holes:
        raise Refused(f"{name!r} is {_OTHERS.get(code, _OTHERS[b'S'])}")
    if code not in _KINDS:
        raise Refused(f"{name!r} is of a kind that is not known ({code!r})")
    kind = Kind.DIRECTORY if code in {b"0", b"\0"} and name.endswith("/") else _KINDS[code]
    return Entry(
        name=name,
        kind=kind,
        size_bytes=(size if extended.size_bytes is None else extended.size_bytes) if kind is Kind.FILE else 0,
        mode=_number(record[100:108]) & 0o7777,
        mtime=_number(record[136:148]) if extended.mtime is None else extended.mtime,
        target=_text(record[157:257]) if extended.target is None else extended.target,
    )


def _extend(known: _Extended, kind: bytes, content: bytes) -> _Extended:
    if kind == b"L":
        return replace(known, name=_text(content))
    if kind == b"K":
        return replace(known, target=_text(content))
    words = dict(_records(content))
    if kind == b"g":
        if words.keys() & {"path", "linkpath", "size"}:
            raise Refused("has a header that gives all its entries one name, target or size")
        return known
    if any(key.startswith("GNU.sparse.") for key in words):
        known = replace(known, holes=True)
    try:
        return replace(
            known,
            name=words.get("path", known.name),
            target=words.get("linkpath", known.target),
            size_bytes=int(words["size"]) if "size" in words else known.size_bytes,
            mtime=int(float(words["mtime"])) if "mtime" in words else known.mtime,
        )
    except (ValueError, OverflowError) as exc:
        raise Refused(f"has an extended header that is damaged: {exc}") from exc


def _records(content: bytes) -> Iterator[tuple[str, str]]:
    """`<length> <key>=<value>\\n`, the length being that of the whole."""
    while content.rstrip(b"\0"):
        digits, space, _ = content[:16].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        record = content[len(digits) + 1 : length]
        if not space or length <= len(digits) + 1 or length > len(content) or not record.endswith(b"\n"):
            raise Refused("has an extended header that is damaged")
        key, _, value = record[:-1].partition(b"=")
        yield key.decode(errors="replace"), value.decode(errors="surrogateescape")
        content = content[length:]


def _is_header(record: bytes) -> bool:
    """Whether the record's checksum is right; some old programs took the bytes as signed."""
    if len(record) != RECORD or record == _EMPTY:
        return False
    try:
        wanted = _number(record[148:156])
    except Refused:
        return False
    others = record[:148] + b" " * 8 + record[156:]
    unsigned = sum(others)
    return wanted == unsigned or wanted == unsigned - 256 * sum(byte > 127 for byte in others)


def _number(field: bytes) -> int:
    """Octal digits; or, in GNU's archives and others', the bytes of a large number."""
    if field[0] & 0x80:
        if field[0] & 0x40:
            raise Refused("has a number below zero in a header")
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not set(digits) <= set(b"01234567"):
        raise Refused("has a header that is damaged")
    return int(digits or b"0", 8)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode(errors="surrogateescape")


def _check(entry: Entry, count: int, limits: ArchiveLimits) -> None:
    if count > limits.entries:
        raise Refused(f"has more than {limits.entries:,} entries")
    if not 0 <= entry.size_bytes <= limits.file_bytes:
        raise Refused(f"{entry.name!r} has {entry.size_bytes:,} bytes; {limits.file_bytes:,} are the most")


# -- zip ---------------------------------------------------------------------------------------------------------


class _Bounded:
    """A file of which nobody reads much at once: a zip's list of contents is read in one piece, whatever its size."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self._file, self._most = file, most
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count < 0:  # of the archive's last record, from where it is sought
            count = self._most
        if count > self._most:
            raise Refused("has more entries than may be in an archive")
        return self._file.read(count)


def _of_zip(file: BinaryIO, limits: ArchiveLimits) -> Iterator[Entry]:
    try:
        listing = max(BLOCK_BYTES, 512 * limits.entries)  # 46 bytes and the name for each
        archive = zipfile.ZipFile(_Bounded(file, listing))
    except zipfile.BadZipFile as exc:
        raise Refused(f"is damaged: {exc}") from exc
    with archive:
        packed = file.seek(0, 2)
        if (count := len(archive.infolist())) > limits.entries:
            raise Refused(f"has {count:,} entries; {limits.entries:,} are the most")
        for number, info in enumerate(archive.infolist(), 1):
            entry = _zipped(info)
            _check(entry, number, limits)
        stream = _Counted(file, packed, limits)
        for info in archive.infolist():
            entry = _zipped(info)
            if entry.kind is Kind.DIRECTORY:
                yield entry
                continue
            try:
                with archive.open(info) as content:
                    stream.source = content
                    if entry.kind is Kind.SYMLINK:
                        yield replace(entry, target=stream.upto(MAX_NAME_BYTES + 1).decode(errors="surrogateescape"))
                    else:
                        yield replace(entry, blocks=stream.blocks(entry.size_bytes))
                        while stream.read(BLOCK_BYTES):  # what was not asked for; at the end is the checksum
                            continue
            except zipfile.BadZipFile as exc:
                raise Refused(f"{entry.name!r} is damaged: {exc}") from exc


def _zipped(info: Any) -> Entry:
    name = info.orig_filename  # zipfile cuts the other one off at a NUL
    unix = info.external_attr >> 16 if info.create_system == 3 else 0
    kinds = {0: Kind.FILE, stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}
    kind = Kind.DIRECTORY if info.is_dir() else kinds.get(stat.S_IFMT(unix))
    if info.flag_bits & 0x1:
        raise Refused(f"{name!r} is encrypted")
    if kind is None:
        raise Refused(f"{name!r} is {'a FIFO' if stat.S_ISFIFO(unix) else 'a device or a socket'}")
    try:
        mtime = int(time.mktime((*info.date_time, 0, 0, -1)))
    except (OverflowError, ValueError):
        mtime = 0
    size = info.file_size if kind is not Kind.DIRECTORY else 0
    return Entry(name, kind, size, stat.S_IMODE(unix) or 0o644, mtime)
