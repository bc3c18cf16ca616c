"""The file of a journal, as those see it who do not have it: where nothing can be written, where they may not look."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lives import a_life
from loadmaster.errors import JournalFault
from loadmaster.logbook import Logbook, Record, state_name
from loadmaster.logfile import NAME, frames, generations

LOOK = """
from pathlib import Path
from loadmaster.errors import JournalFault
from loadmaster.logbook import Logbook
try:
    with Logbook.look(Path({!r})) as book:
        history = book.history("7")
        print(len(history.events) if history else None)
except JournalFault as fault:
    print(fault)
"""

Run = Callable[[str], str]


@contextmanager
def kept(directory: Path) -> Iterator[Logbook]:
    book = Logbook.open(directory)
    try:
        yield book
    finally:
        book.close()


def living(directory: Path) -> None:
    with kept(directory) as book:
        book.add([[Record.of(event) for event in a_life("7")[:4]]])


def copied(directory: Path, into: str) -> Path:
    """As it is on the disk of an agent that was killed, for everybody to read and nobody to write."""
    place = Path(into) / "journal"
    place.mkdir()
    with kept(directory) as book:
        book.add([[Record.of(event) for event in a_life("7")[:4]]])
        for path in directory.glob("journal.*"):
            if not path.name.endswith("-shm"):
                (place / path.name).write_bytes(path.read_bytes())
                (place / path.name).chmod(0o444)
    assert frames(place / NAME.format(0)) > 0
    place.chmod(0o555)
    return place


@pytest.fixture
def home(as_ordinary_user: Run) -> str:
    place = as_ordinary_user("import os; print(os.getcwd())").strip()
    os.chmod(place, 0o755)
    return place


def test_it_is_read_where_nothing_can_be_written_with_what_is_in_the_log_alone(
    tmp_path: Path, as_ordinary_user: Run, home: str
) -> None:
    place = copied(tmp_path / "journal", home)
    assert as_ordinary_user(LOOK.format(str(place))) == "4\n"
    place.chmod(0o755)


def test_it_is_read_where_nothing_can_be_written_and_there_is_no_log(
    tmp_path: Path, as_ordinary_user: Run, home: str
) -> None:
    place = Path(home) / "journal"
    living(place)  # and closed, which moves all of the log into the file
    assert frames(place / NAME.format(0)) == 0
    place.chmod(0o555)
    (place / NAME.format(0)).chmod(0o444)
    assert as_ordinary_user(LOOK.format(str(place))) == "4\n"
    place.chmod(0o755)


def test_who_may_not_look_is_told_so(tmp_path: Path, as_ordinary_user: Run, home: str) -> None:
    place = Path(home) / "journal"
    living(place)
    if os.geteuid() != 0:
        place.chmod(0)
    assert as_ordinary_user(LOOK.format(str(place))) == f"{place}: cannot read the journal: Permission denied\n"
    place.chmod(0o755)
    (place / NAME.format(0)).chmod(0)
    assert as_ordinary_user(LOOK.format(str(place))) == f"{place}: cannot read the journal: Permission denied\n"


def test_what_is_no_directory_is_said(tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    with (
        pytest.raises(JournalFault, match="cannot read the journal: Not a directory"),
        Logbook.look(tmp_path / "journal"),
    ):
        pass
    with pytest.raises(JournalFault, match="there is no journal in it"), Logbook.look(tmp_path / "nowhere"):
        pass


def test_only_what_is_called_so_is_a_journal(tmp_path: Path) -> None:
    for name in ("journal.1.db", "journal.22.db", "journal.3.db-wal", "journal.x.db", ".journal.4.db.part", "journal"):
        (tmp_path / name).touch()
    assert sorted(generations(tmp_path)) == [1, 22]


# -- a payload that no job explains --------------------------------------------------------------------------------


def started(directory: Path, job_id: str, attempt: int = 1) -> Path:
    state = directory / "payloads" / state_name(job_id, attempt)
    state.mkdir(parents=True)
    (state / "lock").touch()
    return state


@pytest.mark.parametrize("job_id", ["7", "a job with a long name " * 10])
def test_a_payload_whose_job_is_known_is_no_damage(tmp_path: Path, job_id: str) -> None:
    with kept(tmp_path) as book:
        book.add([[Record.of(event) for event in a_life(job_id)]])
        book.add([[Record.of(event) for event in a_life(job_id, 2)[:6]]])
    for attempt in (1, 2):  # an agent that was killed had no time to remove the first
        started(tmp_path, job_id, attempt)
    with kept(tmp_path) as book:
        assert book.damage is None


def test_a_payload_that_was_ready_and_waited_for_its_slot_is_no_damage(tmp_path: Path) -> None:
    """An agent that was killed while jobs waited had, for the next one, lost what it had of each of them."""
    with kept(tmp_path) as book:
        book.add([[Record.of(event) for event in a_life("7")[:4]]])
    (tmp_path / "payloads" / state_name("7", 1)).mkdir()
    with kept(tmp_path) as book:
        assert book.damage is None


def test_a_journal_that_was_removed_beside_payloads_is_damage(tmp_path: Path) -> None:
    living(tmp_path)
    for path in tmp_path.glob("journal.*"):
        path.unlink()
    started(tmp_path, "7")
    started(tmp_path, "line\nfeed")
    with kept(tmp_path) as book:
        assert book.damage == r"it has lost what it had of 2 payloads that were started: '1.7', '1.line\nfeed'"


def test_a_log_that_was_emptied_beside_payloads_is_damage(tmp_path: Path) -> None:
    """What was synced into the file is there, the rest is not: the job had no slot then."""
    living(tmp_path)
    copy = (tmp_path / NAME.format(0)).read_bytes()
    with kept(tmp_path) as book:
        book.add([[Record.of(event) for event in a_life("7")[4:6]]])
    (tmp_path / NAME.format(0)).write_bytes(copy)
    started(tmp_path, "7")
    with kept(tmp_path) as book:
        assert book.damage == "it has lost what it had of 1 payloads that were started: '1.7'"
