"""Many HTTP requests at once, in one thread, by libcurl.

A transfer may take several requests: sent to a name beside, compared, renamed. Such a course is a *script*: a generator
that yields requests and is sent their replies. The thread runs as many scripts at a time as their lanes allow and tells in
batches which have ended, so that ten thousand small files wake the event loop some hundred times.

One thread, not one per transfer: more threads make small files slower in Python, and libcurl's multi interface has no need
of them. epoll and not `CurlMulti.select`, which sees no descriptor above 1023 and cannot be woken.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from typing import Final, Generic, Protocol, TypeVar

import anyio
import pycurl
from anyio import to_thread

from loadmaster.errors import StorageError, StorageUnavailable
from loadmaster.storage.carrier import NO_REPLY, USUAL_PACE, Carrier, Kind, Pace, Request, Script, Together
from loadmaster.storage.replies import Reply, visible

CLEANUP_SECONDS: Final = 5.0
"""For each request that tidies up at the server after a transfer that was given up."""

LEAVING_SECONDS: Final = 2 * CLEANUP_SECONDS + 1
"""How long a cancelled call waits for that: two requests and a breath."""

TOLD_SECONDS: Final = 0.1
"""A file that has ended is told of after so long, or when all of its call have, or with so many others:"""
TOLD_AT_ONCE: Final = 256

LOOK_SECONDS: Final = 1.0
"""Between two looks at how far everything has come."""

STALLED: Final = "moved next to nothing for a while"

_EVENTS: Final = {
    pycurl.POLL_IN: select.EPOLLIN,
    pycurl.POLL_OUT: select.EPOLLOUT,
    pycurl.POLL_INOUT: select.EPOLLIN | select.EPOLLOUT,
}


class GivenUp(StorageUnavailable):
    """Thrown into a script that nobody waits for any more. It may tidy up, and should end."""


class Item(Protocol):
    """What a script is run for."""

    @property
    def given_up(self) -> bool:
        """Nobody wants it any more."""
        ...

    @property
    def url(self) -> str:
        """For the words of errors."""
        ...


I = TypeVar("I", bound=Item)  # noqa: E741


class _Call(Generic[I]):
    """One call of `CurlThread.run`: what is still to be done of it, and what has been and was not told yet."""

    __slots__ = (
        "_closed", "_lock", "cancelled", "descriptor", "fault", "items", "lane", "left", "oldest", "script", "told",
        "untold",
    )  # fmt: skip

    def __init__(self, items: Sequence[I], lane: str, script: Callable[[I], Script]) -> None:
        self.items, self.lane, self.script = iter(items), lane, script
        self.left = len(items)
        self.cancelled = False
        self.fault: BaseException | None = None
        self.untold: list[I] = []
        self.oldest = 0.0
        self.told: deque[I] = deque()
        self.descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()  # held for an instant: nobody may write to a number that is another file's by now
        self._closed = False

    def tell(self) -> None:
        """Wake whoever waits, with all that has ended. In the thread."""
        self.told.extend(self.untold)
        self.untold.clear()
        with self._lock:
            if not self._closed:
                os.eventfd_write(self.descriptor, 1)

    def take(self) -> list[I]:
        """What has been told since it was asked last. In the event loop."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.descriptor)
        return [self.told.popleft() for _ in range(len(self.told))]

    def close(self) -> None:
        """Nobody listens any more."""
        with self._lock:
            self._closed = True
            os.close(self.descriptor)


class Work:
    """A script under way, and those it waits for."""

    __slots__ = ("call", "carrier", "children", "item", "leaving", "parent", "rest", "steps")

    def __init__(self, call: _Call[Item], item: Item, steps: Script, parent: Work | None = None) -> None:
        self.call, self.item, self.steps, self.parent = call, item, steps, parent
        self.carrier: Carrier[Work] | None = None
        self.leaving = False
        self.rest: Iterator[Script] | None = None
        self.children: list[Work] | None = None


class CurlThread:
    """A thread that carries requests, from when it is first needed until `close`."""

    def __init__(
        self, name: str, lanes: Mapping[str, int], settings: Mapping[int, object], pace: Pace = USUAL_PACE
    ) -> None:
        """`lanes`: how many scripts at once, by the name of their lane. `settings`: options of every easy handle."""
        self._name = name
        self._pace = pace
        self._lanes = dict(lanes)
        self._most = sum(lanes.values())
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._orders: deque[_Call[Item]] = deque()
        self._wake = -1
        self._closing = False
        self._closed = False
        self._look = False

    def __repr__(self) -> str:
        return f"<CurlThread {self._name}{'' if self._thread is None else ', running'}>"

    async def run(
        self, items: Sequence[I], lane: str, script: Callable[[I], Script], ended: Callable[[Sequence[I]], None]
    ) -> None:
        """Run a script for each; `ended` is called in the event loop's thread with those that have ended.

        A script that is cancelled has `GivenUp` thrown into it and may still tidy up, in bounded time. What a
        script raises is raised here. Raises `anyio.ClosedResourceError` after the end.
        """
        if self._closed:
            raise anyio.ClosedResourceError
        if not items:
            return
        call = _Call(items, lane, script)
        try:
            self._order(call)
            left = len(items)
            while left:
                await anyio.wait_readable(call.descriptor)
                told = call.take()
                left -= len(told)
                if told:
                    ended(told)
                if call.fault is not None:
                    raise call.fault
        except BaseException:
            call.cancelled = True
            self.look()
            with anyio.move_on_after(LEAVING_SECONDS, shield=True):
                while call.left:
                    await anyio.wait_readable(call.descriptor)
                    call.take()
            raise
        finally:
            call.close()

    def set_width(self, lane: str, width: int) -> None:
        """From now on, so many scripts of a lane at once; what is under way goes on."""
        self._lanes[lane] = width
        self._rouse()

    def look(self) -> None:
        """Have the thread look for calls that were cancelled and items that were given up. From any thread."""
        self._look = True
        self._rouse()

    async def close(self) -> None:
        """End the thread, also while transfers hang: their scripts are closed where they stand."""
        self._closed = True
        thread = self._thread
        if thread is not None:
            self._closing = True
            self._rouse()
            with anyio.CancelScope(shield=True):  # it does not wait for the network: this is soon
                await to_thread.run_sync(thread.join)
            os.close(self._wake)
            self._thread, self._closing = None, False

    def _order(self, call: _Call[I]) -> None:
        self._orders.append(call)  # type: ignore[arg-type]
        if self._thread is None or not self._thread.is_alive():  # it is not in a child of fork
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            self._thread = threading.Thread(target=_Loop(self).run, name=f"loadmaster {self._name}", daemon=True)
            self._thread.start()
        else:
            self._rouse()

    def _rouse(self) -> None:
        if self._thread is not None:
            os.eventfd_write(self._wake, 1)


class _Loop:
    """What the thread does: libcurl's sockets and timer in one epoll, scripts stepped as their replies come."""

    def __init__(self, owner: CurlThread) -> None:
        self._owner = owner
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._socket)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._timer)
        self._multi.setopt(pycurl.M_MAXCONNECTS, 2 * owner._most)
        self._settings = {**owner._settings, pycurl.SOCKOPTFUNCTION: self._opened}
        self._epoll = select.epoll()
        self._epoll.register(owner._wake, select.EPOLLIN)
        self._wanted: dict[int, int] = {}
        self._registered: dict[int, int] = {}
        self._sockets: set[int] = set()
        self._changed: set[int] = set()
        self._due: float | None = None
        self._look_seconds = min(LOOK_SECONDS, owner._pace.seconds / 4)
        self._looked = 0.0
        self._free: dict[Kind, list[Carrier[Work]]] = {}
        self._carriers: dict[pycurl.Curl, Carrier[Work]] = {}
        self._waiting: dict[str, deque[_Call[Item]]] = {lane: deque() for lane in owner._lanes}
        self._under_way: dict[str, set[Work]] = {lane: set() for lane in owner._lanes}
        self._untold: set[_Call[Item]] = set()
        self._large: set[Carrier[Work]] = set()
        """Those whose answer may be read directly once it begins."""
        self._direct: dict[int, Carrier[Work]] = {}

    def run(self) -> None:
        """Until the owner closes."""
        fault: BaseException = anyio.ClosedResourceError()
        try:
            while not self._owner._closing:
                self._turn()
        except BaseException as exc:  # noqa: BLE001 - a bug; passed on to everybody who waits
            fault = exc
        finally:
            self._leave(fault)

    def _turn(self) -> None:
        """Do what can be done, then wait for the next thing to happen."""
        self._take_orders()
        self._go_on()
        now = time.monotonic()
        self._tell(now)
        due = inf if self._due is None else self._due
        if self._untold:
            due = min(due, now + TOLD_SECONDS)
        if any(self._under_way.values()):
            self._look_for_stalls(now)
            due = min(due, self._looked + self._look_seconds)
        self._register()
        for descriptor, event in self._epoll.poll(-1 if due == inf else max(0.0, due - now)):
            if descriptor == self._owner._wake:
                os.eventfd_read(descriptor)
            elif descriptor in self._direct:
                self._read(self._direct[descriptor])
            else:
                ready = pycurl.CSELECT_OUT if event & select.EPOLLOUT else 0
                if event & ~select.EPOLLOUT:
                    ready |= pycurl.CSELECT_IN
                self._multi.socket_action(descriptor, ready)
        for carrier in [carrier for carrier in self._large if carrier.accepted]:
            self._large.remove(carrier)
            if (direct := carrier.go_direct()) is not None:
                self._direct[direct.descriptor] = carrier
                self._epoll.register(direct.descriptor, select.EPOLLIN)

    def _read(self, carrier: Carrier[Work]) -> None:
        """Take some of a body that libcurl has left to us."""
        assert carrier.direct is not None  # noqa: S101 - it is registered
        try:
            if not carrier.direct.read():
                return
        except (OSError, StorageError) as exc:
            carrier.failure = exc
        self._ended(carrier, 0, "")

    def _go_on(self) -> None:
        """Step the scripts whose requests have ended, start others in their places, let libcurl do what is due.

        Twice at most: while bytes keep coming there is always something due, and others want their turn.
        """
        for _ in range(2):
            self._reap()
            self._start()
            if self._due is None or self._due > time.monotonic():
                return
            self._due = None
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
        self._reap()
        self._start()  # or a lane that came free just now stays empty until something else happens

    def _take_orders(self) -> None:
        while self._owner._orders:
            call = self._owner._orders.popleft()
            self._waiting[call.lane].append(call)
        if self._owner._look:
            self._owner._look = False
            for works in self._under_way.values():
                for work in [w for w in works if not w.leaving and (w.call.cancelled or w.item.given_up)]:
                    work.leaving = True
                    self._break_off(work, GivenUp(visible(work.item.url), "given up"))
            for lane, calls in self._waiting.items():
                for call in [call for call in calls if call.cancelled]:
                    call.left -= sum(1 for _ in call.items)
                    self._untold.add(call)
                self._waiting[lane] = deque(call for call in calls if not call.cancelled)

    def _start(self) -> None:
        """As many as the lanes let, of the calls in turn."""
        for lane, width in self._owner._lanes.items():
            calls, works = self._waiting[lane], self._under_way[lane]
            while calls and len(works) < width:
                call = calls.popleft()
                item = next(call.items, None)
                if item is None:
                    continue
                calls.append(call)
                work = Work(call, item, call.script(item))
                works.add(work)
                self._step(work, None)

    def _reap(self) -> None:
        more = 1
        while more:
            more, good, bad = self._multi.info_read()
            for curl in good:
                self._ended(self._carriers[curl], 0, "")
            for curl, code, text in bad:
                self._ended(self._carriers[curl], code, text)

    def _ended(self, carrier: Carrier[Work], code: int, text: str) -> None:
        work = carrier.work
        if work is None:  # given up since
            return
        outcome: Reply | StorageError | OSError
        try:
            outcome = carrier.outcome(code, text)
        except OSError as exc:
            outcome = exc
        self._unload(carrier)
        self._step(work, outcome)

    def _step(self, work: Work, outcome: Reply | StorageError | OSError | None) -> None:
        """Let the script go on, to its next request or its end."""
        try:
            steps = work.steps
            # None starts a generator.
            request = steps.throw(outcome) if isinstance(outcome, Exception) else steps.send(outcome)  # type: ignore[arg-type]
            if request.__class__ is Request:
                self._carry(request, work)
            else:
                self._fork(request, work)  # type: ignore[arg-type]
        except StopIteration:
            self._finish(work)
        except StorageError as exc:
            if work.parent is None:
                work.call.fault = exc
                self._finish(work)
            else:
                self._break_off(work.parent, exc)
        except Exception as exc:  # noqa: BLE001 - a script ends by returning; this is raised in the caller's task
            work.call.fault = exc
            self._finish(work)

    def _carry(self, request: Request, work: Work) -> None:
        source = request.source
        key = (request.method, request.wants_headers, source.__class__ is bytes, request.sink is not None)
        free = self._free.get(key)
        carrier = free.pop() if free else self._new_carrier(key)
        carrier.load(request)
        self._multi.add_handle(carrier.curl)
        carrier.work, work.carrier = work, carrier
        if request.large:
            self._large.add(carrier)

    def _unload(self, carrier: Carrier[Work]) -> None:
        if carrier.work is not None:
            carrier.work.carrier = None
        if carrier.request.large:
            self._large.discard(carrier)
            self._end_direct(carrier)
        self._multi.remove_handle(carrier.curl)
        carrier.unload()
        self._free[carrier.key].append(carrier)

    def _end_direct(self, carrier: Carrier[Work]) -> None:
        direct, carrier.direct = carrier.direct, None
        if direct is not None:
            del self._direct[direct.descriptor]
            self._epoll.unregister(direct.descriptor)
            direct.close()

    def _new_carrier(self, key: Kind) -> Carrier[Work]:
        carrier: Carrier[Work] = Carrier(key, self._settings)
        self._carriers[carrier.curl] = carrier
        self._free.setdefault(key, [])
        return carrier

    def _fork(self, together: Together, work: Work) -> None:
        """Run scripts for a script."""
        children: list[Work] = []
        work.rest, work.children = iter(together.scripts), children
        while work.children is children and len(children) < together.at_once and self._begin_child(work):
            pass
        if work.children is children and not children:
            work.children = None
            self._step(work, NO_REPLY)

    def _begin_child(self, work: Work) -> bool:
        """Whether there was another one. If it fails at once, there are none any more."""
        steps = next(work.rest, None) if work.rest is not None else None
        if steps is None or work.children is None:
            return False
        child = Work(work.call, work.item, steps, work)
        work.children.append(child)
        self._step(child, None)
        return True

    def _break_off(self, work: Work, error: StorageError) -> None:
        """What is under way for a script ends; it may tidy up, with requests that have little time."""
        children, work.children, work.rest = work.children, None, None
        for child in children or ():
            if child.carrier is not None:
                self._unload(child.carrier)
            child.steps.close()
        if work.carrier is not None:
            self._unload(work.carrier)
        self._step(work, error)

    def _look_for_stalls(self, now: float) -> None:
        """libcurl's own watch sleeps where nothing at all happens on a connection that has been used before."""
        seconds = now - self._looked
        if seconds < self._look_seconds:
            return
        self._looked = now
        self._sockets.clear()  # the number of one that was closed may be another descriptor's by now: ask for all of them
        self._changed.update(self._wanted)
        for carrier in list(self._carriers.values()):
            work = carrier.work
            if work is not None and carrier.stalls(now, seconds, self._owner._pace):
                request = carrier.request
                self._unload(carrier)
                self._step(work, StorageUnavailable(visible(request.about or request.url), STALLED))

    def _finish(self, work: Work) -> None:
        parent = work.parent
        if parent is not None:
            if parent.children is not None:
                parent.children.remove(work)
                if not self._begin_child(parent) and not parent.children:
                    parent.children = None
                    self._step(parent, NO_REPLY)
            return
        call = work.call
        self._under_way[call.lane].discard(work)
        if call not in self._untold:
            call.oldest = time.monotonic()
            self._untold.add(call)
        call.untold.append(work.item)
        call.left -= 1

    def _tell(self, now: float) -> None:
        if not self._untold:
            return
        for call in list(self._untold):
            if call.left <= 0 or len(call.untold) >= TOLD_AT_ONCE or now - call.oldest >= TOLD_SECONDS or call.fault:
                self._untold.discard(call)
                call.tell()

    # libcurl says what it wants to wait for; epoll is told when it is time to wait, since most of it is taken back at once.

    def _socket(self, what: int, descriptor: int, multi: object, data: object) -> None:
        if what == pycurl.POLL_REMOVE:
            self._wanted.pop(descriptor, None)
        else:
            self._wanted[descriptor] = _EVENTS[what]
        self._changed.add(descriptor)

    def _timer(self, milliseconds: int) -> None:
        self._due = None if milliseconds < 0 else time.monotonic() + milliseconds / 1000

    def _opened(self, descriptor: int, purpose: int) -> int:
        self._sockets.add(descriptor)
        self._registered.pop(descriptor, None)  # another that had this number is closed, and epoll forgets those itself
        return int(pycurl.SOCKOPT_OK)

    def _register(self) -> None:
        """Of a connection that carries one file after the other nothing changes, and that is known without asking, for we
        hear of each socket that is opened. Of libcurl's other descriptors (its resolver's) we do not hear."""
        registered = self._registered
        for descriptor in self._changed:
            events, before = self._wanted.get(descriptor), registered.get(descriptor)
            if events is None:
                if before is not None:
                    del registered[descriptor]
                    with suppress(OSError):  # closed since
                        self._epoll.unregister(descriptor)
            elif before is None:
                registered[descriptor] = events
                try:
                    self._epoll.register(descriptor, events)
                except FileExistsError:
                    self._epoll.modify(descriptor, events)
            elif events != before or descriptor not in self._sockets:
                registered[descriptor] = events
                try:
                    self._epoll.modify(descriptor, events)
                except FileNotFoundError:  # closed since, and another of the same number opened
                    self._epoll.register(descriptor, events)
        self._changed.clear()

    def _leave(self, fault: BaseException) -> None:
        """Close everything where it stands. The scripts remove what they have half made here; nothing is sent."""
        calls = {call for waiting in (*self._waiting.values(), self._owner._orders) for call in waiting}
        for works in self._under_way.values():
            for work in works:
                calls.add(work.call)
                for child in work.children or ():
                    child.steps.close()
                work.steps.close()
        for carrier in self._carriers.values():
            self._end_direct(carrier)
            if carrier.work is not None:
                self._multi.remove_handle(carrier.curl)
        self._multi.close()
        for carrier in self._carriers.values():
            carrier.curl.close()
        self._epoll.close()
        for call in calls | self._untold:
            if call.left > 0:
                call.fault = call.fault or fault
            call.left = 0
            call.tell()
