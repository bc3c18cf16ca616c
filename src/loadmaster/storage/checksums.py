"""Checksums that are computed while bytes pass: adler32 (DIRAC's), crc32c, md5, sha256.

Written as `adler32:0a1b2c3d`; read also as the bare eight digits of an adler32 and as a hexadecimal multihash (`1220...` is
sha256). With `loadmaster[fast]` an adler32 is computed by zlib-ng (48 GB/s where CPython's zlib has 2.8), and there is
crc32c (22 GB/s), for which the standard library has nothing: without that package it is refused, for a table in pure
Python has 0.01 GB/s.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol, Self

DIGITS: Final = {"adler32": 8, "crc32c": 8, "md5": 32, "sha256": 64}
"""The algorithms, and how long their values are in hexadecimal."""

_MULTIHASH: Final = {"1220": "sha256", "d50110": "md5"}
"""Code and length, as in multiformats' table: 0x12 is sha2-256 of 32 bytes, 0xd5 (as a varint d501) md5 of 16."""


_USUAL: Final = re.compile("adler32:[0-9a-f]{8}")


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a file's content comes to, by one algorithm; digits are lower case."""

    algorithm: str
    digits: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`algorithm:digits`, an adler32's digits alone, or a multihash. Raises ValueError that says what was expected."""
        if _USUAL.fullmatch(text) is not None:  # as nearly all are, and three times as fast
            return cls("adler32", text[8:])
        name, separator, digits = text.strip().lower().partition(":")
        if not separator:
            name, digits = "adler32", name
            for prefix, algorithm in _MULTIHASH.items():
                if digits.startswith(prefix) and len(digits) == len(prefix) + DIGITS[algorithm]:
                    name, digits = algorithm, digits.removeprefix(prefix)
        if name not in DIGITS:
            raise ValueError(f"{text!r}: no checksum we know; there is {', '.join(DIGITS)}")
        if name == "adler32" and digits:
            digits = digits.rjust(8, "0")  # some catalogs leave leading zeros out
        if len(digits) != DIGITS[name] or not set(digits) <= set("0123456789abcdef"):
            raise ValueError(f"{text!r}: {name} has {DIGITS[name]} hexadecimal digits")
        return cls(name, digits)

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.digits}"


class Running(Protocol):
    """A checksum under way."""

    def update(self, data: bytes | memoryview) -> None:
        """Take in the next bytes."""
        ...

    def result(self) -> Checksum:
        """The checksum of all bytes so far."""
        ...


class _Cyclic:
    """One whose value continues from a number."""

    __slots__ = ("_algorithm", "_function", "_value")

    def __init__(self, algorithm: str, function: Callable[[bytes | memoryview, int], int], start: int) -> None:
        self._algorithm, self._function, self._value = algorithm, function, start

    def update(self, data: bytes | memoryview) -> None:
        self._value = self._function(data, self._value)

    def result(self) -> Checksum:
        return Checksum(self._algorithm, f"{self._value:08x}")


class _Digest:
    """One of hashlib's."""

    __slots__ = ("_algorithm", "_hash")

    def __init__(self, algorithm: str) -> None:
        self._algorithm, self._hash = algorithm, hashlib.new(algorithm, usedforsecurity=False)

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    def result(self) -> Checksum:
        return Checksum(self._algorithm, self._hash.hexdigest())


def running(algorithm: str) -> Running:
    """A new checksum of no bytes. Raises ValueError for an algorithm we do not know, or have no library for."""
    if algorithm == "adler32":
        return _Cyclic(algorithm, _adler32(), 1)
    if algorithm not in DIGITS:
        raise ValueError(f"{algorithm!r}: no checksum we know; there is {', '.join(DIGITS)}")
    if algorithm == "crc32c":
        return _Cyclic(algorithm, _crc32c(), 0)
    return _Digest(algorithm)


@cache
def _adler32() -> Callable[[bytes | memoryview, int], int]:
    try:
        from zlib_ng.zlib_ng import adler32
    except ImportError:
        return zlib.adler32
    return adler32


@cache
def _crc32c() -> Callable[[bytes | memoryview, int], int]:
    try:
        from crc32c import crc32c
    except ImportError:
        raise ValueError("crc32c: no library for it is installed: pip install 'loadmaster[fast]'") from None
    return crc32c


# -- of the parts of a file --------------------------------------------------------------------------------------

COMBINABLE: Final = frozenset({"adler32", "crc32c"})
"""Algorithms by which the checksum of a whole follows from those of its parts."""


def combined(first: Checksum, second: Checksum, second_bytes: int) -> Checksum:
    """The checksum of two parts one after the other, the second of so many bytes. Raises ValueError if they have none."""
    if first.algorithm != second.algorithm or first.algorithm not in COMBINABLE:
        raise ValueError(f"{first.algorithm} and {second.algorithm}: cannot be combined")
    one, two = int(first.digits, 16), int(second.digits, 16)
    combine = _combined_adler32 if first.algorithm == "adler32" else _combined_crc32c
    return Checksum(first.algorithm, f"{combine(one, two, second_bytes):08x}")


def continuing(checksum: Checksum) -> Running:
    """One that has the bytes of this checksum already. Raises ValueError if there is no way to go on from it."""
    if checksum.algorithm not in COMBINABLE:
        raise ValueError(f"{checksum.algorithm}: cannot be continued from its digits")
    function = _adler32() if checksum.algorithm == "adler32" else _crc32c()
    return _Cyclic(checksum.algorithm, function, int(checksum.digits, 16))


_ADLER_BASE: Final = 65521


def _combined_adler32(one: int, two: int, count: int) -> int:
    """Both halves are sums modulo the base; the upper one has seen the first part's lower sum with each later byte."""
    low1, low2 = one & 0xFFFF, two & 0xFFFF
    high1, high2 = one >> 16, two >> 16
    low = (low1 + low2 - 1) % _ADLER_BASE
    high = (high1 + high2 + count * (low1 - 1)) % _ADLER_BASE
    return high << 16 | low


_CASTAGNOLI: Final = 0x82F63B78
"""The polynomial of crc32c, its bits reversed."""


def _combined_crc32c(one: int, two: int, count: int) -> int:
    """The first part's remainder, moved on by as many zero bytes as the second part has, that is multiplied by a power
    of x modulo the polynomial; the power by squaring."""
    power, square = 1 << 31, _times(1 << 30, 1 << 30)  # x^0 and x^2
    square = _times(square, square)  # x^4
    while count:
        square = _times(square, square)  # x^8 for the last bit of the count
        if count & 1:
            power = _times(square, power)
        count >>= 1
    return _times(power, one) ^ two


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo Castagnoli's, bits reversed."""
    product, bit = 0, 1 << 31
    while bit:
        if a & bit:
            product ^= b
        bit >>= 1
        b = b >> 1 ^ _CASTAGNOLI if b & 1 else b >> 1
    return product
