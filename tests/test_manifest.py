"""A manifest is good as a whole, or every line at fault is named."""

from __future__ import annotations

import io
import json
import os
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.console.manifest import EXAMPLE, KEPT_LINES, MAX_LINE_BYTES, MOST_PROBLEMS, BadManifest, Entry, Manifest
from loadmaster.names import local_path
from loadmaster.storage.checksums import Checksum

BASE = "/work"


def read(*lines: dict[str, Any] | str | bytes) -> list[Entry]:
    """The entries of a manifest of these lines."""
    text = b"".join(
        (line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()) + b"\n"
        for line in lines
    )
    manifest = Manifest.read(io.BytesIO(text), "m", BASE)
    try:
        found = list(manifest.entries())
        assert list(manifest.entries()) == found  # it can be read again
        assert manifest.files == len(found)
        assert manifest.last_line == len(lines)
        sizes = [entry.size_bytes for entry in found]
        assert manifest.size_bytes == (None if None in sizes else sum(size or 0 for size in sizes))
        return found
    finally:
        manifest.close()


def problems(*lines: dict[str, Any] | str | bytes) -> list[str]:
    with pytest.raises(BadManifest) as told:
        read(*lines)
    return told.value.problems


def test_paths_are_taken_from_the_base_and_urls_as_they_are() -> None:
    assert read(
        {"source": "https://h/a?x=1", "target": "in/a"},
        {"source": "out/b c", "target": "s3://bucket/b", "size_bytes": 3, "checksum": "md5:" + "0" * 32},
        {"source": "/abs", "target": "file:///abs2", "size": 0, "checksum": "ABC"},
    ) == [
        Entry(1, "https://h/a?x=1", "file:///work/in/a"),
        Entry(2, "file:///work/out/b%20c", "s3://bucket/b", 3, Checksum("md5", "0" * 32)),
        Entry(3, "file:///abs", "file:///abs2", 0, Checksum("adler32", "00000abc")),
    ]


def test_empty_lines_and_a_byte_order_mark_mean_nothing_but_are_counted() -> None:
    entries = read(b"\xef\xbb\xbf", "", {"source": "a", "target": "b"}, "   ", b'\t{"source": "c", "target": "d"}\r')
    assert [entry.line for entry in entries] == [3, 5]


def test_every_bad_line_is_named_by_its_number() -> None:
    assert problems(
        "{not json",
        {"source": "a", "target": "b"},
        {"source": "a"},
        {"source": "a", "target": "c", "sise": 3},
        {"source": "", "target": "c", "size": -1},
        {"source": "a", "target": "d", "checksum": "md7:12"},
        {"source": "file://elsewhere/a", "target": "e"},
        {"source": "a", "target": "directory/"},
        "[]",
        {"source": "a\0", "target": "f"},
        b'{"source": "\xff", "target": "g"}',
    ) == [
        f"line 1: not JSON: key must be a string, at column 2; a line is like {EXAMPLE}",
        "line 3: target: is missing",
        "line 4: sise: there is no such field",
        "line 5: source: is empty; size: Input should be greater than or equal to 0",
        "line 6: checksum: 'md7:12': no checksum we know; there is adler32, crc32c, md5, sha256",
        "line 7: file://elsewhere/a: not a file:// URL of this host",
        "line 8: target: directory/: names a directory, not a file",
        "line 9: an object {...} is expected",
        "line 10: source: a path or URL may not have control characters",
        "line 11: not JSON: invalid unicode code point, at column 13",
    ]


@pytest.mark.parametrize(
    "again", ["in/a", "./in/a", "in/../in//a", "/work/in/a", "file:///work/in/a", "file:///work/in/%61"]
)
def test_two_files_for_one_place_are_refused_however_it_is_spelled(again: str) -> None:
    told = problems({"source": "x", "target": "in/a"}, {"source": "y", "target": "z"}, {"source": "w", "target": again})
    assert len(told) == 1
    assert told[0].startswith("line 3: the target of line 1 again")


def test_a_file_that_is_made_by_another_line_is_no_source() -> None:
    """Lines are moved side by side: what would be read depends on chance."""
    assert problems(
        {"source": "b", "target": "c"}, {"source": "a", "target": "./b"}, {"source": "q", "target": "q"}
    ) == [
        "line 1: its source is the target of line 2",
        "line 3: its source is the target of itself",
    ]


def test_all_that_is_wrong_is_told_at_once_in_the_order_of_the_lines() -> None:
    """A bad line hid the two below that were for one place, and these the scheme that nobody serves."""

    def unserved(scheme: str) -> str | None:
        return None if scheme == "file" else f"no storage for {scheme}://"

    lines = [
        '{"source": "a", "target": "b"}',
        '{"source": "odd://h/a", "target": "b"}',
        "{",
        '{"source": "b", "target": "c"}',
    ]
    with pytest.raises(BadManifest) as told:
        Manifest.read(io.BytesIO("\n".join(lines).encode()), "m", BASE, unserved=unserved)
    assert told.value.problems == [
        "line 2: odd://h/a: no storage for odd://",
        "line 2: the target of line 1 again: file:///work/b",
        f"line 3: not JSON: EOF while parsing an object, at column 1; a line is like {EXAMPLE}",
        "line 4: its source is the target of line 1",
    ]


def test_of_a_file_that_is_no_manifest_the_first_lines_are_named_and_the_rest_counted() -> None:
    told = problems(*["nonsense"] * 5000, *[{"source": "a", "target": "b"}] * (KEPT_LINES + 3))
    assert len(told) == MOST_PROBLEMS + 1
    assert told[MOST_PROBLEMS - 1].startswith(f"line {MOST_PROBLEMS}: not JSON")
    assert told[-1] == f"and {5000 + KEPT_LINES + 2 - MOST_PROBLEMS} more"
    told = problems("nonsense", *[{"source": "a", "target": "b"}] * (KEPT_LINES + 3))
    assert told[:2] == [
        f"line 1: not JSON: expected ident, at column 2; a line is like {EXAMPLE}",
        "line 3: the target of line 2 again: file:///work/b",
    ]


def test_one_source_may_go_to_many_places() -> None:
    assert len(read(*({"source": "a", "target": f"b{number}"} for number in range(50)))) == 50


def test_a_file_that_is_no_manifest_is_not_read_into_memory() -> None:
    class Endless(io.RawIOBase):
        def __init__(self) -> None:
            self.given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.given += len(buffer)
            buffer[:] = b"x" * len(buffer)
            return len(buffer)

    endless = Endless()
    with pytest.raises(BadManifest, match=r"line 1: of more than 65536 bytes; nothing after it was read"):
        Manifest.read(io.BufferedReader(endless), "m", BASE)
    assert endless.given < 4 * MAX_LINE_BYTES


def test_an_empty_manifest_has_no_files() -> None:
    assert read() == []


def test_what_is_remembered_of_a_line_is_little(tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text(
        "".join(json.dumps({"source": f"https://h/{n:0>100}", "target": f"t/{n:0>100}"}) + "\n" for n in range(20_000))
    )
    with path.open("rb") as stream:
        Manifest.read(stream, "m", BASE).close()  # the model is made at its first use
        stream.seek(0)
        tracemalloc.start()
        try:
            manifest = Manifest.read(stream, "m", BASE)
            held, peak = tracemalloc.get_traced_memory()
            assert sum(1 for _ in manifest.entries()) == 20_000
        finally:
            tracemalloc.stop()
        manifest.close()
    assert held < 200_000
    assert peak < 20_000 * 250 + KEPT_LINES * 700  # the lines themselves are 5 MB


def normal(name: str) -> str:
    return os.path.normpath(os.path.join(BASE, name))


NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20).filter(
    lambda name: "://" not in name and not name.endswith("/") and not name.startswith("/")
)


@given(st.lists(NAMES, unique_by=normal, max_size=8))
def test_every_name_that_a_file_may_have_comes_back(names: list[str]) -> None:
    entries = read(*({"source": "https://h/a", "target": name} for name in names))
    assert [normal(str(local_path(entry.target))) for entry in entries] == [normal(name) for name in names]


def test_a_long_manifest_is_read_again_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = b"".join(b'{"source": "a%d", "target": "b%d", "checksum": "adler32:%08x"}\n' % (n, n, n) for n in range(9))
    found = []
    for kept in (9, 8):
        monkeypatch.setattr("loadmaster.console.manifest.KEPT_LINES", kept)
        with closing(Manifest.read(io.BytesIO(lines), "it", str(tmp_path))) as manifest:
            found.append([*manifest.entries()])
            assert found[-1] == [*manifest.entries()]
    assert found[0] == found[1]
    assert [str(entry.checksum) for entry in found[0]] == [f"adler32:{number:08x}" for number in range(9)]
