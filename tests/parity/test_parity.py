"""DIRAC's own job wrapper and our runtime, given the same jobs: they answer alike, or otherwise for a reason that is written
down. What DIRAC answers is in `record.json`; the long run asks it again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import differences
import ours
import pytest
from cases import CASES
from compare import differences as compared
from environment import NotThere, ask_all, dirac_python
from record import answer_to, load

from conftest import BACKENDS

RECORD = load()
JOBS = [
    pytest.param(
        name, backend.values[0], id=f"{name}-{backend.id}",
        marks=[pytest.mark.long] if (number - turn) % len(BACKENDS) else [],
    )
    for number, name in enumerate(CASES)
    for turn, backend in enumerate(BACKENDS)
]  # fmt: skip
"""Each case on one of the backends, in turn; in the long run on all of them."""

FOUND: dict[str, dict[str, tuple[str, str]]] = {}
"""What has been found to differ, by the names of the cases that have been run."""


@pytest.fixture
def pilots_environment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """The environment a case's pilot has, and nothing else."""
    case = CASES[request.getfixturevalue("name")]
    with mock.patch.dict(os.environ, ours.pilots_environment(case, tmp_path / "scene"), clear=True):
        yield


@pytest.mark.parametrize(("name", "anyio_backend"), JOBS)
async def test_a_job_ends_as_with_dirac(name: str, tmp_path: Path, pilots_environment: None) -> None:
    answer = await ours.answer(CASES[name], tmp_path / "scene")
    FOUND[name] = compared(answer_to(CASES[name], RECORD[name]), answer)
    assert differences.unexplained(name, FOUND[name]) == {}


def test_every_difference_that_is_written_down_is_still_there() -> None:
    if FOUND.keys() != CASES.keys():
        pytest.skip("only part of the cases have been run")
    assert differences.vanished(FOUND) == []


def test_the_record_has_an_answer_to_every_case_and_no_other() -> None:
    assert RECORD.keys() == CASES.keys()
    assert [name for name, answers in RECORD.items() if any(answer["unanswered"] for answer in answers)] == []
    assert [name for name, answers in RECORD.items() if len(answers) > 1 and "race" not in CASES[name]] == []


def test_a_difference_that_nobody_has_written_down_is_seen() -> None:
    same = compared(RECORD["success"][0], RECORD["success"][0])
    other = compared(RECORD["success"][0], {**RECORD["success"][0], "rescheduled": 1, "exit_code": 3})
    assert same == {}
    assert differences.unexplained("success", other) == {"exit code": ("0", "3"), "rescheduled": ("False", "True")}


def test_the_page_has_these_tables() -> None:
    page = differences.DOCUMENT.read_text(encoding="utf-8")
    assert page == differences.document(page)


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_dirac_still_answers_what_is_recorded() -> None:
    try:
        python = dirac_python()
    except NotThere as reason:
        pytest.skip(f"DIRAC cannot be had: {reason}")
    answers = ask_all(python, CASES.values())
    wrong = {name: answer for name, answer in answers.items() if not _is_recorded(name, answer)}
    assert wrong == {}


def _is_recorded(name: str, answer: dict[str, Any]) -> bool:
    """Of cases that depend on when the watchdog looks, what it has said meanwhile is left out; of races, all but the end."""
    if "race" in CASES[name]:
        return answer["statuses"] in [known["statuses"] for known in RECORD[name]]
    chance = {"heartbeats", "parameters"} if "PollingTime" in CASES[name].get("wrapper", {}) else set()
    steady = [{fact: known[fact] for fact in known.keys() - chance} for known in RECORD[name]]
    return {fact: answer[fact] for fact in answer.keys() - chance} in steady
