"""Checksums by any library are the same, in every spelling, of a whole and of its parts."""

from __future__ import annotations

import hashlib
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster.storage import checksums
from loadmaster.storage.checksums import COMBINABLE, DIGITS, Checksum, combined, continuing, running

CHUNKS = st.lists(st.binary(max_size=300), max_size=5)


def of(algorithm: str, *chunks: bytes) -> Checksum:
    passed = running(algorithm)
    for chunk in chunks:
        passed.update(memoryview(chunk))
    return passed.result()


@given(CHUNKS)
def test_a_checksum_is_that_of_the_standard_library_however_the_bytes_come(chunks: list[bytes]) -> None:
    whole = b"".join(chunks)
    assert of("adler32", *chunks).digits == f"{zlib.adler32(whole):08x}"
    assert of("md5", *chunks).digits == hashlib.md5(whole).hexdigest()
    assert of("sha256", *chunks).digits == hashlib.sha256(whole).hexdigest()


def test_crc32c_is_castagnolis() -> None:
    assert str(of("crc32c", b"1234", b"56789")) == "crc32c:e3069283"
    assert str(of("crc32c")) == "crc32c:00000000"


@pytest.mark.parametrize("algorithm", sorted(COMBINABLE))
@given(first=st.binary(max_size=300), second=st.binary(max_size=300))
def test_the_checksum_of_a_whole_follows_from_its_parts(algorithm: str, first: bytes, second: bytes) -> None:
    parts = of(algorithm, first), of(algorithm, second)
    assert combined(*parts, len(second)) == of(algorithm, first, second)
    rest = continuing(parts[0])
    rest.update(second)
    assert rest.result() == of(algorithm, first, second)


@pytest.mark.parametrize("algorithm", sorted(COMBINABLE))
def test_parts_may_be_long(algorithm: str) -> None:
    first, second = b"\xff" * 3_000_001, bytes(range(256)) * 20_000
    whole = of(algorithm, first, second)
    assert combined(of(algorithm, first), of(algorithm, second), len(second)) == whole


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="md5 and md5: cannot be combined"):
        combined(of("md5"), of("md5"), 0)
    with pytest.raises(ValueError, match="md5: cannot be continued"):
        continuing(of("md5"))
    with pytest.raises(ValueError, match="adler32 and crc32c"):
        combined(of("adler32"), of("crc32c"), 0)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("F", "adler32:0000000f"),
        (" 0A1B2C3D ", "adler32:0a1b2c3d"),
        ("adler32:1", "adler32:00000001"),
        ("CRC32C:01020304", "crc32c:01020304"),
        ("md5:" + "0" * 32, "md5:" + "0" * 32),
        ("1220" + "ab" * 32, "sha256:" + "ab" * 32),
        ("d50110" + "ab" * 16, "md5:" + "ab" * 16),
    ],
)
def test_every_spelling_is_read(text: str, meant: str) -> None:
    assert str(Checksum.parse(text)) == meant
    assert Checksum.parse(meant) == Checksum.parse(text)


@pytest.mark.parametrize(
    "text", ["", "crc32:01020304", "adler32:", "md5:12", "sha256:" + "g" * 64, "1220" + "0" * 63, "+1"]
)
def test_what_is_no_checksum_is_refused_with_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"no checksum we know|hexadecimal digits"):
        Checksum.parse(text)


@given(st.sampled_from(sorted(DIGITS)), st.data())
def test_what_is_written_is_read_back(algorithm: str, data: st.DataObject) -> None:
    digits = data.draw(st.text("0123456789abcdef", min_size=DIGITS[algorithm], max_size=DIGITS[algorithm]))
    assert Checksum.parse(str(Checksum(algorithm, digits))) == Checksum(algorithm, digits)


def test_without_the_fast_libraries_the_results_are_the_same_and_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    monkeypatch.setitem(sys.modules, "crc32c", None)
    for library in (checksums._adler32, checksums._crc32c):
        library.cache_clear()
    try:
        assert of("adler32", b"Wikipedia").digits == "11e60398"
        assert checksums._adler32() is zlib.adler32
        with pytest.raises(ValueError, match=r"pip install 'loadmaster\[fast\]'"):
            running("crc32c")
    finally:
        for library in (checksums._adler32, checksums._crc32c):
            library.cache_clear()


def test_an_algorithm_nobody_knows_is_refused() -> None:
    with pytest.raises(ValueError, match="'crc32': no checksum we know"):
        running("crc32")
