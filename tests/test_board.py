"""What a person sees of a node at work."""

from __future__ import annotations

from io import StringIO
from types import MappingProxyType
from typing import Any

import pytest

from loadmaster import Failure, JobResult, NodeStatistics, PayloadOutcome, Status
from loadmaster.console.board import LineBoard, LiveBoard, SilentBoard, ended, open_board, rows, told
from loadmaster.console.gauge import LINE_SECONDS
from loadmaster.result import EndedBy, Phase

NO_JOBS = dict.fromkeys(("waiting", "waiting for disk", "staging in", "ready", "computing", "delivering"), 0)


def figures(*, jobs: dict[str, int] | None = None, **words: Any) -> NodeStatistics:
    usual: dict[str, Any] = {
        "seconds": 100.0, "ended": {"Done": 0, "Failed": 0}, "given_back": 0, "interrupted": 0, "cores": 4,
        "busy_cores": 0, "busy_core_seconds": 200.0, "cpu_seconds": 30.0, "idle": {}, "idle_core_seconds": {},
        "bytes_in": 0, "bytes_out": 0,
    }  # fmt: skip
    found = {**usual, **words, "jobs": {**NO_JOBS, **(jobs or {})}}
    frozen: dict[str, Any] = {k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in found.items()}
    return NodeStatistics(**frozen)


def result(status: Status = Status.DONE, message: str = "", seconds: float | None = 2.5) -> JobResult:
    return JobResult(
        job_id="j7", attempt=1, status=status,
        failure=Failure("PayloadFailed", message, Phase.PAYLOAD) if message else None,
        outcome=None if seconds is None else PayloadOutcome(
            exit_code=0, signal=None, wall_seconds=seconds, cpu_seconds=0.0, peak_memory_bytes=None,
            ended_by=EndedBy.ITSELF,
        ),
    )  # fmt: skip


class Screen(StringIO):
    """A terminal, as far as it says so."""

    def isatty(self) -> bool:
        return True


class Gone(StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_a_row_has_what_there_is_and_always_what_moves() -> None:
    assert dict(rows(figures())) == {
        "staging in": "0", "computing": "0", "delivering": "0", "cores": "0 of 4 busy", "in, out": "0 B, 0 B",
    }  # fmt: skip
    some = figures(
        jobs={"waiting": 12345, "ready": 2, "computing": 3}, ended={"Done": 7, "Failed": 0}, busy_cores=3,
        idle={"waiting for inputs": 1}, bytes_in=2_000_000,
    )  # fmt: skip
    assert list(rows(some)) == [
        ("waiting", "12,345"), ("staging in", "0"), ("ready", "2"), ("computing", "3"), ("delivering", "0"),
        ("Done", "7"), ("cores", "3 of 4 busy; idle: 1 waiting for inputs"), ("in, out", "2.0 MB, 0 B"),
    ]  # fmt: skip


def test_how_a_job_ended_is_a_line() -> None:
    assert ended(result()) == "j7  Done (2.5 s)"
    assert ended(result(Status.FAILED, "exit code 3", None)) == "j7  Failed  PayloadFailed: exit code 3"


def test_what_it_was_in_all_is_a_line() -> None:
    assert told(figures()).startswith("no jobs in ")
    line = told(figures(ended={"Done": 1234, "Rescheduled": 5}, given_back=4))
    assert line.startswith("1,234 Done, 5 Rescheduled, 4 of them given back in ")
    assert "cores busy 50%" in line
    lost = told(figures(ended={"Done": 3, "Rescheduled": 1}, begun_again=1))
    assert lost.startswith("3 Done, 1 begun again after an attempt was lost in "), "three jobs, not four"
    assert told(figures(recalled=7)).startswith("no new jobs (7 had ended before, and were not run again) in ")
    assert told(figures(ended={"Done": 2}, recalled=7)).startswith(
        "2 Done (7 had ended before, and were not run again) in "
    )


def test_a_pipe_gets_a_line_for_each_job_and_one_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = StringIO()
    board = open_board(stream, quiet=False)
    assert isinstance(board, LineBoard)
    board.end(result())
    board.move(figures())
    assert stream.getvalue().count("\n") == 1
    now += LINE_SECONDS
    board.move(figures(jobs={"computing": 4}))
    board.move(figures(jobs={"computing": 4}))
    assert stream.getvalue().count("\n") == 2
    assert "computing 4" in stream.getvalue()


def test_a_quiet_board_says_only_what_it_is_asked_to() -> None:
    stream = Screen()
    board = open_board(stream, quiet=True)
    assert type(board) is SilentBoard
    board.end(result(Status.FAILED, "exit code 3"))
    board.move(figures())
    board.say("told to stop")
    board.close()
    assert stream.getvalue() == "told to stop\n"


def test_a_live_board_has_lines_for_what_failed_and_gives_the_terminal_back() -> None:
    pytest.importorskip("rich")
    stream = Screen()
    board = open_board(stream, quiet=False)
    assert isinstance(board, LiveBoard)
    board.move(figures(jobs={"computing": 3}))
    board.end(result())
    board.end(result(Status.FAILED, "said \x1b[31m[bold]red"))
    board.close()
    shown = stream.getvalue()
    assert "j7  Done" not in shown
    assert "said \\x1b[31m[bold]red" in shown, "what a payload says is not obeyed, neither as colours nor as markup"
    assert "\x1b[?25h" in shown, "the cursor is given back"


@pytest.mark.parametrize("live", [False, True])
def test_a_terminal_that_is_gone_stops_nothing(live: bool) -> None:
    if live:
        pytest.importorskip("rich")
    board = LiveBoard(Gone()) if live else LineBoard(Gone())
    board.say("somebody there?")
    board.end(result(Status.FAILED, "exit code 3"))
    board.move(figures())
    board.close()
