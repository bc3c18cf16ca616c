"""What a payload prints: written by it alone, looked at for next to nothing."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import anyio
import pytest

from conftest import until
from loadmaster.notices import Notices
from loadmaster.payload import output as output_module
from loadmaster.payload.output import BLOCK_BYTES, PEEK_BYTES, Output, last_lines
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


# -- more than is kept -------------------------------------------------------------------------------------------

KEPT = 1_000_000


def printed(output: Output, count: int) -> None:
    """As many bytes as a payload that numbers its lines of 100 characters."""
    lines = range(count // 100)
    os.write(output.stdout, b"".join(b"%099d\n" % number for number in lines))


def test_the_disk_of_the_middle_is_given_back_and_the_payload_prints_on(workdir: Workdir, output: Output) -> None:
    for _ in range(5):
        printed(output, 4_000_000)
        output.trim(KEPT)
        assert os.fstat(output.stdout).st_blocks * 512 <= KEPT + 4 * BLOCK_BYTES
    assert os.fstat(output.stdout).st_size == 20_000_000
    assert output.peek(1) == [f"{39_999:099d}"]


def test_in_the_end_the_file_is_its_beginning_a_mark_and_its_end(workdir: Workdir, output: Output) -> None:
    printed(output, 4_000_000)
    output.trim(KEPT)
    printed(output, 4_000_000)
    output.trim(KEPT)
    os.write(output.stdout, b"the end\n")
    output.join()
    text = (workdir.path / "std.out").read_bytes()
    assert KEPT <= len(text) <= KEPT + 3 * BLOCK_BYTES
    begin, left_out, end = re.split(rb"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n", text)
    whole = b"".join(b"%099d\n" % number for number in range(40_000)) * 2 + b"the end\n"
    assert whole.startswith(begin)
    assert whole.endswith(end)
    assert len(begin) + int(left_out) + len(end) == len(whole)


def test_what_is_not_too_long_stays_as_it_is(workdir: Workdir, output: Output) -> None:
    printed(output, KEPT)
    output.trim(KEPT)
    assert not output.has_gaps
    output.join()
    assert (workdir.path / "std.out").stat().st_size == KEPT


def test_a_file_the_payload_has_cut_is_left_alone(workdir: Workdir, output: Output) -> None:
    printed(output, 4_000_000)
    output.trim(KEPT)
    os.truncate(workdir.path / "std.out", 700_000)
    output.join()
    assert (workdir.path / "std.out").stat().st_size == 700_000


def test_a_disk_that_cannot_give_back_keeps_everything(
    output: Output, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("loadmaster.payload.output._PUNCH_HOLE", 0x80)  # a mode that there is none of
    printed(output, 4_000_000)
    output.trim(KEPT)
    output.trim(KEPT)
    output.join()
    assert os.fstat(output.stdout).st_size == 4_000_000
    assert [record.getMessage() for record in caplog.records] == [
        "std.out: cannot be kept short here: Operation not supported"
    ]


# -- live --------------------------------------------------------------------------------------------------------


async def test_what_is_printed_is_told_as_it_is_printed(output: Output) -> None:
    told: list[tuple[str, str, int]] = []
    async with anyio.create_task_group() as group:
        group.start_soon(output.follow, lambda *news: told.append(news))
        os.write(output.stdout, b"one \xc3")
        await until(lambda: told == [("std.out", "one ", 0)])
        os.write(output.stderr, b"an error\n")
        await until(lambda: len(told) == 2)
        os.write(output.stdout, b"\xa9\n")  # the other half of a letter
        await until(lambda: told[1:] == [("std.err", "an error\n", 0), ("std.out", "\u00e9\n", 0)])
        os.write(output.stdout, b"the last words")
        group.cancel_scope.cancel()
    assert told[-1] == ("std.out", "the last words", 0)


async def test_without_a_queue_of_the_kernels_it_is_told_all_the_same(
    output: Output, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever followed was told nothing. The user's queues are all taken by others."""
    monkeypatch.setattr(output_module, "LOOK_SECONDS", 0.05)
    told: list[tuple[str, str, int]] = []
    with ExitStack() as others:
        with suppress(OSError):
            for _ in range(10_000):
                others.enter_context(Notices())
            pytest.skip("there is no end of queues here")
        async with anyio.create_task_group() as group:
            group.start_soon(output.follow, lambda *news: told.append(news))
            await until(lambda: "only" in caplog.text)
            os.write(output.stdout, b"one\n")
            await until(lambda: told == [("std.out", "one\n", 0)])
            os.write(output.stdout, b"two\n")
            await until(lambda: len(told) == 2)
            group.cancel_scope.cancel()


async def test_of_a_flood_only_the_end_is_told(output: Output) -> None:
    printed(output, 10_000_000)
    told: list[tuple[str, str, int]] = []
    async with anyio.create_task_group() as group:
        group.start_soon(output.follow, lambda *news: told.append(news))
        await until(lambda: told != [])
        group.cancel_scope.cancel()
    [(_, text, skipped)] = told
    assert len(text) + skipped == 10_000_000
    assert len(text) == PEEK_BYTES


def test_a_file_that_was_cut_and_written_anew_is_left_alone(workdir: Workdir, output: Output) -> None:
    """What is where the gap was is the payload's: 262 kB were cut from a log that was under its cap."""
    printed(output, 4_000_000)
    output.trim(KEPT)
    os.truncate(workdir.path / "std.out", 0)
    printed(output, 3_900_000)
    output.join()
    assert (workdir.path / "std.out").read_bytes() == b"".join(b"%099d\n" % number for number in range(39_000))


def test_whoever_still_prints_goes_on_appending(workdir: Workdir, output: Output) -> None:
    printed(output, 4_000_000)
    output.trim(KEPT)
    output.join()
    os.write(output.stdout, b"late\n")
    assert (workdir.path / "std.out").read_bytes().endswith(b"\nlate\n")
