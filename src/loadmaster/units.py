"""Sizes and times as people write them: `"2 GB"`, `"1h30m"`. Numbers, and texts of numbers, are bytes and seconds.

| of a size   | bytes | of a time | seconds |
| ----------- | ----- | --------- | ------- |
| `B` or none | 1     | `s`, none | 1       |
| `kB`, `K`   | 1000, 1024     | `m`, `min` | 60 |
| `MB`, `M`   | 1000², 1024²   | `h`   | 3600    |
| `GB`, `G`   | 1000³, 1024³   | `d`   | 86400   |
| `TB`, `T`   | 1000⁴, 1024⁴   |       |         |

`KiB`, `MiB`, ... are what `K`, `M`, ... are, as everywhere in GNU's tools and in batch systems. Upper and lower case
mean the same.
"""

from __future__ import annotations

import math
import re
from typing import Final

_FACTORS: Final = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SECONDS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}

_NUMBER: Final = r"([0-9]{1,30}(?:\.[0-9]{1,30})?)"
_SIZE: Final = re.compile(rf"\s*{_NUMBER}\s*([kmgt]?)(i?b|)\s*", re.ASCII | re.IGNORECASE)
_PART: Final = re.compile(rf"\s*{_NUMBER}\s*(s|min|m|h|d)\s*", re.ASCII | re.IGNORECASE)
_TIME: Final = re.compile(rf"(?:{_PART.pattern}){{1,4}}", re.ASCII | re.IGNORECASE)

A_SIZE: Final = "a size is expected: bytes, or with a unit, as 500M, 16G, 2 GB (10^9) or 2 GiB (2^30)"
A_TIME: Final = "a time is expected: seconds, or with a unit, as 90, 30s, 5m, 2h, 1h30m or 1d"

_LONGEST: Final = 100
"""Characters of a size or time; expressions take time by the square."""


def bytes_of(value: object) -> object:
    """The bytes of a text that has a unit, rounded up; anything else as it is, also a text that is a mere number.

    Raises ValueError that says which units there are.
    """
    if not isinstance(value, str) or _is_number(value):
        return value
    found = _SIZE.fullmatch(value) if len(value) <= _LONGEST else None
    if found is None or (found[3].lower() == "ib" and not found[2]):
        raise ValueError(f"{value[:40]!r}: {A_SIZE}")
    factor = 1000 if found[2] and found[3].lower() == "b" else 1024
    whole, _, fraction = found[1].partition(".")
    power = factor ** _FACTORS[found[2].lower()]
    return int(whole) * power + (math.ceil(float(f"0.{fraction}") * power) if fraction else 0)


def mib_of(value: object) -> object:
    """The same in MiB, rounded up, for what is counted in these: `"2 GB"` are 1908. A mere number is MiB already."""
    found = bytes_of(value)
    return found if found is value else -(-int(str(found)) // 2**20)


def seconds_of(value: object) -> object:
    """The seconds of a text that has units; anything else as it is, also a text that is a mere number.

    Raises ValueError that says which units there are.
    """
    if not isinstance(value, str) or _is_number(value):
        return value
    if len(value) > _LONGEST or _TIME.fullmatch(value) is None:
        raise ValueError(f"{value[:40]!r}: {A_TIME}")
    return sum(float(number) * _SECONDS[unit.lower()] for number, unit in _PART.findall(value))


def _is_number(text: str) -> bool:
    """Whether it is one as it stands; or empty, of which it is said that it is no number."""
    try:
        float(text)
    except ValueError:
        return not text.strip()
    return True
