"""When a payload has used too much, and when it is worth looking."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from math import inf
from typing import Any

import pytest
from pydantic import ValidationError

from loadmaster.description import ComputingElement, JobDescription, Limits
from loadmaster.limits import (
    BLIND_LOOK_SECONDS,
    CPU_MARGIN,
    CPU_RATIO,
    DELIVERY_SECONDS,
    SHORTEST_LOOK_SECONDS,
    UNCHECKED,
    WINDOW_STEPS,
    cpu_ratio,
    judge,
    limits_of,
    needs_pss,
    remembered,
    seconds_left,
    seconds_until_look,
    seconds_until_walk,
    stop_margin,
)
from loadmaster.result import Usage, Verdict

NOON = datetime(2030, 5, 1, 12, 0, tzinfo=UTC)


def job(**words: object) -> JobDescription:
    return JobDescription.load({"executable": "/bin/true", **words})


def judged(usage: Usage, **limits: Any) -> Verdict | None:
    return judge([usage], Limits(**limits), now=NOON)


# -- judging -----------------------------------------------------------------------------------------------------


def test_a_payload_without_limits_may_use_anything() -> None:
    assert judged(Usage(1e9, 1e9, 2**60, 10_000, 2**60)) is None


@pytest.mark.parametrize(("wall", "stopped"), [(9.99, False), (10.0, True), (11.0, True)])
def test_wall_time_is_exceeded_when_it_is_reached(wall: float, stopped: bool) -> None:
    verdict = judged(Usage(wall_seconds=wall), wall_seconds=10)
    assert verdict == (Verdict("wall time", wall, 10.0, "s") if stopped else None)


@pytest.mark.parametrize(("cpu", "stopped"), [(9.99, False), (10.0, True)])
def test_cpu_time_is_exceeded_when_it_is_reached(cpu: float, stopped: bool) -> None:
    verdict = judged(Usage(wall_seconds=1.0, cpu_seconds=cpu), cpu_seconds=10)
    assert verdict == (Verdict("CPU time", cpu, 10.0, "s") if stopped else None)


@pytest.mark.parametrize(
    ("field", "name", "unit"),
    [
        ("processes", "number of processes", ""),
        ("workdir_bytes", "work directory size", "bytes"),
        ("output_bytes", "output size", "bytes"),
    ],
)
def test_an_amount_may_be_used_up_but_not_exceeded(field: str, name: str, unit: str) -> None:
    used: dict[str, Any] = {field: 100}
    more_used: dict[str, Any] = {field: 101}
    allowed, more = replace(Usage(1.0), **used), replace(Usage(1.0), **more_used)
    assert judged(allowed, **{field: 100}) is None
    assert judged(more, **{field: 100}) == Verdict(name, 101, 100, unit)


def test_memory_is_judged_with_sharing_accounted_for() -> None:
    """Ten children of a 200 MB parent have 2.2 GB of resident size together, and take 200 MB."""
    shared = Usage(1.0, rss_bytes=2_200_000_000, pss_bytes=200_000_000)
    assert judged(shared, memory_bytes=1_000_000_000) is None
    assert judged(shared, memory_bytes=100_000_000) == Verdict("memory", 200_000_000, 100_000_000, "bytes")


def test_a_resident_size_alone_is_no_reason_to_stop_but_one_to_look_closer() -> None:
    usage, limits = Usage(1.0, rss_bytes=2_000), Limits(memory_bytes=1_000)
    assert judge([usage], limits, now=NOON) is None
    assert needs_pss(usage.rss_bytes, limits)
    assert not needs_pss(1_000, limits)
    assert not needs_pss(2**60, Limits())


def test_the_best_figure_of_memory_is_the_one_with_sharing() -> None:
    assert Usage(1.0, rss_bytes=10).memory_bytes == 10
    assert Usage(1.0, rss_bytes=10, pss_bytes=3).memory_bytes == 3


@pytest.mark.parametrize(("free", "stopped"), [(None, False), (101, False), (100, False), (99, True)])
def test_too_little_free_disk_stops_it(free: int | None, stopped: bool) -> None:
    verdict = judged(replace(Usage(1.0), free_disk_bytes=free), free_disk_bytes=100)
    assert verdict == (Verdict("free disk", 99, 100, "bytes") if stopped else None)


@pytest.mark.parametrize(("early", "stopped"), [(1, False), (0, True), (-60, True)])
def test_a_deadline_has_passed_when_it_is_reached(early: int, stopped: bool) -> None:
    limits = Limits(deadline=NOON + timedelta(seconds=early), grace_seconds=0)
    assert (judge([Usage(0.0)], limits, now=NOON) is not None) is stopped


def test_what_was_not_looked_at_is_not_judged() -> None:
    limits: dict[str, Any] = {"memory_bytes": 1, "workdir_bytes": 1, "free_disk_bytes": 2**60}
    assert judged(Usage(wall_seconds=1.0), **limits) is None


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        (Verdict("wall time", 86402.4, 86400.0, "s"), "wall time of 86402 s is over the limit of 86400 s"),
        (Verdict("CPU time", 0.50123, 0.5, "s"), "CPU time of 0.5012 s is over the limit of 0.5 s"),
        (Verdict("memory", 2_147_483_648, 2e9, "bytes"), "memory of 2.147 GB is over the limit of 2 GB"),
        (Verdict("output size", 1001, 999, "bytes"), "output size of 1.001 kB is over the limit of 999 bytes"),
        (Verdict("number of processes", 12, 10, ""), "number of processes of 12 is over the limit of 10"),
        (Verdict("free disk", 9.5e6, 1e7, "bytes"), "free disk of 9.5 MB is under the minimum of 10 MB"),
        (Verdict("CPU ratio", 0.25, 5, "%"), "CPU ratio of 0.25 % is under the minimum of 5 %"),
        (
            Verdict("deadline", NOON.timestamp() + 2.7, NOON.timestamp(), "UTC"),
            "deadline of 2030-05-01 12:00:00 UTC was over at 2030-05-01 12:00:02 UTC",
        ),
    ],
)
def test_a_verdict_can_be_read_by_people(verdict: Verdict, text: str) -> None:
    """A job stopped after a day and two seconds was told `8.64e+04 s is over the limit of 8.64e+04 s`."""
    assert str(verdict) == text


# -- a payload that does nothing ---------------------------------------------------------------------------------


def samples(*pairs: tuple[float, float]) -> list[Usage]:
    return [Usage(wall, cpu) for wall, cpu in pairs]


def test_a_payload_younger_than_the_window_is_not_stalled() -> None:
    assert cpu_ratio(samples((0, 0), (1799, 0)), 1800) is None


def test_a_payload_that_idles_for_a_window_is_stalled_whatever_it_did_before() -> None:
    history = samples((0, 0), (5000, 20_000), (5900, 20_000), (6800, 20_001))
    assert cpu_ratio(history, 1800) == pytest.approx(1 / 1800)
    verdict = judge(history, Limits(cpu_ratio=0.05), now=NOON)
    assert verdict is not None
    assert str(verdict) == "CPU ratio of 0.05556 % is under the minimum of 5 %"


def test_a_payload_that_computes_now_and_then_is_not_stalled() -> None:
    assert judge(samples((0, 0), (900, 0), (1800, 90)), Limits(cpu_ratio=0.05), now=NOON) is None


def test_only_the_samples_that_judge_a_window_are_remembered() -> None:
    limits = Limits(cpu_ratio=0.05, cpu_ratio_window_seconds=600)
    history: tuple[Usage, ...] = (Usage(0.0),)
    for second in range(1, 5000):
        history = remembered(history, Usage(float(second), float(second)), limits)
        assert len(history) <= WINDOW_STEPS + 3
        assert history[-1].wall_seconds == second
        ratio = cpu_ratio(history, 600)
        assert ratio is None if second < 600 else ratio == 1
    assert history[0].wall_seconds >= 5000 - 600 - 2 * 600 / WINDOW_STEPS


def test_without_a_limit_on_the_ratio_the_past_is_forgotten() -> None:
    assert remembered(samples((0, 0), (1, 1)), Usage(2.0), Limits()) == (Usage(2.0),)


# -- a job's limits on a node ------------------------------------------------------------------------------------


def test_foreseen_cpu_becomes_a_limit_in_the_nodes_own_seconds_with_a_margin() -> None:
    fast = ComputingElement.load({"CPUNormalizationFactor": "20"})
    assert limits_of(job(CPUTime="36000"), fast).cpu_seconds == pytest.approx(1800 * CPU_MARGIN)


def test_foreseen_cpu_leaves_the_other_limits_alone() -> None:
    asked = {"wall_seconds": 60, "grace_seconds": 3}
    limits = limits_of(job(cpu_work=10, limits=asked), ComputingElement())
    assert (limits.wall_seconds, limits.grace_seconds) == (60, 3)


@pytest.mark.parametrize("words", [{}, {"CPUTime": "0"}, {"cpu_work": 0}])
def test_unknown_cpu_is_no_limit(words: dict[str, object]) -> None:
    assert limits_of(job(**words), ComputingElement()).cpu_seconds is None


def test_a_limit_the_user_set_wins_over_what_is_foreseen() -> None:
    assert limits_of(job(cpu_work=10, limits={"cpu_seconds": 5}), ComputingElement()).cpu_seconds == 5


IDLE = {"cpu_ratio": 0.05, "wall_seconds": 60}


@pytest.mark.parametrize(
    "words",
    [
        {"JobType": "Test"},
        {"DisableCPUCheck": "True"},
        {"DisableCPUCheck": 1},
        {"ExecutionEnvironment": [f"{UNCHECKED}=1"]},
    ],
)
def test_diracs_switches_turn_off_the_cpu_ratio_alone(words: dict[str, object]) -> None:
    limits = limits_of(job(limits=IDLE, **words), ComputingElement())
    assert limits == Limits(wall_seconds=60)


@pytest.mark.parametrize(
    "words", [{}, {"DisableCPUCheck": "False"}, {"DisableCPUCheck": ""}, {"RemoteExecution": "no"}]
)
def test_a_switch_that_is_off_turns_nothing_off(words: dict[str, object]) -> None:
    assert limits_of(job(limits=IDLE, **words), ComputingElement()) == Limits(**IDLE)


def test_the_pilots_own_variable_turns_off_the_cpu_ratio() -> None:
    assert limits_of(job(limits=IDLE), ComputingElement(), {UNCHECKED: ""}).cpu_ratio is None


def test_remote_execution_turns_all_limits_off_but_the_grace_is_kept() -> None:
    words = {"RemoteExecution": True, "CPUTime": 10, "limits": {**IDLE, "grace_seconds": 3}}
    assert limits_of(job(**words), ComputingElement()) == Limits(grace_seconds=3)


def test_the_memory_a_job_asks_for_is_no_limit() -> None:
    assert limits_of(job(memory_mb=100), ComputingElement(memory_mb=200)).memory_bytes is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_bytes": 0},
        {"memory_bytes": 1.5},
        {"processes": -1},
        {"cpu_ratio": 0},
        {"cpu_ratio": float("nan")},
        {"cpu_ratio_window_seconds": 0},
        {"deadline": datetime(2030, 5, 1)},
        {"memory": 5},
    ],
)
def test_limits_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Limits(**wrong)


def test_a_deadline_is_a_point_in_time_wherever_it_was_written() -> None:
    there = datetime(2030, 5, 1, 14, 0, tzinfo=timezone(timedelta(hours=2)))
    limits = Limits.model_validate_json(Limits(deadline=there).model_dump_json())
    assert limits.deadline == NOON


# -- when to look ------------------------------------------------------------------------------------------------


def look(usage: Usage, limits: Limits, cores: int = 4) -> float:
    return seconds_until_look(usage, limits, now=NOON, cores=cores, heartbeat_seconds=60)


def test_a_payload_without_limits_is_looked_at_for_heartbeats_only() -> None:
    assert look(Usage(wall_seconds=5), Limits()) == 60


def test_a_far_off_limit_needs_no_looks() -> None:
    assert look(Usage(wall_seconds=5), Limits(wall_seconds=10_000, cpu_seconds=10_000)) == 60


def test_the_next_look_is_when_the_wall_clock_gets_there() -> None:
    assert look(Usage(wall_seconds=5), Limits(wall_seconds=15)) == 10


def test_cpu_time_is_looked_at_when_all_cores_together_could_have_used_it() -> None:
    assert look(Usage(wall_seconds=5, cpu_seconds=4), Limits(cpu_seconds=44), cores=4) == 10
    assert look(Usage(wall_seconds=5, cpu_seconds=4), Limits(cpu_seconds=44), cores=1) == 40


def test_the_nearest_of_several_limits_decides() -> None:
    assert look(Usage(wall_seconds=5, cpu_seconds=4), Limits(wall_seconds=7, cpu_seconds=44), cores=4) == 2


@pytest.mark.parametrize("wall", [14.99, 15.0, 100.0])
def test_a_limit_that_is_near_or_past_does_not_make_the_loop_spin(wall: float) -> None:
    assert look(Usage(wall_seconds=wall), Limits(wall_seconds=15)) == SHORTEST_LOOK_SECONDS


def test_the_next_look_is_when_the_deadline_comes() -> None:
    assert look(Usage(wall_seconds=5), Limits(deadline=NOON + timedelta(seconds=20), grace_seconds=2)) == 18
    assert look(Usage(wall_seconds=5), Limits(deadline=NOON - timedelta(days=1))) == SHORTEST_LOOK_SECONDS


def test_with_outputs_to_deliver_the_deadline_is_looked_at_more_often_as_it_comes_near() -> None:
    """Outputs grow between two looks: half of the time that is left, at most."""
    limits = Limits(deadline=NOON + timedelta(seconds=200), grace_seconds=10, upload_bytes_per_second=10)
    usage = Usage(wall_seconds=5, outputs_bytes=1200)
    assert stop_margin(usage, limits) == timedelta(seconds=10 + DELIVERY_SECONDS + 120)
    assert look(usage, limits) == 20


def test_a_payload_with_outputs_has_to_stop_before_the_deadline() -> None:
    limits = Limits(deadline=NOON + timedelta(seconds=100), grace_seconds=10, upload_bytes_per_second=1e6)
    assert judge([Usage(5.0, outputs_bytes=59_000_000)], limits, now=NOON) is None
    verdict = judge([Usage(5.0, outputs_bytes=61_000_000)], limits, now=NOON)
    assert str(verdict) == (
        "deadline of 2030-05-01 11:59:59 UTC was over at 2030-05-01 12:00:00 UTC "
        "(12:01:40 less 101 s to end it and deliver 61 MB)"
    )


def test_the_time_that_is_left_is_that_of_the_nearest_limit() -> None:
    usage = Usage(wall_seconds=100, cpu_seconds=300)
    assert seconds_left(usage, Limits(memory_bytes=1), now=NOON) == inf
    assert seconds_left(usage, Limits(wall_seconds=150), now=NOON) == 50
    assert seconds_left(usage, Limits(wall_seconds=150, cpu_seconds=390), now=NOON) == 30  # at three cores' pace
    assert seconds_left(usage, Limits(cpu_seconds=200), now=NOON) < 0
    assert seconds_left(Usage(100, 1), Limits(cpu_seconds=11), now=NOON) == 10  # it may begin to compute
    assert seconds_left(usage, Limits(deadline=NOON + timedelta(seconds=7), grace_seconds=3), now=NOON) == 4


@pytest.mark.parametrize("limit", ["memory_bytes", "processes", "workdir_bytes", "free_disk_bytes", "output_bytes"])
def test_what_may_grow_at_any_rate_is_looked_at_often_and_less_often_in_a_long_payload(limit: str) -> None:
    limits = Limits.model_validate({limit: 10**9})
    shortest, longest = BLIND_LOOK_SECONDS
    assert look(Usage(wall_seconds=0), limits) == shortest
    assert look(Usage(wall_seconds=20), limits) == 2
    assert look(Usage(wall_seconds=10_000), limits) == longest


def test_idling_is_looked_for_when_it_can_have_lasted_a_window() -> None:
    limits = Limits(cpu_ratio=0.05, cpu_ratio_window_seconds=100)
    assert look(Usage(wall_seconds=70), limits) == 30
    assert look(Usage(wall_seconds=5000), limits) == 10


def test_walking_the_work_directory_takes_a_small_part_of_the_time() -> None:
    assert seconds_until_walk(1000, cost_seconds=2) == 40
    assert seconds_until_walk(1000, cost_seconds=0.001) == BLIND_LOOK_SECONDS[1]


def test_each_limit_that_is_exceeded_has_its_own_name() -> None:
    assert CPU_RATIO == "CPU ratio"
    now = NOON + timedelta(seconds=1)
    every = {
        "deadline": NOON, "wall_seconds": 1, "cpu_seconds": 1, "memory_bytes": 1, "processes": 1,
        "workdir_bytes": 1, "output_bytes": 1, "free_disk_bytes": 10, "cpu_ratio": 100, "cpu_ratio_window_seconds": 1,
    }  # fmt: skip
    usage = Usage(5.0, 5.0, rss_bytes=5, processes=5, pss_bytes=5, workdir_bytes=5, free_disk_bytes=5, output_bytes=5)
    names = []
    while verdict := judge([Usage(0.0), usage], Limits.model_validate(every), now=now):
        names.append(verdict.limit)
        del every[next(iter(every))]
    assert names == [
        "deadline", "wall time", "CPU time", "memory", "number of processes", "work directory size", "output size",
        "free disk", "CPU ratio",
    ]  # fmt: skip
