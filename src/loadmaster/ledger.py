"""What a node has, and who may hold a slot of it: cores, memory, GPUs, whatever else a site counts, and disk.

A slot is leased for the payload only, so that the inputs of waiting jobs and the outputs of finished ones never
hold a core. Disk is reserved apart from it, for a job's whole stay. `loadmaster.line` has the rule of who is next.

How many processors a job gets is as in DIRAC's pool: one if it says nothing; what it needs, or more, up to its maximum,
if more are free when its turn comes; all of an empty node if it wants the whole of it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

import anyio
from anyio import lowlevel

from loadmaster.description import JobDescription
from loadmaster.errors import PayloadNotStarted, StagingFailed
from loadmaster.line import Amounts, Line, Ticket
from loadmaster.topology import Cpu, Gpu, choose_cpus, choose_gpus

NO_JOB: Final = "no job"
HELD: Final = "held for a large job"
TOO_FEW: Final = "fewer than the next job needs"
MEMORY: Final = "memory"
GPUS: Final = "GPUs"
"""Why a core is idle: nobody waits, or who does has to wait for more cores, or for something else (or a resource of the
site's, by its name)."""


@dataclass(frozen=True, slots=True)
class Slot:
    """What a payload was given."""

    cores: int
    memory_mb: int | None
    cpus: tuple[int, ...] = ()
    """The processors it is to stay on; none: any."""
    gpus: tuple[str, ...] = ()
    """By index or UUID."""
    gpu_variables: tuple[str, ...] = ()
    """Where programs look up their GPUs on this node: `CUDA_VISIBLE_DEVICES`. Set for a payload without any, too, or it
    would take those of another."""
    disk_bytes: int | None = None
    """What the job said its files take."""
    extras: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Of the site's named resources."""


class Slots(Protocol):
    """Whoever grants slots."""

    def lease(self, job: JobDescription) -> AbstractAsyncContextManager[Slot]:
        """Wait for a slot the job fits and hold it. Raises `PayloadNotStarted` when it can never fit."""
        ...

    def hold(self, job: JobDescription, slot: Slot) -> AbstractContextManager[None]:
        """Hold the slot again in which the job's payload has been running all the time, whether there is room or not."""
        ...


class AsAsked:
    """Grants each job what it asks for at once: for a pilot that has already been given the resources of one job."""

    @asynccontextmanager
    async def lease(self, job: JobDescription) -> AsyncIterator[Slot]:
        """Hold nothing, wait for nothing."""
        yield Slot(job.number_of_processors, job.memory_mb, disk_bytes=job.disk_bytes, extras=job.resources)

    @contextmanager
    def hold(self, job: JobDescription, slot: Slot) -> Iterator[None]:
        """Hold nothing."""
        yield


def wants_whole_node(job: JobDescription) -> bool:
    """By its field, or by the tag DIRAC's optimizer gave it."""
    return job.whole_node or "WholeNode" in job.tags


def gpus_of(job: JobDescription) -> int:
    """How many GPUs a job needs: the tag alone is one."""
    return job.number_of_gpus or int("GPU" in job.tags)


class Ledger:
    """What one node has, shared by the jobs of one event loop. `loadmaster.machine.detect().ledger()` makes a true one.

    What is None is not counted: a job gets what it asks of it. `cpus` are the processors by number if they are to be
    assigned, as many as `cores`; payloads are then to stay on theirs. `patience`: how often small jobs may go ahead of a
    large one; 0 is never; as often as there are cores when not given: each is taken once more by a small job before they
    are kept for a large one.
    """

    def __init__(
        self,
        cores: int,
        memory_mb: int | None = None,
        *,
        cpus: Sequence[Cpu] = (),
        gpus: Sequence[Gpu] = (),
        gpu_variables: Sequence[str] = (),
        disk_bytes: int | None = None,
        extras: Mapping[str, int] = MappingProxyType({}),
        patience: int | None = None,
    ) -> None:
        if cpus and len({cpu.number for cpu in cpus}) != cores:
            raise ValueError(f"{cores} cores, but {len(cpus)} processors by number")
        self.cores = cores
        self.memory_mb = memory_mb
        self.disk_bytes = disk_bytes
        self.gpu_variables = tuple(gpu_variables)
        self._extras = tuple(sorted(extras))
        capacity = (cores, memory_mb or 0, len(gpus), *(extras[name] for name in self._extras))
        patience = cores if patience is None else patience
        self._line = Line(capacity, patience=patience)
        self._disk = Line((disk_bytes or 0,), patience=patience)
        self._cpus = {cpu.number: cpu for cpu in cpus}
        self._gpus = {gpu.name: gpu for gpu in gpus}
        self._free_cpus = dict(self._cpus)
        self._free_gpus = dict(self._gpus)

    def __repr__(self) -> str:
        return f"<Ledger [{self.free_cores} of {self.cores} cores free, {self.waiting} waiting]>"

    @property
    def free_cores(self) -> int:
        """Cores nobody holds."""
        return self._line.free[0]

    @property
    def free_memory_mb(self) -> int | None:
        """Memory nobody holds; None: it is not counted."""
        return None if self.memory_mb is None else self._line.free[1]

    @property
    def free_gpus(self) -> int:
        """GPUs nobody holds."""
        return self._line.free[2]

    @property
    def free_disk_bytes(self) -> int | None:
        """Disk nobody has reserved; None: it is not counted."""
        return None if self.disk_bytes is None else self._disk.free[0]

    @property
    def waiting(self) -> int:
        """How many wait for a slot."""
        return len(self._line)

    @property
    def waiting_for_disk(self) -> int:
        """How many wait for disk."""
        return len(self._disk)

    # -- slots -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, job: JobDescription) -> AsyncIterator[Slot]:
        """Wait in line for what the job needs and hold it; cancellation gives both place and slot back."""
        ticket = self._request(job)
        slot: Slot | None = None
        try:
            await _granted(ticket)
            slot = self._assigned(ticket, job)
            yield slot
        finally:
            self._return(ticket, slot)

    @contextmanager
    def hold(self, job: JobDescription, slot: Slot) -> Iterator[None]:
        """Hold exactly that slot, at once. If there is less than it takes, nobody is granted anything until there is."""
        memory = 0 if self.memory_mb is None else slot.memory_mb or 0
        extras = (slot.extras.get(name, 0) for name in self._extras)
        ticket = self._line.hold((slot.cores, memory, len(slot.gpus), *extras))
        for number in slot.cpus:
            self._free_cpus.pop(number, None)
        for name in slot.gpus:
            self._free_gpus.pop(name, None)
        try:
            yield
        finally:
            self._return(ticket, slot)

    def check(self, job: JobDescription) -> None:
        """Raise `PayloadNotStarted` when the job can never have a slot here."""
        self._needs(job)

    def fits(self, job: JobDescription) -> bool:
        """Whether the job would have a slot at once, if it asked now."""
        try:
            needs = self._needs(job)
        except PayloadNotStarted:
            return False
        return all(need <= spare for need, spare in zip(needs, self._line.spare(), strict=True))

    def _needs(self, job: JobDescription) -> Amounts:
        memory_mb = 0 if self.memory_mb is None else job.memory_mb or 0
        extras = (job.resources.get(name, 0) for name in self._extras)
        needs = (job.number_of_processors, memory_mb, gpus_of(job), *extras)
        there = self._line.capacity
        for what, amount, has in zip(("cores", "MB of memory", "GPUs", *self._extras), needs, there, strict=True):
            if amount > has:
                raise PayloadNotStarted(f"the job needs {amount} {what}, the node has {has}")
        if unknown := [name for name, amount in job.resources.items() if amount and name not in self._extras]:
            raise PayloadNotStarted(f"the job needs {unknown[0]!r}, which the node does not have")
        return there if wants_whole_node(job) else needs

    def _request(self, job: JobDescription) -> Ticket:
        return self._line.request(self._needs(job), priority=job.priority, most=job.max_number_of_processors or 0)

    def _assigned(self, ticket: Ticket, job: JobDescription) -> Slot:
        """What was granted, with particular processors and GPUs: there are as many as were counted."""
        cores, memory, gpu_count, *extras = ticket.holds
        gpus = self._choose_gpus(gpu_count, cores)
        cpus = choose_cpus(self._free_cpus.values(), cores, {gpu.node for gpu in gpus}) if self._cpus else ()
        for number in cpus:
            del self._free_cpus[number]
        for gpu in gpus:
            del self._free_gpus[gpu.name]
        return Slot(
            cores,
            job.memory_mb if self.memory_mb is None else memory or job.memory_mb,
            cpus,
            tuple(gpu.name for gpu in gpus),
            self.gpu_variables,
            job.disk_bytes,
            {name: amount for name, amount in zip(self._extras, extras, strict=True) if amount},
        )

    def _choose_gpus(self, count: int, cores: int) -> tuple[Gpu, ...]:
        if not count:
            return ()
        left: dict[int, int] = {}
        for cpu in self._free_cpus.values():
            left[cpu.node] = left.get(cpu.node, 0) + 1
        roomy = {node for node, number in left.items() if number >= cores}
        return choose_gpus(list(self._free_gpus.values()), count, roomy)

    def _return(self, ticket: Ticket, slot: Slot | None) -> None:
        if slot is not None and (slot.cpus or slot.gpus):
            self._free_cpus |= {number: self._cpus[number] for number in slot.cpus if number in self._cpus}
            self._free_gpus |= {name: self._gpus[name] for name in slot.gpus if name in self._gpus}
        self._line.give_back(ticket)

    def idle_reasons(self) -> dict[str, int]:
        """Why cores are free: so many for each reason, the surest first. Empty when all are held."""
        reasons = dict[str, int]()
        idle, claims = max(0, self.free_cores), list(self._line.claims())
        for ticket in claims:
            kept = min(idle, ticket.needs[0])
            self._count(reasons, self._lacking(ticket) or HELD, kept)
            idle -= kept
        following = next((ticket for ticket in self._line.in_order() if ticket not in claims), None)
        if following is None:
            self._count(reasons, NO_JOB, idle)
        elif following.needs[0] > self.free_cores:
            self._count(reasons, TOO_FEW, idle)
        else:
            self._count(reasons, self._lacking(following) or HELD, idle)
        return reasons

    def _lacking(self, ticket: Ticket) -> str | None:
        """What a ticket waits for that is not cores; None when it is."""
        free = self._line.free
        if ticket.needs[0] > free[0]:
            return None
        kinds = zip((MEMORY, GPUS, *self._extras), ticket.needs[1:], free[1:], strict=True)
        return next((kind for kind, need, there in kinds if need > there), None)

    @staticmethod
    def _count(reasons: dict[str, int], reason: str, cores: int) -> None:
        if cores:
            reasons[reason] = reasons.get(reason, 0) + cores

    # -- disk --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reserve_disk(self, size_bytes: int, *, priority: int = 0) -> AsyncIterator[None]:
        """Wait for so much of the node's disk and hold it; cancellation gives both place and disk back.

        It comes before the slot and outlives it, so whoever holds a slot never waits for disk. At once where disk is
        not counted. Raises `StagingFailed` when there is less altogether.
        """
        if self.disk_bytes is None or size_bytes <= 0:
            yield
            return
        if size_bytes > self.disk_bytes:
            raise StagingFailed(f"the job needs {size_bytes} bytes of disk, the node has {self.disk_bytes}")
        ticket = self._disk.request((size_bytes,), priority=priority)
        try:
            await _granted(ticket)
            yield
        finally:
            self._disk.give_back(ticket)

    @contextmanager
    def hold_disk(self, size_bytes: int) -> Iterator[None]:
        """Hold so much of the disk at once, for it has been in use all the time; nobody is granted any while it is short."""
        if self.disk_bytes is None or size_bytes <= 0:
            yield
            return
        ticket = self._disk.hold((size_bytes,))
        try:
            yield
        finally:
            self._disk.give_back(ticket)


async def _granted(ticket: Ticket) -> None:
    """Wait for it. Who has it at once goes on at once, unless cancelled."""
    await lowlevel.checkpoint_if_cancelled()
    if not ticket.granted:
        ticket.heard = anyio.Event()
        await ticket.heard.wait()
