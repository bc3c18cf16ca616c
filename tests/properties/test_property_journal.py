"""A journal cut or torn anywhere opens to a beginning of what was written, and takes what comes next."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lives import a_life
from loadmaster.events import Event, dumps
from loadmaster.lifecycle import Lifecycle
from loadmaster.logbook import Logbook, Record
from loadmaster.logfile import NAME

JOBS = 12
EVENTS: list[Event] = [event for step in range(11) for number in range(JOBS) for event in [a_life(f"{number}")[step]]]
"""The lives of some jobs, side by side."""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A journal as it is on disk while its agent writes: half of it in the main file, half in the log."""
    directory, copy = tmp_path_factory.mktemp("journal"), tmp_path_factory.mktemp("copies") / "disk"
    Logbook.open(directory).close()
    half = len(EVENTS) // 2
    book = Logbook.open(directory)
    book.add([[Record.of(event)] for event in EVENTS[:half]])
    book.close()
    book = Logbook.open(directory)
    for event in EVENTS[half:]:
        book.add([[Record.of(event)]])
    copy.mkdir()
    for path in directory.glob("journal.*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, copy)
    book.close()
    return copy


@contextmanager
def fresh(disk: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(disk, Path(scratch) / "journal"))


def beginning(directory: Path) -> int:
    """How many events are there; they are the first that were written, and more can be written after them."""
    book = Logbook.open(directory)
    try:
        found = {
            event for job in range(JOBS) if (history := book.history(str(job))) for event in map(dumps, history.events)
        }
        expected = list(map(dumps, EVENTS[: len(found)]))
        assert found == set(expected)
        for job in book.open_jobs():
            Lifecycle.of(job.events)
        if len(found) < len(EVENTS):
            assert book.add([[Record.of(EVENTS[len(found)])]]) == [None]
        assert book.add([[Record.of(a_life("new")[0])]]) == [None]
    finally:
        book.close()
    return len(found)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_cut_at_any_byte_it_opens_to_a_beginning(disk: Path, data: st.DataObject) -> None:
    with fresh(disk) as directory:
        path = directory / (NAME.format(0) + data.draw(st.sampled_from(["", "-wal"])))
        size = data.draw(st.integers(0, path.stat().st_size - 1))
        with path.open("r+b") as file:
            file.truncate(size)
        beginning(directory)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_log_with_any_block_torn_opens_to_a_beginning(disk: Path, data: st.DataObject) -> None:
    with fresh(disk) as directory:
        path = directory / f"{NAME.format(0)}-wal"
        start = data.draw(st.integers(0, path.stat().st_size - 1))
        with path.open("r+b") as file:
            file.seek(start)
            file.write(data.draw(st.binary(min_size=1, max_size=512)))
        beginning(directory)


def test_untouched_it_has_everything(disk: Path) -> None:
    with fresh(disk) as directory:
        assert beginning(directory) == len(EVENTS)
