"""What a payload prints: written by it alone, looked at for next to nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadmaster.payload.output import PEEK_BYTES, Output, last_lines
from loadmaster.workdir import Workdir


@pytest.fixture
def output(workdir: Workdir) -> Iterator[Output]:
    output = Output(workdir, "std.out", "std.err")
    yield output
    output.close()


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


def test_the_last_lines_are_the_last_lines(output: Output) -> None:
    assert output.peek() == []
    os.write(output.stdout, b"".join(b"line %d\n" % number for number in range(100)))
    os.write(output.stderr, b"an error\n")
    assert output.peek(2) == ["line 98", "line 99"]
    assert len(output.peek()) == 20
    assert output.peek(0) == []


def test_a_line_that_is_not_finished_is_seen(output: Output) -> None:
    os.write(output.stdout, b"done\n50 %")
    assert output.peek() == ["done", "50 %"]


def test_bytes_that_are_no_text_are_seen_as_such(output: Output) -> None:
    os.write(output.stdout, b"\xff\xfe ok\n")
    assert output.peek() == ["\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} ok"]


def test_a_look_at_a_hundred_gigabytes_is_immediate(file: int) -> None:
    os.ftruncate(file, 100 * 10**9)
    os.pwrite(file, b"\nthe end\n", 100 * 10**9)
    begun = time.perf_counter()
    assert last_lines(file, 1) == ["the end"]
    assert time.perf_counter() - begun < 0.05


def test_a_line_longer_than_a_look_is_seen_by_its_end(file: int) -> None:
    os.write(file, b"x" * PEEK_BYTES * 3)
    assert last_lines(file, 5) == ["x" * PEEK_BYTES]


def test_half_a_line_at_the_beginning_of_a_look_is_not_shown(file: int) -> None:
    os.write(file, b"0123456789\n" * PEEK_BYTES)
    assert set(last_lines(file, 10**6)) == {"0123456789"}


def test_one_name_for_both_is_one_file_with_the_lines_in_order(workdir: Workdir) -> None:
    output = Output(workdir, "log", "log")
    os.write(output.stdout, b"1\n")
    os.write(output.stderr, b"2\n")
    os.write(output.stdout, b"3\n")
    assert output.peek() == ["1", "2", "3"]
    output.close()


def test_a_look_sees_what_was_printed_whatever_the_payload_put_in_its_place(output: Output, workdir: Workdir) -> None:
    os.write(output.stdout, b"printed\n")
    (workdir.path / "std.out").unlink()
    os.mkfifo(workdir.path / "std.out")
    assert output.peek() == ["printed"]


def test_a_fifo_with_the_name_of_the_output_is_replaced(workdir: Workdir) -> None:
    os.mkfifo(workdir.path / "std.out")
    output = Output(workdir, "std.out", "logs/std.err")
    os.write(output.stdout, b"x" * 10**6)
    output.close()
    assert (workdir.path / "std.out").stat().st_size == 10**6
    assert (workdir.path / "logs" / "std.err").is_file()


def test_when_one_file_cannot_be_made_the_other_is_let_go(workdir: Workdir) -> None:
    (workdir.path / "std.err").mkdir()
    with pytest.raises(IsADirectoryError):
        Output(workdir, "std.out", "std.err")
