"""Any history whatever: events keep their order, folds are pure, and what is written is what is read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from loadmaster.errors import IllegalEvent
from loadmaster.events import (
    KINDS,
    Event,
    JobFinished,
    OperationDone,
    OperationDropped,
    PayloadExited,
    PayloadStarted,
    dump,
    dumps,
    load,
    loads,
)
from loadmaster.lifecycle import Lifecycle, Stage
from loadmaster.result import EndedBy, Failure, PayloadOutcome, Phase, Status, StoredFile, Usage, Verdict

OFTEN = settings(max_examples=200, deadline=None)
"""No deadline: the first example pays for imports and schemas, and the suite shares its machine."""

NUMBERS = st.floats(min_value=0, max_value=1e12, allow_nan=False)
COUNTS = st.integers(min_value=0, max_value=2**60)
NAMES = st.text(max_size=20)
TIMES = st.datetimes(timezones=st.just(UTC))
JSON = st.recursive(st.none() | st.booleans() | COUNTS | NAMES, lambda inner: st.lists(inner, max_size=3), max_leaves=5)

FILES = st.builds(StoredFile, NAMES, NAMES, COUNTS, NAMES, st.none() | NAMES, st.none() | NAMES)
FAILURE = st.builds(
    Failure, st.sampled_from(["PayloadFailed", "JobWasKilled", "RescheduleJob"]) | NAMES, NAMES, st.sampled_from(Phase)
)
FAILURES = st.none() | FAILURE
VERDICTS = st.builds(Verdict, NAMES, NUMBERS, NUMBERS, NAMES)
OUTCOMES = st.builds(
    PayloadOutcome,
    st.none() | st.integers(0, 255),
    st.none() | st.integers(1, 64),
    NUMBERS,
    NUMBERS,
    st.none() | COUNTS,
    st.sampled_from(EndedBy),
    st.none() | VERDICTS,
)
USAGES = st.builds(Usage, NUMBERS, NUMBERS, COUNTS, COUNTS, st.none() | COUNTS, NUMBERS)
LINES = st.lists(NAMES, max_size=3).map(tuple)
OWN_FIELDS: dict[str, tuple[st.SearchStrategy[object], ...]] = {
    "JobAccepted": (st.dictionaries(NAMES, JSON, max_size=3), NAMES, COUNTS),
    "StageInStarted": (NAMES, NAMES),
    "StageInEnded": (),
    "KillOrdered": (NAMES,),
    "PayloadAdopted": (COUNTS, NAMES),
    "SoftStopOrdered": (COUNTS,),
    "LimitReached": (VERDICTS,),
    "CompanionFailed": (FAILURE,),
    "Remembered": (NAMES, JSON),
    "FileStagedIn": (FILES,),
    "PayloadPrepared": (NAMES | st.lists(NAMES, max_size=3).map(tuple), st.dictionaries(NAMES, NAMES, max_size=3)),
    "SlotGranted": (COUNTS, st.none() | COUNTS),
    "PayloadStarted": (COUNTS, COUNTS, NAMES),
    "PayloadExited": (OUTCOMES,),
    "ParameterReported": (NAMES, NAMES),
    "ComputingEnded": (FAILURES,),
    "StageOutStarted": (),
    "FileStagedOut": (FILES,),
    "OutputMissing": (NAMES, NAMES),
    "FailoverRequested": (FILES, NAMES),
    "RegistrationRequested": (FILES, NAMES),
    "RemovalRequested": (NAMES, LINES, NAMES),
    "OperationDone": (COUNTS, NAMES),
    "OperationDropped": (COUNTS, NAMES, NAMES),
    "JobFinished": (st.sampled_from(Status), FAILURES),
    "Heartbeat": (st.sampled_from(Phase), NUMBERS, st.none() | USAGES, LINES),
    "OutputPrinted": (NAMES, NAMES, COUNTS),
    "TransferProgress": (NAMES, NAMES, COUNTS, st.none() | COUNTS),
    "StagingProgress": (NAMES, COUNTS, COUNTS, COUNTS, st.none() | COUNTS, NUMBERS, st.none() | NUMBERS),
}


def of_kind(name: str, job_ids: st.SearchStrategy[str], attempts: st.SearchStrategy[int]) -> st.SearchStrategy[Event]:
    return st.builds(KINDS[name], job_ids, attempts, TIMES, *OWN_FIELDS[name])


ANY_EVENT = st.one_of([of_kind(name, NAMES, COUNTS) for name in KINDS])

# Drawn anew, a file in every event would cost more than the fold; what these properties are about is the order.
NOW = datetime(2024, 1, 1, tzinfo=UTC)
FILE = StoredFile("a", "file:///a", 1, "00000001")
FIXED: dict[str, tuple[object, ...]] = {
    "JobAccepted": ({},),
    "FileStagedIn": (FILE,),
    "PayloadPrepared": ("true", {}),
    "SlotGranted": (1, None),
    "PayloadStarted": (1, 1, "session"),
    "PayloadExited": (PayloadOutcome(0, None, 1.0, 1.0, None),),
    "ParameterReported": ("a", "b"),
    "Remembered": ("a", [1, "b"]),
    "KillOrdered": ("enough",),
    "PayloadAdopted": (10, "node7"),
    "SoftStopOrdered": (15,),
    "LimitReached": (Verdict("wall time", 2.0, 1.0, "s"),),
    "CompanionFailed": (Failure("HookFailed", "because", Phase.PAYLOAD),),
    "ComputingEnded": (None,),
    "FileStagedOut": (FILE,),
    "OutputMissing": ("a", "b"),
    "FailoverRequested": (FILE, "b"),
    "RegistrationRequested": (FILE,),
    "RemovalRequested": ("c", ("d",)),
    "OperationDone": (1, "a line"),
    "OperationDropped": (1, "a line"),
    "JobFinished": (Status.DONE, None),
    "Heartbeat": (Phase.PAYLOAD, 1.0),
    "OutputPrinted": ("std.out", "a line\n"),
    "TransferProgress": ("a", "b", 1, None),
    "StagingProgress": ("download", 1, 2, 3, None, 4.0, None),
}


def event(name: str, job_id: str = "7") -> Event:
    return KINDS[name](job_id, 1, NOW, *FIXED.get(name, ()))


ANYTHING = st.lists(
    st.builds(event, st.sampled_from(sorted(KINDS)), st.sampled_from(["7", "7", "7", "8"])), max_size=40
)


@st.composite
def legal_histories(draw: st.DrawFn) -> list[Event]:
    """A history as a runtime could have made it: at each step one of the events that can come, for as long as drawn."""
    life, history = Lifecycle(), []
    for _ in range(draw(st.integers(0, 30))):
        possible = [candidate for name in sorted(KINDS) if takes(life, candidate := event(name))]
        if not possible:
            break
        history.append(draw(st.sampled_from(possible)))
        life.advance(history[-1])
    return history


def takes(life: Lifecycle, candidate: Event) -> bool:
    try:
        life.check(candidate)
    except IllegalEvent:
        return False
    return True


def state(life: Lifecycle) -> dict[str, object]:
    return deepcopy(vars(life))


def kinds(history: Sequence[Event]) -> list[type[Event]]:
    return [type(each) for each in history]


def test_the_tables_of_these_properties_know_every_kind() -> None:
    assert set(OWN_FIELDS) == set(KINDS)


@OFTEN
@given(ANYTHING)
def test_an_event_is_taken_or_refused_and_a_refused_one_changes_nothing(events: list[Event]) -> None:
    life = Lifecycle()
    for each in events:
        before = state(life)
        try:
            life.advance(each)
        except IllegalEvent:
            assert state(life) == before
        else:
            assert life.stage is not Stage.NEW


@OFTEN
@given(ANYTHING)
def test_what_was_taken_is_a_legal_history_by_itself(events: list[Event]) -> None:
    """So a journal that has only what was taken can always be read again."""
    life, taken = Lifecycle(), []
    for each in events:
        try:
            life.advance(each)
        except IllegalEvent:
            continue
        taken.append(each)
    assert state(Lifecycle.of(taken)) == state(life)


@OFTEN
@given(legal_histories())
def test_every_prefix_of_a_legal_history_folds_and_folding_twice_equals_once(history: list[Event]) -> None:
    for length in range(len(history) + 1):
        once, twice = Lifecycle.of(history[:length]), Lifecycle.of(history[:length])
        assert state(once) == state(twice)
    if history and isinstance(history[-1], JobFinished):
        assert Lifecycle.of(history).result() == Lifecycle.of(history).result()


@OFTEN
@given(legal_histories())
def test_a_payload_that_started_exits_once_and_only_what_was_left_to_be_done_follows_the_end(
    history: list[Event],
) -> None:
    seen = kinds(history)
    assert seen.count(PayloadStarted) <= 1
    assert seen.count(PayloadExited) <= seen.count(PayloadStarted)
    if JobFinished in seen:
        after = seen[seen.index(JobFinished) + 1 :]
        assert {OperationDone, OperationDropped}.issuperset(after)
        assert seen.count(PayloadExited) == seen.count(PayloadStarted)


@OFTEN
@given(legal_histories())
def test_every_unfinished_history_can_still_be_brought_to_its_end(history: list[Event]) -> None:
    """Wherever a runtime died, whoever picks the journal up can finish the job: there is no dead end."""
    life = Lifecycle.of(history)
    for name in ("JobAccepted", "PayloadExited", "ComputingEnded", "JobFinished"):
        if takes(life, event(name)):
            life.advance(event(name))
    assert life.stage is Stage.FINISHED


@OFTEN
@given(ANY_EVENT)
def test_any_event_survives_being_written_and_read(written: Event) -> None:
    read = load(json.loads(json.dumps(dump(written), allow_nan=False)))
    assert (type(read), read) == (type(written), written)
    quickly = loads(dumps(written))
    assert (type(quickly), quickly) == (type(written), written)
