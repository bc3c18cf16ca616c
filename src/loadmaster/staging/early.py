"""Outputs that leave while the payload runs: sent as it closes them, published after its verdict, or not at all.

    finished ──▶ sent ──▶ held ──▶ published     if the job has not failed, and the file is what was sent
                  │         │
                  └─────────┴────▶ abandoned     otherwise: it was written again, or the payload failed, or was killed

What is held has no name at the storage yet. What could not be sent, or is another file by now, leaves after the payload
like any other: nothing that happens here fails a job.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Protocol, Self

import anyio
from anyio import to_thread
from anyio.abc import TaskGroup

from loadmaster.errors import StorageError
from loadmaster.staging.engine import Listener, Transfers
from loadmaster.staging.errand import Errand, Outcome
from loadmaster.staging.files import Outgoing
from loadmaster.staging.partnames import PartNames
from loadmaster.staging.plan import Delivery
from loadmaster.staging.watch import Content, Finished, FinishedOutputs, Likeness, likeness
from loadmaster.storage.base import Direction, Held, Step
from loadmaster.storage.local import checksum
from loadmaster.tasks import single_error
from loadmaster.workdir import NotDeliverable, Workdir

log = logging.getLogger(__name__)

ABANDON_SECONDS: Final = 15.0
"""How long storages may take to remove what was held, all of it together, also when we are leaving."""


class Before(Protocol):
    """Whoever sees to it that an agent which comes after this one finds what is held."""

    @property
    def parts(self) -> PartNames:
        """What it is called there."""
        ...

    async def begin(self) -> None:
        """Called before anything is sent."""
        ...

    async def sending(self, names: Sequence[str]) -> None:
        """Called before these outputs are sent."""
        ...

    async def left(self, places: Iterable[str]) -> None:
        """Called with where something could not be removed."""
        ...


class FinishedOutput(Outgoing):
    """An output that leaves as it was when it was finished, or does not leave."""

    __slots__ = ("_content",)

    def __init__(self, workdir: Workdir, finished: Finished) -> None:
        super().__init__(workdir, finished.name)
        self._content = finished.content

    def _open(self) -> tuple[int, int]:
        descriptor, size = super()._open()
        if likeness(self._content, Content.of(descriptor)) is Likeness.OTHER:
            os.close(descriptor)
            raise NotDeliverable(errno.ESTALE, "was written again")
        return descriptor, size


class EarlyOutputs:
    """The outputs of one job that leave before its end. Made by `open_early`."""

    def __init__(
        self,
        transfers: Transfers,
        workdir: Workdir,
        patterns: Sequence[str],
        plan: Callable[[str], Delivery | None],
        listener: Listener,
        group: TaskGroup,
        before: Before | None = None,
    ) -> None:
        self._transfers = transfers
        self._workdir = workdir
        self._patterns = patterns
        self._plan = plan
        self._listener = listener
        self._group = group
        self._before = before
        self._latest: dict[str, Errand] = {}
        self._contents: dict[Errand, Content] = {}
        """Of all that was begun and may hold something."""
        self._queue: deque[Errand] = deque()
        self._news = anyio.Event()
        self._enough = anyio.Event()
        self._scope = anyio.CancelScope()
        self._ended = anyio.Event()
        self._ended.set()

    def __repr__(self) -> str:
        held = sum(errand.held is not None and errand.held.token is not None for errand in self._contents)
        return f"<EarlyOutputs {held} held, {len(self._contents) - held} on their way>"

    # -- while the payload runs ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Be ready to send what `watch` finds."""
        self._ended = anyio.Event()
        self._group.start_soon(self._send_all)

    async def watch(self) -> None:
        """Have sent what the payload finishes, until cancelled."""
        try:
            with FinishedOutputs(self._workdir, self._patterns) as outputs:
                while True:
                    some = await outputs.next()
                    if self._before is not None:
                        await self._before.sending([finished.name for finished in some])
                    for finished in some:
                        await self._take(finished)
        except OSError as exc:
            log.warning("%s: outputs leave after the payload, for they cannot be watched: %s", self._workdir.path, exc)

    async def _take(self, finished: Finished) -> None:
        """Send it; what was sent of it before is of no use."""
        earlier = self._latest.pop(finished.name, None)
        if earlier is not None:
            earlier.forgo()
            self._abandon_if_held(earlier)
        delivery = self._plan(finished.name)
        if delivery is None or self._enough.is_set() or not await self._transfers.can_hold(delivery.targets[0].url):
            return
        errand = Errand(
            finished.name, Direction.UPLOAD, delivery.targets[:1], FinishedOutput(self._workdir, finished),
            size_bytes=finished.content.size_bytes, lfn=delivery.lfn, step=Step.HOLD, held=Held(),
            parts=None if self._before is None else self._before.parts,
        )  # fmt: skip
        self._latest[finished.name] = errand
        self._contents[errand] = finished.content
        self._put(errand)

    async def _send_all(self) -> None:
        try:
            with self._scope:
                if self._before is not None:
                    await self._before.begin()
                await self._transfers.hold(self, self._arrived, self._listener, self._enough)
        finally:
            self._ended.set()

    async def _arrived(self, errand: Errand, outcome: Outcome) -> None:
        if errand.step is not Step.HOLD:
            return
        if isinstance(outcome, StorageError):
            log.info("%s: leaves after the payload: %s", errand.name, outcome)
            if self._latest.get(errand.name) is errand:
                del self._latest[errand.name]
        if self._latest.get(errand.name) is not errand:
            self._abandon_if_held(errand)

    def _abandon_if_held(self, errand: Errand) -> None:
        if errand.held is not None and errand.held.token is not None:
            self._put(_ending(errand, Step.ABANDON))

    def _put(self, errand: Errand) -> None:
        self._queue.append(errand)
        self._news.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Errand:
        while not self._queue:
            if self._enough.is_set():
                raise StopAsyncIteration
            await self._news.wait()
            self._news = anyio.Event()
        return self._queue.popleft()

    # -- after it -----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Begin nothing more. What is on its way goes on."""
        self._enough.set()
        self._news.set()

    def is_on_its_way(self, name: str) -> bool:
        """Whether a storage has it in hand."""
        errand = self._latest.get(name)
        return errand is not None and errand.moving is not None

    async def landed(self) -> None:
        """Wait for what is on its way."""
        self.close()
        await self._ended.wait()

    async def published(self, errands: Sequence[Errand]) -> list[Errand]:
        """The same, but those of which all is there have only to be published; `key` is then what stood here before."""
        wanted = [(each, sent) for each in errands if (sent := self._latest.get(each.name)) is not None]
        same = await to_thread.run_sync(self._still_the_same, wanted) if wanted else set()
        return [
            _ending(self._latest[each.name], Step.PUBLISH, instead_of=each) if each.name in same else each
            for each in errands
        ]

    def _still_the_same(self, pairs: Iterable[tuple[Errand, Errand]]) -> set[str]:
        """Those that are held where they are wanted, and what was sent is what the file is now."""
        return {
            sent.name
            for wanted, sent in pairs
            if sent.places[0] == wanted.places[0] and self._is_as_sent(sent, self._contents[sent])
        }

    def _is_as_sent(self, errand: Errand, content: Content) -> bool:
        held = errand.held
        if held is None or held.token is None or held.info is None or held.info.size_bytes != content.size_bytes:
            return False
        with suppress(OSError, ValueError, StorageError):
            descriptor = self._workdir.open_output(errand.name)
            try:
                like = likeness(content, Content.of(descriptor))
                if like is Likeness.UNSURE and held.info.checksum is not None:
                    return checksum(descriptor, held.info.checksum.algorithm) == held.info
                return like is Likeness.SAME
            finally:
                os.close(descriptor)
        return False

    async def abandon(self) -> None:
        """Stop, and remove from the storages what has not been published. Bounded, and not interrupted by cancellation."""
        self.close()
        self._scope.cancel()
        with anyio.move_on_after(ABANDON_SECONDS, shield=True):
            await self._ended.wait()
            if left := self._held():
                await self._transfers.abandon([_ending(errand, Step.ABANDON) for errand in left])
        if left := self._held():
            for errand in left:
                log.warning("%s: what was sent of it to %s is left there", errand.name, errand.places[0].url)
            if self._before is not None:
                await self._before.left({errand.places[0].url for errand in left})
        self._contents.clear()
        self._latest.clear()

    def _held(self) -> list[Errand]:
        return [errand for errand in self._contents if errand.held is not None and errand.held.token is not None]


@asynccontextmanager
async def open_early(
    transfers: Transfers,
    workdir: Workdir,
    patterns: Sequence[str],
    plan: Callable[[str], Delivery | None],
    listener: Listener,
    before: Before | None = None,
) -> AsyncIterator[EarlyOutputs]:
    """What leaves early of one job: what matches the patterns, to where `plan` says. At the end, however one leaves, what
    has not been published is abandoned."""
    with single_error():
        async with anyio.create_task_group() as group:
            early = EarlyOutputs(transfers, workdir, patterns, plan, listener, group, before)
            try:
                yield early
            finally:
                await early.abandon()


def _ending(errand: Errand, step: Step, instead_of: Errand | None = None) -> Errand:
    """The last word about what is held. Small, and first: all the bytes are there."""
    return Errand(
        errand.name, Direction.UPLOAD, errand.places, errand.end,
        size_bytes=0, lfn=errand.lfn, rank=-1, step=step, held=errand.held, key=instead_of,
    )  # fmt: skip
