"""How far many files have come: what is said of all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from loadmaster.conformance import LocalBytes
from loadmaster.staging.errand import Moving
from loadmaster.staging.party import Party
from loadmaster.staging.progress import Meter
from loadmaster.storage.base import Direction, Transfer


@dataclass
class Stand:
    """What a meter looks at, of a party."""

    done_files: int = 0
    done_bytes: int = 0
    files: int = 4
    size_bytes: int = 4000
    unsized_files: int = 0
    has_all: bool = True
    transfers: int = 0
    moving: dict[Moving, int] = field(default_factory=dict)


def meter(stand: Stand, files: int | None = None) -> Meter:
    return Meter(cast(Party, stand), files)


def moving(done: int, first: int = 0, *parts: int) -> Moving:
    transfer = Moving(Direction.DOWNLOAD, "https://host/a", LocalBytes(), first_byte=first, done_bytes=done)
    transfer.parts = [Transfer(Direction.DOWNLOAD, "https://host/a", LocalBytes(), done_bytes=part) for part in parts]
    return transfer


def test_the_rate_is_that_of_the_last_seconds_and_tells_the_time_that_is_left() -> None:
    stand = Stand()
    watch = meter(stand)
    assert watch.look(0.0).seconds_left is None
    stand.done_bytes, stand.done_files = 1000, 1
    seen = watch.look(1.0)
    assert (seen.done_bytes, seen.size_bytes, seen.bytes_per_second, seen.seconds_left) == (1000, 4000, 1000.0, 3.0)
    for second in range(2, 30):
        seen = watch.look(float(second))
    assert (seen.bytes_per_second, seen.seconds_left) == (0.0, None)


def test_bytes_count_while_they_pass_also_those_that_came_before_and_those_of_parts() -> None:
    stand = Stand(moving={moving(10): 1, moving(5, 100): 2, moving(0, 0, 7, 8): 3})
    assert meter(stand).look(0.0).done_bytes == 10 + 105 + 15


def test_what_is_not_known_is_not_told() -> None:
    assert meter(Stand(unsized_files=1)).look(0.0).size_bytes is None
    seen = meter(Stand(has_all=False), 100).look(0.0)
    assert (seen.files, seen.size_bytes) == (100, None)
    assert meter(Stand(has_all=False)).look(0.0).files == 4
