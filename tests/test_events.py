"""Events as they are written and read back."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from loadmaster import events
from loadmaster.events import (
    KINDS,
    ComputingEnded,
    Event,
    FileStagedIn,
    Heartbeat,
    JobFinished,
    OutputPrinted,
    PayloadExited,
    PayloadPrepared,
    dump,
    load,
)
from loadmaster.result import EndedBy, Failure, PayloadOutcome, Phase, Status, StoredFile, Usage, Verdict

NOW = datetime(2024, 2, 29, 23, 59, 59, 999_999, tzinfo=UTC)
FINISHED = JobFinished("7", 1, NOW, Status.DONE, None)


def through_json(event: Event) -> Event:
    return load(json.loads(json.dumps(dump(event), allow_nan=False)))


def test_every_kind_is_known_by_the_name_of_its_class() -> None:
    written = {name for name, kind in vars(events).items() if isinstance(kind, type) and issubclass(kind, Event)}
    assert set(KINDS) == written - {"Event"}
    assert all(KINDS[name] is getattr(events, name) for name in KINDS)


def test_what_is_only_of_the_moment_is_not_kept() -> None:
    assert {name for name, kind in KINDS.items() if not kind.kept} == {
        "Heartbeat", "OutputPrinted", "StagingProgress", "TransferProgress",
    }  # fmt: skip


def test_an_event_is_written_with_its_kind_its_job_and_its_time() -> None:
    assert dump(FINISHED) == {
        "kind": "JobFinished",
        "job_id": "7",
        "attempt": 1,
        "time": "2024-02-29T23:59:59.999999+00:00",
        "status": "Done",
        "failure": None,
    }


@pytest.mark.parametrize(
    "event",
    [
        FINISHED,
        ComputingEnded("7", 1, NOW, Failure("PayloadFailed", "exit code 1", Phase.PAYLOAD)),
        FileStagedIn("7", 2, NOW, StoredFile("é", "file:///é", 2**40, "00000001", "/vo/é", "DISK")),
        PayloadPrepared("7", 1, NOW, ("/bin/echo", "a b", ""), {"A": "x=y\n"}),
        PayloadPrepared("7", 1, NOW, "echo a", {}),
        PayloadExited(
            "7", 1, NOW, PayloadOutcome(None, 9, 1.5, 0.25, 4096, EndedBy.LIMIT, Verdict("wall time", 2.0, 1.0, "s"))
        ),
        PayloadExited("7", 1, NOW, PayloadOutcome(None, None, 0.0, 0.0, None)),
        Heartbeat("7", 1, NOW, Phase.PAYLOAD, 1.0, Usage(1.0, 0.5, 1024, 3), ("the last line",)),
        OutputPrinted("7", 1, NOW, "std.out", "hello\n", 5),
    ],
    ids=lambda event: event.kind,
)
def test_an_event_is_read_back_as_it_was_written(event: Event) -> None:
    back = through_json(event)
    assert back == event
    assert repr(back).partition("time=")[0] == repr(event).partition("time=")[0]
    assert back.time.utcoffset() == event.time.utcoffset()


def test_what_is_read_back_has_our_own_types() -> None:
    """`Status.DONE == "Done"`, so equality alone would not notice a plain string."""
    outcome = PayloadOutcome(0, None, 1.0, 1.0, None, EndedBy.KILL)
    back = through_json(PayloadExited("7", 1, NOW, outcome))
    assert isinstance(back, PayloadExited)
    assert isinstance(back.outcome.ended_by, EndedBy)
    finished = through_json(FINISHED)
    assert isinstance(finished, JobFinished)
    assert isinstance(finished.status, Status)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "JobVanished"},
        {"kind": "Event"},
        {"kind": None},
        {"kind": ["JobFinished"]},
        {"kind": {}},
        {"kind": "JobFinished"},
        {**dump(FINISHED), "status": "Perhaps"},
        {**dump(FINISHED), "attempt": "first"},
        {**dump(FINISHED), "time": "yesterday"},
        {**dump(FINISHED), "failure": {"kind": "PayloadFailed"}},
    ],
)
def test_what_is_no_event_is_refused_as_a_value(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"event|JobFinished"):
        load(data)


def test_reading_changes_nothing_of_what_was_read() -> None:
    data = dump(FINISHED)
    load(data)
    assert data == dump(FINISHED)
