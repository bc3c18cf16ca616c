"""A job's history, folded: the order of events, and what they add up to."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from loadmaster.errors import IllegalEvent
from loadmaster.events import (
    CompanionFailed,
    ComputingEnded,
    Event,
    FailoverRequested,
    FileStagedIn,
    FileStagedOut,
    Heartbeat,
    JobAccepted,
    JobFinished,
    KillOrdered,
    LimitReached,
    OutputMissing,
    ParameterReported,
    PayloadAdopted,
    PayloadExited,
    PayloadPrepared,
    PayloadStarted,
    Remembered,
    SlotGranted,
    SoftStopOrdered,
    StageInEnded,
    StageInStarted,
    StageOutStarted,
)
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.result import Failure, PayloadOutcome, Phase, Status, StoredFile, Verdict

WHO = ("7", 1, datetime(2024, 1, 1, tzinfo=UTC))
OUTCOME = PayloadOutcome(0, None, 1.0, 0.5, 4096)
OVER = Verdict("wall time", 2.0, 1.0, "s")

ACCEPTED = JobAccepted(*WHO)
STAGING_IN = StageInStarted(*WHO)
STAGED_IN = StageInEnded(*WHO)
PREPARED = PayloadPrepared(*WHO, "true", {})
GRANTED = SlotGranted(*WHO, 1, None)
STARTED = PayloadStarted(*WHO, 10, 20, "session")
EXITED = PayloadExited(*WHO, OUTCOME)
COMPUTED = ComputingEnded(*WHO, None)
STAGING_OUT = StageOutStarted(*WHO)
FINISHED = JobFinished(*WHO, Status.DONE, None)

STRAIGHT = [
    ACCEPTED, STAGING_IN, STAGED_IN, PREPARED, GRANTED, STARTED, EXITED, COMPUTED, STAGING_OUT, FINISHED,
]  # fmt: skip
"""The life of a job that goes well; `STRAIGHT[:n]` brings a job to its n-th stage."""


def stored(name: str, url: str = "file:///se/x") -> StoredFile:
    return StoredFile(name, url, 1, "00000001")


def failure(kind: str) -> Failure:
    return Failure(kind, "because", Phase.PAYLOAD)


# -- order -------------------------------------------------------------------------------------------------------


def test_a_straight_life_passes_every_stage_in_the_order_of_the_picture() -> None:
    life = Lifecycle()
    stages = [life.stage]
    for event in STRAIGHT:
        life.advance(event)
        stages.append(life.stage)
    assert stages == list(Stage)


@pytest.mark.parametrize("before", range(len(STRAIGHT) + 1))
def test_each_event_comes_only_where_the_picture_has_it(before: int) -> None:
    early_ends = {1, 2, 3, 4, 5, 7}  # all stages of computing but the one with a running payload
    for number, event in enumerate(STRAIGHT):
        life = Lifecycle.of(STRAIGHT[:before])
        ends_computing = event is COMPUTED and before in early_ends
        finishes = event is FINISHED and before in {8, 9}
        after_a_restart = (event, before) in [(STAGING_IN, 2), (GRANTED, 5)]
        without_an_end = (event, before) == (PREPARED, 2)
        if number == before or ends_computing or finishes or after_a_restart or without_an_end:
            life.advance(event)
        else:
            with pytest.raises(IllegalEvent, match=event.kind):
                life.advance(event)


@pytest.mark.parametrize(
    ("event", "stages"),
    [
        (FileStagedIn(*WHO, stored("a")), range(2, 8)),
        (FileStagedOut(*WHO, stored("a")), range(6, 10)),
        (OutputMissing(*WHO, "a", "not made"), range(6, 10)),
        (FailoverRequested(*WHO, stored("a"), "file:///x"), range(6, 10)),
        (ParameterReported(*WHO, "a", "b"), range(1, 10)),
        (Remembered(*WHO, "a", [1]), range(1, 10)),
        (KillOrdered(*WHO, "enough"), range(1, 8)),
        (SoftStopOrdered(*WHO, 15), range(6, 7)),
        (LimitReached(*WHO, OVER), range(6, 7)),
        (CompanionFailed(*WHO, Failure("HookFailed", "because", Phase.PAYLOAD)), range(6, 7)),
        (PayloadAdopted(*WHO, 11, "node7"), range(6, 7)),
        (Heartbeat(*WHO, Phase.PAYLOAD, 1.0), range(0)),
    ],
    ids=lambda value: value.kind if isinstance(value, Event) else "",
)
def test_a_note_is_taken_where_it_belongs_and_moves_nothing(event: Event, stages: range) -> None:
    for before in range(len(STRAIGHT) + 1):
        life = Lifecycle.of(STRAIGHT[:before])
        stage = life.stage
        if before in stages:
            life.advance(event)
        else:
            with pytest.raises(IllegalEvent):
                life.advance(event)
        assert life.stage is stage


def test_a_refused_event_is_named_with_its_job_and_the_stage() -> None:
    with pytest.raises(IllegalEvent, match="job 7: PayloadExited cannot come while the job is granted"):
        Lifecycle.of([*STRAIGHT[:5], EXITED])


@pytest.mark.parametrize(("job_id", "attempt"), [("8", 1), ("7", 2)])
def test_events_of_two_jobs_or_attempts_are_not_one_life(job_id: str, attempt: int) -> None:
    """A journal that mixed two jobs up was folded into one result, with the outputs of both."""
    stray = StageInStarted(job_id, attempt, WHO[2])
    life = Lifecycle.of([ACCEPTED])
    with pytest.raises(IllegalEvent, match=f"job {job_id}, attempt {attempt}: StageInStarted"):
        life.advance(stray)
    assert life.stage is Stage.ACCEPTED


# -- result ------------------------------------------------------------------------------------------------------


def test_there_is_no_result_before_the_end() -> None:
    with pytest.raises(IllegalEvent, match="staging_out has no result"):
        Lifecycle.of(STRAIGHT[:-1]).result()


def test_the_result_has_what_the_events_said() -> None:
    a, b, c = stored("a"), stored("b"), stored("c")
    notes: dict[int, list[Event]] = {
        2: [FileStagedIn(*WHO, a), ParameterReported(*WHO, "k", "1")],
        6: [FileStagedOut(*WHO, b), ParameterReported(*WHO, "k", "2")],
        9: [FailoverRequested(*WHO, c, "file:///wanted"), OutputMissing(*WHO, "d", "not made")],
    }
    events = [event for n, move in enumerate(STRAIGHT) for event in (*notes.get(n, []), move)]
    result = Lifecycle.of(events).result()
    assert (result.job_id, result.attempt, result.status, result.failure) == ("7", 1, Status.DONE, None)
    assert result.outcome == OUTCOME
    assert result.inputs == (a,)
    assert result.outputs == (b, c)
    assert result.missing_outputs == ("d",)
    assert result.pending == ("move file:///se/x to file:///wanted",)
    assert result.parameters == {"k": "2"}


def test_a_hook_that_is_called_again_does_not_double_the_files() -> None:
    """`RetryHook` in stageIn or stageOut repeats the standard steps, and each file was counted twice."""
    inputs = [FileStagedIn(*WHO, stored("a")), FileStagedIn(*WHO, stored("a"))]
    outputs: list[Event] = [
        FileStagedOut(*WHO, stored("b")),
        OutputMissing(*WHO, "c", "not made"),
        FailoverRequested(*WHO, stored("d"), "file:///wanted"),
    ]
    result = Lifecycle.of([*STRAIGHT[:2], *inputs, *STRAIGHT[2:9], *outputs, *outputs, FINISHED]).result()
    assert [file.name for file in result.inputs] == ["a"]
    assert [file.name for file in result.outputs] == ["b", "d"]
    assert result.missing_outputs == ("c",)
    assert len(result.pending) == 1


def test_one_file_delivered_to_two_places_is_two_outputs() -> None:
    both = [FileStagedOut(*WHO, stored("a", f"file:///{place}")) for place in ("logs", "data")]
    assert len(Lifecycle.of([*STRAIGHT[:9], *both, FINISHED]).result().outputs) == 2


def test_the_first_failure_is_the_one_that_is_kept() -> None:
    ended = [ACCEPTED, ComputingEnded(*WHO, failure("StagingFailed"))]
    late = JobFinished(*WHO, Status.FAILED, failure("HookFailed"))
    assert Lifecycle.of([*ended, late]).result().failure == failure("StagingFailed")
    assert Lifecycle.of([*STRAIGHT[:9], late]).result().failure == failure("HookFailed")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("PayloadFailed", Status.FAILED),
        ("LimitExceeded", Status.FAILED),
        ("AnythingElse", Status.FAILED),
        ("JobWasKilled", Status.KILLED),
        ("RescheduleJob", Status.RESCHEDULED),
        ("HoldJob", Status.RESCHEDULED),
    ],
)
def test_the_kind_of_failure_decides_how_a_job_ends(kind: str, status: Status) -> None:
    assert Lifecycle.of([ACCEPTED, ComputingEnded(*WHO, failure(kind))]).ends_as() is status
    assert Lifecycle.of(STRAIGHT[:9]).ends_as(failure(kind)) is status


def test_a_kill_is_not_forgotten_when_the_delivery_fails_too() -> None:
    life = Lifecycle.of([ACCEPTED, ComputingEnded(*WHO, failure("JobWasKilled")), STAGING_OUT])
    assert life.ends_as(failure("StagingFailed")) is Status.KILLED


def test_a_job_whose_outputs_are_safe_elsewhere_is_completed_not_done() -> None:
    safe = FailoverRequested(*WHO, stored("a"), "file:///wanted")
    assert Lifecycle.of(STRAIGHT[:9]).ends_as() is Status.DONE
    assert Lifecycle.of([*STRAIGHT[:9], safe]).ends_as() is Status.COMPLETED
    assert Lifecycle.of([*STRAIGHT[:9], safe]).ends_as(failure("HookFailed")) is Status.FAILED


def test_the_first_reason_to_end_a_payload_counts() -> None:
    second = Verdict("processes", 9.0, 3.0, "")
    life = Lifecycle.of(
        [*STRAIGHT[:6], SoftStopOrdered(*WHO, 15), LimitReached(*WHO, OVER), LimitReached(*WHO, second)]
    )
    assert (life.soft_stop, life.verdict, life.companion_failure) == (15, OVER, None)
    failed = [CompanionFailed(*WHO, failure(kind)) for kind in ("HoldJob", "HookFailed")]
    assert Lifecycle.of([*STRAIGHT[:6], *failed]).companion_failure == failure("HoldJob")
