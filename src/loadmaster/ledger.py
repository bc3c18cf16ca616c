"""Cores and memory of a node: who may hold a slot, and who waits. First come, first served.

A slot is leased for the payload only, so that the inputs of waiting jobs and the outputs of finished ones never
hold a core. All state is changed by plain functions, and every change ends in `_assign`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

import anyio

from loadmaster.description import JobDescription
from loadmaster.errors import PayloadNotStarted


@dataclass(frozen=True, slots=True)
class Slot:
    """What a payload was given."""

    cores: int
    memory_mb: int | None


class Slots(Protocol):
    """Whoever grants slots."""

    def lease(self, job: JobDescription) -> AbstractAsyncContextManager[Slot]:
        """Wait for a slot the job fits and hold it. Raises `PayloadNotStarted` when it can never fit."""
        ...


class AsAsked:
    """Grants each job what it asks for at once: for a pilot that has already been given the resources of one job."""

    @asynccontextmanager
    async def lease(self, job: JobDescription) -> AsyncIterator[Slot]:
        """Hold nothing, wait for nothing."""
        yield Slot(job.number_of_processors, job.memory_mb)


@dataclass(eq=False, slots=True)
class _Ticket:
    slot: Slot
    granted: anyio.Event = field(default_factory=anyio.Event)


class Ledger:
    """The cores and memory of one node, shared by the jobs of one event loop."""

    def __init__(self, cores: int, memory_mb: int | None = None) -> None:
        self.cores = cores
        self.memory_mb = memory_mb
        self._free_cores = cores
        self._free_memory_mb = memory_mb or 0
        self._waiting: deque[_Ticket] = deque()

    def __repr__(self) -> str:
        return f"<Ledger [{self._free_cores} of {self.cores} cores free, {len(self._waiting)} waiting]>"

    @asynccontextmanager
    async def lease(self, job: JobDescription) -> AsyncIterator[Slot]:
        """Wait in line for the job's cores and memory and hold them; cancellation gives both place and slot back."""
        ticket = self._request(Slot(job.number_of_processors, job.memory_mb))
        try:
            await ticket.granted.wait()
            yield ticket.slot
        finally:
            self._return(ticket)

    def _request(self, slot: Slot) -> _Ticket:
        if slot.cores > self.cores:
            raise PayloadNotStarted(f"the job needs {slot.cores} cores, the node has {self.cores}")
        if self.memory_mb is not None and (slot.memory_mb or 0) > self.memory_mb:
            raise PayloadNotStarted(f"the job needs {slot.memory_mb} MB of memory, the node has {self.memory_mb}")
        ticket = _Ticket(slot)
        self._waiting.append(ticket)
        self._assign()
        return ticket

    def _return(self, ticket: _Ticket) -> None:
        if ticket.granted.is_set():
            self._free_cores += ticket.slot.cores
            self._free_memory_mb += self._memory(ticket)
        else:
            self._waiting.remove(ticket)
        self._assign()

    def _assign(self) -> None:
        """Grant from the head of the line while it fits; nobody overtakes, so nobody starves."""
        while self._waiting and self._fits(self._waiting[0]):
            ticket = self._waiting.popleft()
            self._free_cores -= ticket.slot.cores
            self._free_memory_mb -= self._memory(ticket)
            ticket.granted.set()

    def _fits(self, ticket: _Ticket) -> bool:
        return ticket.slot.cores <= self._free_cores and self._memory(ticket) <= self._free_memory_mb

    def _memory(self, ticket: _Ticket) -> int:
        return 0 if self.memory_mb is None else ticket.slot.memory_mb or 0
