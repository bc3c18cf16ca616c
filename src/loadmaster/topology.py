"""Processors and GPUs by number, where they sit, and which of the free ones a slot is given: near to each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cpu:
    """A logical processor: what the kernel schedules on, and an affinity mask names."""

    number: int
    node: int = 0
    """The NUMA node: its memory is near."""
    core: int | None = None
    """The physical core, by the lowest number of the processors that share it (SMT siblings); None: its own."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, or a slice of one."""

    name: str
    """As the variable that tells a payload of it wants it: an index or a UUID."""
    node: int | None = None
    """The NUMA node it is attached to, where that is known."""


def choose_cpus(free: Iterable[Cpu], count: int, near: Collection[int | None] = ()) -> tuple[int, ...]:
    """So many of the free processors: of one NUMA node if they fit, one of those in `near` if that is possible.

    Of several nodes the fullest that has room, so that the others keep theirs for larger slots; when none has, as few
    nodes as possible. Within a node whole physical cores; a single processor comes from a core that is broken already.
    There have to be enough.
    """
    nodes: dict[int, list[Cpu]] = defaultdict(list)
    for cpu in free:
        nodes[cpu.node].append(cpu)
    chosen: list[int] = []
    while len(chosen) < count:
        missing = count - len(chosen)
        roomy = [node for node, cpus in nodes.items() if len(cpus) >= missing]
        if roomy:
            node = min(roomy, key=lambda node: (node not in near, len(nodes[node]), node))
        else:
            node = max(nodes, key=lambda node: (len(nodes[node]), node in near, -node))
        chosen += _of_node(nodes.pop(node), missing)
    return tuple(sorted(chosen))


def _of_node(free: Sequence[Cpu], count: int) -> list[int]:
    """Whole cores as long as they fit, the larger first; then the rest from the core with the fewest left."""
    cores: dict[int, list[int]] = defaultdict(list)
    for cpu in free:
        cores[cpu.number if cpu.core is None else cpu.core].append(cpu.number)
    whole = sorted(cores.values(), key=lambda numbers: (-len(numbers), min(numbers)))
    chosen: list[int] = []
    rest: list[list[int]] = []
    for numbers in whole:
        if len(numbers) > 1 and len(numbers) <= count - len(chosen):
            chosen += numbers
        else:
            rest.append(numbers)
    for numbers in sorted(rest, key=lambda numbers: (len(numbers), min(numbers))):
        chosen += sorted(numbers)[: max(0, count - len(chosen))]
    return chosen


def choose_gpus(free: Sequence[Gpu], count: int, roomy: Collection[int] = ()) -> tuple[Gpu, ...]:
    """So many of the free GPUs: attached to one NUMA node if they fit, one of those in `roomy` if that is possible.

    Of several nodes the one with the fewest left. There have to be enough.
    """
    nodes: dict[int | None, list[Gpu]] = defaultdict(list)
    for gpu in free:
        nodes[gpu.node].append(gpu)
    enough = [node for node, gpus in nodes.items() if len(gpus) >= count]
    if not enough:
        return tuple(free[:count])
    node = min(enough, key=lambda node: (node not in roomy, len(nodes[node])))
    return tuple(nodes[node][:count])
