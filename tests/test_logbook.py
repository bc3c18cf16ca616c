"""The file of a journal: whole after a crash, honest about damage, one agent's at a time."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path

import pytest

from lives import LONG_AGO, a_life
from loadmaster.errors import JournalFault
from loadmaster.events import Event, JobAccepted, dumps
from loadmaster.logbook import Logbook, Record
from loadmaster.logfile import NAME, UPGRADES


def written(directory: Path, events: Iterable[Event]) -> None:
    """One after the other, each with a sync of its own."""
    book = Logbook.open(directory)
    try:
        for event in events:
            assert book.add([[Record.of(event)]]) == [None]
    finally:
        book.close()


def database(directory: Path, number: int = 0) -> Path:
    return directory / NAME.format(number)


def known(directory: Path, job_id: str) -> list[Event]:
    with Logbook.look(directory) as book:
        history = book.history(job_id)
        return list(history.events) if history else []


def crashed(directory: Path, events: Iterable[Event], into: Path) -> None:
    """What the disk has of these when the machine stops: a copy of what was synced."""
    book = Logbook.open(directory)
    for event in events:
        book.add([[Record.of(event)]])
    into.mkdir()
    for path in directory.glob("journal.*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, into)
    book.close()


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    life = a_life("7")
    written(tmp_path / "journal", life)
    assert known(tmp_path / "journal", "7") == life


def test_jobs_that_have_not_ended_come_back_in_the_order_in_which_they_came(tmp_path: Path) -> None:
    lives = {name: a_life(name) for name in ("c", "a", "b")}
    written(tmp_path, [*lives["c"][:5], *lives["a"], *lives["b"][:1], *lives["c"][5:6]])
    book = Logbook.open(tmp_path)
    try:
        assert [(job.job_id, job.attempt, job.status) for job in book.open_jobs()] == [("c", 1, None), ("b", 1, None)]
        assert list(book.open_jobs()[0].events) == lives["c"][:6]
        assert book.ended() == {"Done": 1}
    finally:
        book.close()


def test_the_last_attempt_is_the_one_that_is_known(tmp_path: Path) -> None:
    written(tmp_path, [*a_life("7", 1), *a_life("7", 2)[:3]])
    with Logbook.look(tmp_path) as book:
        assert (last := book.history("7")) and (last.attempt, last.status, len(last.events)) == (2, None, 3)
        assert (first := book.history("7", 1)) and (first.attempt, first.status) == (1, "Done")
        assert book.last(["7", "8"]) == {"7": (2, None)}
        assert book.history("8") is None


def test_a_job_counts_as_its_last_attempt_stands(tmp_path: Path) -> None:
    written(tmp_path, [*a_life("7", 1), *a_life("7", 2), *a_life("8", 1), *a_life("8", 2)[:3]])
    with Logbook.look(tmp_path) as book:
        assert book.counts() == (1, {"Done": 1})


def test_who_has_had_it_is_known_and_who_died(tmp_path: Path) -> None:
    written(tmp_path, a_life("7"))
    crashed(tmp_path, (), tmp_path / "copy")
    written(tmp_path / "copy", ())
    with Logbook.look(tmp_path / "copy") as book:
        first, died, last = book.agents()
    assert first.pid == died.pid == last.pid == os.getpid()
    assert first.closed is not None
    assert first.began <= first.closed <= died.began <= last.began
    assert died.closed is None
    assert last.closed is not None


def test_agents_are_forgotten_once_the_next_one_began_long_ago(tmp_path: Path) -> None:
    for _ in range(3):
        written(tmp_path, ())
    book = Logbook.open(tmp_path)
    try:
        began = [agent.began for agent in book.agents()]
        book.forget(began[2] + timedelta(microseconds=1), jobs=10)
        assert [agent.began for agent in book.agents()] == began[2:]
    finally:
        book.close()


def test_a_journal_of_an_earlier_version_has_no_agents_and_can_be_looked_at(tmp_path: Path) -> None:
    written(tmp_path, a_life("7"))
    with sqlite3.connect(database(tmp_path)) as earlier:
        earlier.execute("DROP TABLE agents")
        earlier.execute(f"PRAGMA user_version = {len(UPGRADES) - 1}")
    earlier.close()
    with Logbook.look(tmp_path) as book:
        assert book.agents() == []


def test_a_name_that_is_no_text_and_a_threshold_that_is_infinite_are_kept(tmp_path: Path) -> None:
    from dataclasses import replace

    from loadmaster.events import FileStagedIn, PayloadExited
    from loadmaster.result import StoredFile, Verdict

    life = a_life("7")
    life[2] = FileStagedIn("7", 1, LONG_AGO, StoredFile("\udcff", "file:///x", 1, ""))
    exited = life[7]
    assert isinstance(exited, PayloadExited)
    life[7] = replace(exited, outcome=replace(exited.outcome, verdict=Verdict("memory", float("inf"), 1.0, "bytes")))
    written(tmp_path, life)
    assert known(tmp_path, "7") == life


# -- whose it is -------------------------------------------------------------------------------------------------


def test_a_journal_is_one_agents_and_the_other_is_told_whose(tmp_path: Path) -> None:
    book = Logbook.open(tmp_path)
    try:
        with pytest.raises(JournalFault, match=rf"{tmp_path}: this journal is in use by process {os.getpid()} on"):
            Logbook.open(tmp_path)
    finally:
        book.close()
    Logbook.open(tmp_path).close()


def test_a_killed_agents_journal_is_free_at_once(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from loadmaster.logbook import Logbook\n"
        "book = Logbook.open(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"open\n"
        with pytest.raises(JournalFault, match=f"process {agent.pid}"):
            Logbook.open(tmp_path)
        agent.kill()
    Logbook.open(tmp_path).close()


def test_a_person_reads_while_an_agent_writes(tmp_path: Path) -> None:
    book = Logbook.open(tmp_path)
    try:
        life = a_life("7")
        book.add([[Record.of(event)] for event in life[:4]])
        assert known(tmp_path, "7") == life[:4]
        with Logbook.look(tmp_path) as other:
            (line,) = other.lines(last=10)
            assert (line.job_id, line.status, line.last) == ("7", None, life[3])
            with pytest.raises(sqlite3.OperationalError, match="readonly"):
                other.add([[Record.of(life[4])]])
        assert book.add([[Record.of(life[4])]]) == [None]
    finally:
        book.close()


def test_where_there_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(JournalFault, match="there is no journal in it"), Logbook.look(tmp_path):
        pass


def test_nobody_else_reads_what_may_be_secret(tmp_path: Path) -> None:
    book = Logbook.open(tmp_path / "journal")
    try:
        book.add([[Record.of(a_life("7")[0])]])
        modes = {path.name: path.stat().st_mode & 0o077 for path in (tmp_path / "journal").iterdir()}
        assert set(modes.values()) == {0}
        assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o700
    finally:
        book.close()


# -- who comes twice, who never came -----------------------------------------------------------------------------


def test_a_job_that_is_there_already_harms_nobody_elses_events(tmp_path: Path) -> None:
    book = Logbook.open(tmp_path)
    try:
        seven, eight = a_life("7"), a_life("8")
        book.add([[Record.of(event) for event in seven]])
        errors = book.add([[Record.of(eight[0])], [Record.of(seven[0])], [Record.of(eight[1])]])
        assert [str(error) for error in errors] == ["None", "job 7, attempt 1 is in the journal already", "None"]
        assert known(tmp_path, "8") == eight[:2]
        assert known(tmp_path, "7") == seven
    finally:
        book.close()


def test_an_event_of_a_job_that_is_not_open_is_refused_with_what_came_with_it(tmp_path: Path) -> None:
    book = Logbook.open(tmp_path)
    try:
        seven, eight = a_life("7"), a_life("8")
        book.add([[Record.of(event) for event in seven]])
        errors = book.add([[Record.of(eight[0]), Record.of(seven[3])], [Record.of(a_life("9")[0])]])
        assert str(errors[0]) == "job 7, attempt 1 is not open in the journal"
        assert errors[1] is None
        assert known(tmp_path, "7") == seven
        assert known(tmp_path, "9") == a_life("9")[:1]
        assert known(tmp_path, "8") == []
    finally:
        book.close()


def test_more_than_a_statement_takes_is_still_all_or_nothing(tmp_path: Path) -> None:
    book = Logbook.open(tmp_path)
    try:
        lives = [[Record.of(event) for event in a_life(str(number))] for number in range(100)]
        assert book.add(lives) == [None] * 100
        assert book.ended() == {"Done": 100}
    finally:
        book.close()


# -- crashes and damage ------------------------------------------------------------------------------------------


def test_power_loss_takes_nothing_that_was_said_to_be_written(tmp_path: Path) -> None:
    life = a_life("7")[:8]
    crashed(tmp_path / "journal", life, tmp_path / "disk")
    assert known(tmp_path / "disk", "7") == life
    book = Logbook.open(tmp_path / "disk")
    book.close()
    assert book.damage is None


def test_a_torn_write_is_left_out_and_said(tmp_path: Path) -> None:
    life = a_life("7")[:8]
    crashed(tmp_path / "journal", life, tmp_path / "disk")
    log = Path(f"{database(tmp_path / 'disk')}-wal")
    os.truncate(log, log.stat().st_size - 100)
    book = Logbook.open(tmp_path / "disk")
    try:
        assert book.damage == "the end of the last write was torn, and is left out"
        (job,) = book.open_jobs()
        assert list(job.events) == life[:7]
        assert book.add([[Record.of(life[7])]]) == [None]
    finally:
        book.close()
    assert known(tmp_path / "disk", "7") == life


def test_a_file_that_was_cut_short_is_kept_aside_and_gone_on_with_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    lives = [a_life(f"{number:03}") for number in range(60)]
    written(tmp_path, [event for life in lives for event in life[:9]])
    whole = database(tmp_path).read_bytes()
    os.truncate(database(tmp_path), len(whole) * 2 // 3)
    cut = database(tmp_path).read_bytes()
    book = Logbook.open(tmp_path)
    try:
        assert book.damage is not None
        assert "journal.0.db is damaged (parts of it do not belong together) and kept aside" in book.damage
        jobs = book.open_jobs()
        assert 10 < len(jobs) < 60
        events = [event for job in jobs for event in job.events]
        assert events == [event for life in lives for event in life[:9]][: len(events)]
        assert book.add([[Record.of(lives[0][9])]]) == [None]
    finally:
        book.close()
    assert database(tmp_path).read_bytes() == cut
    book = Logbook.open(tmp_path)
    book.close()
    assert book.damage is None


def test_damage_that_only_a_check_finds_is_told_without_the_words_of_the_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`journal.0.db is damaged (*** in database main ***)`, it said."""
    written(tmp_path, [event for number in range(60) for event in a_life(f"{number:03}")[:9]])
    content = bytearray(database(tmp_path).read_bytes())
    content[-2 * 4096 : -4096] = bytes(4096)
    database(tmp_path).write_bytes(content)
    (tmp_path / "suspect").touch()
    book = Logbook.open(tmp_path)
    book.close()
    assert book.damage is not None
    assert "journal.0.db is damaged (parts of it do not belong together) and kept aside" in book.damage
    assert "***" not in caplog.text


def test_what_is_no_journal_at_all_is_kept_aside_too(tmp_path: Path) -> None:
    database(tmp_path).write_text("Dear diary, " * 1000)
    book = Logbook.open(tmp_path)
    book.close()
    assert book.damage is not None
    assert "journal.0.db is damaged (it is no database) and kept aside; 0 events could be read" in book.damage
    assert database(tmp_path).read_text().startswith("Dear diary")


def test_a_file_that_was_emptied_is_said_also_beside_no_payload(tmp_path: Path) -> None:
    """It began anew without a word: nobody was told that what had ended is known no more, and may be run again."""
    written(tmp_path, a_life("7"))
    os.truncate(database(tmp_path), 0)
    book = Logbook.open(tmp_path)
    assert book.damage == "journal.0.db had been emptied: what it had is lost"
    assert book.open_jobs() == []
    book.close()
    book = Logbook.open(tmp_path)
    book.close()
    assert book.damage is None, "it is said once"


def test_an_agent_that_died_as_it_made_its_first_file_has_lost_nothing(tmp_path: Path) -> None:
    database(tmp_path).touch()
    book = Logbook.open(tmp_path)
    book.close()
    assert book.damage is None


@pytest.mark.parametrize("size", [100, 4096])
def test_a_first_page_of_noise_is_kept_aside_whatever_size_it_says(tmp_path: Path, size: int) -> None:
    """A copy was to be made as large as the noise said: File too large, at this start and at every one after it."""
    written(tmp_path, a_life("7"))
    content = database(tmp_path).read_bytes()
    noise = bytes((place * 167 + 91) % 256 for place in range(size)) + content[size:]
    database(tmp_path).write_bytes(noise)
    book = Logbook.open(tmp_path)
    book.close()
    assert book.damage is not None
    assert "journal.0.db is damaged" in book.damage
    assert database(tmp_path).read_bytes() == noise
    assert database(tmp_path, 1).exists()


def test_a_lost_main_file_is_made_again_from_the_log(tmp_path: Path) -> None:
    """All that a young journal knows is in its log still."""
    life = a_life("7")[:8]
    crashed(tmp_path / "journal", life, tmp_path / "disk")
    os.truncate(database(tmp_path / "disk"), 0)
    book = Logbook.open(tmp_path / "disk")
    try:
        events = [event for job in book.open_jobs() for event in job.events]
        assert events == life[: len(events)]
        assert book.damage is not None
    finally:
        book.close()


def test_damage_that_is_met_while_writing_is_looked_for_at_the_next_start(tmp_path: Path) -> None:
    written(tmp_path, [event for number in range(60) for event in a_life(f"{number:03}")[:9]])
    content = bytearray(database(tmp_path).read_bytes())
    for page in range(5, len(content) // 4096):
        content[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    database(tmp_path).write_bytes(content)
    with pytest.raises((sqlite3.DatabaseError, JournalFault)):
        book = Logbook.open(tmp_path)
        try:
            for number in range(1000, 1100):
                book.add([[Record.of(event) for event in a_life(str(number))]])
        finally:
            damage = book.damage
            book.close()
        assert damage is not None
        raise JournalFault("it was found when it was opened")
    book = Logbook.open(tmp_path)
    book.close()
    names = sorted(path.name for path in tmp_path.glob("journal.*.db"))
    assert names == ["journal.0.db", "journal.1.db"]


def test_an_event_that_cannot_be_read_ends_its_job_history_there_and_nobody_elses(tmp_path: Path) -> None:
    written(tmp_path, [*a_life("7")[:5], *a_life("8")[:5]])
    with sqlite3.connect(database(tmp_path)) as db:
        db.execute('UPDATE events SET facts = \'{"kind": "Nonsense"}\' WHERE number = 3')
    db.close()
    book = Logbook.open(tmp_path)
    try:
        seven, eight = book.open_jobs()
        assert list(seven.events) == a_life("7")[:2]
        assert list(eight.events) == a_life("8")[:5]
        assert book.add([[Record.of(a_life("7")[3])]]) == [None]
    finally:
        book.close()
    assert known(tmp_path, "7") == [*a_life("7")[:2], a_life("7")[3]]


def test_a_full_disk_takes_nothing_and_later_takes_it(small_disk: Path) -> None:
    book = Logbook.open(small_disk / "journal")
    try:
        written: list[str] = []
        with pytest.raises(sqlite3.OperationalError, match="full"):
            for number in range(100_000):
                big = JobAccepted(str(number), 1, LONG_AGO, {"executable": "x" * 20_000})
                assert book.add([[Record.of(big)]]) == [None]
                written.append(str(number))
        assert len(written) > 5
        with pytest.raises(sqlite3.OperationalError):
            book.add([[Record.of(JobAccepted("more", 1, LONG_AGO, {"executable": "x" * 20_000}))]])
        subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
        assert book.add([[Record.of(JobAccepted("later", 1, LONG_AGO, {}))]]) == [None]
        assert [job.job_id for job in book.open_jobs()] == [*written, "later"]
    finally:
        book.close()


# -- its age -----------------------------------------------------------------------------------------------------


def test_a_file_of_the_first_version_is_brought_up_to_date_with_all_that_is_in_it(tmp_path: Path) -> None:
    with sqlite3.connect(database(tmp_path), isolation_level=None) as db:
        db.executescript(UPGRADES[0] + "PRAGMA user_version = 1")
        for event in a_life("7")[:4]:
            db.execute("INSERT INTO events (job, kind, facts) VALUES (1, ?, ?)", (event.kind, dumps(event)))
    db.close()
    written(tmp_path, a_life("7")[4:6])
    assert known(tmp_path, "7") == a_life("7")[:6]
    with sqlite3.connect(database(tmp_path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (len(UPGRADES),)
    db.close()


def test_a_file_of_a_version_to_come_is_left_alone(tmp_path: Path) -> None:
    Logbook.open(tmp_path).close()
    with sqlite3.connect(database(tmp_path)) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(JournalFault, match="written by a later loadmaster"):
        Logbook.open(tmp_path)
    assert not database(tmp_path, 1).exists()


def test_what_ended_long_ago_is_forgotten_step_by_step_and_the_open_never(tmp_path: Path) -> None:
    written(tmp_path, [*a_life("open")[:3]])
    book = Logbook.open(tmp_path)
    try:
        book.add([[Record.of(event) for event in a_life(str(number))] for number in range(30)])
        book.add([[Record.of(event) for event in a_life("young", began=LONG_AGO + timedelta(days=3))]])
        before = LONG_AGO + timedelta(days=1)
        assert [book.forget(before, jobs=20) for _ in range(3)] == [20, 10, 0]
        assert book.ended() == {"Done": 1}
        assert [job.job_id for job in book.open_jobs()] == ["open"]
        assert book.history("young") is not None
        assert book.add([[Record.of(event) for event in a_life("3")]]) == [None]
    finally:
        book.close()


def test_a_hundred_thousand_jobs_that_have_ended_delay_nobody(tmp_path: Path) -> None:
    """The time is the processor's: the machine may be busy with others."""
    book = Logbook.open(tmp_path)
    for start in range(0, 10_000, 500):
        book.add([[Record.of(event) for event in a_life(str(number))] for number in range(start, start + 500)])
    for number in range(100):
        book.add([[Record.of(event) for event in a_life(f"open{number}")[:8]]])
    book.close()
    begun = time.process_time()
    book = Logbook.open(tmp_path)
    try:
        assert len(book.open_jobs()) == 100
        assert book.ended() == {"Done": 10_000}
    finally:
        book.close()
    assert time.process_time() - begun < 1.0
