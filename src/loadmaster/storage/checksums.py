"""Checksums that are computed while bytes pass: adler32 (DIRAC's), crc32c, md5, sha256.

Written as `adler32:0a1b2c3d`; read also as the bare eight digits of an adler32 and as a hexadecimal multihash (`1220...` is
sha256). The faster of the libraries that are installed is used: adler32 10 GB/s with zlib-ng, 1.6 with CPython's zlib.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol, Self

DIGITS: Final = {"adler32": 8, "crc32c": 8, "md5": 32, "sha256": 64}
"""The algorithms, and how long their values are in hexadecimal."""

_MULTIHASH: Final = {"1220": "sha256", "d50110": "md5"}
"""Code and length, as in multiformats' table: 0x12 is sha2-256 of 32 bytes, 0xd5 (as a varint d501) md5 of 16."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a file's content comes to, by one algorithm; digits are lower case."""

    algorithm: str
    digits: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """`algorithm:digits`, an adler32's digits alone, or a multihash. Raises ValueError that says what was expected."""
        name, separator, digits = text.strip().lower().partition(":")
        if not separator:
            name, digits = "adler32", name
            for prefix, algorithm in _MULTIHASH.items():
                if digits.startswith(prefix) and len(digits) == len(prefix) + DIGITS[algorithm]:
                    name, digits = algorithm, digits.removeprefix(prefix)
        if name not in DIGITS:
            raise ValueError(f"{text!r}: no checksum we know; there is {', '.join(DIGITS)}")
        if name == "adler32":
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
        return _Cyclic(algorithm, adler32, 1)
    if algorithm not in DIGITS:
        raise ValueError(f"{algorithm!r}: no checksum we know; there is {', '.join(DIGITS)}")
    if algorithm == "crc32c":
        raise ValueError("crc32c: no library for it is installed")
    return _Digest(algorithm)


def _adler32() -> Callable[[bytes | memoryview, int], int]:
    return zlib.adler32


adler32: Final = _adler32()
