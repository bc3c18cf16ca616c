"""When a payload has used too much, and when it is worth looking."""

from __future__ import annotations

import pytest

from loadmaster.limits import CPU_MARGIN, SHORTEST_LOOK_SECONDS, Usage, judge, limits_of, seconds_until_look
from loadmaster.model import ComputingElement, JobDescription, Limits, Verdict


def job(**words: object) -> JobDescription:
    return JobDescription.load({"executable": "/bin/true", **words})


# -- judging -----------------------------------------------------------------------------------------------------


def test_a_payload_without_limits_may_use_anything() -> None:
    assert judge(Usage(1e9, 1e9, 2**60, 10_000), Limits()) is None


@pytest.mark.parametrize(("wall", "stopped"), [(9.99, False), (10.0, True), (11.0, True)])
def test_wall_time_is_exceeded_when_it_is_reached(wall: float, stopped: bool) -> None:
    verdict = judge(Usage(wall_seconds=wall), Limits(wall_seconds=10))
    assert (verdict is not None) is stopped
    if stopped:
        assert verdict == Verdict("wall time", wall, 10.0, "s")


@pytest.mark.parametrize(("cpu", "stopped"), [(9.99, False), (10.0, True)])
def test_cpu_time_is_exceeded_when_it_is_reached(cpu: float, stopped: bool) -> None:
    verdict = judge(Usage(wall_seconds=1.0, cpu_seconds=cpu), Limits(cpu_seconds=10))
    assert (verdict is not None) is stopped
    if stopped:
        assert verdict == Verdict("CPU time", cpu, 10.0, "s")


def test_a_verdict_can_be_read_by_people() -> None:
    """A job stopped after a day and two seconds was told `8.64e+04 s is over the limit of 8.64e+04 s`."""
    assert str(Verdict("wall time", 86402.4, 86400.0, "s")) == "wall time of 86402 s is over the limit of 86400 s"
    assert str(Verdict("CPU time", 0.50123, 0.5, "s")) == "CPU time of 0.5012 s is over the limit of 0.5 s"


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


# -- when to look ------------------------------------------------------------------------------------------------


def look(usage: Usage, limits: Limits, cores: int = 4) -> float:
    return seconds_until_look(usage, limits, cores=cores, heartbeat_seconds=60)


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
