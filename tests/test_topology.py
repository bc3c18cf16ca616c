"""Which processors and GPUs a slot is given: near to each other, and whole cores."""

from __future__ import annotations

import pytest

from loadmaster.topology import Cpu, Gpu, choose_cpus, choose_gpus

# Two NUMA nodes of four physical cores of two threads each; siblings are n and n + 8, as on most machines.
TWO_SOCKETS = [Cpu(number, node=number % 8 // 4, core=number % 8) for number in range(16)]
GPUS = [Gpu("0", 0), Gpu("1", 0), Gpu("2", 1), Gpu("3", 1)]


def free(*taken: int) -> list[Cpu]:
    return [cpu for cpu in TWO_SOCKETS if cpu.number not in taken]


@pytest.mark.parametrize(
    ("taken", "count", "chosen"),
    [
        ((), 2, (0, 8)),
        ((), 4, (0, 1, 8, 9)),
        ((), 8, (0, 1, 2, 3, 8, 9, 10, 11)),
        ((0,), 1, (8,)),
        ((0,), 2, (1, 9)),
        ((0,), 3, (1, 8, 9)),
        ((0, 1), 2, (2, 10)),
        ((0, 1, 2, 3), 2, (8, 9)),
        ((0, 1, 2, 3), 5, (4, 5, 6, 12, 13)),
        ((4, 12), 6, (5, 6, 7, 13, 14, 15)),
        ((), 16, tuple(range(16))),
    ],
)
def test_whole_cores_of_one_node(taken: tuple[int, ...], count: int, chosen: tuple[int, ...]) -> None:
    assert choose_cpus(free(*taken), count) == chosen


def test_the_fullest_node_that_has_room_is_filled_up() -> None:
    assert choose_cpus(free(4, 12, 5), 2) == (6, 14)


def test_what_fits_no_node_takes_as_few_as_possible() -> None:
    assert choose_cpus(free(0, 8, 1), 9) == (4, 5, 6, 7, 9, 12, 13, 14, 15)


def test_near_beats_full() -> None:
    assert choose_cpus(free(0, 8), 2) == (1, 9)
    assert choose_cpus(free(0, 8), 2, near={1}) == (4, 12)


def test_near_does_not_beat_one_node() -> None:
    assert choose_cpus(free(4, 5, 6, 7), 6, near={1}) == (0, 1, 2, 8, 9, 10)


def test_processors_of_which_nothing_is_known_are_as_good() -> None:
    assert choose_cpus([Cpu(3), Cpu(5), Cpu(9)], 2) == (3, 5)


@pytest.mark.parametrize(
    ("left", "count", "roomy", "chosen"),
    [
        (GPUS, 1, {0, 1}, ["0"]),
        (GPUS, 1, {1}, ["2"]),
        (GPUS[1:], 1, {0, 1}, ["1"]),
        (GPUS[1:], 2, {0, 1}, ["2", "3"]),
        (GPUS, 3, {0}, ["0", "1", "2"]),
        ([Gpu("a"), Gpu("b")], 1, {0}, ["a"]),
    ],
)
def test_gpus_are_of_one_node_if_they_fit(left: list[Gpu], count: int, roomy: set[int], chosen: list[str]) -> None:
    assert [gpu.name for gpu in choose_gpus(left, count, roomy)] == chosen
