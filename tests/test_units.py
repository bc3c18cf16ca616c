"""Sizes and times as people write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadmaster import ComputingElement, InvalidJob, JobDescription
from loadmaster.units import bytes_of, mib_of, seconds_of


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("2 GB", 2_000_000_000),
        ("2gb", 2_000_000_000),
        ("2G", 2 * 2**30),
        (" 2 GiB ", 2 * 2**30),
        ("500M", 500 * 2**20),
        ("1.5k", 1536),
        ("0.001 kB", 1),
        ("1.0001kB", 1001),  # rounded up
        ("3 TB", 3 * 10**12),
    ],
)
def test_a_size_with_a_unit_is_bytes(text: str, size: int) -> None:
    assert bytes_of(text) == size
    assert mib_of(text) == -(-size // 2**20)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("5 min", 300.0), ("2h", 7200.0), ("1.5h", 5400.0), ("1h 30m", 5400.0), ("1d", 86400.0)],
)  # fmt: skip
def test_a_time_with_a_unit_is_seconds(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("value", [5, 2.5, None, "5", "2.5", "1e9", "nan", "", " 7 ", [1], {"a": 1}])
def test_what_has_no_unit_is_left_to_who_asked(value: Any) -> None:
    assert bytes_of(value) is seconds_of(value) is mib_of(value) is value


@pytest.mark.parametrize("text", ["GB", "2 GB/s", "2 EB", "-2G", "1 iB", "2 G B", "1,5 GB", "²G", "2G" * 50_000])
def test_what_is_no_size_is_told_which_units_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="a size is expected: bytes, or with a unit") as caught:
        bytes_of(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "text", ["5 moons", "m", "-5m", "5m-", "1h30", "1:30", "1s" * 50_000, "1s" + " " * 100_000 + "x"]
)
def test_what_is_no_time_is_told_which_units_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="a time is expected: seconds, or with a unit"):
        seconds_of(text)


@given(st.integers(0, 2**60), st.sampled_from(["B", "kB", "K", "KiB", "MB", "M", "GB", "GiB", "T"]))
def test_more_of_a_larger_unit_is_never_less(number: int, unit: str) -> None:
    assert int(str(bytes_of(f"{number}{unit}"))) >= number


def test_a_description_understands_units_wherever_it_has_bytes_or_seconds() -> None:
    job = JobDescription.load(
        {
            "executable": "x",
            "memory_mb": "2 GB",
            "disk_bytes": "10G",
            "cpu_work": "1d",
            "stop_seconds": "5m",
            "limits": {"wall_seconds": "1h30m", "memory_bytes": "2GiB", "upload_bytes_per_second": "1 MB"},
            "input_data": [{"source": "/a", "size_bytes": "1 kB"}],
        }
    )
    assert (job.memory_mb, job.disk_bytes, job.cpu_work, job.stop_seconds) == (1908, 10 * 2**30, 86400.0, 300.0)
    assert (job.limits.wall_seconds, job.limits.memory_bytes) == (5400.0, 2**31)
    assert (job.limits.upload_bytes_per_second, job.input_data[0].size_bytes) == (1_000_000.0, 1000)
    assert JobDescription.load(job.words()) == job
    assert ComputingElement.load({"MaxRAM": "4 GiB", "CPUTimeLeft": "1h"}).cpu_work_left == 3600.0


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ({"limits": {"wall_seconds": "5 moons"}}, "limits.wall_seconds: '5 moons': a time is expected: seconds, or with"),
        ({"limits": {"memory_bytes": "2 Gbit"}}, "limits.memory_bytes: '2 Gbit': a size is expected: bytes, or with a unit"),
        ({"limits": {"memory_bytes": "0 GB"}}, "limits.memory_bytes: Input should be greater than 0"),
        ({"Memory": "2 Gbit"}, "Memory: '2 Gbit': a size is expected"),
        ({"limits": {"deadline": "5m"}}, "limits.deadline: a date and a time with its zone are expected, as 20"),
        ({"limits": {"deadline": "2031-12-24T18:00:00"}}, "limits.deadline: a date and a time with its zone are expected"),
        ({"job_id": "a b"}, "job_id: only letters, digits and . _ + - may be in it, and a letter or a digit comes first"),
        ({"input_data": [{"source": "a", "checksum": "md5:0"}]}, "input_data.0.checksum: a checksum is expected, as"),
        ({"priority": "high"}, "priority: a whole number is expected"),
        ({"limits": {"cpu_ratio": "low"}}, "limits.cpu_ratio: a number is expected"),
        ({"memory": "2 GB"}, "memory: there is no such field; there is memory_mb"),
        ({"wall_seconds": 5}, "wall_seconds: there is no such field; there is limits.wall_seconds"),
        ({"limits": {"memory": 5}}, "limits.memory: there is no such field; there is memory_mb"),
        ({"imput_data": ["a"]}, "imput_data: there is no such field; there is input_data"),
        ({"x" * 100_000: 1}, ": there is no such field"),
        ({"limits": 5}, "limits: an object {...} is expected"),
        ({"tags": 3}, "tags: a list is expected"),
    ],
)  # fmt: skip
def test_a_complaint_says_in_words_what_is_expected(words: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        JobDescription.load({"executable": "x", **words})
    assert complaint in str(caught.value)
