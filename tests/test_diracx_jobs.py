"""What is said of jobs, under which times, and what has been said already: decisions, without a server."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from loadmaster.dirac import JobStatus
from loadmaster.diracx.jobs import Attempt, Kind, Line, attempt_name, clean
from loadmaster.diracx.outbox import Filed, ParameterReport, Report, RescheduleReport, StatusReport
from loadmaster.events import (
    ComputingEnded,
    Event,
    Heartbeat,
    JobAccepted,
    JobFinished,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    SlotGranted,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.result import Failure, PayloadOutcome, Phase, Status, Usage

NOON = datetime(2030, 1, 1, 12, 0, 0, 123456, tzinfo=UTC)
SECOND = timedelta(seconds=1)


def life(failure: Failure | None = None, status: Status = Status.DONE) -> list[Event]:
    """A job's events, all at the same moment."""

    def at(kind: Any, *words: Any) -> Event:
        event = kind("7", 1, NOON, *words)
        assert isinstance(event, Event)
        return event

    return [
        at(JobAccepted), at(StageInStarted), at(PayloadPrepared, "true", {}), at(SlotGranted, 1, None),
        at(PayloadStarted, 1, 1, "process group"), at(PayloadExited, PayloadOutcome(0, None, 1.0, 1.0, None)),
        at(ComputingEnded, failure), at(StageOutStarted), at(JobFinished, status, failure),
    ]  # fmt: skip


def reports(attempt: Attempt, events: list[Event]) -> list[Report]:
    return [report for event in events for report in attempt.reports(7, event)]


def test_statuses_have_times_that_grow_though_the_events_have_the_same() -> None:
    said = [each for each in reports(Attempt("a"), life()) if isinstance(each, StatusReport)]
    times = [each.time for each in said]
    assert times == sorted(set(times))
    assert times[0] == NOON.replace(microsecond=123000)
    assert times[-1] - times[0] < SECOND


def test_a_history_that_is_heard_again_is_not_reported_again() -> None:
    events = life()
    for cut in range(len(events) + 1):
        before, after = Attempt("a"), Attempt("a", reported=cut)
        said = reports(before, events[:cut])
        assert before.heard == before.reported == cut
        again = reports(after, events)
        assert said + again == reports(Attempt("a"), events)


def test_a_job_that_is_to_run_again_is_ordered_to_but_not_one_that_waits_for_a_person() -> None:
    def orders(kind: str) -> list[Report]:
        failure = Failure(kind, "no database here", Phase.STAGE_IN)
        events = [life()[0], *life(failure, Status.RESCHEDULED)[6:]]
        return [each for each in reports(Attempt("a"), events) if isinstance(each, RescheduleReport)]

    assert orders("RescheduleJob") == [RescheduleReport(7)]
    assert orders("HoldJob") == []


def test_two_attempts_with_one_number_have_two_names() -> None:
    first = life()[0]
    assert attempt_name(first) != attempt_name(JobAccepted("7", 1, NOON + SECOND))
    assert attempt_name(first) != attempt_name(JobAccepted("7", 2, NOON))


def line(*statuses: JobStatus, time: datetime = NOON) -> Line:
    line = Line(7)
    for number, said in enumerate(statuses):
        line.file(Filed(number, StatusReport(7, time, said)))
    return line


RUNNING, DONE = JobStatus("Running", "Job Initialization"), JobStatus("Done", "Execution Complete")


def test_a_status_is_sent_again_under_the_same_time_whatever_the_clocks_say_meanwhile() -> None:
    """An answer is lost: the server may have it. Under another time it would be a new one, of a job that is over."""
    sent = line(RUNNING, DONE)
    first = sent.update(sent.next(Kind.STATUSES), timedelta(0), NOON, "JobWrapper")
    again = sent.update(sent.next(Kind.STATUSES), timedelta(seconds=9), NOON + SECOND, "JobWrapper")
    assert first == again
    assert list(first) == sorted(first)
    assert len(first) == 2


def test_what_was_ignored_as_old_is_sent_again_as_of_later_in_its_order() -> None:
    sent = line(RUNNING, DONE)
    filed = sent.next(Kind.STATUSES)
    first = sent.update(filed, timedelta(0), NOON, "JobWrapper")
    sent.say_again(filed, NOON + 60 * SECOND)
    again = sent.update(filed, timedelta(0), NOON, "JobWrapper")
    assert min(again) > max(first)
    assert [words["Status"] for _, words in sorted(again.items())] == ["Running", "Done"]
    sent.file(Filed(9, StatusReport(7, NOON, DONE)))
    sent.delivered(filed)
    assert min(sent.update(sent.next(Kind.STATUSES), timedelta(0), NOON, "JobWrapper")) > max(again)


def test_the_time_is_the_server_s() -> None:
    sent = line(RUNNING)
    (stamp,) = sent.update(sent.next(Kind.STATUSES), 3600 * SECOND, NOON, "JobWrapper")
    assert datetime.fromisoformat(stamp) == NOON.replace(microsecond=123000) + 3600 * SECOND


def test_without_anything_to_say_a_question_is_asked() -> None:
    ((stamp, words),) = line().update([], timedelta(0), NOON, "JobWrapper@" + "x" * 99).items()
    assert words == {"Source": "JobWrapper@" + "x" * 21}
    assert datetime.fromisoformat(stamp) == NOON.replace(microsecond=123000)


def test_an_order_to_reschedule_comes_after_the_statuses_before_it_and_parameters_when_they_like() -> None:
    sent = line(RUNNING)
    sent.file(Filed(8, RescheduleReport(7)))
    sent.file(Filed(9, StatusReport(7, NOON, DONE)))
    sent.file(Filed(10, ParameterReport(7, {"a": "b"})))
    assert [filed.number for filed in sent.next(Kind.STATUSES)] == [0]
    assert sent.next(Kind.RESCHEDULE) == []
    assert [filed.number for filed in sent.next(Kind.PARAMETERS)] == [10]
    sent.delivered(sent.next(Kind.STATUSES))
    assert sent.said == RUNNING
    assert sent.next(Kind.STATUSES) == []
    sent.delivered(sent.next(Kind.RESCHEDULE))
    assert [filed.number for filed in sent.next(Kind.STATUSES)] == [9]


def test_a_heartbeat_has_dirac_s_words_and_units() -> None:
    sent = line()
    assert sent.heartbeat().keys() == {"LoadAverage"}
    usage = Usage(10.0, cpu_seconds=5.0, rss_bytes=3 * 2**20, free_disk_bytes=2**30)
    sent.beat = Heartbeat("7", 1, NOON, Phase.PAYLOAD, 1.0, usage, ("one", "two\udc80\0"))
    words = sent.heartbeat()
    del words["LoadAverage"]
    printed = str(words.pop("StandardOutput"))
    assert words == {"MemoryUsed": 3.0, "CPUConsumed": 5.0, "WallClockTime": 10.0, "AvailableDiskSpace": 1024.0}
    assert "Last 2 lines of application output from Watchdog on 2030-01-01 12:00:00" in printed
    assert printed.endswith("one\ntwo?\ufffd\n")


@given(st.text(st.characters()))
def test_any_text_is_fit_for_json_and_a_database(text: str) -> None:
    cleaned = clean(text)
    assert json.loads(json.dumps(cleaned).encode("ascii").decode()) == cleaned
    assert all(character.isprintable() or character in "\t\ufffd" for character in cleaned)
    assert clean(cleaned) == cleaned
