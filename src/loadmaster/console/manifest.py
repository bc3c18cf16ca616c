"""The manifest of `loadmaster stage`: JSON Lines, in each line one file to move.

    {"source": "https://example.org/a.root", "target": "data/a.root", "size_bytes": 4096, "checksum": "adler32:0a1b2c3d"}

`source` and `target` are URLs or paths, relative ones from the current directory; the other two may be left out. Empty lines
mean nothing. A manifest is checked whole before anything moves, and a long one then read again as the files are moved: what
is remembered of its lines is 16 bytes each, so that a hundred thousand are no burden.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import chain, pairwise, repeat
from operator import itemgetter
from tempfile import TemporaryFile
from typing import Annotated, BinaryIO, Final

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from loadmaster.description import complaints
from loadmaster.errors import LoadmasterError
from loadmaster.names import file_url, is_url, local_file
from loadmaster.storage.checksums import Checksum, running

MAX_LINE_BYTES: Final = 64 * 1024
"""Longer than any two URLs; a file that is no manifest at all is not read into memory."""

_PLAIN: Final = re.compile(r"[A-Za-z0-9_.~/-]+")
"""Paths nothing of which has to be quoted: nearly all, and four times as fast."""

KEPT_LINES: Final = 16_384
"""A manifest of no more lines is kept as it was understood, in some 10 MB: to understand it twice takes as long as copying
small files. What is longer is read again."""

MOST_PROBLEMS: Final = 100
"""So many are named, the first ones, and the rest counted: nobody reads more of a file that is no manifest."""

EXAMPLE: Final = '{"source": "https://example.org/a.root", "target": "data/a.root"}'

LIKE: Final = f"; a line is like {EXAMPLE}"

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class BadManifest(LoadmasterError):
    """A manifest that cannot be used; `problems` names the lines at fault by their numbers."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__(f"{name}: " + "; ".join(problems))
        self.name, self.problems = name, problems


@dataclass(frozen=True, slots=True)
class Entry:
    """One file to move, and what is known of its content."""

    line: int
    source: str
    """A URL, as the target is."""
    target: str
    size_bytes: int | None = None
    checksum: Checksum | None = None


def _checksum(value: object) -> Checksum:
    if not isinstance(value, str):
        raise ValueError("a text is expected, as adler32:0a1b2c3d")  # noqa: TRY004 - pydantic collects these
    found = Checksum.parse(value)
    _check_computable(found.algorithm)
    return found


def _clean(text: str) -> str:
    if not text.isprintable() and any(character < " " or character == "\x7f" for character in text):
        raise ValueError("a path or URL may not have control characters")
    return text


@cache
def _check_computable(algorithm: str) -> None:
    running(algorithm)


_Place = Annotated[str, Field(min_length=1), AfterValidator(_clean)]


class _Words(BaseModel):
    """A line as it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: _Place
    target: _Place
    size_bytes: int | None = Field(None, ge=0, validation_alias=AliasChoices("size_bytes", "size"))
    checksum: Annotated[Checksum, PlainValidator(_checksum)] | None = None


class Manifest:
    """The lines of a manifest, all of them good. Made by `read`; to be closed."""

    def __init__(
        self,
        name: str,
        lines: BinaryIO,
        base: str,
        *,
        files: int,
        last_line: int,
        size_bytes: int | None,
        schemes: Mapping[str, str],
    ) -> None:
        self.name = name
        self.files = files
        self.last_line = last_line
        """The number of its last line; the first one is 1."""
        self.size_bytes = size_bytes
        """Of all files together; None when that of one is not given."""
        self.schemes = schemes
        """The kinds of storage it needs, and for each the first URL that does."""
        self._lines, self._base = lines, base
        self._entries: list[Entry] | None = None
        """All of them, if they are few."""

    @classmethod
    def read(
        cls, stream: BinaryIO, name: str, base: str, *, unserved: Callable[[str], str | None] = lambda scheme: None
    ) -> Manifest:
        """Check a stream to its end, keeping its lines in a temporary file. Blocks.

        `base`: the directory relative paths are taken from; `unserved`: why there is no storage for a scheme, if there is
        none. Raises `BadManifest` with all that is wrong, in the order of the lines, `MOST_PROBLEMS` at most.
        """
        lines = TemporaryFile(prefix="loadmaster-manifest-")  # noqa: SIM115 - the manifest's, until it is closed
        try:
            return cls._read(stream, name, base, lines, cache(unserved))
        except BaseException:
            lines.close()
            raise

    @classmethod
    def _read(
        cls, stream: BinaryIO, name: str, base: str, lines: BinaryIO, unserved: Callable[[str], str | None]
    ) -> Manifest:
        problems = _Problems()
        sources, targets = array("Q"), array("Q")
        schemes: dict[str, str] = {}
        entries: list[Entry] | None = []
        number = known = unknown = 0
        for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > MAX_LINE_BYTES:
                problems.add(number, f"of more than {MAX_LINE_BYTES} bytes; nothing after it was read")
                break
            try:
                entry = _entry(number, line, base)
            except ValueError as exc:
                problems.add(number, str(exc))
                entry = None
            lines.write(line)
            if number > KEPT_LINES:
                entries = None
            if entry is not None:
                if entries is not None:
                    entries.append(entry)
                known += entry.size_bytes or 0
                unknown += entry.size_bytes is None
                for url in (entry.source, entry.target):
                    schemes.setdefault(scheme := url.partition("://")[0], url)
                    if (why := unserved(scheme)) is not None:
                        problems.add(number, f"{url}: {why}")
                sources.append(_short(entry.source))
                targets.append(_short(entry.target))
        size_bytes = None if unknown else known
        manifest = cls(name, lines, base, files=len(targets), last_line=number, size_bytes=size_bytes, schemes=schemes)
        manifest._entries = entries
        if wanted := _repeated(targets) | _common(sources, targets):
            for at, problem in manifest._collisions(wanted):
                problems.add(at, problem)
        if problems.count:
            raise BadManifest(name, problems.told())
        return manifest

    def entries(self) -> Iterator[Entry]:
        """The files to move, in their order. Blocks, and is to be used by one reader at a time."""
        if self._entries is not None:
            yield from self._entries
            return
        self._lines.seek(0)
        for number, line in enumerate(self._lines, 1):
            if (entry := _entry(number, line, self._base)) is not None:
                yield entry

    def lines_with(self, schemes: Mapping[str, str]) -> list[str]:
        """The lines that need one of these kinds of storage, by number, with what is wrong with it. Blocks."""
        problems = _Problems()
        for entry in self.entries():
            for url in (entry.source, entry.target):
                if (scheme := url.partition("://")[0]) in schemes:
                    problems.add(entry.line, f"{url}: {schemes[scheme]}")
        return problems.told()

    def close(self) -> None:
        """Remove the temporary file."""
        self._entries = None
        self._lines.close()

    def _good_entries(self) -> Iterator[Entry]:
        """Those of the lines that are good."""
        if self._entries is not None:
            yield from self._entries
            return
        self._lines.seek(0)
        for number, line in enumerate(self._lines, 1):
            with suppress(ValueError):
                if (entry := _entry(number, line, self._base)) is not None:
                    yield entry

    def _collisions(self, wanted: set[int]) -> Iterator[tuple[int, str]]:
        """The lines that stand in each other's way: their numbers, and why."""
        first: dict[str, int] = {}
        for entry in self._good_entries():
            if _short(entry.target) in wanted:
                key = _key(entry.target)
                if (other := first.setdefault(key, entry.line)) != entry.line:
                    yield entry.line, f"the target of line {other} again: {entry.target}"
        for entry in self._good_entries():
            if (line := first.get(_key(entry.source))) is not None:
                yield entry.line, f"its source is the target of {'itself' if line == entry.line else f'line {line}'}"


class _Problems:
    """The first ones of each look at a manifest, and how many there are."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[tuple[int, str]] = []

    def add(self, line: int, problem: str) -> None:
        self.count += 1
        self._first.append((line, problem))
        if len(self._first) >= 2 * MOST_PROBLEMS:
            self._cut()

    def told(self) -> list[str]:
        """In the order of the lines; of more than are named, the last line says how many."""
        self._cut()
        more = self.count - len(self._first)
        once = chain([""], repeat(LIKE))  # one example is enough
        lines = [
            f"line {line}: {problem.removesuffix(next(once) if problem.endswith(LIKE) else '')}"
            for line, problem in self._first
        ]
        return lines + ([f"and {more} more"] if more else [])

    def _cut(self) -> None:
        self._first = sorted(self._first, key=itemgetter(0))[:MOST_PROBLEMS]


def _entry(number: int, line: bytes, base: str) -> Entry | None:
    """The file a line names; None when it is empty. Raises ValueError that says what is wrong."""
    text = line.removeprefix(_BYTE_ORDER_MARK).strip() if number == 1 else line.strip()
    if not text:
        return None
    try:
        words = _Words.model_validate_json(text)
    except ValidationError as exc:
        raise ValueError(_said(exc)) from exc
    source, target = _url(words.source, base), _url(words.target, base)
    if target.endswith("/"):
        raise ValueError(f"target: {words.target}: names a directory, not a file")
    return Entry(number, source, target, words.size_bytes, words.checksum)


def _said(error: ValidationError) -> str:
    """What is wrong with a line; where it is no JSON at all, with the place in the line, and what one looks like."""
    (first, *_) = error.errors(include_url=False)
    if first["type"] == "json_invalid":
        what, _, column = str(first["ctx"]["error"]).partition(" at line 1 column ")
        return f"not JSON: {what}, at column {column}{LIKE}"
    if first["type"] == "model_type":
        return f"an object {{...}} is expected{LIKE}"
    return "; ".join(complaints(error))


def _url(text: str, base: str) -> str:
    """A URL; of a path its file:// URL."""
    if _PLAIN.fullmatch(text) is not None and _PLAIN.fullmatch(base) is not None:
        return f"file://{text}" if text.startswith("/") else f"file://{base.rstrip('/')}/{text}"
    if not is_url(text):
        return file_url(os.path.join(base, text))
    if text.startswith("file://"):
        local_file(text)  # raises ValueError for another host's
    return text


def _key(url: str) -> str:
    """The same for two spellings of one path. Links are not followed: they may change while files are moved."""
    if not url.startswith("file://"):
        return url
    path = url.removeprefix("file://")
    if path.startswith("/") and "%" not in path and "//" not in path and "/." not in path:
        return path  # as most are, and five times as fast
    return os.path.normpath(local_file(url))


def _short(url: str) -> int:
    """Eight bytes that stand for a place; two places that share them are told apart afterwards."""
    return int.from_bytes(blake2b(_key(url).encode(errors="surrogateescape"), digest_size=8).digest(), "little")


def _repeated(places: array[int]) -> set[int]:
    ordered = sorted(places)
    return {a for a, b in pairwise(ordered) if a == b}


def _common(some: array[int], others: array[int]) -> set[int]:
    return set(some).intersection(others)
